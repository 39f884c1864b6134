"""What runs on a node outside of the container: what happens to a run when its attempt starts or ends?

- ``batch_hooks.py``: the commands that a batch script calls: begin, end, watch and release.
- ``attempts.py``: records of attempts. ``end`` calls the restart policy and writes its decision.
- ``restart_policy.py``: ``decide``, a pure function: causes of an end -> start again, stop, or wait.
- ``bad_nodes.py``: nodes that the next attempts of a run leave out.
- ``slurm_cli.py``: the only place that calls Slurm's commands. ``SlurmUnavailable``, ``FailedStarts``.
- ``canary.py``: runs that wait until the first one of their kind has passed.
- ``successor.py``, ``orphans.py``, ``wall_limit.py``: restarts without requeue, ranks whose batch script is gone, the
  time limit.
- ``notify.py``: the program that a profile names for notices.
- ``rank_entry.py``: the start of a rank, before any package is imported.

Python >= 3.6, standard library only, in all files, this one included. May import ``flip.runs`` alone.
"""
