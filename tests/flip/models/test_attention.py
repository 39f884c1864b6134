"""Tests the choice of attention kernels: shapes of a stage, the order of kernels, and the fall-back if one fails."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from flip.config import derived, schema
from flip.models import attention, clip
from tests.flip.models.test_clip import sized

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def order():
    """Return torch's order of kernels, which every test leaves as it was."""
    before = _cur_sdpa_kernel_backends(with_priority=True)
    yield before
    attention.prefer("sdpa")
    assert _cur_sdpa_kernel_backends(with_priority=True) == before


@pytest.mark.parametrize("fields", [{}, {"padding": "mask"}, {"radford": True}, {"pool": "class", "padding": "mask"}])
def test_stage_shapes_are_those_that_model_computes(fields, monkeypatch):
    """A wrong shape would be tried before the stage in place of the one that the steps have."""
    seen = set()

    def record(query, key, value, attn_mask=None, is_causal=False):
        mask = ""
        if is_causal:
            mask = "causal"
        elif attn_mask is not None:
            mask = "padding"
        seen.add((*query.shape[1:3], key.shape[2], query.shape[3], mask))
        return F_sdpa(query, key, value, attn_mask=attn_mask, is_causal=is_causal)

    F_sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    model = sized("tiny", **fields)
    visible = derived.visible_patch_count(model.image, "0.5")
    pair = clip.CLIPModel(model, schema.Augment(), "flash")
    clip.init_weights(pair, 0)
    tokens = torch.randint(1, model.text.vocabulary, (3, model.text.length))
    tokens[:, -3:] = 0
    pair(
        torch.zeros(3, visible, 3 * model.image.patch**2, dtype=torch.uint8),
        torch.zeros(3, visible, dtype=torch.int16),
        tokens,
    )
    assert seen == {tuple(shape[1:]) for shape in attention.stage_shapes(model, visible)}


def test_prefer_puts_kernel_first_and_leaves_out_failed_ones(order):
    attention.prefer("efficient")
    assert _cur_sdpa_kernel_backends(with_priority=True)[0] == SDPBackend.EFFICIENT_ATTENTION
    attention.prefer("flash", without=["flash", "cudnn"])
    assert set(_cur_sdpa_kernel_backends()) == {SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH}
    attention.prefer("sdpa")
    assert _cur_sdpa_kernel_backends(with_priority=True) == order


def test_failing_kernel_is_replaced_for_all_shapes(monkeypatch, caplog):
    """cuDNN accepts captions and finds no plan for them. The order of kernels holds for the process, so images lose it
    too."""
    names = {member: name for name, member in attention.KERNELS.items()}

    def first(*_):
        return names[_cur_sdpa_kernel_backends(with_priority=True)[0]]

    def failure(shape, *_):
        if shape.tower == "text" and first() == "cudnn":
            return "No valid execution plans built."
        return ""

    monkeypatch.setattr(attention, "_kernel", first)
    monkeypatch.setattr(attention, "_failure", failure)
    shapes = attention.stage_shapes(sized("tiny"), 8)
    with caplog.at_level(logging.WARNING):
        chosen = attention.choose_kernels("cudnn", shapes, 4, torch.bfloat16, CUDA)
    assert list(chosen.values()) == ["flash"] * 3
    (record,) = caplog.records
    assert "text, 32 tokens" in record.getMessage() and "No valid execution plans" in record.getMessage()
    assert "image, 9 tokens: flash; text, 32 tokens: flash" in attention.format_kernels(chosen)


@pytest.mark.parametrize("value, device", [("explicit", CUDA), ("flash", torch.device("cpu"))])
def test_nothing_is_chosen_without_fused_kernels_or_gpu(value, device, order):
    assert attention.choose_kernels(value, attention.stage_shapes(sized("tiny"), 8), 4, torch.float32, device) == {}
    assert _cur_sdpa_kernel_backends(with_priority=True) == order
