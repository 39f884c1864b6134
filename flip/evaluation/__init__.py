"""How good is a model, and on which data sets?

- ``datasets``: finds data sets and reads them.
- ``encoding``: models as encoders, and the features of a data set.
- ``tasks``: what is asked of a model: zero-shot classification, retrieval, a linear probe, associations.
- ``metrics``: how answers are counted, and how results are stored and shown.
- ``evaluator``: scores a model on a data set. ``request``: the configuration of an evaluation job;
  ``evaluation_job``: the job.
- ``label_check``: compares labels with class names on the node.

Imports point one way: metrics, datasets, encoding, tasks, then the files of this folder.

May import ``flip.data``, ``flip.models``, ``flip.checkpoint`` and ``flip.distributed``.
"""
