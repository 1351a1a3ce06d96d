#!/usr/bin/env bash
# Runs a command of klear_jax on all workers of a Cloud TPU slice, or of several, to its end.
#
#   export PROJECT=my-project ZONE=us-east5-a ACCELERATOR=v5p-128
#   launch/tpu_pod.sh NAME run --config=configs/gppo_8b.py --workdir=gs://BUCKET/gppo_8b
#
# Makes the pod NAME if it is not there, copies this tree, with what is not committed, installs
# it on all workers, starts the command, shows the log of the first worker and waits. When the
# pod is preempted or a worker dies, makes the pod anew where that is needed, and starts the
# same command, which resumes from its newest checkpoint. The exit code is the command's; after
# 2, bad input, and 3, a run that has stopped itself, it is not started again.
#
# The command goes on without this script, but restarts need it: keep it in tmux, best on a
# small machine in the cloud. Given again, it takes over the command that is under way. The pod
# stays, and costs, until `delete`. Nothing on its disks is kept.
#
#   launch/tpu_pod.sh [--dry_run] NAME VERB
#
#   run [MODULE] FLAG...  all of the above; MODULE is train or evaluate
#   create                the pod alone; one that is broken is made anew
#   setup                 copies the tree and installs it
#   logs                  follows the command; restarts stay with the script that runs it
#   status, stop, delete  stop ends the command and keeps the pod
#
# --dry_run prints the commands for a new pod on which all goes well, and runs none.
#
# Settings, from the environment, or as flags before NAME: --project=..., --spot
#   PROJECT, ZONE, ACCELERATOR     must be set; ACCELERATOR for run and create
#   RUNTIME                        software of the machines; by default their generation's
#   SLICES=1                       how many slices of that kind
#   SPOT=1, RESERVED=1             instead of on demand
#   RESTARTS=10 RESTART_HOURS=24   no more than so many in so many hours, then it gives up; a
#                                  run that was told to end, and saved, is not counted, but for
#                                  one whose pod is gone before it can be asked
#   POLL_SECONDS=30                between looks at the workers
#   PATIENCE_SECONDS=900           with workers that do not answer, or cannot be installed, though
#                                  the pod seems healthy; then it is made anew
#   CREATE_FLAGS, SSH_FLAGS        more flags for gcloud, such as --network=... or --internal-ip
#
# Needs Linux, gcloud, logged in, and its key in the agent: ssh-add ~/.ssh/google_compute_engine
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/pod.sh
source launch/tpu_gcloud.sh

owner=$(uname -n)-$$  # Who sees to the command.
key=- id=- seen=0     # Which command; which start of it; bytes of its log that were shown.
starts=0 half=''      # How many starts; since when installations have failed.
planned_command=0     # What a dry run takes for the state of the command.

setup() {
  local list words
  if [ ! -e "$tmp/klear_jax.tgz" ]; then # Once: what is started again is the same code.
    # shellcheck disable=SC2016 # The inner shell expands it.
    list='git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d "" file; do [ ! -e "$file" ] || printf "%s\0" "$file"; done'
    call '' bash -c "set -o pipefail; $list | tar -czf '$tmp/klear_jax.tgz' --null -T -" || fail "this tree could not be packed"
    [ "$dry_run" ] || [ "$(wc -c <"$tmp/klear_jax.tgz")" -lt 100000000 ] ||
      fail "this tree has more than 100 MB: let .gitignore name what does not belong to it"
  fi
  say "installing on $workers workers"
  read -ra words <<<"${SSH_FLAGS:-}"
  on_tpu '' queued-resources scp "$tmp/klear_jax.tgz" "$name:klear_jax.tgz" --worker=all --node=all ${words[@]+"${words[@]}"} >&2 2>"$tmp/errors" &&
    ask setup && return
  tail -n 20 "$tmp/errors" >&2
  return 1
}

let_pass() { # POLLS
  local i
  for ((i = 0; i < $1; i++)); do sleep "$POLL_SECONDS"; done
}

too_long() { [ $((SECONDS - $1)) -ge "$PATIENCE_SECONDS" ]; } # SINCE

follow() { # Until the command has ended: sets `outcome`, `why` and `code`.
  local silent='' uneven=''
  outcome=failed why='' code=1
  while true; do
    sleep "$POLL_SECONDS"
    if ! ask status; then
      look
      case $state in
        unknown) say "the service does not answer; the command goes on" ;;
        ready)
          # When none does, it is more likely our way to them that is broken: not theirs to pay.
          [ -s "$tmp/workers" ] || { say "no worker answers (is the key in the agent?); the command goes on" && continue; }
          too_long "${silent:=$SECONDS}" && suspect=1 why="not all workers answer" && return
          ;;
        *) why="the pod is $state" && return ;;
      esac
      continue
    fi
    silent=''
    read_workers
    [ ! "$taken" ] || { outcome=taken why="another script sees to the command now" && return; }
    if [ "$bytes" -gt "$seen" ] && on_workers '' 0 "$(worker_command log "$seen" "$bytes")" 2>"$tmp/errors"; then
      seen=$bytes
    fi
    if [ "$failed" ]; then
      why="worker $failed: $code"
      case $code in
        stopped) outcome=stopped code=1 ;;
        lost) code=1 ;;
        *) # Its last words, if they were not the last shown.
          [ "$failed $seen" = "0.0 $bytes" ] || on_workers '' all "$(worker_command tail "$failed")" >&2 2>"$tmp/errors" || true
          ;;
      esac
      return
    fi
    [ "$running" != 0 ] || { outcome=finished && return; }
    if [ "$finished" != 0 ] && too_long "${uneven:=$SECONDS}"; then
      why="some workers do not end" && return
    fi
  done
}

