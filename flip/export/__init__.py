"""How does a trained model become a model of open_clip and timm, and how is it used?

- ``exporter`` writes a folder that both load; ``format``: its model card and configurations.
- ``weights`` converts names and layouts; ``fold_padding`` replaces the padding mask of the text encoder.
- ``load``: ``flip.load`` of runs and exports; ``preprocess``: pictures and texts of users.

May import ``flip.evaluation``, ``flip.models``, ``flip.checkpoint`` and ``flip.monitoring``.
"""
