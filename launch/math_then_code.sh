#!/usr/bin/env bash
# Both stages of RL in miniature: SFT on sums and programs, math GPPO, then code GPPO from it.
#
#   bash launch/math_then_code.sh [SEED]
#
# Writes to runs/math_then_code_SEED. Run again, it resumes what was cut off and repeats
# nothing that is done.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh
setup .
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}

seed=${1:-0}
runs=runs/math_then_code_$seed
data=runs/data_code
math="--config.model.vocab_size=384 --config.tokenizer=$data/tokenizer --config.evaluation.data=$data/arithmetic/1.0.0"

python -m klear_jax.prepare_data --output=$data --task=chain_sum,programs

evaluate() { # STAGE WORKDIR: on problems of both kinds, once.
  [ -e "$runs/math_$1.json" ] ||
    python -m klear_jax.evaluate --config=configs/sft_tiny.py $math \
      --model="$2" --output="$runs/math_$1.json"
  [ -e "$runs/code_$1.json" ] ||
    python -m klear_jax.evaluate --config=configs/gppo_code_tiny.py \
      --model="$2" --output="$runs/code_$1.json"
}

mkdir -p "$runs"
python -m klear_jax.train --config=configs/sft_code_tiny.py --workdir="$runs/sft" \
  --config.seed="$seed"
evaluate sft "$runs/sft"
python -m klear_jax.train --config=configs/gppo_tiny.py $math \
  --config.data.path=$data/arithmetic/1.0.0 \
  --workdir="$runs/math" --config.init_from="$runs/sft" --config.seed="$seed"
evaluate math "$runs/math"
python -m klear_jax.train --config=configs/gppo_code_tiny.py --workdir="$runs/code" \
  --config.init_from="$runs/math" --config.seed="$seed"
evaluate code "$runs/code"

python -c 'import json, sys
for stage in ("sft", "math", "code"):
    for kind in ("math", "code"):
        accuracy = json.load(open(f"{sys.argv[1]}/{kind}_{stage}.json"))["accuracy"]
        print(f"after {stage:4}  {kind}  {accuracy:.1%}")' "$runs"
