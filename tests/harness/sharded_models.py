"""A small CLIP model on real gloo ranks: builds it as the trainer does, and runs a function on every rank."""

import os
import tempfile

import torch
from torch import distributed
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import init_device_mesh

from flip.config import schema
from flip.distributed import parallel
from flip.models import clip
from flip.runs.rundir import RunDir
from tests.flip.models.test_clip import sized
from tests.harness.ranks import run_ranks

BATCH = 12
"""Samples of a global batch: of 1, 2, 3 or 4 ranks."""
SEED = 3

GPU_DEFAULTS = {"reshard": "no", "loss_tile": 4096}
"""Values to which ``auto`` resolves on CUDA. ``replicate`` resolves to the number of nodes."""


def compute(**fields):
    defaults = {"device": "cpu", "precision": "fp32", "attention": "explicit", "threads": 1, "deterministic": "no"}
    return schema.Compute(**defaults | fields)


def built(config, world, meta=True, radford=False, sharded=False, patch=8, head=False):
    """Builds a CLIP model. ``sharded``: shards it even over a single rank."""
    model = sized("tiny", radford=radford)
    model.image.patch = patch
    with torch.device("meta" if meta else "cpu"):
        pair = clip.CLIPModel(model, schema.Augment(), config.attention, config.recompute, head)
    if not meta:
        return pair
    if sharded:
        parallel._shard(pair, config, init_device_mesh(world.device.type, (1,)))
    parallel.apply_parallelism(pair, world, config)
    clip.init_weights(pair, SEED)
    parallel.check_initialised(pair)
    return pair


def launch(size, cases, work, folder=None):
    """Runs ``work`` in ``size`` processes (in this one if ``size`` is 1). Returns the result of rank 0 per case."""
    if size == 1:
        world = parallel.start(cases[0])
        try:
            return [work(config, world) for config in cases]
        finally:
            parallel.stop()
    if folder:
        RunDir(folder).start_attempt({})
    with tempfile.TemporaryDirectory() as place:
        outputs, *_ = run_ranks(rank_main, size, size, f"{place}/store", cases, folder, work)
    return [{name: torch.from_numpy(value) for name, value in output.items()} for output in outputs]


def rank_main(rank, size, store, cases, folder, work):
    """Runs ``work`` for each case on this rank. Any unpickling of data from other ranks fails, in torch's code too."""
    distributed_c10d._unpickler = None
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), FLIP_STORE=store)
    world = parallel.start(cases[0])
    outputs = [work(config, world, folder) for config in cases]
    distributed.barrier()
    parallel.stop()
    if rank == 0:
        return [{name: value.numpy() for name, value in output.items()} for output in outputs]
    return None
