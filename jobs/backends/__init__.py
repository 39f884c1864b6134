"""Which backends exist, and the only place that opens one.

- ``table.py``: ``BACKENDS``, a row for each kind of a cluster profile: how it is opened, and how often its runs may be
  queried. ``open_backend`` opens that of a profile, ``row_of`` refuses a kind that has no row.
- ``multi.py``: ``MultiBackend`` submits jobs of several profiles, each to its backend.

| kind | package | starts |
|---|---|---|
| ``local`` | ``jobs.local`` | processes of this machine |
| ``slurm`` | ``jobs.slurm`` | batch jobs |

A backend implements ``jobs.common.job.Backend``. No code elsewhere chooses one: commands ask
``jobs.submitted_runs.clusters`` about runs, whose job.json names the kind. May import ``jobs.local``, ``jobs.slurm``
and ``jobs.common``; the backends import nothing of this package.
"""
