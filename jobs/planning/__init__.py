"""Can a training run, how fast, and at what cost? Writes nothing.

- ``preflight.py``: the lists of checks before a job is queued. A failed rule raises the error that the job would have
  ended with. ``data_checks.py``: of what a run reads; ``storage_checks.py``: of what it writes.
- ``user_files.py``: the files of a user's classes, checked, pinned by hash and never imported; ``callback_files.py``:
  those of ``monitor.callbacks``.
- ``program_files.py``: the files of a user's program, which a snapshot holds.
- ``software_checks.py``: what decodes images, and what GPUs need besides torch.
- ``environment_checks.py``: files that a container hides, environment variables that jobs do not get.
- ``memory_fit.py``: whether a step fits the memory of the devices.
- ``assumptions.py``: every number that plans assume about a machine, and the measured number that replaces it.
- ``measurement.py``: ``Measurement``, the file of `flip doctor --measure`, which has these numbers.
- ``core_speeds.py``: the table of speeds of a core.
- ``step_time.py``: seconds of a step on GPUs (arithmetic, communication, input) and what would shorten it.
- ``throughput.py``: the speed of a core that prepares samples, by images, mask and kernel, and where it comes from.
- ``kernel_share.py``: the share of a data set's images that the visible-patch kernel takes, by a sample.
- ``run_cost.py``: ``Estimate`` of FLOPs, GPU-hours and price.

May import ``jobs.submitted_runs``, ``jobs.sweeps``, ``jobs.slurm``, ``jobs.common`` and ``jobs.host``.
"""
