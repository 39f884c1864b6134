"""Basics for every package of ``jobs``: jobs and backends, cluster profiles, command lines, text output.

- ``job.py``: ``Job`` (a run to start), ``JobResources`` and ``Backend``, the
  interface that ``jobs.slurm`` and ``jobs.local`` implement.
- ``cluster_profile.py``: ``ClusterProfile``, a file of sweeps/clusters/, and the folder of runs.
- ``cli.py``: the parser of all commands, their exit codes, and command lines to show.
- ``completion.py``: words that a shell completes.
- ``documents.py``: what commands print with ``--json``; ``next_commands.py``: the commands that usually follow.
- ``filesystem.py``: locks and file errors with exit codes. ``trust.py``: folders in which others can exchange files.
- ``first_process.py``: a command as process 1 of a container. ``submitter.py``: which user submitted a run.
- ``text.py``: aligned tables, numbers and durations as text; ``terminal.py``: tables that fit its width, progress.
- ``paths.py``: paths in the repository, and the folder of runs.

May import ``flip``, but not torch, and no other package of ``jobs``.
"""
