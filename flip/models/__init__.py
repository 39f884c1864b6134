"""What do the two towers compute, and what is the loss?

- ``clip``: the model of both towers, their initial weights and the logit scale; names of parameters are part of the
  file format.
- ``image_towers`` builds the image tower: ``image_encoder``, the toolkit's own, ``timm_vit``, or a user's.
- ``transformer``: the block and the layout of packed texts.
- ``attention``: which fused kernel computes the attention on a GPU.
- ``token_head``: the text classification head of pooled image features.
- ``tiled_loss``: computes a loss of ``flip.loss_kinds`` over all ranks, in tiles.

May import ``flip.config``, ``flip.distributed``, ``flip.rng``, ``flip.tower_kinds`` and
``flip.model_costs``.
"""
