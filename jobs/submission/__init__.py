"""A plan carried out: from a sweep file to jobs of a backend.

- ``submission.py``: ``Submission``, one call of ``jobs/submit.py``: sweep, checks, plan, question, commit.
- ``apply.py``: run directories are made, moved and locked, and jobs handed over, all or nothing per run.
- ``snapshot.py``: ``take`` copies the code that the runs will use into the sweep's folder, by its digest.
- ``dry_run.py``: ``PlannedJob``, what Slurm would get.
- ``render.py``: a plan as text and as JSON.
- ``evaluation.py``: ``EvaluationRequest``, one call of ``jobs/evaluate.py``: a job of its own beside the run.

Does not watch runs: it returns what to watch, and the command does. May import ``jobs.planning``, ``jobs.runs``,
``jobs.slurm``, ``jobs.sweeps``, ``jobs.common`` and ``jobs.host``, but not ``jobs.reporting``. Of ``flip.training`` it
imports ``warm_start`` alone, which loads no torch before it is called.
"""
