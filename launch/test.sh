#!/usr/bin/env bash
# Installs what the tests need into .venv, and runs them on CPU. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh
setup ".[test]"
ruff check --quiet .
ruff format --quiet --check .
mypy --no-error-summary
# A file stays in one process: its tests share compiled programs.
python -m pytest --numprocesses="${TEST_PROCESSES:-2}" --dist=loadfile \
  --no-loadscope-reorder "$@"