begin() { # Starts the command, or takes over the one that is under way.
  local all=1
  planned_command=none ask status || all=''
  read_workers
  [ ! "$other" ] || fail "$name runs another command: end it with stop, or take another name"
  why="not all workers answer"
  if [ "$running" != 0 ] && [ "$running" = "$(wc -l <"$tmp/workers")" ]; then
    [ "$all" ] || return # Those that run are not to suffer for it.
    say "the command is under way: following it"
    id=$running_id seen=$((bytes > 20000 ? bytes - 20000 : 0)) # From near the log's end.
    ask claim "$owner"
    return
  fi
  [ "$running" = 0 ] || ask stop || return
  why="the installation failed"
  if ! setup; then
    # For long, and not everywhere: a machine is broken.
    ! too_long "${half:=$SECONDS}" || [ ! -s "$tmp/workers" ] || suspect=1
    return 1
  fi
  half=''
  why="the start failed" seen=0 id=$(date +%Y%m%d-%H%M%S)-$$-$((starts += 1))
  ask start "$id" "$owner" "$key" "$cache" "$module" "${flags[@]}" || { tail -n 20 "$tmp/errors" >&2 && return 1; }
}

run() {
  local meaning failures=0
  trap 'say "the command goes on: the same line takes it up again, stop ends it"; exit 130' INT TERM
  while true; do
    create
    if begin; then
      failures=0
      follow
    else
      failures=$((failures + 1)) outcome=failed code=1
    fi
    case $outcome in
      finished) say "done; the pod costs until: $0 $name delete" && return ;;
      stopped | taken) fail "$why" 1 ;;
    esac
    ! meaning=$(final "$code") || fail "$meaning" "$code"
    [ "$code" = "$PREEMPTED" ] || may_restart "$tmp/restarts" || fail "$why; given up after $RESTARTS restarts in $RESTART_HOURS hours" "$code"
    say "$why: starting again"
    [ $failures = 0 ] || let_pass $((2 ** (failures < 5 ? failures : 5)))
  done
}

logs() {
  ask status || fail "not all workers answer" 1
  read -r _ id owner key _ seen _ < <(grep '^0\.0 ' "$tmp/workers") || fail "nothing was started on $name"
  seen=$((seen > 20000 ? seen - 20000 : 0))
  follow
  [ $outcome = finished ] || fail "$why" "$code"
}

while [ $# -gt 0 ]; do
  case $1 in
    --dry_run) dry_run=1 ;;
    --spot) SPOT=1 ;;
    --reserved) RESERVED=1 ;;
    --project=*) PROJECT=${1#*=} ;;
    --zone=*) ZONE=${1#*=} ;;
    --accelerator=*) ACCELERATOR=${1#*=} ;;
    --runtime=*) RUNTIME=${1#*=} ;;
    --slices=*) SLICES=${1#*=} ;;
    -*) fail "unknown flag $1 (the head of $0 is its manual)" ;;
    *) break ;;
  esac
  shift
done
[ $# -ge 2 ] || fail "usage: $0 [--dry_run] NAME run|create|setup|logs|status|stop|delete"
name=$1 verb=$2
[[ $name =~ ^[a-z][a-z0-9-]*$ ]] || fail "NAME is of a-z, 0-9 and -, not '$name'"
POLL_SECONDS=${POLL_SECONDS:-30} PATIENCE_SECONDS=${PATIENCE_SECONDS:-900}
SLICES=${SLICES:-1}
[[ $SLICES =~ ^[1-9][0-9]*$ ]] || fail "SLICES must be a number, not '$SLICES'"
case $verb in
  run | create)
    need PROJECT ZONE ACCELERATOR
    RUNTIME=${RUNTIME:-$(runtime)}
    planned=ABSENT,,
    ;;
  setup | logs | status | stop | delete)
    need PROJECT ZONE
    SLICES='' ACCELERATOR='' # As it is.
    ;;
  *) fail "unknown verb $verb (the head of $0 is its manual)" ;;
esac
if [ "$verb" = run ]; then
  read_command "${@:3}"
  case $module-$workdir in
    train-gs://* | train-/*) ;;
    train-*) fail "name where all workers can write: --workdir=gs://BUCKET/DIR" ;;
  esac
  key=$(printf '%q ' "$module" "${flags[@]}" | cksum | cut -d' ' -f1)
  cache=$(cache_of "$workdir")
fi
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

case $verb in
  run | create | delete) $verb && exit ;;
esac
look
[ "$verb" != status ] || echo "$name is $state"
[ $state = ready ] || { [ "$verb" = status ] && exit; } || fail "$name is $state" 1
case $verb in
  setup) setup || fail "the installation failed" 1 ;;
  logs) logs ;;
  status | stop)
    ask "$verb" || say "not all workers answer"
    cat "$tmp/workers"
    ;;
esac
