"""What a submission would do, and what is wrong with it. Writes nothing.

- ``plan.py``: ``plan`` compares each ``ResolvedRun`` (what the sweep file means now) with its ``ExistingRun`` (what is
  in the run directory) and gives a ``Plan`` of ``Action``: start, leave, fork, move to the trash, refuse.
- ``preflight.py``: checks of data, tokenizer, paths, space, memory and checkpoints. A failed ``Check`` raises the error
  that the job would have ended with.
- ``environment_checks.py``: what a container hides, and environment variables that jobs do not get.
- ``memory_fit.py``: whether a step fits the memory of the devices.
- ``cost.py``: ``Estimate`` of FLOPs, GPU-hours and price.

May import ``jobs.runs``, ``jobs.slurm``, ``jobs.common`` and ``jobs.host``.
"""
