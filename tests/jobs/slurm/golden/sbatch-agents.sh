#!/bin/bash

# Parameters
#SBATCH --array=0-2%3
#SBATCH --chdir=/
#SBATCH --cpus-per-task=12
#SBATCH --error=/dev/null
#SBATCH --export=ALL
#SBATCH --gpus-per-node=8
#SBATCH --job-name=demo.0123abcd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/dev/null
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=USR2@90
#SBATCH --time=1434

# setup
unset FLIP_ATTEMPT FLIP_AGENTS  # a successor may have inherited those of its predecessor
sweep=/runs/demo root=
id=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
trap '' TERM USR1 USR2  # the start is not interrupted
umask go-w  # also for what the ranks create
retry() { for _ in 1 2 3 4 5; do "$@" && return; sleep 30; done; return 1; }
stop_watcher() { [ -z "$watcher" ] || kill -9 "$watcher" 2>/dev/null; }
sweep_deleted() {  # and not only out of reach: the folder above is the one of the submission, and may be searched
  above=${sweep%/*}
  [ -n "$root" ] && [ "$(stat -Lc %i "$above")" = "$root" ] && [ -x "$above" ] && ! [ -e "$sweep" ]
}
# Below: how a job restarts whose node lacks the mount or the interpreter. Elsewhere jobs/host/ does it, by functions of
# the same names; tests/slurm/test_requeue.py compares both.
field() { grep -Eo "\b$1=[^ ]*" <<< "$shown" | head -n 1 | cut -d= -f2-; }  # of `scontrol show job`
restarted() { count=$(field Restarts); [ "${count:-0}" -gt "$restarts" ]; }  # by Slurm
cancelled() {  # by a person, as own_job.state_of decides: a job at its limit, preempted or without its node is not
  ! restarted || return
  case $(field JobState) in
    CANCELLED) ;;
    COMPLETING) [ "$(field Reason)" = None ] && ! limit_passed && ! preempted_at_end;;
    *) false;;
  esac
}
ending() { [ "$(field JobState)" = COMPLETING ] && ! restarted; }  # Slurm refuses changes until it is requeued
limit_passed() { ran=$(seconds "$(field RunTime)") && limit=$(seconds "$(field TimeLimit)") && [ "$ran" -ge "$limit" ]; }
seconds() {  # of [days-]hours:minutes:seconds
  [[ $1 =~ ^(([0-9]+)-)?([0-9]+):([0-9]+):([0-9]+)$ ]] || return
  echo $(((10#0${BASH_REMATCH[2]} * 24 + 10#${BASH_REMATCH[3]}) * 3600 + 10#${BASH_REMATCH[4]} * 60 + 10#${BASH_REMATCH[5]}))
}
preempted_at_end() {
  preempted=$(moment "$(field PreemptTime)") && ended=$(moment "$(field EndTime)") || return
  gap=$((ended - preempted))
  [ "${gap#-}" -le 3 ]
}
moment() { [[ $1 = *T*:* ]] && date -d "$1" +%s; }
read_failed_starts() {  # in a row, the attempt whose end could not be written, the last one's node: failed_starts.py
  starts=0 attempt=0 previous=''
  [[ $(field Comment) =~ ^away:([0-9]+):(-1|[0-9]+):([0-9]+)(:[0-9]+:([^:]*))?$ ]] || return
  [ "${BASH_REMATCH[2]}" -ne $((restarts - 1)) ] || starts=${BASH_REMATCH[1]}
  attempt=${BASH_REMATCH[3]} previous=${BASH_REMATCH[5]}
}
exclude_failed_node() {  # this node, in place of the one of the failed start before: an outage must not exclude all
  listed=$(field ExcNodeList)
  listed=${listed#"(null)"} others=''
  [ -z "$listed" ] || others=$(retry scontrol show hostnames "$listed") || return
  excluded=$({ grep -Fxv "$previous" <<< "$others"; echo "$SLURMD_NODENAME"; } | grep . | paste -sd,)
}
affordable() {  # whether enough other nodes of the partition work; else the job would never start (BadConstraints)
  nodes=$(retry sinfo -h -N -p "$SLURM_JOB_PARTITION" -o '%N|%T') || return
  avoided=$(retry scontrol show hostnames "$1") || return
  left=$(grep -Ev '[|](down|drain|fail|inval|unk)' <<< "$nodes" | cut -d'|' -f1 | grep -Fxv "$avoided" | sort -u | wc -l)
  [ "$left" -ge "${SLURM_JOB_NUM_NODES:-1}" ]
}
submit_successor() (  # the same script, in the environment with which this shell was started; nothing if that was done
  rows=$(squeue -a -h -r -t all --name="$SLURM_JOB_NAME" -o '%j|%K|%i|%T|%N|%r|%S|%k') || exit
  newest=$(cut -d'|' -f2,3 <<< "$rows" | grep "^${SLURM_ARRAY_TASK_ID:-N/A}|" | cut -d'|' -f2 | sort -n | tail -n 1)
  [ "${newest:-$id}" = "$id" ] || exit 0
  text=$(scontrol write batch_script "$id" -) || exit
  avoid=${excluded:-$listed}
  options=(--parsable --dependency="afterany:$id" ${SLURM_ARRAY_TASK_ID:+--array="$SLURM_ARRAY_TASK_ID"})
  [ "$delay" -eq 0 ] || options+=(--begin="now+$delay")
  options+=(${avoid:+--exclude="$avoid"} --comment="away:$((starts + 1)):-1:$failure")
  set -- "$FLIP_ATTEMPT" "$(type -P sbatch)" "${options[@]}"
  exec <<< "${text/$'\n#SBATCH --hold\n'/$'\n'}"
  restore_environment
  [ -z "$1" ] || export FLIP_FOLLOWS="$1"
  exec "${@:2}"
)
restore_environment() {  # not by `env NAME=VALUE`: every user of the node reads command lines, which would hold secrets
  local flip_entry
  for flip_entry in $(declare -Fx | cut -d' ' -f3); do
    grep -qz "^BASH_FUNC_$flip_entry%%=" "/proc/$$/environ" || export -nf "${flip_entry?}"
  done
  for flip_entry in $(compgen -e); do unset -v "$flip_entry"; done 2>/dev/null  # some are read-only
  while IFS= read -rd '' flip_entry; do
    case $flip_entry in SLURM_CONF=*) ;; BASH_FUNC_*|SLURM*|FLIP_FOLLOWS=*) continue;; esac
    export "${flip_entry?}"
  done < "/proc/$$/environ" 2>/dev/null
}
requeue() {  # for half a day while Slurm does not answer, as when this node is cut off; ten minutes if it refuses
  error='' refusals=-1
  for _ in {1..1440}; do
    if shown=$(scontrol show job "$id"); then
      ! cancelled || exit "$code"
      if restarted; then  # by Slurm, or by a try whose answer was lost
        [ -z "$error" ] || return 0
        exit "$code"
      fi
      refusals=$((refusals + 1))
      [ "$refusals" -lt 20 ] || exit "$code"
    fi
    error=$(scontrol requeue "$id" 2>&1) && return
    echo "${error:=refused}" >&2
    case $error in *"presently disabled"*) submit_successor && exit "$code";; esac
    sleep 30
  done
  exit "$code"
}
# batch_hooks.restart_later with leave_node: a node that lacks the mount or the interpreter must not consume a whole
# array, nor end a run. Called before an attempt starts, and if its end could not be decided, which the next `begin` then
# records.
requeue_elsewhere() {
  status=$?
  [ -n "$FLIP_ATTEMPT" ] || code=$status
  case $status in 1|2|4|126|127|13[0-9]) ;; *) [ -z "$FLIP_ATTEMPT" ] || return; exit "$code";; esac  # decided
  ! sweep_deleted || { echo "$sweep was deleted: the job ends" >&2; exit 78; }
  restarts=${SLURM_RESTART_COUNT:-0}
  until shown=$(scontrol show job "$id") || [ "$((tries += 1))" -gt 1440 ]; do sleep 30; done  # as long as a requeue
  ! cancelled || exit "$code"
  read_failed_starts
  echo "start $((starts + 1)) failed on ${SLURMD_NODENAME:=unknown} with exit code $status" >&2
  [ "$starts" -lt 100 ] || exit "$code"
  failure=${FLIP_ATTEMPT:-$attempt}:$status:$SLURMD_NODENAME
  comment=Comment=away:$((starts + 1)):$restarts:$failure late=''
  if ending; then late=$comment; else retry scontrol update JobId="$id" "$comment"; fi
  delay=$((60 * starts))
  { exclude_failed_node && affordable "$excluded"; } || excluded=''
  requeue
  updates=()
  [ "$delay" -eq 0 ] || updates+=(StartTime="now+$delay")
  [ -z "$excluded" ] || updates+=(ExcNodeList="$excluded")
  [ "${#updates[@]}" -eq 0 ] || scontrol update JobId="$id" "${updates[@]}"
  [ -z "$late" ] || retry scontrol update JobId="$id" "$late"
  exit "$code"
}
log=/runs/demo/.slurm/0123abcd/$id
exec >>"$log.out" 2>>"$log.err" || requeue_elsewhere
IFS= read -rd '' ownership <<'END_OF_OWNERSHIP'
(flip/files/acl.py and flip/files/ownership.py)
END_OF_OWNERSHIP
exposed=$(/opt/py/bin/python -I -c "$ownership" /runs/demo/.code/c0de /runs/demo/.code/today --) || requeue_elsewhere
export FLIP_SNAPSHOT=/runs/demo/.code/c0de PYTHONPATH=/runs/demo/.code/c0de PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 NCCL_DEBUG='WARN x'
FLIP_RUN=$(sed -n "$((${SLURM_ARRAY_TASK_ID:-0} + 1))p" /runs/demo/.slurm/0123abcd/runs) || requeue_elsewhere
export FLIP_RUN
exec {agents}<> <(:)  # a pipe on which the watcher says how the agents end
trap stop_watcher EXIT
/opt/py/bin/python -I /runs/demo/.code/today/jobs/host/batch_hooks.py watch "$FLIP_RUN" --shell $$ --agents "$agents" --peer-seconds 120 & watcher=$!; disown  # restarts the job if this shell is killed
FLIP_ATTEMPT=$(/opt/py/bin/python -I /runs/demo/.code/today/jobs/host/batch_hooks.py begin "$FLIP_RUN" --token 0123abcd) || requeue_elsewhere
[ -n "$FLIP_ATTEMPT" ] || exit 0  # complete, cancelled, or submitted again
export FLIP_ATTEMPT
finish() {
  code=$?; trap '' TERM USR1 USR2; trap stop_watcher EXIT
  /opt/py/bin/python -I /runs/demo/.code/today/jobs/host/batch_hooks.py end "$FLIP_RUN" --attempt "$FLIP_ATTEMPT" --code "$code" || requeue_elsewhere
  stop_watcher  # not before: `end` may outlive the limit
  [ ! -e "$FLIP_RUN/result.json" ] || code=0  # an srun that outlived its ranks was killed
  exit "$code"
}
trap finish EXIT
exec >>"$FLIP_RUN/logs/$FLIP_ATTEMPT/job.out" 2>>"$FLIP_RUN/logs/$FLIP_ATTEMPT/job.err"
[ -z "$exposed" ] || echo "$exposed" >&2
# Handlers, since srun would inherit ignored signals. On TERM srun kills its ranks; for them USR1 means the same.
forward() { [ -z "$step" ] || kill -s "$1" "$step"; }
trap 'forward USR1' TERM; trap 'forward USR2' USR1 USR2
start_step() {  # in the background, because a shell that waits for a foreground command handles no signal
  (exec srun "$@") & step=$!
  while wait "$step"; code=$?; [ "$code" -gt 128 ] && kill -0 "$step" 2>/dev/null; do :; done
  step=; return "$code"
}
# A task per node runs the node agent, which starts the ranks of all attempts of this job (docs/restarts.md). Without a
# coordinator, and if an agent cannot reach it, srun starts the ranks, and each restart is a requeue.
srun() {
  coordinator=$FLIP_RUN/attempts/$FLIP_ATTEMPT/coordinator.json
  for _ in {1..500}; do [ ! -e "$coordinator" ] || break; sleep 0.02; done
  if [ -e "$coordinator" ]; then
    FLIP_AGENTS=1 start_step --ntasks=2 --ntasks-per-node=1 --cpus-per-task=96 --wait=0 "$@" || :
    # srun has the highest code of its tasks: 137 of one that was killed, also if the run has gone on without it
    ! read -rt 0.1 -u "$agents" said || code=$said
    # an agent of one node may fail to reach the coordinator while others work: their attempt must not start twice
    [ "$code" -eq 74 ] && [ ! -e "$FLIP_RUN/logs/$FLIP_ATTEMPT/node0.out" ] || return "$code"
    # nor after the end of an attempt without healthy nodes, which opens no log
    [ ! -e "${coordinator%/*}/end.json" ] || return "$code"
  fi
  rm -f "$coordinator" || :  # it would prove that agents have started the ranks
  echo "no node agents: srun starts the ranks, and each restart is a requeue" >&2
  start_step --cpus-per-task=12 --distribution=block:block --wait=120 "$@"
}

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /runs/demo/.slurm/0123abcd/%A_%a_%t_log.out --error /runs/demo/.slurm/0123abcd/%A_%a_%t_log.err --output=all --error=all --kill-on-bad-exit=0 --export=ALL /opt/py/bin/python -I /runs/demo/.code/today/jobs/host/rank_entry.py jobs.worker
