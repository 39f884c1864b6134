"""How does a trained model become a model of open_clip and timm, and how is it used?

- ``exporter`` writes a folder that both load; ``format``: its model card and configurations; ``onnx_models``: ONNX.
- ``weights`` converts names and layouts; ``fold_padding`` replaces the padding mask of the text encoder.
- ``differences``: inputs for which an export predicts other values than the toolkit.
- ``open_clip_source`` and ``timm_source``: their models as the first weights of a run.
- ``load``: ``flip.load`` of runs and exports; ``preprocess``: images and texts of users.

May import ``flip.evaluation``, ``flip.models``, ``flip.checkpoint`` and ``flip.monitoring``.
"""
