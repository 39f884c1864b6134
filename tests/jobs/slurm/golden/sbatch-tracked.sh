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
#SBATCH --requeue
#SBATCH --signal=USR2@90
#SBATCH --time=1434

# setup
trap '' TERM USR1 USR2  # neither a start nor its end is interrupted
sweep=/runs/demo root=
exclude=''
id=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
# Below: the end of a start on a node that lacks the mount, the code or the interpreter. On other nodes
# jobs/host/job.py restarts the job. jobs/host/failed_starts.py reads and writes the same comment of a job.
sweep_deleted() {  # and not only out of reach: the folder above is the one of the submission, and may be searched
  above=${sweep%/*}
  [ -n "$root" ] && [ "$(stat -Lc %i "$above")" = "$root" ] && [ -x "$above" ] && ! [ -e "$sweep" ]
}
elsewhere() {  # [CODE]: back to the queue, without this node. CODE: of this start; default: of the last command
  status=${1:-$?}
  case $status in 1|2|4|126|127|13[0-9]) ;; *) exit "$status";; esac  # the other codes are decisions
  ! sweep_deleted || { echo "$sweep was deleted: the job ends" >&2; exit 78; }
  starts='' tries=0 refusals=0
  until shown=$(scontrol show job "$id") && requeue; do  # for half a day, if Slurm does not answer
    [ "$((tries += 1))" -lt 1440 ] || exit "$status"
    sleep 30
  done
  updates=()
  [ "$starts" -eq 0 ] || updates+=(StartTime="now+$((60 * starts))")
  [ -z "$excluded" ] || updates+=(ExcNodeList="$excluded")
  [ "${#updates[@]}" -eq 0 ] || scontrol update JobId="$id" "${updates[@]}"
  exit "$status"
}
requeue() {  # ends the job if it may not be requeued; fails if Slurm refuses now
  [[ $shown = *JobState=RUNNING* ]] || exit "$status"  # cancelled, or requeued already
  [ -n "$starts" ] || read_failed_starts
  [ "$starts" -lt 100 ] || exit "$status"
  excluded=${exclude:+$exclude,}$SLURMD_NODENAME
  others_work || excluded=''
  scontrol update JobId="$id" Comment="away:$((starts + 1)):$restarts:$attempt:$status:$SLURMD_NODENAME"
  refusal=$(scontrol requeue "$id" 2>&1) && return
  echo "${refusal:=refused}" >&2
  [[ $refusal != *"presently disabled"* ]] || exit "$status"
  [ "$((refusals += 1))" -lt 20 ] || exit "$status"
  return 1
}
read_failed_starts() {  # those in a row before this one, and the attempt whose end could not be written
  starts=0 attempt=0 restarts=${SLURM_RESTART_COUNT:-0}
  number='[0-9]{1,9}'
  form="[[:space:]]Comment=away:($number):(-1|$number):($number)(:[0-9]{1,3}:[^[:space:]:|]*)?[[:space:]]"
  if [[ "$shown " =~ $form ]]; then
    [ "${BASH_REMATCH[2]}" -ne "$((restarts - 1))" ] || starts=${BASH_REMATCH[1]}
    attempt=${BASH_REMATCH[3]}
  fi
  echo "start $((starts + 1)) failed on $SLURMD_NODENAME with exit code $status" >&2
}
others_work() {  # whether enough nodes are left that work; else the job would wait for ever (BadConstraints)
  [[ $exclude != */* ]] || return  # the file of a list, which only sbatch reads
  avoided=$(scontrol show hostnames "$excluded") || return
  nodes=$(sinfo -h -N -p "$SLURM_JOB_PARTITION" -o '%N|%T') || return
  nodes=$(grep -Ev '[|](down|drain|fail|inval|unk)' <<< "$nodes" | cut -d'|' -f1 | grep -Fxv "$avoided" | sort -u)
  [ "$(grep -c . <<< "$nodes")" -ge "${SLURM_JOB_NUM_NODES:-1}" ]
}
if [ $# -eq 0 ]; then  # Slurm starts the job
unset FLIP_ATTEMPT FLIP_AGENTS  # a successor may have inherited those of its predecessor
umask go-w  # also for what the ranks create
log=/runs/demo/.slurm/0123abcd/$id
exec >>"$log.out" 2>>"$log.err" || elsewhere
IFS= read -rd '' ownership <<'END_OF_OWNERSHIP'
(flip/files/acl.py and flip/files/ownership.py)
END_OF_OWNERSHIP
exposed=$(python3 -I -c "$ownership" /runs/demo/.code/c0de /runs/demo/.code/today --) || elsewhere
[ -z "$exposed" ] || echo "$exposed" >&2
export FLIP_SNAPSHOT=/runs/demo/.code/c0de PYTHONPATH=/runs/demo/.code/c0de PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONNOUSERSITE=1 NCCL_DEBUG='WARN x'
FLIP_RUN=$(sed -n "$((${SLURM_ARRAY_TASK_ID:-0} + 1))p" /runs/demo/.slurm/0123abcd/runs) || elsewhere
export FLIP_RUN
[ -r /runs/demo/.code/today/jobs/host/job.py ] || elsewhere 2
shopt -s execfail
exec python3 -I /runs/demo/.code/today/jobs/host/job.py "$FLIP_RUN" --token 0123abcd --peer-seconds 120 --tracker wandb --script "$0" || elsewhere
fi
[ "$1" != elsewhere ] || elsewhere "$2"
if [ "$1" = follow ]; then
  flip_tracker=$2
  trap 'exit 0' TERM USR1 USR2
  exec </dev/null >"$FLIP_RUN/logs/$FLIP_ATTEMPT/follow-$flip_tracker.log" 2>&1
  while read -r flip_name <"/proc/$3/comm" && [ "$flip_name" != srun ]; do sleep 0.5; done 2>/dev/null
  while IFS= read -rd '' flip_entry; do export "${flip_entry?}"; done <"/proc/$3/environ" 2>/dev/null
  unset FLIP_AGENTS
  PYTHONPATH=/runs/demo/.code/today exec apptainer exec --nv --bind /runs/demo:/runs/demo /img/torch.sif /opt/py/bin/python -m jobs.follow "$FLIP_RUN" --attempt "$FLIP_ATTEMPT" --job --tracker "$flip_tracker"
fi
trap : TERM USR1 USR2  # srun would inherit ignored signals
if [ "$2" = agents ]; then  # each starts the ranks of its node, of all attempts of this job
  export FLIP_AGENTS=1
  flip_options=(--nodes="$3" --ntasks="$3" --ntasks-per-node=1 --cpus-per-task=96 --wait=0)
else
  flip_options=(--nodes="$3" --ntasks="$(($3 * 8))" --cpus-per-task=12 --distribution=block:block --wait=120)
fi
set --
srun() { exec srun "${flip_options[@]}" "$@"; }

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /runs/demo/.slurm/0123abcd/%A_%a_%t_log.out --error /runs/demo/.slurm/0123abcd/%A_%a_%t_log.err --output=all --error=all --kill-on-bad-exit=0 --export=ALL apptainer exec --nv --bind /runs/demo:/runs/demo /img/torch.sif /opt/py/bin/python -I /runs/demo/.code/today/jobs/host/rank_entry.py jobs.worker
