"""When and how is the training state saved and restored?

- ``manager``: the checkpoints of one attempt, and the time between two of them.
- ``saver`` writes checkpoints, ``restorer`` finds, verifies and loads.
- ``staging``: the copy in host memory that is written; ``safetensors_io``: the files of a checkpoint;
  ``safetensors_header``: checks of their headers.
- ``remote``: checkpoints in object storage; ``remote_folder``: the address and the owner of a run's folder there.
- ``export_record``: the record of an exported folder.

May import ``flip.distributed``, ``flip.data.storage``, ``flip.files`` and ``flip.runs``.
"""
