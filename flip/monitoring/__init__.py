"""What happened in a run: metrics, TensorBoard, status, profiles and results.

- ``metrics_writer`` and ``hparams`` write, ``metrics_reader`` reads metric lines; ``witness`` logs samples for tests.
- ``collector``, ``tally``, ``shares``: numbers of a step, where time goes, and what limits the speed; ``profiler``.
- ``results``: the outcomes of runs, as reports and ``flip.read_runs`` have them.

May import ``flip.costs``, ``flip.checkpoint``, ``flip.data``, ``flip.distributed`` and ``flip.evaluation``.
"""
