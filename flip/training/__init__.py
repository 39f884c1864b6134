"""The loop, the step, the optimiser, and the source of the initial weights.

- ``trainer``: stages, steps, evaluations, commits and the end of an attempt.
- ``grad_cache``: gradients of a large batch in parts; ``optimizer``: AdamW, its schedule, and norms.
- ``anomaly``: steps that are not finite, and loss spikes.
- ``warm_start``: initial weights from another run or an export; ``conversion``: weights for other sizes.

May import every other package of ``flip``.
"""
