"""The loop, the step, the optimiser, and the source of the initial weights.

- ``trainer``: stages, steps, checkpoints and the end of an attempt. ``callbacks``: the hooks for everything else.
- ``standard_callbacks``: which callbacks an attempt has: ``metrics_callback``, ``scoring``, ``sample_log``, the
  profiler of ``flip.monitoring``, and classes of the user (``user_callbacks``). ``result``: result.json.
- ``grad_cache``: gradients of a large batch in parts; ``parameter_groups``: AdamW, its schedule, and norms.
- ``compiled_code``: the copy of compiled code for later attempts.
- ``anomaly``: steps that are not finite, and loss spikes.
- ``warm_start``: initial weights from another run or an export; ``conversion``: weights for other sizes.

May import every other package of ``flip``.
"""
