"""How do ranks work together?

- ``parallel``: the process group, FSDP, numeric modes, and helpers for sharded tensors.
- ``compile_cache``: the folder on a node's disk for code that torch compiles.
- ``collectives``: JSON values between ranks; pickles are never exchanged.
- ``link_speed``: the speed of collectives and of links between ranks.

May import ``flip.config``, ``flip.common``, ``flip.files`` and ``flip.runs``.
"""
