# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # Its variables are those of the script that sources it.
# All that is said to gcloud: of the pod, a queued resource of Cloud TPU (on demand, spot or
# reserved, of one slice or several), and to its workers. Sourced by launch/tpu_pod.sh, which
# sets `name`, `tmp`, the settings, and which start of which command it is (id, owner, key).

state='' workers=1   # As `look` found it: ready, waiting, broken, deleting, absent, unknown; hosts.
planned=ACTIVE,,     # What a dry run takes for the answer of the service.
suspect=''           # Whether a pod that calls itself ready has to be made anew all the same.
ours=''              # Whether it is there, or in the queue, unless somebody else deletes it.

on_tpu() { # ANSWER GROUP VERB...: gcloud, which must not hang for ever.
  local limit=(timeout --foreground 3600)
  [ ! "$dry_run" ] || limit=()
  call "$1" ${limit[@]+"${limit[@]}"} gcloud compute tpus "${@:2}" --project="$PROJECT" --zone="$ZONE" --quiet </dev/null
}

look() {
  local answer whole accelerator message node hosts slices=0
  state=unknown
  if ! answer=$(on_tpu "$planned" queued-resources describe "$name" --format='csv[no-heading](state.state,tpu.nodeSpec[0].node.acceleratorType.basename(),state.failedData.error.message)' 2>"$tmp/errors"); then
    if grep -q NOT_FOUND "$tmp/errors"; then state=absent; else cat "$tmp/errors" >&2; fi
    return
  fi
  IFS=, read -r whole accelerator message <<<"$answer"
  [ "${accelerator:-${ACCELERATOR:-}}" = "${ACCELERATOR:-$accelerator}" ] ||
    fail "$name is there as $accelerator, not $ACCELERATOR: delete it, or take another name"
  case $whole in
    ACTIVE) ;;
    ABSENT) state=absent && return ;; # In a dry run.
    SUSPENDED | SUSPENDING | FAILED)
      state=broken
      say "$name is $whole ${message:-}"
      return
      ;;
    DELETING) state=deleting && return ;;
    *) state=waiting && return ;;
  esac
  # A slice may be down while the whole calls itself active.
  answer=$(on_tpu READY,1 tpu-vm list --filter="queuedResource~/$name\$" --format='csv[no-heading](state,networkEndpoints.len())' 2>"$tmp/errors") || return 0
  state=ready workers=0
  while IFS=, read -r node hosts; do
    slices=$((slices + 1))
    case $node in
      READY) workers=$((workers + hosts)) ;;
      PREEMPTED | TERMINATED | STOPP* | DELETING | HIDDEN | UNKNOWN)
        state=broken
        say "$name has a slice that is $node"
        ;;
      *) [ $state = broken ] || state=waiting ;; # Under repair, or started anew.
    esac
  done <<<"$answer"
  if [ "$SLICES" ] && [ ! "$dry_run" ]; then
    [ $slices -le "$SLICES" ] || fail "$name has $slices slices, not $SLICES"
    [ $state = broken ] || [ $slices = "$SLICES" ] || state=waiting
  fi
}

create() { # Returns when the pod is ready; in the queue that may take days.
  local before now='' tries=0 words
  read -ra words <<<"${SPOT:+--spot} ${RESERVED:+--reserved} ${CREATE_FLAGS:-}"
  if [ "$SLICES" = 1 ]; then
    words=(--node-id="$name" ${words[@]+"${words[@]}"})
  else
    words=(--node-count="$SLICES" --node-prefix="$name" ${words[@]+"${words[@]}"})
  fi
  while true; do
    look
    if [ $state = ready ] && [ "$suspect" ]; then state=broken; fi
    before=$now now=$state
    [ $now = "$before" ] || say "$name is $now"
    case $now in
      ready) ours=1 && return ;;
      waiting) ours=1 ;;
      unknown) [ "$before$ours" ] || fail "$name cannot be asked for, see above" 1 ;;
      absent)
        [ ! "$ours" ] || fail "$name was deleted" 1
        [ $((tries += 1)) -le 5 ] || fail "$name cannot be made, see above" 1
        # It may fail for a while: the old pod is not quite gone. It may also turn out later.
        if on_tpu '' queued-resources create "$name" --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" "${words[@]}" >&2; then
          planned=ACTIVE,,
          continue
        fi
        ;;
      broken)
        if delete; then
          suspect='' ours=''
          continue
        fi
        [ $((tries += 1)) -le 5 ] || fail "$name cannot be deleted, see above" 1
        ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

