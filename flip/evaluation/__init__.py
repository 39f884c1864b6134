"""How good is a model, on which data sets, and by which job is that computed?

- ``datasets``, ``forms``, ``annotations``, ``images``: data sets by name, in the forms in which people have them.
- ``task``: what a result is; ``zero_shot``, ``prompts``, ``retrieval``, ``linear_probe``, ``metrics``: the scores.
- ``encoders``, ``foreign``, ``open_clip_folder``: models of ours and of open_clip; ``features``, ``cache``: embeddings.
- ``evaluator`` scores a model on a data set, ``job`` is the evaluation job.

May import ``flip.data``, ``flip.models``, ``flip.checkpoint`` and ``flip.distributed``.
"""
