"""How do images and texts of a data set become features?

- ``encoders``: the model of a run, or one of open_clip, as an ``Encoder`` of images and texts.
- ``features``: the features of a data set, computed by all ranks in order, and a cache of these.
- ``open_clip_folder``: the files of a model of open_clip, and the run directory of its results (no torch).

May import ``flip.data``, ``flip.models``, ``flip.checkpoint``, ``flip.distributed`` and the data sets.
"""
