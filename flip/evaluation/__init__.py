"""How good is a model, and on which data sets?

- ``datasets``, ``annotations``, ``images``, ``prompts``: find data sets by name or path and read them.
- ``task``: the task of an evaluation job and its results; ``job``: the job.
- ``evaluator``: scores a model on a data set by ``zero_shot``, ``retrieval``, ``linear_probe`` or ``associations``.
- ``metrics``: accuracy, and published metrics of single data sets; ``predictions``: those of each image.
- ``score``: the score by which a result is shown and compared, with its name, chance level and interval.
- ``encoders``, ``open_clip_folder``: models of runs and of open_clip; ``features``: their features and a cache of
these.

May import ``flip.data``, ``flip.models``, ``flip.checkpoint`` and ``flip.distributed``.
"""
