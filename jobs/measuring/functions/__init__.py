"""The rows of `flip doctor --measure`: what is run to measure a machine, in processes of its own.

``python -m jobs.measuring.functions ROW`` runs one row and prints its numbers as JSON; ``jobs.measuring`` starts it,
limits its time, and judges the result. A row runs on CUDA or on a CPU with the same code, so that a machine without
GPUs tests what a cluster will run.

- ``arithmetic.py``: products of matrices by dtype, and copies between host and device.
- ``collectives.py``: all-reduce, all-gather and reduce-scatter between processes, by size.
- ``steps.py``: training steps of one process (``training_step.py``), with memory and compilations; their losses in
  other arithmetic, and on several ranks (``ranks.py``).
- ``trace.py``: the kernels of such steps under torch's profiler. ``peak_memory.py``: the memory of a piece of work.
- ``timing.py``: seconds of a call.
- ``inputs.py``: the cost of a sample on a core and its stages (``input_stages.py``), and reads by several processes.
- ``disk.py``: writes, syncs, renames and locks below the folder of runs, and a save and a restore.
- ``faults.py``: a killed rank, a killed agent (``agents.py``), a preemption; the run must end with the weights of an
  undisturbed one.
- ``photo_shards.py``: synthetic shards that cost what photographs cost.

May import torch, ``jobs.measuring`` and everything below it. `benchmarks/` imports from here.
"""
