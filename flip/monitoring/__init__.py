"""What happened in a run: metrics, TensorBoard, status, profiles and results.

- ``collector``: measures steps and makes metric lines; ``rank_counters``: counts of one rank, and their totals;
  ``profiler``: traces, and time lost to communication.
- ``utilisation``: the arithmetic of training as a share of what the devices could do.
- ``metrics_writer``: writes metric lines, TensorBoard and status; ``metrics_reader``: reads metric lines;
  ``curve_table``: as a table for users.
- ``curves``: tag and description of every curve.
- ``results``: the outcomes of runs, for reports and ``flip.read_runs``.

May import ``flip.model_costs``, ``flip.checkpoint``, ``flip.data``, ``flip.distributed`` and ``flip.evaluation``.
"""
