"""How do ranks work together, and how do they stop together?

- ``devices``: which GPU of a node is a rank's.
- ``parallel``: the process group, FSDP, numeric modes, and helpers for sharded tensors.
- ``compile_cache``: the folder on a node's disk for code that torch compiles.
- ``collectives``: JSON values between ranks; pickles are never exchanged.
- ``link_speed``: the speed of collectives and of links between ranks.
- ``shutdown``: signals, the step at which all ranks agree to stop, and a watchdog for a process that hangs.

May import ``flip.config``, ``flip.files`` and ``flip.runs``.
"""
