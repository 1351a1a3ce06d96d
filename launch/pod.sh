# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # Its variables are those of the script that sources it.
# What launch/tpu_pod.sh and launch/gpu_slurm.sh share; sourced by them.

dry_run='' # Set by the scripts.
# Where a dry run prints, and where it is spoken, whatever is done with the output of a command.
exec 3>&1 4>&2

say() { echo "$*" >&4; }

fail() { # SENTENCE [CODE]
  say "error: $1"
  exit "${2:-2}"
}

call() { # ANSWER COMMAND...: runs it; a dry run prints it, and takes ANSWER for its output.
  if [ ! "$dry_run" ]; then
    "${@:2}"
    return
  fi
  local line
  line=$(printf '%q ' "${@:2}")
  echo "${line% }" >&3
  [ ! "$1" ] || echo "$1"
}

need() { # NAME...: of variables that must be set.
  local name missing=''
  for name in "$@"; do
    [ -n "${!name:-}" ] || missing="$missing, $name"
  done
  [ ! "$missing" ] || fail "set ${missing#, } in the environment (the head of $0 says what they are)"
}

# Reads [MODULE] FLAG... into `module`, `flags` and `workdir`.
read_command() {
  module=train workdir='' flags=()
  if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    module=$1
    shift
  fi
  case $module in
    train | evaluate) ;;
    *) fail "on many machines there are train and evaluate, no klear_jax.$module" ;;
  esac
  [ $# -gt 0 ] || fail "say what to run, for instance: run --config=configs/gppo_8b.py --workdir=DIR"
  flags=("$@")
  while [ $# -gt 0 ]; do
    case $1 in
      --workdir=*) workdir=${1#*=} ;;
      --workdir) workdir=${2:-} ;;
    esac
    shift
  done
}

# Compiled programs lie beside the workdir: a restart, or the next run, skips compiling.
cache_of() { # WORKDIR
  local workdir=${1%/}
  case ${workdir#gs:/} in
    /*/*) echo "${workdir%/*}/compilation_cache" ;;
    /*) echo "$workdir/compilation_cache" ;; # Beside a bucket, nothing is one's own.
    */*) echo "${workdir%/*}/compilation_cache" ;;
    *) echo compilation_cache ;;
  esac
}

# The codes after which a command would end the same way if it were started again.
final() { # CODE: says what it means.
  case $1 in
    2) echo "bad input, see above" ;;
    3) echo "the run has stopped itself, see above" ;;
    *) return 1 ;;
  esac
}

PREEMPTED=75 # The code of a run that was told to end, and has saved: nobody's failure.

RESTARTS=${RESTARTS:-10} RESTART_HOURS=${RESTART_HOURS:-24}

may_restart() { # FILE: notes a restart there; fails if there were too many of late.
  local now since
  now=$(date +%s)
  since=$((now - RESTART_HOURS * 3600))
  echo "$now" >>"$1"
  [ "$(awk -v since="$since" '$1 >= since' "$1" | wc -l)" -le "$RESTARTS" ]
}
