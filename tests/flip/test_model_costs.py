"""Tests the memory estimates of model_costs.device_memory.

benchmarks/memory.py compares them with real steps, models/test_clip.py with autograd.
"""

import pytest

from flip import model_costs
from flip.config.schema import Compute
from tests.flip.test_flops import sized


def memory(name="L/16", local=256, mask="0.5", ranks=1, precision="bf16", attention="sdpa", **compute):
    return model_costs.device_memory(
        sized(name), Compute(precision=precision, attention=attention, **compute), local, mask, ranks
    )


def test_device_memory_parts_add_up_to_total():
    for ranks in (1, 8):
        for local in (1, 256):
            parts = memory(local=local, ranks=ranks)
            assert parts["total"] == sum(value for name, value in parts.items() if name != "total")


def test_device_memory_counts_batches_that_arrive_during_a_step_on_cuda():
    assert memory(device="cuda")["batch"] == 3 * memory(device="cpu")["batch"] > 0


def test_device_memory_scales_with_mask_and_ranks():
    unmasked, half = (memory(mask=mask) for mask in ("0", "0.5"))
    assert unmasked["image_activations"] == pytest.approx(half["image_activations"] * 197 / 99, rel=0.01)
    spread = memory(ranks=8)
    assert spread["moments"] * 8 == pytest.approx(half["moments"], abs=8)
    assert spread["gathered"] > 0 and "bf16_weights" not in spread and "gathered" not in half


def test_device_memory_peak_is_gradients_or_activations_by_batch_size():
    small = memory(local=1)
    large = memory(local=512)
    assert small["gradients"] == pytest.approx(small["weights"], rel=1e-6) and "image_activations" not in small
    assert large["gradients"] < small["gradients"] and large["image_activations"] > large["weights"]


def test_device_memory_shrinks_with_recomputation_or_accumulation():
    plain = memory()["total"]
    selective, block, parts = (
        memory(**settings)["total"]
        for settings in ({"recompute": "selective"}, {"recompute": "block"}, {"accumulate": 8})
    )
    assert plain > selective > block and plain > parts
    once = memory(accumulate=2, recompute="block")
    assert once["gradients"] == pytest.approx(once["weights"], rel=1e-6)  # the gradients of the previous micro-batch


def test_explicit_attention_needs_more_memory_unless_recomputed():
    assert memory(attention="explicit")["total"] > memory()["total"]
    again = [memory(attention=attention, recompute="selective")["total"] for attention in ("explicit", "sdpa")]
    assert again[0] < again[1] * 1.05


def test_micro_batches_hold_unsharded_gradients_on_every_rank():
    few, many = (memory(local=2, ranks=ranks, accumulate=2) for ranks in (2, 256))
    assert few["gradients"] == many["gradients"] == memory(local=2, accumulate=2)["gradients"]
    assert few["gathered"] == many["gathered"] > few["gradients"] / 2
    assert memory(local=2, ranks=256)["total"] < many["total"] / 2
