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
  [ "$starts" -lt MAX_FAILED_STARTS ] || exit "$status"
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
  nodes=$(grep -Ev '[|](UNUSABLE)' <<< "$nodes" | cut -d'|' -f1 | grep -Fxv "$avoided" | sort -u)
  [ "$(grep -c . <<< "$nodes")" -ge "${SLURM_JOB_NUM_NODES:-1}" ]
}
