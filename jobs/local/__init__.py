"""The local backend: runs as processes of this machine.

- ``backend.py``: ``LocalBackend`` implements ``jobs.common.job.Backend``: it writes each run's job.json and
  starts a supervisor.
- ``supervisor.py``: ``Supervisor``, one detached process per sweep folder: it starts and restarts runs by the same
  policy as on Slurm, and ends if nothing is left to do.
- ``rank_processes.py``: ``LocalAttempt``, the ranks of one attempt, with the lifeline pipe that ends them if their
  supervisor dies; ``Rank``, also of an earlier supervisor; processes by pid and start time.

The state is in files: a supervisor that was killed is replaced by the next submission. Loads no torch. May import
``jobs.common``, ``jobs.host`` and ``jobs.tracking``.
"""
