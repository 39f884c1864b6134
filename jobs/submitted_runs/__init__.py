"""Submitted runs of any backend: selection, states, cancellation, and how to submit them again.

- ``select.py``: resolves command-line arguments (a sweep, SWEEP/RUN, a pattern, a path) to run directories.
- ``clusters.py``: ``states``, ``cancel`` and ``request_cancel`` for runs of any backend; exit codes of failed runs.
- ``resubmit.py``: the command that submits a run again, from its job.json, if this user may trust that file.

job.json of a run names the kind of its backend, which ``jobs.backends`` opens. May import ``jobs.backends``,
``jobs.sweeps``, ``jobs.common`` and ``jobs.host``.
"""
