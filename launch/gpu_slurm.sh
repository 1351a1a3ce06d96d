#!/usr/bin/env bash
# Runs a command of klear_jax on the GPUs of a Slurm cluster, a process each, to its end.
#
#   export NODES=8 SBATCH_PARTITION=gpu SBATCH_ACCOUNT=me SBATCH_TIMELIMIT=24:00:00
#   launch/gpu_slurm.sh NAME run --config=configs/gppo_8b.py --workdir=/shared/gppo_8b
#
# Installs this tree into .venv, and submits a job that runs the command in it: both must lie on
# storage that all nodes share, and the tree must stay as it is while the job waits or runs.
# After a preemption, a dead node, a failure or the end of its time, the job goes back into the
# queue and starts the same command, which resumes from its newest checkpoint; before the end of
# its time it is told to save. After 2, bad input, and 3, a run that has stopped itself, it
# does not.
#
#   launch/gpu_slurm.sh [--dry_run] NAME VERB
#
#   run [MODULE] FLAG...  MODULE is train or evaluate
#   logs                  follows what the job and the first process say
#   status, stop
#
# Everything said is below runs/slurm/NAME: job.log of the job, task_INDEX.log of a process.
# Jobs of one NAME run one after the other. --dry_run prints the commands and runs none.
#
# Settings, from the environment, beside those of sbatch (SBATCH_...):
#   NODES                          must be set
#   GPUS=8                         of a node
#   CPUS=8                         for a GPU; code rewards want more
#   RESTARTS=10 RESTART_HOURS=24   no more than so many in so many hours, then the job fails; a
#                                  run that was told to end, and saved, is not counted
#   SAVE_SECONDS=200               for saving, before the end of the time; of a preemption as many
#                                  as Slurm gives (GraceTime)
#   SBATCH_FLAGS, SRUN_FLAGS       more flags
set -euo pipefail
# In the job, $0 is Slurm's copy of this file, and the tree is where it was submitted.
case ${2:-} in
  _job | _task) ;;
  *) cd "$(dirname "$0")/.." ;;
esac
source launch/pod.sh

run() {
  local words job extras=cuda
  need NODES
  read_command "$@"
  [ "${workdir#gs://}" = "$workdir" ] || extras=cuda,gcs
  [ "$dry_run" ] || mkdir -p "$logs"
  job=(--job-name="$name" --nodes="$NODES" --ntasks-per-node="$GPUS" --gpus-per-node="$GPUS"
    --cpus-per-task="$CPUS" --mem=0 --chdir="$PWD" --output="$logs/job.log" --open-mode=append
    --requeue "--signal=B:USR1@$((SAVE_SECONDS + 100))" --dependency=singleton)
  read -ra words <<<"${SBATCH_FLAGS:-}"
  # Two who install into one .venv wait for each other.
  call '' flock runs/slurm/lock bash -c "source launch/setup.sh && setup '.[$extras]'" || fail "the installation failed" 1
  call '' sbatch "${job[@]}" ${words[@]+"${words[@]}"} launch/gpu_slurm.sh "$name" _job "$@"
  [ ! "$dry_run" ] || SLURM_JOB_ID=ID _job "$@"
}

