"""Runs that were submitted, whatever their backend: which ones are meant, in which state are they, what can be done?

- ``select.py``: from what a person types (a sweep, sweep/run, a pattern, a path) to run directories.
- ``clusters.py``: ``open_backend`` for a profile, ``MultiBackend`` for several; ``states``, ``cancel`` and
  ``request_cancel`` for runs of any backend; exit codes of failed runs.
- ``resubmit.py``: the command that submits a run again, from its job.json, if this user may trust that file.

The backend of a run is named in its job.json. May import ``jobs.slurm``, ``jobs.local``, ``jobs.common`` and
``jobs.host``; the backends import nothing of this package.
"""
