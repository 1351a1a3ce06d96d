#!/usr/bin/env bash
# The whole way on a laptop, in minutes: data, SFT, GPPO, evaluation, report, export.
#
#   bash launch/local.sh [SEED]
#
# Installs into .venv what is missing, writes to runs/local_SEED, prints a table. Run again,
# it resumes what was cut off and repeats nothing that is done.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh
setup .
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}

seed=${1:-0}
case $seed in *[!0-9]*)
  echo "usage: bash launch/local.sh [SEED], a number" >&2
  exit 2
  ;;
esac
runs=runs/local_$seed
data=runs/data

python -m klear_jax.prepare_data --output=$data

evaluate() { # NAME CONFIG [FLAG]: once, to NAME/evaluation.json, which an export tells of.
  [ -e "$runs/$1/evaluation.json" ] ||
    python -m klear_jax.evaluate --config="$2" --output="$runs/$1/evaluation.json" "${@:3}"
}

evaluate start configs/sft_tiny.py --config.seed="$seed"
python -m klear_jax.train --config=configs/sft_tiny.py --workdir="$runs/sft" --config.seed="$seed"
evaluate sft configs/sft_tiny.py --model="$runs/sft"
python -m klear_jax.train --config=configs/gppo_tiny.py --workdir="$runs/gppo" \
  --config.seed="$seed" --config.init_from="$runs/sft"
evaluate gppo configs/gppo_tiny.py --model="$runs/gppo"
[ -e "$runs/gppo/report.html" ] || python -m klear_jax.report --workdir="$runs/gppo"
[ -e "$runs/export/config.json" ] ||
  python -m klear_jax.export --workdir="$runs/gppo" --output="$runs/export"

python launch/local_table.py "$runs"
echo "
metrics    $runs/gppo/metrics.jsonl, and tensorboard --logdir $runs
samples    $runs/gppo/rollouts/
report     $runs/gppo/report.html
model      $runs/export (Hugging Face folder)"
