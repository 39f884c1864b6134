#!/bin/bash

# Parameters
#SBATCH --account=lab
#SBATCH --array=0-2%3
#SBATCH --chdir=/
#SBATCH --constraint=h100
#SBATCH --cpus-per-task=12
#SBATCH --error=/dev/null
#SBATCH --exclusive
#SBATCH --export=ALL
#SBATCH --gpus-per-node=8
#SBATCH --job-name=demo.0123abcd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/dev/null
#SBATCH --qos=preemptible
#SBATCH --requeue
#SBATCH --signal=USR2@90
#SBATCH --time=1434

# setup
id=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
trap '' TERM USR1 USR2  # what is begun here is finished
follow() (  # Slurm does not requeue this job: the same script as a new one, as jobs/host/slurm_cli.py does it
  text=$(scontrol write batch_script "$id" -) || exit
  words=(--dependency="afterany:$SLURM_JOB_ID" --comment="away:$((starts + 1)):-1:$attempt")
  words+=(--begin="now+$((60 * starts))" --exclude="$out")
  [ -z "$SLURM_ARRAY_TASK_ID" ] || words+=(--array="$SLURM_ARRAY_TASK_ID")
  for name in "${!SLURM@}"; do [ "$name" = SLURM_CONF ] || unset "$name"; done
  sbatch "${words[@]}" <<< "${text/$'\n#SBATCH --hold\n'/$'\n'}"
)
again() {  # for half a day while Slurm is silent, as when this node is cut off; ten minutes where it refuses
  for _ in {1..1440}; do no=${no:-0}
    why=$(scontrol requeue "$id" 2>&1) && return; echo "$why" >&2
    case $why in *"presently disabled"*) follow; exit "$code";; esac; sleep 30
    now=$(scontrol show job "$id") || continue
    now=$(sed -En 's/.*Restarts=([0-9]+).*/\1/p' <<< "$now")
    [ "${now:-$life}" = "$life" ] || exit "$code"  # Slurm has started it again
    no=$((no + 1)); [ "$no" -lt 20 ] || return
  done
}
ask() { for _ in 1 2 3 4 5; do scontrol "$@" && break; sleep 30; done; }
elsewhere() {  # a node that lacks what the others have, a mount or the interpreter, must not eat a whole array
  code=$?
  case $code in 1|2|4|126|127|13[0-9]) ;; *) exit "$code";; esac  # others are what `begin` means
  life=${SLURM_RESTART_COUNT:-0} starts=0 attempt=0  # as slurm_cli.FailedStarts: starts in a row for nothing
  until shown=$(scontrol show job "$id") || [ "$((tries += 1))" -gt 1440 ]; do sleep 30; done  # as the trap does
  mark=$(sed -En 's/^ *Comment=away:([0-9]+:-?[0-9]+:[0-9]+).*/\1/p' <<< "$shown")
  IFS=: read -r past last ended <<< "$mark"
  [ "${last:-x}" != $((life - 1)) ] || starts=$past; [ -z "$ended" ] || attempt=$ended
  [ "$starts" -lt 100 ] || exit "$code"
  ask update JobId="$id" Comment="away:$((starts + 1)):$life:$attempt"
  out=$(sed -En 's/.*ExcNodeList=([^ ]+).*/\1/p' <<< "$shown" | sed -E 's/^\(null\)$//; s/(^|,)([^][,]+),\2(,|$)/\1/; s/,$//')
  out=${out:+$out,}$SLURMD_NODENAME,$SLURMD_NODENAME
  again
  scontrol update JobId="$id" ${shown:+"ExcNodeList=$out"} StartTime="now+$((60 * starts))"
  exit "$code"
}
said=/runs/demo/.slurm/0123abcd/$id
exec >>"$said.out" 2>>"$said.err" || elsewhere
foreign=$(find /runs/demo/.code/c0de /runs/demo/.code/today -name '.[gv]*' -prune -o '(' ! -user "$EUID" ! -user 0 -o -perm -002 ! -type l ')' -print -quit)
[ -z "$foreign" ] || { echo "$foreign: of another user, or writable by all: not executed" >&2; exit 77; }
export FLIP_SNAPSHOT=/runs/demo/.code/c0de PYTHONPATH=/runs/demo/.code/c0de PYTHONUNBUFFERED=1 PYTHONNOUSERSITE=1 NCCL_DEBUG='WARN x'
FLIP_RUN=$(sed -n "$((${SLURM_ARRAY_TASK_ID:-0} + 1))p" /runs/demo/.slurm/0123abcd/runs) || elsewhere
FLIP_ATTEMPT=$(python3 -I /runs/demo/.code/today/jobs/host/batch_hooks.py begin "$FLIP_RUN" --token 0123abcd) || elsewhere
[ -n "$FLIP_ATTEMPT" ] || exit 0  # complete, cancelled, or submitted again
export FLIP_RUN FLIP_ATTEMPT
finish() {
  code=$?; trap '' TERM USR1 USR2; trap - EXIT
  [ "$SECONDS" -lt 85875 ] || late=1
  python3 -I /runs/demo/.code/today/jobs/host/batch_hooks.py end "$FLIP_RUN" --attempt "$FLIP_ATTEMPT" --code "$code" ${late:+--late}
  [ -z "$watcher" ] || kill -9 "$watcher" 2>/dev/null  # not before: `end` may outlive the limit
  exit "$code"
}
trap finish EXIT
exec >>"$FLIP_RUN/logs/$FLIP_ATTEMPT/job.out" 2>>"$FLIP_RUN/logs/$FLIP_ATTEMPT/job.err"
python3 -I /runs/demo/.code/today/jobs/host/batch_hooks.py watch "$FLIP_RUN" --attempt "$FLIP_ATTEMPT" & watcher=$!; disown
forward() { [ -z "$step" ] || kill -s "$1" "$step"; }
trap 'forward USR1' TERM; trap 'forward USR2' USR1 USR2
srun() {  # in the background, as a shell that waits for a foreground command handles no signal
  (exec srun "$@") & step=$!
  while wait "$step"; code=$?; [ "$code" -gt 128 ] && kill -0 "$step" 2>/dev/null; do :; done
  step=; return "$code"
}

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /runs/demo/.slurm/0123abcd/%A_%a_%t_log.out --error /runs/demo/.slurm/0123abcd/%A_%a_%t_log.err --output=all --error=all --kill-on-bad-exit=0 --wait=120 --export=ALL --cpus-per-task=12 '--container-image=nvcr.io#nvidia/pytorch:25.09-py3' --container-mounts=/runs/demo:/runs/demo,/data:/data,/scratch/cache:/root/.cache /opt/py/bin/python /runs/demo/.code/today/jobs/host/rank_entry.py jobs.worker