delete() { on_tpu '' queued-resources delete "$name" --force >&2; }

runtime() { # The software of the machines that goes with an accelerator.
  case $ACCELERATOR in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v4-*) echo tpu-ubuntu2204-base ;;
    *) fail "set RUNTIME: a default is known for v4-, v5litepod-, v5p- and v6e-, not for $ACCELERATOR" ;;
  esac
}

on_workers() { # ANSWER WHICH COMMAND
  # gcloud tries a machine that does not answer ten times.
  local words alive=(--ssh-flag=-oConnectTimeout=10 --ssh-flag=-oServerAliveInterval=30)
  read -ra words <<<"${SSH_FLAGS:-}"
  on_tpu "$1" queued-resources ssh "$name" --worker="$2" --node=all --command="$3" "${alive[@]}" ${words[@]+"${words[@]}"}
}

worker_command() { # VERB [ARG...]: of tpu_worker.sh
  local line
  line=$(printf '%q ' bash klear_jax/launch/tpu_worker.sh "$@")
  echo "${line% }"
}

# Does a verb on all workers, and fails unless each says so: gcloud calls it a success when it
# has left out a slice.
ask() { # VERB [ARG...]
  local command script=klear_jax/launch/tpu_worker.sh
  command=$(worker_command "$@")
  case $1 in
    setup) command="mkdir -p klear_jax && tar -xzf klear_jax.tgz -C klear_jax launch/tpu_worker.sh && $command" ;;
    status | stop) command="if [ -e $script ]; then $command; else echo klear_jax \$(hostname) - - - none 0 0; fi" ;;
  esac
  on_workers "klear_jax 0.0 $id $owner $key $planned_command 1 1" all "$command" >"$tmp/out" 2>"$tmp/errors" || true
  sed -n 's/^klear_jax //p' "$tmp/out" | sort -u -k1,1 >"$tmp/workers"
  [ "$(wc -l <"$tmp/workers")" -ge "$workers" ]
}

read_workers() { # What they said last: counts, and the worker that failed first, with its code.
  local where its_id its_owner its_key its_state its_bytes its_end end=0
  running=0 finished=0 other='' taken='' bytes=0 failed='' running_id=''
  while read -r where its_id its_owner its_key its_state its_bytes its_end; do
    [ "$its_owner" = "$owner" ] || [ "$its_owner" = - ] || taken=1
    [[ $its_bytes$its_end =~ ^[0-9]+$ ]] || continue # Arithmetic would run what is no number.
    [ "$where" != 0.0 ] || bytes=$its_bytes
    if [ "$its_state" = running ]; then
      running=$((running + 1)) running_id=$its_id
      [ "$its_key" = "$key" ] || other=1
    fi
    [ "$its_id" = "$id" ] || its_state=lost # The machine is a new one.
    case $its_state in
      running) ;;
      0) finished=$((finished + 1)) ;;
      # The others end because of the first. Bad input is said by one, and goes before all.
      *) if [ ! "$failed" ] || [ "$its_state" = 2 ] || { [ "$code" != 2 ] && [ "$its_end" -lt "$end" ]; }; then
        failed=$where code=$its_state end=$its_end
      fi ;;
    esac
  done <"$tmp/workers"
}
