"""One training step of a large model on a fake process group: its collectives, memory, graphs, and kernels.

Tensors are fake: shapes without memory, so that H/14 on 512 ranks is traced on any machine. ``python -m
tests.flip.distributed.rehearsal [PART ...]`` prints the counts as JSON.
"""

import contextlib
import json
import sys
from collections import Counter
from datetime import timedelta
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
from torch import distributed, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from flip.common.host import Host
from flip.config import merge
from flip.config.derived import for_stage, visible_patch_count
from flip.config.resolve import dataset_facts, resolve_auto
from flip.distributed import parallel
from flip.distributed.collectives import mean_over_ranks
from flip.models import clip
from flip.models.tiled_loss import contrastive_loss
from flip.training import grad_cache, parameter_groups
from jobs.common.cluster_profile import load_profile
from jobs.planning import memory_fit

KINDS = {"_allgather_base_": "gathers", "_reduce_scatter_base_": "scatters", "allreduce_": "reductions"}
NODE = 8
"""GPUs of a node."""


class Case(NamedTuple):
    """A step of ``local`` pairs on each of ``ranks`` ranks."""

    size: str
    mask: str
    ranks: int
    local: int
    accumulate: int
    reshard: str = "auto"

    def __str__(self):
        name = f"{self.size} mask {self.mask}, {self.ranks} ranks of {self.local} pairs, accumulate {self.accumulate}"
        if self.reshard == "auto":
            return name
        return f"{name}, reshard {self.reshard}"

    def config(self):
        """As ``submit`` resolves ``auto`` for nodes of eight H100."""
        compute = {"compile": "auto", "replicate": 0, "loss_tile": 0, "reshard": self.reshard}
        layer = {
            "model": {"size": self.size},
            "data": {"samples": 1 << 28, "sample_bytes": 20_000},
            "stages": [{"name": "stage", "samples": 1 << 30, "batch": self.local * self.ranks, "mask": self.mask}],
            "compute": compute | {"accumulate": self.accumulate},
            "resources": {"nodes": self.ranks // NODE, "processes": NODE, "gpus": NODE},
        }
        config = merge.merge([("rehearsal", layer)])
        config = resolve_auto(config, Host(cores=96, memory=10**12, bf16=True, cuda=True), dataset_facts(config))
        if self.reshard == "auto":
            memory_fit.fit_reshard(config, load_profile("h100"))
        return config


CASES = (
    Case("H/14", "0.5", 8, 512, 4),
    Case("H/14", "0.5", 512, 128, 1),
    Case("H/14", "0", 8, 64, 1),
    Case("L/16", "0", 512, 128, 4),
    Case("L/16", "0.75", 8, 128, 1, reshard="yes"),
)
"""Each two of the sizes, stages, ranks and numbers of micro-batches occur together."""


class Counting(TorchDispatchMode):
    """Counts collectives with their bytes by the size of their group, and operations that run a kernel."""

    def __init__(self):
        super().__init__()
        self.collectives = Counter()
        self.bytes = Counter()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space = func.namespace
        name = func.overloadpacket.__name__
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
        for item in value:
            yield from tensors(item)


@contextlib.contextmanager
def fake_world(ranks):
    distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield parallel.World(0, ranks, torch.device("cpu"), None, None, timedelta(minutes=1))
    finally:
        distributed.destroy_process_group()


@contextlib.contextmanager
def fake_step(case):
    """Yield config, model, inputs, and a function that computes the gradient of a step."""
    config = case.config()
    compute = config.compute
    model = for_stage(config, config.stages[0]).model
    with fake_world(case.ranks) as world:
        with torch.device("meta"):
            pair = clip.CLIPModel(model, config.augment, compute.attention, compute.recompute)
        parallel._shard(pair, compute, parallel._mesh(world, compute.replicate))
        with FakeTensorMode(allow_non_fake_inputs=True):
            pair.to_empty(device="cpu")
            inputs = zeros(model, case.mask, case.local)
            autocast = contextlib.nullcontext()

            def backward():
                statistics = grad_cache.grad_cache_backward(
                    pair, inputs, case.accumulate, world.device, autocast, compute.loss_tile
                )
                mean_over_ranks(torch.stack(statistics), case.ranks)

            yield config, pair, inputs, backward


def traffic(case):
    """``collectives`` of a step: kind -> [count, GB]; and what ``auto`` was resolved to."""
    with fake_step(case) as (config, *_, backward), Counting() as counting:
        backward()
    counts = {kind: [n, round(counting.bytes[kind] / 1e9, 2)] for kind, n in sorted(counting.collectives.items())}
    return {"collectives": counts, "reshard": config.compute.reshard, "replicate": config.compute.replicate}


def memory(case):
    """GB at the peak of the passes of a step, and of the optimiser's step."""
    with fake_step(case) as (config, pair, inputs, backward):
        adamw = with_moments(pair, config)
        with tracked(pair, adamw, inputs) as passes:
            backward()
        with tracked(pair, adamw, inputs) as update:
            adamw.step()
    return {"passes": peak(passes), "optimiser": peak(update)}


def zeros(model, mask, local):
    """A batch of ``local`` pairs, captions without padding."""
    patches = torch.zeros(local, visible_patch_count(model.image, mask), 3 * model.image.patch**2, dtype=torch.uint8)
    keep = torch.zeros(patches.shape[:2], dtype=torch.int16)
    return patches, keep, torch.ones(local, model.text.length, dtype=torch.int32)


def with_moments(pair, config):
    """The optimiser after a step. The first one creates moments, for which DTensor propagates full shapes: under this
    fake mode the tracker would count those too."""
    adamw = parameter_groups.build(pair.named_parameters(), config.optim)
    for parameter in pair.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adamw.step()
    adamw.zero_grad(set_to_none=True)
    return adamw


@contextlib.contextmanager
def tracked(pair, adamw, inputs):
    tracker = FSDPMemTracker(pair, adamw)
    tracker.track_inputs(inputs)
    with tracker:
        # It follows one forward pass of the root at a time.
        hook = pair.register_forward_pre_hook(lambda *_: tracker.reset_mod_stats(), prepend=True)
        yield tracker
        hook.remove()


def peak(tracker):
    return round(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] / 1e9, 2)


