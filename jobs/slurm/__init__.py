"""The Slurm backend: runs as array jobs that are requeued.

- ``backend.py``: ``SlurmBackend`` implements ``jobs.common.job.Backend``: sbatch, queue, cancel.
- ``batch_script.py``: the text of the batch script, and the environment of jobs. ``fallback.sh`` holds its functions
  for a node without the mount, the code or the interpreter.
- ``job_states.py``: what Slurm shows of the jobs of runs, by one call of squeue.
- ``start_problems.py``: why a job in the queue does not start.
- ``site.py``: partitions, limits and nodes of this Slurm; ``check_ready`` refuses a profile that cannot work.
- ``agents_trial.py``: lets node agents connect once, in a step of up to two nodes.
- ``site_checks.py``: a row per guarantee of the launcher.

Stateless: any number of processes may use it at once. All commands of Slurm are called in
``jobs.host.slurm_cli``. May import ``jobs.common`` and ``jobs.host``.
"""
