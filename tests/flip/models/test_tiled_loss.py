"""Tests the tiled contrastive loss against a dense float64 reference, in one process and over two ranks."""

import itertools

import pytest
import torch
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flip.config.schema import Model
from flip.loss_kinds import LOSSES, first_values
from flip.models.tiled_loss import contrastive_loss
from tests.harness.ranks import run_ranks


def features(b, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(b, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    return [torch.nn.functional.normalize(image + x, dim=-1).to(dtype) for x in (text, 0.5 * image)]


def dense(image, text, scale):
    """The CLIP loss by its definition, with a loop."""
    logits = scale * image.double() @ text.double().T
    total = 0.0
    for i in range(len(image)):
        total = total - logits[i, i] + (torch.logsumexp(logits[i], 0) + torch.logsumexp(logits[:, i], 0)) / 2
    return total / len(image)


def dense_sigmoid(image, text, scale, bias):
    """The SigLIP loss by its definition (Zhai et al. 2023, equation 1), with loops."""
    logits = scale * image.double() @ text.double().T + bias
    total = 0.0
    for i in range(len(image)):
        for j in range(len(image)):
            total = total + torch.log1p(torch.exp(-logits[i, j] if i == j else logits[i, j]))
    return total / len(image)


#: objective, and what is special -> (definition, scale and learned parameters to compare with). Each row of LOSSES has
#: one.
OBJECTIVES = {
    "clip": (dense, (14.3,)),
    "clip at the clamp": (dense, (100.0,)),
    "siglip": (dense_sigmoid, (10.0, -10.0)),
    "siglip trained": (dense_sigmoid, (117.0, -13.0)),
}
#: objective -> scale, and first values of the learned parameters
SHARED = {name: [10.0, *first_values(Model(objective=name)).values()] for name in LOSSES}


def test_every_loss_is_compared_with_its_definition():
    missing = LOSSES.keys() - OBJECTIVES.keys()
    assert not missing, f"{missing}: add the plain formula of each to OBJECTIVES in this file"


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("tile", [1, 7, 8, 1024])
def test_contrastive_loss_matches_definition_in_value_and_gradient(dtype, tolerance, objective, tile):
    definition, shared = OBJECTIVES[objective]
    values = *features(24, dtype=dtype), *(torch.tensor([value], dtype=dtype) for value in shared)
    leaves = [x.requires_grad_() for x in values]
    expected = definition(*leaves)
    references = torch.autograd.grad(expected.sum(), leaves)
    loss, accuracy = contrastive_loss(objective.split()[0], *leaves, tile=tile)
    assert (loss.shape, accuracy.shape) == ((), ())
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for gradient, reference in zip(torch.autograd.grad(loss, leaves), references, strict=True):
        assert gradient.shape == reference.shape
        assert torch.allclose(gradient.double(), reference.double(), atol=tolerance * 10)


def test_accuracy_is_share_of_images_nearest_to_their_text():
    image = torch.eye(4)
    text = image[[0, 1, 3, 2]]
    for tile, (objective, shared) in itertools.product((1, 3, 4), SHARED.items()):
        assert contrastive_loss(objective, image, text, *torch.tensor(shared)[:, None], tile=tile)[1].item() == 0.5


@pytest.mark.parametrize("objective", SHARED)
def test_gradients_match_finite_differences(objective):
    shared = [value / 4 for value in SHARED[objective]]
    values = *features(6), *(torch.tensor(value, dtype=torch.float64) for value in shared)
    leaves = [x.requires_grad_() for x in values]
    assert torch.autograd.gradcheck(lambda *x: contrastive_loss(objective, *x, tile=4)[0], leaves)


@pytest.mark.parametrize("objective", SHARED)
def test_contrastive_loss_allocates_no_tensor_larger_than_tile(objective):
    """Neither forward nor backward allocates b * B numbers."""
    b = 512
    tile = 32
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max([largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
            return out

    leaves = [
        x.requires_grad_() for x in (*features(b, dtype=torch.float32), *torch.tensor(SHARED[objective])[:, None])
    ]
    with Watch():
        contrastive_loss(objective, *leaves, tile=tile)[0].backward()
    assert largest == b * tile


def test_contrastive_loss_of_bf16_features_is_fp32():
    image, text = features(8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = contrastive_loss("clip", image, text, torch.tensor([100.0]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(dense(image, text, 100.0).item(), rel=1e-5)


@pytest.mark.parametrize("objective", SHARED)
def test_tf32_is_enabled_only_inside_contrastive_loss(objective):
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                seen.add(torch.backends.cuda.matmul.allow_tf32)
            return function(*args, **(kwargs or {}))

    shared = torch.tensor(SHARED[objective])[:, None]
    leaves = [x.requires_grad_() for x in (*features(24, dtype=torch.float32), *shared)]
    matmul = torch.backends.cuda.matmul
    for tf32, outside in ((True, False), (False, True), (False, False)):
        matmul.allow_tf32 = outside
        with Watch():
            loss, _ = contrastive_loss(objective, *leaves, tf32=tf32)
            assert seen == {tf32} and matmul.allow_tf32 == outside
            loss.backward()
        assert seen == {tf32} and matmul.allow_tf32 == outside
        seen.clear()


def step(image, text, objective):
    """Returns loss, accuracy and gradients of a small model for some pairs."""
    weight = torch.eye(16, dtype=torch.float64).add(0.1).requires_grad_()
    scale = torch.full((1,), 2.0, dtype=torch.float64, requires_grad=True)
    learned = [torch.full((1,), -3.0, dtype=torch.float64, requires_grad=True) for _ in LOSSES[objective].parameters]
    embed = [torch.nn.functional.normalize(x @ weight, dim=-1) for x in (image, text)]
    loss, accuracy = contrastive_loss(objective, *embed, scale.exp(), *learned, tile=5)
    loss.backward()
    outputs = {"loss": loss.detach(), "accuracy": accuracy, "weight": weight.grad, "scale": scale.grad}
    return outputs | {str(number): value.grad for number, value in enumerate(learned)}


def rank_main(rank, world, store, objective):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", store=distributed.FileStore(store, world), rank=rank, world_size=world)
    image, text = features(24, seed=7)
    b = len(image) // world
    outputs = step(image[rank * b : (rank + 1) * b], text[rank * b : (rank + 1) * b], objective)
    averaged = {}
    for name in sorted(outputs):  # as FSDP does with gradients, and the trainer with loss and accuracy
        distributed.all_reduce(outputs[name])
        averaged[name] = (outputs[name] / world).tolist()
    distributed.barrier()
    distributed.destroy_process_group()
    return averaged


@pytest.mark.long
@pytest.mark.parametrize("objective", LOSSES)
def test_contrastive_loss_on_two_ranks_matches_single_process(objective, tmp_path):
    outputs = run_ranks(rank_main, 2, 2, str(tmp_path / "store"), objective)
    single = step(*features(24, seed=7), objective)
    for rank in range(2):
        for name, value in single.items():
            output = torch.tensor(outputs[rank][name], dtype=torch.float64)
            assert torch.allclose(output, value, atol=1e-12), (rank, name)