def loss_operations(local, ranks, width, tile):
    """Kernels of the loss of ``local`` pairs on each of ``ranks`` ranks, forward and backward."""
    with fake_world(ranks), FakeTensorMode():
        features = [torch.zeros(local, width).requires_grad_() for _ in range(2)]
        scale = torch.zeros(1).requires_grad_()
        with Counting() as counting:
            contrastive_loss("clip", *features, scale, tile=tile)[0].backward()
    return counting.operations


def norm_operations(case):
    """Kernels of the norms of weights and of their change, for a metric line; none of them is per parameter."""
    with fake_step(case) as (config, pair, *_):
        adamw = with_moments(pair, config)
        with Counting() as counting:
            parameter_groups.weight_norms(adamw, case.ranks)
    return counting.operations


def compiled_graphs(accumulate, padding):
    """Graphs that dynamo traces in each of six steps of 8 ranks, three masked and three not; a graph break fails.

    ``padding``: of captions. With ``mask`` packed texts have another length in each step, rounded to the same one.
    """
    layer = {"model": {"size": "tiny", "text": {"padding": padding}}, "compute": {"compile": "yes"}}
    config = merge.merge([("rehearsal", layer)])
    config.compute.device = "cpu"
    config.compute.precision = "bf16"
    graphs = CompileCounter()
    counts = []
    compile_module = nn.Module.compile

    def compile_fully(block, **options):
        return compile_module(block, backend=graphs, fullgraph=True, **options)

    torch._dynamo.reset()
    with fake_world(NODE) as world, mock.patch.object(nn.Module, "compile", compile_fully):
        with torch.device("meta"):
            pair = clip.CLIPModel(config.model, config.augment, "sdpa")
        parallel.apply_parallelism(pair, world, config.compute)
        for number, mask in enumerate(["0.5"] * 3 + ["0"] * 3):
            inputs = zeros(config.model, mask, 8)
            inputs[2][0, -1 - number % 3 :] = 0
            before = graphs.frame_count
            grad_cache.grad_cache_backward(pair, inputs, accumulate, world.device, contextlib.nullcontext())
            counts.append(graphs.frame_count - before)
    return counts


PARTS = {str(case): partial(traffic, case) for case in CASES}
PARTS |= {f"memory of {case}": partial(memory, case) for case in CASES}
PARTS |= {
    f"loss of 128 pairs on 512 ranks, tile {tile}": partial(loss_operations, 128, 512, 1024, tile)
    for tile in (1024, 65_536)
}
PARTS |= {f"norms of {CASES[1]}": partial(norm_operations, CASES[1])}
PARTS |= {
    f"graphs of steps, accumulate {accumulate}, padding {padding}": partial(compiled_graphs, accumulate, padding)
    for accumulate, padding in ((1, "mask"), (4, "attend"))
}


if __name__ == "__main__":
    json.dump({name: PARTS[name]() for name in sys.argv[1:] or PARTS}, sys.stdout, indent=1)
