"""Tests the transformer block against the block of timm."""

from functools import partial

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn

from flip.models.transformer import TransformerBlock


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_transformer_block_matches_timm_bitwise(fused, precision):
    """Outputs and gradients are bitwise equal. Parameters have the names and the order of timm."""
    reference = Block(
        48, 3, qkv_bias=True, act_layer=partial(nn.GELU, approximate="tanh"), norm_layer=partial(nn.LayerNorm, eps=1e-6)
    )
    reference.attn.fused_attn = fused
    block = TransformerBlock(48, 3, fused, "gelu_tanh", 1e-6)
    assert list(block.state_dict()) == list(reference.state_dict())
    block.load_state_dict(reference.state_dict())
    x = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        outputs = block(x), reference(x)
    for output in outputs:
        output.float().square().sum().backward()
    assert torch.equal(*outputs)
    for p, q in zip(block.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
