#!/usr/bin/env bash
# What launch/tpu_pod.sh has done on each worker of a pod, over ssh, in $HOME.
#
#   tpu_worker.sh setup                  unpack klear_jax.tgz and install it
#   tpu_worker.sh start ID OWNER KEY CACHE MODULE [FLAG ...]
#   tpu_worker.sh claim OWNER            who sees to the command from now on
#   tpu_worker.sh stop
#   tpu_worker.sh status
#   tpu_worker.sh log FROM TO            bytes of the log, of the first slice alone
#   tpu_worker.sh tail WHERE             the end of the log of that worker
#
# klear_jax/ is the tree and its .venv; klear_jax_runs/ID is a start of the command, with its
# log, its exit code and a lock that is held while it lives. The first five verbs end with a
# line 'klear_jax WHERE ID OWNER KEY STATE BYTES ENDED'. Each may come twice, and do its work
# once: gcloud sends a command again when its connection has broken.
set -euo pipefail

run=klear_jax_runs/current

attribute() {
  curl -sf --max-time 10 -H 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1" || true
}

where() { # SLICE.WORKER, both from 0.
  local slice worker
  slice=$(attribute tpu-env | sed -n "s/^MEGASCALE_SLICE_ID: *'\{0,1\}\([0-9]*\).*/\1/p")
  worker=$(attribute agent-worker-number)
  echo "${slice:-0}.${worker:-$(hostname | sed 's/.*-w-//')}"
}

held() { ! flock --nonblock "$run/lock" true; }

state() { # Of the newest command: none, running, lost, stopped, or its exit code.
  if [ ! -e "$run" ]; then
    echo none
  elif [ ! -e "$run/exit" ] && held; then
    echo running
  else # It may have ended since. Lost: killed from outside, or the machine was started anew.
    cat "$run/exit" 2>/dev/null || echo lost
  fi
}

status() {
  local state id=- owner=- key=- bytes=0 ended=0
  state=$(state)
  if [ "$state" != none ]; then
    id=$(readlink "$run")
    owner=$(cat klear_jax_runs/owner)
    key=$(cat "$run/key")
    bytes=$(($(wc -c <"$run/log")))
    ended=$(stat -c %Y "$run/exit" 2>/dev/null || echo 0)
  fi
  echo "klear_jax $(where) $id $owner $key $state $bytes $ended"
}

alone() { # setup, start and stop wait for each other.
  mkdir -p klear_jax_runs
  exec 8>klear_jax_runs/lock
  flock 8
}

claim() { # OWNER
  echo "$1" >klear_jax_runs/owner.part
  mv klear_jax_runs/owner.part klear_jax_runs/owner
}

refuse_if_running() {
  [ "$(state)" != running ] || { echo "error: a command is running here" >&2 && exit 3; }
}

start() {
  local id=$1 owner=$2 key=$3 dir=klear_jax_runs/$1
  shift 3
  alone
  if [ ! -e "$dir" ]; then
    refuse_if_running
    mkdir "$dir"
    echo "$key" >"$dir/key"
    touch "$dir/log" # Or `status` could look before the command has opened it.
    exec 9>"$dir/lock" # The command inherits it, locked.
    flock 9
    # Of a session of its own: it outlives the connection, and can be stopped as a whole.
    setsid nohup bash klear_jax/launch/tpu_worker.sh train "$id" "$@" \
      </dev/null >"$dir/log" 2>&1 8>&- &
    echo $! >"$dir/pid"
    exec 9>&-
    claim "$owner"
    ln -sfn "$id" "$run"
  fi
  status
}

train() {
  local dir=$PWD/klear_jax_runs/$1 cache=$2 code=0
  shift 2
  trap : TERM # For the command, which saves; this shell, told too, waits for it.
  cd klear_jax
  source launch/flags.sh
  tpu_flags
  export JAX_COMPILATION_CACHE_DIR=$cache PYTHONUNBUFFERED=1
  .venv/bin/python -m "klear_jax.$1" "${@:2}" || code=$?
  note_exit "$dir" "$code"
}

note_exit() { # DIR CODE: whole when it is seen, and never over what was noted before.
  echo "$2" >"$1/exit.$2"
  ln "$1/exit.$2" "$1/exit" 2>/dev/null || true
}

stop() {
  alone
  # Said first, or whoever looks now would find it lost, and start it again.
  [ ! -e "$run" ] || note_exit "$run" stopped
  end_processes
  status
}

end_processes() { # Of the command, or left behind by it.
  if [ -e "$run" ] && held; then
    kill -TERM -- "-$(cat "$run/pid")" || true
    # It saves first: for checkpoint.grace_s.
    flock --timeout 60 "$run/lock" true || kill -KILL -- "-$(cat "$run/pid")" || true
    flock --timeout 30 "$run/lock" true
  fi
}

setup() {
  alone
  refuse_if_running
  end_processes
  find klear_jax -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +
  tar -xzf klear_jax.tgz -C klear_jax
  (cd klear_jax && install_packages) 8>&-
  status
}

install_packages() {
  local tries=0
  # A new machine may be at its own updates for minutes, and hold the lock of apt.
  until command -v bwrap >/dev/null && python3 -m pip --version >/dev/null 2>&1; do
    [ $((tries += 1)) -le 20 ] || { echo "error: apt-get does not install bubblewrap" >&2 && exit 1; }
    { sudo apt-get update -qq && sudo apt-get install -y -qq bubblewrap python3-pip; } >/dev/null ||
      sleep "${APT_SECONDS:-15}"
  done
  # The TPU's runtime starts and ends faster with huge pages. Ubuntu 24.04 lets nobody make the
  # namespaces of the sandbox until it is told to; older ones have no such switch.
  sudo sh -c 'echo always >/sys/kernel/mm/transparent_hugepage/enabled;
    sysctl -q -w kernel.apparmor_restrict_unprivileged_userns=0' 2>/dev/null || true
  [ -e .venv/whole ] || rm -rf .venv # An installation that was cut off is not to be trusted.
  rm -f .venv/whole
  # The Python of the machine may be too old, or lack venv: uv brings one.
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --user --quiet uv
  python3 -m uv python install --quiet 3.11
  PYTHON=$(python3 -m uv python find --system 3.11)
  export PYTHON
  source launch/setup.sh
  setup ".[tpu,gcs]"
  touch .venv/whole
}

log() { # Up to TO, so that nothing is shown twice or left out.
  case $(where) in
    0.*) head -c "$2" "$run/log" | tail -c "+$(($1 + 1))" ;;
  esac
}

main() {
  case $1 in
    setup | start | train | stop | status | log) "$@" ;;
    claim) claim "$2" && status ;;
    tail) [ "$(where)" != "$2" ] || tail -n 40 "$run/log" ;;
  esac
}

main "$@"
exit # Nothing below is read: setup replaces this file.
