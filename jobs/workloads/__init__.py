"""What jobs do: trainings, programs and evaluations, behind one interface, which is all that the launcher asks.

- ``workload.py``: the interface. ``Workload`` is what a job does, ``SweepRun`` that of a resolved run of a sweep, and
  ``RequestedRun`` a run as its sweep file asks for it. ``Place``: where and on what it runs.
- ``loading.py``: ``requested_runs`` chooses the kind of the runs of a sweep file, once.
- ``training_request.py`` and ``training.py``: ``TrainingRequest.workload_at`` resolves a configuration to a
  ``TrainingWorkload``; ``extension.py``: the configuration that continues a changed run; ``training_page.py``: its
  lines in a dry run.
- ``command_request.py`` and ``command.py``: ``CommandRequest`` makes a ``CommandWorkload``: a program that is executed.
- ``evaluation_request.py`` and ``evaluation.py``: ``EvaluationBuilder`` makes an ``EvaluationWorkload``.
- ``submitted.py``: ``of_run``, the work of an existing run directory, for reports.

A new kind of work implements ``Workload``, is chosen in ``loading.py``, and has a row in ``submitted.KINDS``. The
package may import ``jobs.planning``, ``jobs.submitted_runs``, ``jobs.sweeps``, ``jobs.tracking`` and ``jobs.common``,
and of ``flip.training`` only ``warm_start``, which loads no torch before it is called.
"""
