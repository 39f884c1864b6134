"""What became of runs: states, results, costs and comparisons. Read only.

- ``status.py``: the table of states, and ``watch``, which shows it until all runs have ended.
- ``outcomes.py``: results as rows, CSV and text. ``run_details.py``: all that is known of one run.
- ``goodput.py``: ``Account``, where the time of runs went, and which setting would save most.
- ``seed_groups.py``: ``SeedGroup``, runs that differ in their seed alone, and their ``Score``.
- ``scaling_laws.py``: ``PowerLaw`` fits. ``paper_comparison.py``: results beside those of the paper.
- ``report.py``: the blocks of a report (``document.py``: ``Text``, ``Table``, ``Figure``), shown by ``html.py``,
  ``markdown.py``, ``figures.py`` and ``charts.py``.

Damaged files of one run never hide the others. May import ``jobs.runs``, ``jobs.sweeps``, ``jobs.common`` and
``jobs.host``, but not ``jobs.submission``.
"""
