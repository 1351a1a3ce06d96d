#!/usr/bin/env bash
# SFT of a real pretrained model, SmolLM2-135M-Instruct, on worked-out word problems.
#
#   bash launch/smollm2_sft.sh
#
# Fetches and converts the model as launch/smollm2.sh does, makes the problems and their data
# set, evaluates on other problems of the same templates and on other templates, trains and
# evaluates again; all of it goes to runs/gsm_symbolic. Run again, it resumes what was cut off
# and repeats nothing that is done.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh
source launch/smollm2_model.sh
setup ".[gguf]"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}

runs=runs/gsm_symbolic
smollm2_model
[ -e "$runs/raw" ] || python launch/gsm_symbolic.py "$runs/raw"
python -m klear_jax.prepare_data --config=configs/data/gsm_symbolic.py

evaluate() { # NAME [FLAG]: once, on both sets of problems.
  for problems in seen unseen; do
    [ -e "$runs/evaluation_$1_$problems.json" ] ||
      python -m klear_jax.evaluate --config=configs/sft_smollm2.py \
        --config.evaluation.data="$runs/raw/$problems.jsonl" \
        --output="$runs/evaluation_$1_$problems.json" "${@:2}"
  done
}

evaluate start
python -m klear_jax.train --config=configs/sft_smollm2.py
evaluate sft --model="$runs/run"

echo "
metrics    $runs/run/metrics.jsonl, and tensorboard --logdir $runs
data       $runs/sft/1.0.0/report.md
results    $runs/evaluation_{start,sft}_{seen,unseen}.json"
