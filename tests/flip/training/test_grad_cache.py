"""Tests that grad_cache gives the gradients of the full batch, with masks, in one process and under sharding."""

import contextlib
import os

import pytest
import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from flip.config import schema
from flip.distributed import parallel
from flip.distributed.collectives import mean_over_ranks
from flip.models import tiled_loss
from flip.models.tiled_loss import contrastive_loss
from flip.training import grad_cache
from tests.flip.models.test_clip import captions, inputs, tiny
from tests.harness.ranks import run_ranks

B = 12
KINDS = {
    "clip": {},
    "recipe clip": {"radford": True},
    "siglip, padding masked": {"objective": "siglip", "padding": "mask", "temperature": 0.1, "logit_bias": 0.0},
}
"""Fields of the model. With SigLIP's own bias of -10 the negative pairs would have almost no weight."""


def batch():
    patches, keep, _ = inputs(B)
    return (
        torch.stack([image_patches[indices.long()] for image_patches, indices in zip(patches, keep, strict=True)]),
        keep,
        captions(B),
    )


def compute_gradients(pair, fields, micro, ranks=1):
    statistics = grad_cache.grad_cache_backward(pair, fields, micro, torch.device("cpu"), contextlib.nullcontext())
    value, accuracy = mean_over_ranks(torch.stack(statistics), ranks)
    gradients = {name: parallel.full_tensor(p.grad).clone() for name, p in pair.named_parameters()}
    pair.zero_grad(set_to_none=True)
    return {"loss": value, "accuracy": accuracy} | gradients


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture(scope="module")
def full_batch(kind):
    return compute_gradients(tiny(**kind), batch(), 1)


def farthest(actual, expected):
    """The largest difference of a value, relative to the largest value of its tensor."""
    return max(
        float((actual[name] - value).abs().max() / value.abs().max().clamp(min=1e-12))
        for name, value in expected.items()
    )


def test_grad_cache_with_single_micro_batch_is_bitwise_equal_to_backward(full_batch, kind):
    pair = tiny(**kind)
    value, accuracy = contrastive_loss(pair.objective, *pair(*batch()))
    value.backward()
    assert torch.equal(value, full_batch["loss"]) and torch.equal(accuracy, full_batch["accuracy"])
    assert all(torch.equal(p.grad, full_batch[name]) for name, p in pair.named_parameters())


@pytest.mark.parametrize("micro", [2, 3, 12])
def test_grad_cache_micro_batches_match_full_batch_gradient(full_batch, kind, micro):
    parts = compute_gradients(tiny(**kind), batch(), micro)
    assert parts.keys() == full_batch.keys()
    assert farthest(parts, full_batch) < 2e-5


def test_mean_of_micro_batch_losses_differs_from_full_batch_gradient(full_batch, kind):
    pair = tiny(**kind)
    for part in zip(*(field.chunk(3) for field in batch()), strict=True):
        (contrastive_loss(pair.objective, *pair(*part))[0] / 3).backward()
    naive = {name: p.grad for name, p in pair.named_parameters()}
    assert farthest(naive, {name: full_batch[name] for name in naive}) > 0.1


@pytest.fixture
def two_fake_ranks():
    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    distributed.destroy_process_group()


@pytest.mark.long
def test_text_collectives_overlap_with_image_tower(two_fake_ranks, kind, monkeypatch):
    """Forward: the gather starts after the text tower and ends after the image tower. Backward: the reduce-scatter
    overlaps the image tower and ends before the text tower needs the gradient."""
    events = []
    pair = tiny(**kind)

    class Work:
        def __init__(self, name):
            self.name = name

        def wait(self):
            events.append(f"{self.name} is complete")

    def collective(name):
        def run(output, source, group, async_op):
            assert async_op
            events.append(name)
            output.copy_(source[: len(output)].repeat(len(output) // len(source) or 1, 1))
            return Work(name)

        return run

    monkeypatch.setattr(tiled_loss, "_all_gather", collective("gather"))
    monkeypatch.setattr(tiled_loss, "_reduce_scatter", collective("sum"))
    for name, tower in (("text", pair.text), ("image", pair.image)):
        tower.projection.register_forward_hook(lambda *_, name=name: events.append(f"{name} forward"))
        tower.blocks[0].register_full_backward_hook(lambda *_, name=name: events.append(f"{name} backward"))
    grad_cache.grad_cache_backward(pair, batch(), 1, torch.device("cpu"), contextlib.nullcontext())
    assert events == [
        "text forward", "gather", "image forward", "gather is complete",
        "sum", "image backward", "sum is complete", "text backward",
    ]  # fmt: skip


def rank_main(rank, size, store, kind, micro):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), FLIP_STORE=store)
    compute = schema.Compute(device="cpu", precision="fp32", attention="explicit", threads=1)
    compute.reshard = "no" if micro > 1 else "yes"
    world = parallel.start(compute)
    pair = tiny(**kind)
    for block in (*pair.image.blocks, *pair.text.blocks):
        if micro > 1:
            block.activation_checkpointing = "block"
        else:
            block.activation_checkpointing = "no"
    parallel.apply_parallelism(pair, world, compute)
    share = B // size
    fields = [field[rank * share : (rank + 1) * share] for field in batch()]
    twice = [compute_gradients(pair, fields, micro, size) for _ in range(2)]  # the second call follows a used state
    distributed.barrier()
    parallel.stop()
    return [{name: value.tolist() for name, value in result.items()} for result in twice]


@pytest.mark.long
@pytest.mark.parametrize("micro", [1, 3])
def test_grad_cache_on_two_sharded_ranks_matches_full_batch_gradient(full_batch, kind, micro, tmp_path):
    reports = run_ranks(rank_main, 2, 2, str(tmp_path / "store"), kind, micro)
    for rank in range(2):
        for report in reports[rank]:
            values = {name: torch.tensor(value) for name, value in report.items()}
            assert farthest(values, full_batch) < 2e-5


def test_mean_text_tokens_excludes_those_that_fill_a_bucket():
    pair = tiny(padding="mask")
    tokens = captions(11)
    expected = len(pair.text.token_indices(tokens)) / len(tokens)
    pair.text.bucket_lengths = True
    assert len(pair.text.token_indices(tokens)) / len(tokens) > expected
    assert grad_cache.mean_text_tokens(pair, tokens) == expected < tokens.shape[1]
    assert grad_cache.mean_text_tokens(tiny(padding="attend"), tokens) == tokens.shape[1]