_job() { # Once for the whole job, on its first node.
  local words code=0 step told late='' task last=$logs/last_$SLURM_JOB_ID restarts=$logs/restarts_$SLURM_JOB_ID
  local saved=$logs/saved_$SLURM_JOB_ID
  if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ ! -e "$saved" ]; then
    may_restart "$restarts" || fail "given up after $RESTARTS restarts in $RESTART_HOURS hours" 1
  fi
  rm -f "$last" "$saved"
  trap 'told=1; say "the time is almost over: saving"; tell_all' USR1
  read -ra words <<<"${SRUN_FLAGS:-}"
  # JAX takes the GPU that has the process's number on the node, so each must see all of the
  # node's; --gpus-per-task would show it one, and keep NCCL from reaching the others directly.
  # In the background, because bash heeds no signal while it waits for a command.
  call '' srun --kill-on-bad-exit=1 --gpu-bind=none --cpus-per-task="$CPUS" \
    --output="$logs/task_%t.log" --open-mode=append ${words[@]+"${words[@]}"} \
    bash launch/gpu_slurm.sh "$name" _task "$@" &
  step=$!
  while true; do
    told='' code=0
    wait $step || code=$?
    [ "$told" ] || break # A signal ends the waiting, not the step.
  done
  [ ! "$late" ] || kill "$late" 2>/dev/null || true
  if [ -e "$last" ]; then
    read -r task code <"$last"
    tail -n 5 "$logs/task_$task.log" >&2
    fail "$(final "$code")" "$code"
  fi
  [ "$code" = 0 ] && return
  say "srun ended with $code"
  sleep "${REQUEUE_SECONDS:-10}" # If it is Slurm that ends the job, it ends this script too.
  requeue
  exit "$code"
}

tell_all() { # To save. A step that does not end is not waited for until the time is over.
  scancel --signal=TERM "$SLURM_JOB_ID" || true
  (sleep "$((SAVE_SECONDS + 20))" 3>&- 4>&- >/dev/null 2>&1 && requeue) &
  late=$!
}

requeue() { # Unless the job is preempted, which Slurm sees to, or cancelled, which is meant.
  [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ] || return 0
  scontrol requeue "$SLURM_JOB_ID" || say "error: the job cannot be requeued: submit it again"
}

_task() { # Once for each GPU.
  local code=0 child told
  source launch/flags.sh
  gpu_flags
  read_command "$@"
  [ ! "$workdir" ] || JAX_COMPILATION_CACHE_DIR=$(cache_of "$workdir")
  export JAX_COMPILATION_CACHE_DIR PYTHONUNBUFFERED=1
  case "$module ${flags[*]}" in
    evaluate\ * | *checkpoint.grace_s*) ;;
    *) flags+=("--config.checkpoint.grace_s=$SAVE_SECONDS") ;;
  esac
  # Slurm may tell this shell alone to end, which is not to end before the command has saved.
  trap 'told=1; kill -TERM "$child" 2>/dev/null || true' TERM
  .venv/bin/python -m "klear_jax.$module" "${flags[@]}" &
  child=$!
  while true; do
    told='' code=0
    wait $child || code=$?
    [ "$told" ] || break
  done
  [ $code != "$PREEMPTED" ] || touch "$logs/saved_$SLURM_JOB_ID"
  # Of the codes of all, srun ends with the highest: that of those it has killed.
  ! final $code >/dev/null || echo "$SLURM_PROCID $code" >"$logs/last_$SLURM_JOB_ID"
  exit $code
}

while [ $# -gt 0 ]; do
  case $1 in
    --dry_run) dry_run=1 ;;
    -*) fail "unknown flag $1 (the head of launch/gpu_slurm.sh is its manual)" ;;
    *) break ;;
  esac
  shift
done
[ $# -ge 2 ] || fail "usage: $0 [--dry_run] NAME run|logs|status|stop"
name=$1 verb=$2
[[ $name =~ ^[A-Za-z0-9][A-Za-z0-9_.-]*$ ]] || fail "NAME is of letters, digits, _, . and -, not '$name'"
GPUS=${GPUS:-8} CPUS=${CPUS:-8} SAVE_SECONDS=${SAVE_SECONDS:-200} logs=runs/slurm/$name
case $verb in
  run | _job | _task) "$verb" "${@:3}" ;;
  logs) call '' tail -n 100 -F "$logs/job.log" "$logs/task_0.log" ;;
  status) call '' squeue --me --name="$name" ;;
  stop) call '' scancel --me --name="$name" ;;
  *) fail "unknown verb $verb (the head of $0 is its manual)" ;;
esac
