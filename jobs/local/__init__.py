"""The local backend: runs as processes of this machine.

- ``backend.py``: ``LocalBackend`` implements ``jobs.common.job.Backend``: it writes each run's job.json and
  starts a supervisor.
- ``supervisor.py``: ``Supervisor``, one detached process per sweep folder: it starts and restarts runs by the same
  policy as on Slurm, and ends if nothing is left to do.
- ``agents.py``: ``LocalAgent``, the node agent of a run with its coordinator, and ``AgentAttempt``, one attempt on it.
- ``adopted.py``: ``AdoptedAttempt``, the ranks of an agent or supervisor that has died.
- ``stores.py``: the folders in which several ranks publish their addresses.

The state is in files: a supervisor that was killed is replaced by the next submission. Loads no torch. May import
``jobs.common``, ``jobs.host`` and ``jobs.tracking``.
"""
