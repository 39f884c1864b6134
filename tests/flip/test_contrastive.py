"""The loss against a dense float64 one, in one process and over two."""

import multiprocessing
import os

import pytest
import torch
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flip.contrastive import contrastive_loss


def features(b, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(b, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    return [torch.nn.functional.normalize(image + x, dim=-1).to(dtype) for x in (text, 0.5 * image)]


def dense(image, text, scale):
    """The definition, with a loop."""
    logits = scale * image.double() @ text.double().T
    total = 0.0
    for i in range(len(image)):
        total = total - logits[i, i] + (torch.logsumexp(logits[i], 0) + torch.logsumexp(logits[:, i], 0)) / 2
    return total / len(image)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("scale", [14.3, 100.0])
@pytest.mark.parametrize("tile", [1, 7, 8, 1024])
def test_equals_the_definition(dtype, tolerance, scale, tile):
    leaves = [x.requires_grad_() for x in (*features(24, dtype=dtype), torch.tensor([scale], dtype=dtype))]
    expected = dense(*leaves)
    wanted = torch.autograd.grad(expected.sum(), leaves)
    loss, accuracy = contrastive_loss(*leaves, tile=tile)
    assert (loss.shape, accuracy.shape) == ((), ())
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for found, want in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
        assert torch.allclose(found.double(), want.double(), atol=tolerance * 10)


def test_accuracy_counts_nearest_texts():
    image = torch.eye(4)
    text = image[[0, 1, 3, 2]]
    for tile in (1, 3, 4):
        assert contrastive_loss(image, text, torch.tensor([10.0]), tile=tile)[1].item() == 0.5


def test_gradients_by_finite_differences():
    leaves = [x.requires_grad_() for x in (*features(6), torch.tensor(3.0, dtype=torch.float64))]
    assert torch.autograd.gradcheck(lambda *x: contrastive_loss(*x, tile=4)[0], leaves)


def test_no_tensor_is_larger_than_a_tile():
    """Nothing of b * B numbers is ever made, forward or backward."""
    b, tile = 512, 32
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max([largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
            return out

    leaves = [x.requires_grad_() for x in (*features(b, dtype=torch.float32), torch.tensor([10.0]))]
    with Watch():
        contrastive_loss(*leaves, tile=tile)[0].backward()
    assert largest == b * tile


def test_bf16_features_make_an_fp32_loss():
    image, text = features(8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = contrastive_loss(image, text, torch.tensor([100.0]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(dense(image, text, 100.0).item(), rel=1e-5)


def step(image, text):
    """Loss and gradients of a small model over some pairs, and its accuracy."""
    weight = torch.eye(16, dtype=torch.float64).add(0.1).requires_grad_()
    scale = torch.full((1,), 2.0, dtype=torch.float64, requires_grad=True)
    embed = [torch.nn.functional.normalize(x @ weight, dim=-1) for x in (image, text)]
    loss, accuracy = contrastive_loss(*embed, scale.exp(), tile=5)
    loss.backward()
    return {"loss": loss.detach(), "accuracy": accuracy, "weight": weight.grad, "scale": scale.grad}


def rank_main(rank, world, port, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    store = distributed.TCPStore("127.0.0.1", port, world, is_master=rank == 0)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    image, text = features(24, seed=7)
    b = len(image) // world
    found = step(image[rank * b : (rank + 1) * b], text[rank * b : (rank + 1) * b])
    whole = {name: found[name].item() for name in ("loss", "accuracy")}
    for name in ("weight", "scale"):  # what the trainer's sharding does: gradients are averaged over ranks
        distributed.all_reduce(found[name])
        whole[name] = (found[name] / world).tolist()
    results.put((rank, whole))
    distributed.barrier()
    distributed.destroy_process_group()


def test_two_ranks_equal_one(free_port):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=rank_main, args=(rank, 2, free_port, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = dict(results.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(60)
    one = step(*features(24, seed=7))
    for rank in range(2):
        for name, value in one.items():
            assert torch.allclose(torch.tensor(found[rank][name], dtype=torch.float64), value, atol=1e-12), (rank, name)


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
