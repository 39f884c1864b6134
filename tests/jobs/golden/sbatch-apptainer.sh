#!/bin/bash

# Parameters
#SBATCH --array=0-2%3
#SBATCH --chdir=/runs/demo/.slurm/0123abcd
#SBATCH --cpus-per-task=12
#SBATCH --error=/runs/demo/.slurm/0123abcd/%A_%a_0_log.err
#SBATCH --export=ALL
#SBATCH --gres=gpu:h100:8
#SBATCH --job-name=demo.0123abcd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/runs/demo/.slurm/0123abcd/%A_%a_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@90
#SBATCH --time=1434

# setup
export FLIP_SNAPSHOT=/runs/demo/.code/c0de PYTHONPATH=/runs/demo/.code/c0de PYTHONUNBUFFERED=1 NCCL_DEBUG='WARN x' MASTER_ADDR=10.0.0.1
FLIP_RUN=$(sed -n "$((${SLURM_ARRAY_TASK_ID:-0} + 1))p" /runs/demo/.slurm/0123abcd/runs)
trap '' TERM  # what is begun here is finished
FLIP_ATTEMPT=$(/usr/bin/python3 /runs/demo/.code/c0de/jobs/requeue.py begin "$FLIP_RUN" --token 0123abcd) || exit
[ -n "$FLIP_ATTEMPT" ] || exit 0  # complete, cancelled, or submitted again
export FLIP_RUN FLIP_ATTEMPT
finish() {
  code=$?; trap '' TERM; trap - EXIT
  /usr/bin/python3 /runs/demo/.code/c0de/jobs/requeue.py end "$FLIP_RUN" --attempt "$FLIP_ATTEMPT" --code "$code"
  exit "$code"
}
trap finish EXIT
exec >>"$FLIP_RUN/logs/$FLIP_ATTEMPT/job.out" 2>>"$FLIP_RUN/logs/$FLIP_ATTEMPT/job.err"
trap : TERM  # the shell outlives it; a handler, since srun would inherit deafness
type module >/dev/null 2>&1 || . /etc/profile
module load cuda/12.8 || exit 78
ulimit -n 65536

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /runs/demo/.slurm/0123abcd/%A_%a_%t_log.out --error /runs/demo/.slurm/0123abcd/%A_%a_%t_log.err --output=all --error=all --kill-on-bad-exit=0 --wait=120 --export=ALL apptainer exec --nv --bind /runs/demo:/runs/demo '/img/torch 2.sif' python3.12 /runs/demo/.code/c0de/jobs/rank.py jobs.worker
