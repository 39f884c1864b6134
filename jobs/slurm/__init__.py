"""The Slurm backend: runs as array jobs that are requeued.

- ``backend.py``: ``SlurmBackend`` implements ``jobs.common.job.Backend``: sbatch through submitit, cancel, requeue.
- ``batch_script.py``: the text of the batch script, and the environment that jobs get.
- ``job_states.py``: states of runs, from their files and one call of squeue.
- ``site.py``: what this Slurm is: partitions, limits, nodes; ``ready`` refuses a profile that cannot work here.
- ``site_checks.py``: ``CheckResult`` per promise of the launcher: kept here, kept in part, or not, and why.

Knows nothing but files and Slurm: any number of processes may use it at once. All commands of Slurm are called in
``jobs.host.slurm_cli``. May import ``jobs.common`` and ``jobs.host``.
"""
