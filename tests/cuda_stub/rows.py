"""What runs on the stub: parts of a training, each a process that prints what it saw as JSON.

``python -m tests.cuda_stub.rows PART [OPTION ...]`` in the environment of ``build.py``. The parts compute nothing:
shapes, devices, waits, graphs, collectives, kernels and memory are those of a GPU.
"""

import contextlib
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import yaml
from torch import distributed
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh

from flip.checkpoint import saver, staging
from flip.common.host import Host
from flip.common.shutdown import CoordinatedStop
from flip.config import derived, merge
from flip.config.derived import StageSpan
from flip.config.resolve import dataset_facts, resolve_auto
from flip.distributed import parallel
from flip.evaluation.encoding.encoders import ModelEncoder
from flip.models import clip, transformer
from flip.monitoring.profiler import Profiler
from flip.monitoring.rank_counters import RankCounters
from flip.runs.rundir import RunDir
from flip.traffic import step_phases
from flip.training import anomaly, conversion, parameter_groups
from flip.training.compiled_code import CompiledCode
from flip.training.trainer import Trainer
from tests.cuda_stub import cudnn, stub
from tests.flip.distributed import rehearsal
from tests.harness.common import ROOT

LOCAL = 16
"""Pairs of a rank in a step of a compiled row."""
MICRO_BATCHES = 4


