"""How do trained weights become models of open_clip and timm, and how are they used?

- ``exporter`` writes a folder that both load; ``weights`` translates names and layouts; ``fold_padding`` the text mask.
- ``card``: the model card; ``load``: ``flip.load`` of runs and exports; ``preprocess``: pictures and texts of users.

May import ``flip.evaluation``, ``flip.models``, ``flip.checkpoint`` and ``flip.monitoring``.
"""
