"""Carries out a plan: from a sweep file to jobs of a backend.

- ``submission.py``: ``Submission``, one call of ``flip submit`` with ``SubmitOptions``: checks, plan, question, commit.
- ``existing_runs.py``: what the run directories of earlier submissions contribute.
- ``api.py``: ``flip.submit`` and the handle that it returns.
- ``apply.py``: creates, moves and locks run directories, and hands over their jobs.
- ``snapshot.py``: ``take`` copies the code of the runs into the sweep's folder.
- ``dry_run.py``: ``PlannedJob``, the jobs that Slurm would get.
- ``render.py``: a plan as text and as JSON.
- ``cleanup.py``: what runs no longer need, and its deletion, for ``flip clean``.
- ``removal.py``: moves runs to the trash, and deletes their commits in object storage, for ``flip rm``.
- ``evaluation.py``: ``EvaluationRequest``, one call of ``flip evaluate``: a separate job next to the run.

Does not watch runs: it returns their directories to the command. May import ``jobs.planning``, ``jobs.submitted_runs``,
``jobs.slurm``, ``jobs.sweeps``, ``jobs.tracking``, ``jobs.common`` and ``jobs.host``, and of ``flip.training`` only
``warm_start``, which loads no torch before it is called.
"""
