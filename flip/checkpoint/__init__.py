"""When and how is the training state saved, committed and restored?

- ``manager``: the checkpoints of one attempt; ``interval``: the time between two of them.
- ``saver`` writes and commits, ``restorer`` finds, verifies and reads; ``dcp_io``: torch.distributed.checkpoint's part.
- ``remote``: checkpoints in object storage; ``export_record``: what an exported folder says of itself; ``tensors``.

May import ``flip.distributed``, ``flip.data.storage`` and ``flip.runs``.
"""
