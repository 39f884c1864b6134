"""What every package of ``jobs`` uses: what is a job, what is a cluster profile, how do commands talk?

- ``job.py``: ``Job`` (one run to be started), ``JobResources``, ``JobState`` (one of ``STATES``) and ``Backend``, the
  interface that ``jobs.slurm`` and ``jobs.local`` implement.
- ``cluster_profile.py``: ``ClusterProfile``, a file of sweeps/clusters/, and the folder of runs.
- ``cli.py``: the parser of all commands, and how a command ends or is shown.
- ``filesystem.py``: locks, and errors of files as errors with an exit code.
- ``text.py``: aligned tables, numbers and durations as text.
- ``paths.py``: places in the repository.

May import ``flip``, but not torch, and no other package of ``jobs``.
"""
