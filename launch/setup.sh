# shellcheck shell=bash
# Makes .venv with the packages that the caller needs; sourced by the other scripts.
# Costs nothing when the requirements have not changed since.
#
#   setup .       or       setup ".[test]"

PYTHON=${PYTHON:-}

find_python() {
  local candidate
  for candidate in "$PYTHON" python3.11 python3.12 python3.13 python3; do
    if [ -n "$candidate" ] && "$candidate" -c \
      'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: Python 3.11 or later is needed (on Debian 12: apt-get install python3 python3-venv)" >&2
  exit 1
}

make_venv() {
  local python=$1
  if "$python" -m venv .venv 2>/dev/null; then return; fi
  rm -rf .venv
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null
    "$python" -m venv .venv
  else
    echo "error: $python has no venv module; install it: apt-get install python3-venv" >&2
    exit 1
  fi
}

# Programs of the model run in it. Without it, math works, and code has weaker walls or is
# refused, as klear_jax/rewards/sandbox.py says.
find_bubblewrap() {
  if command -v bwrap >/dev/null || [ "$(uname)" != Linux ]; then return; fi
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null &&
    apt-get update -qq && apt-get install -y -qq bubblewrap >/dev/null; then return; fi
  echo "note: for code rewards, install bubblewrap: sudo apt-get install bubblewrap" >&2
}

setup() {
  local what=$1 stamp
  find_bubblewrap
  stamp=.venv/installed-$(cat requirements.txt pyproject.toml | sha256sum | cut -c1-16)-${what//[^a-z]/}
  if [ ! -e "$stamp" ]; then
    [ -x .venv/bin/python ] || make_venv "$(find_python)"
    echo "installs $what into .venv" >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable "$what"
    touch "$stamp"
  fi
  export PATH=$PWD/.venv/bin:$PATH
}

# glibc gives large blocks back to the kernel and faults them in again at every step;
# keeping them halves the time of a training step on CPU.
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1
