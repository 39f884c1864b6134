"""Basics for every package of ``jobs``: jobs and backends, cluster profiles, command lines, text output.

- ``job.py``: ``Job`` (a run to start), ``JobResources`` and ``Backend``, the
  interface that ``jobs.slurm`` and ``jobs.local`` implement.
- ``cluster_profile.py``: ``ClusterProfile``, a file of sweeps/clusters/, and the folder of runs.
- ``measurement.py``: ``Measurement``, the result of `flip doctor --measure`.
- ``cli.py``: the parser of all commands, their exit codes, and command lines to show.
- ``filesystem.py``: locks, trust, and file errors with exit codes.
- ``text.py``: aligned tables, numbers and durations as text.
- ``paths.py``: paths in the repository, and the folder of runs.

May import ``flip``, but not torch, and no other package of ``jobs``.
"""
