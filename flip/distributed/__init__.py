"""How do ranks work together, and how do they stop together?

- ``parallel``: the process group, FSDP, numeric modes, and helpers for sharded tensors; ``norms``: norms over shards.
- ``collectives``: JSON values between ranks; pickles are never exchanged.
- ``shutdown``: signals, and the step at which all ranks agree to stop.
- ``watchdog``: ends a process that makes no progress.

May import ``flip.config`` and ``flip.runs``.
"""
