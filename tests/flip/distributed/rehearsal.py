"""One training step of a large model on a fake process group: its collectives and the kernels of its loss.

Tensors are fake: shapes without memory, so that H/14 on 512 ranks is traced on any machine. ``python -m
tests.flip.distributed.rehearsal`` prints the counts as JSON.
"""

import contextlib
import json
import sys
from collections import Counter
from datetime import timedelta

import torch
from torch import distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from flip.config import merge
from flip.config.derived import kept_patches
from flip.distributed import parallel
from flip.models import clip
from flip.models.loss import contrastive_loss
from flip.training import grad_cache

KINDS = {"_allgather_base_": "gathers", "_reduce_scatter_base_": "scatters", "allreduce_": "reductions"}


class Counting(TorchDispatchMode):
    """Counts collectives with their bytes by the size of their group, and operations that run a kernel."""

    def __init__(self):
        super().__init__()
        self.collectives, self.bytes, self.operations = Counter(), Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, name = func.namespace, func.overloadpacket.__name__
        if space == "c10d":
            group = next(value for value in args if isinstance(value, torch.ScriptObject))
            size = distributed.get_world_size(distributed.ProcessGroup.unbox(group))
            kind = f"{KINDS[name]} of {size}"
            self.collectives[kind] += 1
            self.bytes[kind] += max(value.numel() * value.element_size() for value in tensors(args))
        elif (
            space == "aten"
            and not func.is_view
            and not name.startswith(("empty", "new_empty", "detach", "_unsafe_view"))
        ):
            self.operations += 1
        return func(*args, **(kwargs or {}))


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors(each)


def step(size, mask, ranks, replicate, local, accumulate, reshard):
    """Collectives of one step of a model on ``ranks`` ranks with ``local`` pairs each: kind -> [count, GB]."""
    layer = {"model": {"size": size}, "compute": {"precision": "bf16", "attention": "sdpa", "device": "cpu"}}
    config = merge.merge([("rehearsal", layer)])
    compute, image = config.compute, config.model.image
    compute.replicate, compute.accumulate, compute.reshard = replicate, accumulate, reshard
    distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        world = parallel.World(0, ranks, torch.device("cpu"), None, None, timedelta(minutes=1))
        with torch.device("meta"):
            model = clip.CLIPModel(config.model, config.augment, "sdpa")
        parallel._shard(model, compute, parallel._mesh(world, replicate))
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            patches = torch.zeros(local, kept_patches(image, mask), 3 * image.patch**2, dtype=torch.uint8)
            keep = torch.zeros(patches.shape[:2], dtype=torch.int16)
            tokens = torch.zeros(local, config.model.text.length, dtype=torch.int32)
            inputs, autocast = (patches, keep, tokens), contextlib.nullcontext()
            with Counting() as counting:
                grad_cache.grad_cache_backward(model, inputs, accumulate, world.device, autocast, 65_536)
        return {kind: [n, round(counting.bytes[kind] / 1e9, 2)] for kind, n in sorted(counting.collectives.items())}
    finally:
        distributed.destroy_process_group()


def loss_operations(local, ranks, width, tile):
    """Kernels of the loss of ``local`` pairs on each of ``ranks`` ranks, forward and backward."""
    distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        with FakeTensorMode():
            features = [torch.zeros(local, width).requires_grad_() for _ in range(2)]
            scale = torch.zeros(1).requires_grad_()
            with Counting() as counting:
                contrastive_loss(*features, scale, tile=tile)[0].backward()
        return counting.operations
    finally:
        distributed.destroy_process_group()


#: name -> arguments of ``step``
STEPS = {
    "H/14 mask 0.5, 8 ranks, accumulate 4": ("H/14", "0.5", 8, 1, 512, 4, "no"),
    "H/14 mask 0.5, 8 ranks, accumulate 4, resharded": ("H/14", "0.5", 8, 1, 512, 4, "yes"),
    "H/14 mask 0.5, 512 ranks, 64 nodes": ("H/14", "0.5", 512, 64, 128, 1, "no"),
    "L/16 mask 0.75, 8 ranks": ("L/16", "0.75", 8, 1, 256, 1, "no"),
}

if __name__ == "__main__":
    counts = {name: step(*arguments) for name, arguments in STEPS.items()}
    tiles = {
        f"loss of 128 pairs on 512 ranks, tile {tile}": loss_operations(128, 512, 1024, tile) for tile in (1024, 65_536)
    }
    json.dump(counts | tiles, sys.stdout, indent=1)
