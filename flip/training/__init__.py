"""The loop, the step, the optimiser, and where the first weights come from.

- ``trainer``: stages, steps, evaluations, commits and the end of an attempt.
- ``grad_cache``: gradients of a large batch in parts; ``optimizer``: AdamW and its schedule; ``anomaly``: bad steps.
- ``warm_start`` finds the weights that ``init`` names (no torch), ``initial_weights`` fills them in.

May import every other package of ``flip``.
"""
