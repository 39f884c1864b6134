"""Carries out a plan: from a sweep file to jobs of a backend.

- ``submission.py``: ``Submission``, one call of ``flip submit``: five steps, each of which takes what the one before
  returns. A dry run is the first three. Its docstring follows one run through all levels.
- ``request.py``: ``Request``, what a call asks for, by its ``SubmitOptions``.
- ``resolve.py``, ``check.py``, ``plan_runs.py``, ``confirm.py``, ``start_runs.py``: the steps.
- ``executed.py``: ``Executed``, the code of jobs, and the folders in which other users can exchange it.
- ``sweep_record.py``: sweep.json.
- ``plan.py``: ``compare`` compares each ``SweepRun`` (from the sweep file) with its ``ExistingRun`` (from the run
  directory) and returns a ``Plan`` of ``Action``: start, leave, fork, move to the trash, refuse.
- ``api.py``: ``flip.submit`` and the handle that it returns.
- ``apply.py``: ``create_and_submit`` creates and moves run directories, and hands over their jobs.
- ``snapshot.py``: ``take`` copies the code of the runs into the sweep's folder.
- ``dry_run.py``: ``PlannedJob``, the jobs that Slurm would get.
- ``render.py``: a plan as text and as JSON.
- ``cleanup.py``: what runs no longer need, and its deletion, for ``flip clean``.
- ``removal.py``: moves runs to the trash, and deletes their checkpoints in object storage, for ``flip rm``.
- ``evaluation.py``: ``EvaluateCommand``, one call of ``flip evaluate``: a separate job next to the run.

Does not watch runs: it returns their directories to the command. What a run does is known to
``jobs.workloads`` alone. May import that, ``jobs.planning``, ``jobs.submitted_runs``, ``jobs.backends``,
``jobs.slurm``, ``jobs.sweeps``, ``jobs.common`` and ``jobs.host``.
"""
