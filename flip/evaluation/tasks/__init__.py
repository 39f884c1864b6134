"""How does a model answer a data set? One file per task.

- ``zero_shot``: the nearest class name; ``retrieval``: the nearest caption or image.
- ``linear_probe``: logistic regression on frozen features; ``association``: the images that belong to a cue.

Each function takes features and returns counts and shares; ``flip.evaluation.evaluator`` calls it on rank 0.

May import ``flip.evaluation.metrics.measures``, ``datasets`` and ``encoding``.
"""
