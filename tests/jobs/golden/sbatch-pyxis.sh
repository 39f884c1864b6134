#!/bin/bash

# Parameters
#SBATCH --account=lab
#SBATCH --array=0-2%3
#SBATCH --chdir=/runs/demo/.slurm/0123abcd
#SBATCH --constraint=h100
#SBATCH --cpus-per-task=12
#SBATCH --error=/runs/demo/.slurm/0123abcd/%A_%a_0_log.err
#SBATCH --exclusive
#SBATCH --export=ALL
#SBATCH --gpus-per-node=8
#SBATCH --job-name=demo.0123abcd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/runs/demo/.slurm/0123abcd/%A_%a_0_log.out
#SBATCH --qos=preemptible
#SBATCH --requeue
#SBATCH --signal=USR2@90
#SBATCH --time=1434

# setup
export FLIP_SNAPSHOT=/runs/demo/.code/c0de PYTHONPATH=/runs/demo/.code/c0de PYTHONUNBUFFERED=1 NCCL_DEBUG='WARN x'
FLIP_RUN=$(sed -n "$((${SLURM_ARRAY_TASK_ID:-0} + 1))p" /runs/demo/.slurm/0123abcd/runs)
trap '' TERM  # what is begun here is finished
FLIP_ATTEMPT=$(python3 /runs/demo/.code/c0de/jobs/requeue.py begin "$FLIP_RUN" --token 0123abcd) || exit
[ -n "$FLIP_ATTEMPT" ] || exit 0  # complete, cancelled, or submitted again
export FLIP_RUN FLIP_ATTEMPT
finish() {
  code=$?; trap '' TERM; trap - EXIT
  python3 /runs/demo/.code/c0de/jobs/requeue.py end "$FLIP_RUN" --attempt "$FLIP_ATTEMPT" --code "$code"
  exit "$code"
}
trap finish EXIT
exec >>"$FLIP_RUN/logs/$FLIP_ATTEMPT/job.out" 2>>"$FLIP_RUN/logs/$FLIP_ATTEMPT/job.err"
trap : TERM  # the shell outlives it; a handler, since srun would inherit deafness

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /runs/demo/.slurm/0123abcd/%A_%a_%t_log.out --error /runs/demo/.slurm/0123abcd/%A_%a_%t_log.err --output=all --error=all --kill-on-bad-exit=0 --wait=120 --export=ALL '--container-image=nvcr.io#nvidia/pytorch:25.09-py3' --container-mounts=/runs/demo:/runs/demo,/data:/data,/scratch/cache:/root/.cache /opt/py/bin/python /runs/demo/.code/c0de/jobs/rank.py jobs.worker
