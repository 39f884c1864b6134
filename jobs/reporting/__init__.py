"""State, results, costs and comparison of runs. Reads run directories and writes only reports.

- ``status.py``: the table of states, and ``watch``, which shows it until all runs have ended.
- ``outcomes.py``: results as rows, CSV and text. ``run_details.py``: details of one run.
- ``goodput.py``: ``Account``, how runs spent their time, and which setting would save most; ``faults.py``: the cost of
  each fault.
- ``seed_groups.py``: ``SeedGroup``, runs that differ only in their seed, and their ``GroupScore``.
- ``ranking.py``: which group is better; ``paired.py``: paired differences of seeds. ``axes.py``: the axes of a grid of
  groups; ``grid_effects.py``: which value of an axis is better.
- ``scaling_laws.py``: curves of runs along an axis; ``laws.py``: their ``Law``, also for the studies;
  ``distributions.py``: ``Interval``, Student's t and F. ``paper_comparison.py``, ``paper_figure.py``: results
  against those of the paper.
- ``report.py``: the blocks of a report, with ``figures.py`` and ``examples.py``; ``jobs.pages`` shows them.

Damaged files of one run do not hide other runs. May import ``jobs.submitted_runs``, ``jobs.sweeps``, ``jobs.pages``,
``jobs.common`` and ``jobs.host``, but not ``jobs.submission``.
"""