class Row(NamedTuple):
    """Steps of one model on ``ranks`` ranks of nodes with eight GPUs."""

    size: str
    recipe: str
    ranks: int

    def __str__(self):
        return f"{self.size}, recipe {self.recipe}, {self.ranks} ranks"

    def config(self):
        """A masked and an unmasked stage, with ``auto`` as ``submit`` resolves it."""
        stages = [
            {"name": name, "samples": 1 << 30, "batch": LOCAL * self.ranks, "mask": mask}
            for name, mask in (("masked", "0.5"), ("unmasked", "0"))
        ]
        processes = min(self.ranks, rehearsal.NODE)
        layer = {
            "model": {"size": self.size},
            "data": {"samples": 1 << 28, "sample_bytes": 20_000},
            "stages": stages,
            "resources": {"nodes": self.ranks // processes, "processes": processes, "gpus": processes},
        }
        layers = [(name, values) for name, values in recipe_layers(self.recipe)]
        config = merge.merge([*layers, ("row", layer)])
        return resolve_auto(config, Host(cores=96, memory=10**12, bf16=True, cuda=True), dataset_facts(config))


ROWS = tuple(
    Row(size, recipe, ranks)
    for size, recipe in (("H/14", "paper"), ("L/16", "paper"), ("B/16", "clip"))
    for ranks in (1, 8, 64)
)


def recipe_layers(name):
    """A recipe below the ones that it is based on."""
    values = yaml.safe_load((ROOT / "sweeps" / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))
    base = values.pop("base", None)
    if base:
        yield from recipe_layers(base)
    yield name, values


class Training:
    """One rank of a run: the trainer's own methods, without files and a loader."""

    train_step = Trainer.train_step
    allocate = Trainer.allocate
    choose_attention = Trainer.choose_attention

    def __init__(self, config, world, folder):
        self.config = config
        self.world = world
        self.samples_seen = 0
        self.step = 0
        self.stage_config = derived.for_stage(config, config.stages[0])
        self.coordinated_stop = CoordinatedStop(world.control_group, world.size, True)
        run = SimpleNamespace(anomalies=Path(folder) / "anomalies")
        self.guard = anomaly.NonFiniteGuard(run, 1, 0, 0.0, 10)
        self.model = self.allocate(self.stage_config, config.stages[0])

    def enter(self, stage):
        """What ``Trainer.enter`` and ``run_stage`` do at a border of stages."""
        before = self.model
        self.stage_config = derived.for_stage(self.config, stage)
        if self.optimizer_exists:
            self.model = self.allocate(self.stage_config, stage, before)
            conversion.copy_weights(before, self.model)
        self.choose_attention(stage)
        self.optimizer = parameter_groups.build(self.model.named_parameters(), self.config.optim)

    @property
    def optimizer_exists(self):
        return hasattr(self, "optimizer")


def batch(config, mask, local, number):
    """Pinned inputs. Captions have other lengths in every step; packed, they are padded to one of 32 lengths, here to
    the same one: another is a shape, for which blocks are compiled again."""
    patches, keep, tokens = rehearsal.zeros(config.model, mask, local)
    tokens[0, -1 - number % 3 :] = 0
    if config.model.text.causal:
        end = config.model.text.vocabulary - 1
        tokens[1:, 20] = end
        tokens[0, 3 + number % 3] = end
    fields = [field.pin_memory() for field in (patches, keep, tokens)]
    return SimpleNamespace(
        patches=fields[0],
        keep_indices=fields[1],
        tokens=fields[2],
        position_ids=None,
        targets=None,
        ids=torch.arange(local),
    )


def observe(training, stage, number):
    """One step, in which an operation that waits for the device is an error after the step that compiles."""
    local = LOCAL * training.config.compute.accumulate  # a micro-batch has the shapes of a plain step
    data = batch(training.stage_config, stage.mask, local, number)
    span = StageSpan(stage, 0, 1 << 30, 1 << 20)
    graphs = counters["stats"].get("unique_graphs", 0)
    before = len(stub.records()[0]) if training.world.size > 1 else 0
    training.coordinated_stop.poll(False, False)
    stub.reset()
    torch.cuda.set_sync_debug_mode("error" if number else "default")
    try:
        loss, _, norm = training.train_step(span, training.optimizer, data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    training.step += 1
    counted = stub.calls()
    seen = {
        "graphs": counters["stats"].get("unique_graphs", 0) - graphs,
        "waits": stub.waits(counted),
        "attention": stub.attention_kernels(counted),
        "cubins": {name: n for name, n in counted.items() if name.startswith("cubin ")},
        "spills": [name for name in counted if name.startswith("spill in ")],
        "kernels without attributes": counted.get("no attributes", 0),
        "triton": sum(n for name, n in counted.items() if name.startswith("triton_")),
        "devices": sorted({str(value.device) for value in (loss, norm)}),
    }
    if training.world.size > 1:
        seen["collectives"] = stub.collectives(before)
    return seen


def steps(row, compile="yes"):
    """Two stages of a model: plain and accumulated steps, a border, a save, an evaluation, a stop request.

    The model has all its blocks: they share their graphs, so each further block takes milliseconds of a step.
    """
    config = row.config()
    config.compute.compile = compile
    masked, unmasked = config.stages
    seen = {}
    with tempfile.TemporaryDirectory() as folder, stub.world(config.compute, row.ranks) as world:
        training = Training(config, world, folder)
        kernels = []
        with log_lines(kernels):
            training.enter(masked)
        seen["log"] = kernels
        seen["planned"] = planned(config, LOCAL)
        seen["steps"] = [observe(training, masked, number) for number in range(3)]
        config.compute.accumulate = MICRO_BATCHES
        seen["planned accumulated"] = planned(config, MICRO_BATCHES * LOCAL)
        seen["accumulated"] = [observe(training, masked, number) for number in range(2)]
        config.compute.accumulate = 1
        training.enter(unmasked)
        seen["unmasked"] = [observe(training, unmasked, number) for number in range(3)]
        training.coordinated_stop.poll(True, True)
        training.coordinated_stop.flush()
        seen["save"] = save(training)
        seen["evaluation"] = evaluate(training)
        seen["memory"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        if row.ranks > 1:
            entries, _ = stub.records()
            seen["timeouts"] = sorted({entry["timeout_ms"] for entry in entries})
    seen["breaks"] = {str(reason): n for reason, n in counters["graph_break"].items()}
    return seen


def planned(config, local):
    """Collectives of a step: those of the model of traffic, which the rehearsal's traces check, and that of the norm of
    the gradient over the ranks of a copy. Kind -> [count, GB]."""
    ranks = config.resources.nodes * config.resources.processes
    model = derived.for_stage(config, config.stages[0]).model
    count = Counter()
    moved = Counter()
    for phase in step_phases(model, config.compute, local, ranks):
        for each in phase.collectives:
            kind = f"{each.kind}s of {each.ranks}"
            count[kind] += phase.times * each.calls
            moved[kind] += phase.times * each.bytes
    if ranks > 1:
        count[f"reductions of {ranks // config.compute.replicate}"] += 1
    return {kind: [n, round(moved[kind] / 1e9, 2)] for kind, n in sorted(count.items())}


class log_lines(logging.Handler):  # noqa: N801 (a context manager)
    """Collect the lines of the attention's log."""

    def __init__(self, lines):
        super().__init__()
        self.lines = lines

    def emit(self, record):
        self.lines.append(record.getMessage())

    def __enter__(self):
        logging.getLogger("flip").addHandler(self)
        logging.getLogger("flip").setLevel(logging.INFO)

    def __exit__(self, *_):
        logging.getLogger("flip").removeHandler(self)


def save(training):
    """The state of a save in page-locked memory."""
    state = saver.model_state(training.model) | saver.optimizer_state(training.model, training.optimizer)
    shard = staging.StagedShard(state, 0, pinned=True)
    stub.reset()
    shard.fill(state)
    waits = stub.waits()
    pinned = all(tensor.is_pinned() for tensor in shard.tensors.values())
    return {"tensors": len(state), "GB": round(len(shard.data) / 1e9, 2), "pinned": pinned, "waits": waits}


def evaluate(training):
    """Both encoders of the fp32 copy."""
    config = training.stage_config

    def build():
        with torch.device("meta"):
            return clip.CLIPModel(config.model, config.augment, config.compute.attention)

    model = parallel.in_fp32(training.model, build, training.world, config.compute)
    data = batch(config, "0", 4, 0)
    encoder = ModelEncoder(model, lambda _: data.tokens.numpy(), config.model.image, training.world.device)
    waits = []
    dtypes = []
    for encode in (partial(encoder.image, data.patches, data.ids), partial(encoder.text, ["a"] * 4)):
        encode()
        stub.reset()
        dtypes.append(str(encode().dtype))
        waits.append(stub.waits())
    weights = sorted({str(parameter.dtype) for parameter in model.parameters()})
    return {"outputs": dtypes, "weights": weights, "waits": waits}


def one_step():
    """A compiled step of H/14, whose kernels are the widest, on eight ranks; fewer blocks have the same graphs."""
    config = Row("H/14", "paper", 8).config()
    for tower in (config.model.image, config.model.text):
        tower.layers = 2
    with tempfile.TemporaryDirectory() as folder, stub.world(config.compute, 8) as world:
        training = Training(config, world, folder)
        training.enter(config.stages[0])
        return observe(training, config.stages[0], 0)


def compiled_code(local_rank, run):
    """The code of one compiled step of H/14 by the rank ``local_rank`` of a node, and its copy in the run directory.

    The copy of an earlier process is loaded first, as in a later attempt.
    """
    config = Row("H/14", "paper", 8).config()
    for tower in (config.model.image, config.model.text):
        tower.layers = 2
    caches = [Path(os.environ[name]) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")]
    with (
        tempfile.TemporaryDirectory() as folder,
        stub.world(config.compute, 8, local_rank=int(local_rank)) as world,
    ):
        code = CompiledCode(RunDir(run), world)
        training = Training(config, world, folder)
        training.enter(config.stages[0])
        training.span = StageSpan(config.stages[0], 0, 1 << 30, 1 << 20)
        with mock.patch.dict(os.environ, LOCAL_RANK="0"):  # the rank of a node that loads
            code.start_stage(training)
        before = size_of(*caches)
        began = time.monotonic()
        observe(training, config.stages[0], 0)
        seconds = time.monotonic() - began
        after = size_of(*caches)
        code.save(training)
    hits = {name: n for name, n in counters["inductor"].items() if name.startswith("fxgraph_cache")}
    hits |= {name: n for name, n in counters["aot_autograd"].items() if name.startswith("autograd_cache")}
    return {
        "device": str(world.device),
        "cache": hits,
        "loaded": before,
        "compiled": [late - early for late, early in zip(after, before, strict=True)],
        "copy": size_of(RunDir(run).compiled),
        "seconds": round(seconds, 1),
    }


def size_of(*folders):
    """[files, bytes] below the folders."""
    sizes = [path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file()]
    return [len(sizes), sum(sizes)]


def traffic(case):
    """Collectives and peak memory of a step of the rehearsal's case, not compiled."""
    from flip.distributed.collectives import mean_over_ranks
    from flip.training import grad_cache

    config = case.config()
    compute = config.compute
    compute.compile = "no"
    with stub.world(compute, case.ranks) as world:
        with torch.device("meta"):
            model = clip.CLIPModel(config.model, config.augment, compute.attention, compute.recompute)
        parallel.apply_parallelism(model, world, compute)
        parallel.separate_reductions(model, world)
        adamw = parameter_groups.build(model.named_parameters(), config.optim)
        inputs = [field.pin_memory() for field in rehearsal.zeros(config.model, case.mask, case.local)]
        for _ in range(2):  # the first step creates the moments
            before = len(stub.records()[0])
            adamw.zero_grad(set_to_none=True)
            torch.cuda.reset_peak_memory_stats()
            statistics = grad_cache.grad_cache_backward(
                model, inputs, case.accumulate, world.device, parallel.autocast(compute, world), compute.loss_tile
            )
            mean_over_ranks(torch.stack(statistics), case.ranks)
            seen = stub.collectives(before)
            peak = torch.cuda.max_memory_allocated()
            adamw.found_inf = torch.zeros((), device="cuda")
            adamw.step()
        return {"collectives": seen, "GB": round(peak / 1e9, 2)}


def tiny(compile="no", ranks=8):
    """The configuration of a row with the smallest model."""
    config = Row("tiny", "paper", ranks).config()
    config.compute.compile = compile
    return config


def start():
    """``parallel.start`` on one rank with real groups, what a metric line gathers, and both profiles of steps."""
    config = tiny(ranks=1)
    reports = []

    def connecting(what):
        reports.append(what)
        return contextlib.nullcontext()

    seen = {}
    with tempfile.TemporaryDirectory() as folder, stub.world(config.compute, 1, connecting=connecting) as world:
        seen["device"] = str(world.device)
        seen["bound"] = str(distributed.group.WORLD.bound_device_id)
        seen["connecting"] = reports
        counters = SimpleNamespace(flat=lambda: {"reads": 1.0, "retries": 0.0})
        ranks = RankCounters(world, SimpleNamespace(counters=lambda: counters), None)
        seen["totals"] = [type(value).__name__ for value in ranks.totals([1.0, 2.0])]
        training = Training(config, world, folder)
        training.enter(config.stages[0])
        profiler = Profiler(Path(folder) / "traces", 1, 2, world.device, 0, 1, 1.0)
        for number in range(4):
            training.span = StageSpan(config.stages[0], 0, 1 << 30, 1 << 20)
            profiler.before_step(training)
            observe(training, config.stages[0], number)
            profiler.step(training)
            training.samples_seen += config.stages[0].batch
        seen["traces"] = len(list((Path(folder) / "traces").iterdir()))
        seen["communication"] = profiler.communication
    return seen


def fall_back():
    """The kernels of a stage if cuDNN accepts its shapes and has no plan for them."""
    config = tiny(ranks=1)
    lines = []
    with tempfile.TemporaryDirectory() as folder, stub.world(config.compute, 1) as world, log_lines(lines):
        Training(config, world, folder).enter(config.stages[0])
    return lines


def kernels(attention):
    """The attention kernels of a step with this value of ``compute.attention``, and the log's line."""
    config = tiny(ranks=1)
    config.compute.attention = attention
    lines = []
    with tempfile.TemporaryDirectory() as folder, stub.world(config.compute, 1) as world, log_lines(lines):
        training = Training(config, world, folder)
        training.enter(config.stages[0])
        return {"log": lines, "step": observe(training, config.stages[0], 0)["attention"]}


def with_defect(name):
    """Two steps of the smallest model with something that must not be in a step; they end with an error or show it."""
    config = tiny("yes" if name == "graph break in a block" else "no", ranks=64)
    with tempfile.TemporaryDirectory() as folder, stub.world(config.compute, 64) as world, DEFECTS[name]():
        training = Training(config, world, folder)
        training.enter(config.stages[0])
        seen = [observe(training, config.stages[0], number) for number in range(2)]
    return seen[1] | {"breaks": {str(reason): n for reason, n in counters["graph_break"].items()} or "none"}


def _norm(compute):
    """Replace the norm of the gradient by a function of it."""
    original = parameter_groups.gradient_norm
    return mock.patch.object(parameter_groups, "gradient_norm", lambda model: compute(original(model)))


def _broken_block():
    forward = transformer.MLP.forward

    def with_break(self, x):
        torch._dynamo.graph_break()
        return forward(self, x)

    return mock.patch.object(transformer.MLP, "forward", with_break)


def _wrong_mesh():
    return mock.patch.object(parallel, "_mesh", lambda world, copies: init_device_mesh("cuda", (world.size,)))


DEFECTS = {
    "none": contextlib.nullcontext,
    "tensor of the CPU in the step": partial(_norm, lambda norm: norm + torch.ones(2)[:1]),
    "item in the step": partial(_norm, lambda norm: norm + norm.item()),
    "copy from pageable memory": partial(_norm, lambda norm: norm + torch.ones(1).to("cuda", non_blocking=True)[0]),
    "graph break in a block": _broken_block,
    "mesh over all ranks": _wrong_mesh,
}

PARTS = {str(row): partial(steps, row) for row in ROWS}
PARTS |= {
    f"{row}, not compiled": partial(steps, row, "no")
    for row in (Row("tiny", "paper", 8), Row("tiny", "clip", 64), Row("tiny", "paper", 1))
}
PARTS |= {"compiled code": compiled_code}
PARTS |= {"start": start, "fall-back": fall_back, "one compiled step": one_step}
PARTS |= {f"attention {name}": partial(kernels, name) for name in ("sdpa", "flash", "cudnn", "efficient")}
PARTS |= {f"defect: {name}": partial(with_defect, name) for name in DEFECTS}
PARTS |= {f"traffic of {case}": partial(traffic, case) for case in rehearsal.CASES}


def main(name, *options):
    warnings.filterwarnings("ignore")
    if name != "fall-back":
        cudnn.install()
    print(json.dumps(PARTS[name](*options), indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
