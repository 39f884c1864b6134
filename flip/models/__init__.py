"""What do the two towers compute, and what is the loss?

- ``clip``: both encoders, their initial weights and the logit scale; names of parameters are part of the file format.
- ``transformer``: the block and the layout of packed texts.
- ``attention``: which fused kernel computes the attention on a GPU.
- ``token_head``: the text classification head of pooled image features.
- ``tiled_loss``: computes a loss of ``flip.loss_kinds`` over all ranks, in tiles.

May import ``flip.config``, ``flip.distributed``, ``flip.rng`` and ``flip.model_costs``.
"""
