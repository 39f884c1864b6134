"""The paper's largest run on 512 GPUs, by arithmetic alone: the same numbers on every machine.

The arithmetic is that of the plan (``jobs.planning.run_cost``, ``flip.model_costs``, ``flip.checkpoint.manager``).
benchmarks/scale.md has the sources.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.lib import interruptions, synthetic
from benchmarks.lib.interruptions import Life
from benchmarks.lib.results import rounded
from flip import model_costs
from flip.checkpoint.manager import MIN_SECONDS
from flip.common.host import Host
from flip.config.derived import buffer_bytes, for_stage, world_size
from flip.config.finish import finish
from flip.config.schema import Config, Stage
from flip.data.manifest.manifest import BLOCK
from flip.data.order import SampleOrder
from flip.data.prefetch import MAX_LOOKAHEAD, THREADS
from flip.data.storage.retry import SHARE
from flip.traffic import step_phases
from jobs.common.cluster_profile import ClusterProfile, load_profile
from jobs.common.paths import SWEEPS
from jobs.planning import memory_fit
from jobs.planning.assumptions import links_of
from jobs.planning.run_cost import estimate
from jobs.planning.step_time import changed, step_time
from jobs.sweeps import sweep_file

SWEEP = SWEEPS / "joint_scaling.yaml"
SETTINGS = ("resources.nodes=64", "data.samples=2e9", f"data.sample_bytes={synthetic.SAMPLE_BLOCKS * BLOCK}")
GETS = 5500
PUTS = 3500
"""Requests per second that S3 guarantees for each partitioned prefix (benchmarks/scale.md, source 1)."""
USD_PER_GET = 0.0004 / 1000
"""S3's list price (docs/laion.md, source 10)."""
PACE = 85.0
"""MB/s of one connection to S3: 85 to 90 in its guide (source 2)."""
LLAMA = {"interruptions": 419, "days": 54, "gpus": 16_384}
"""Unexpected interruptions of the pre-training of Llama 3 405B (source 3)."""
START = 300.0
WRITTEN = 10.0
"""Assumed: seconds from the start of an attempt to its first step, and from a save's stall until its checkpoint is
complete."""
COSTS = {"background": 1.0, "blocking": 10.0}
"""Assumed: seconds for which a save blocks steps."""
FIXED = {"1_min": 60.0, "5_min": 300.0, "15_min": 900.0, "60_min": 3600.0}


def planned() -> tuple[Config, ClusterProfile]:
    """The run ``joint`` of the sweep on 64 nodes of the profile h100, with 2e9 samples, resolved and valid."""
    profile = load_profile("h100")
    (run,) = sweep_file.read_sweep(SWEEP, SETTINGS, only="joint").runs
    node = Host(profile.cpus_per_node, int(1e9 * profile.memory_gb), bf16=True, cuda=True)
    return finish(run.config, node).config, profile


def arithmetic(config: Config, profile: ClusterProfile, speeds: dict[str, float]) -> dict[str, Any]:
    """All figures. ``speeds``: those of ``measured``."""
    run = the_run(config, profile)
    figures = {
        "run": run,
        "step": {name: step(*form) for name, form in forms(config, profile).items()},
        "storage": storage(config, run, speeds),
        "host": host(config),
        "device": {"card_gb": profile.gpu_bytes / 1e9} | {stage.name: device(config, stage) for stage in config.stages},
        "checkpoint": checkpoint(config, speeds),
        "goodput": {name: goodput(life) for name, life in cases(config).items()},
    }
    return shorter(figures)


def the_run(config: Config, profile: ClusterProfile) -> dict[str, Any]:
    plan = estimate(config, profile)
    seconds = plan.devices[0].step_seconds or 0.0
    return {
        "parameters": plan.parameters["total"],
        "gpus": plan.numbers["world"],
        "batch": config.stages[0].batch,
        "utilisation": 100 * plan.devices[0].step.utilisation if plan.devices[0].step else 0.0,
        "samples": config.data.samples,
        "shards": synthetic.SHARDS,
        "steps": plan.cost.steps,
        "step_s": seconds,
        "samples_per_s": config.stages[0].batch / seconds,
        "passes": plan.cost.samples / config.data.samples,
        "gpu_hours": plan.cost.gpu_hours,
        "hours": (plan.cost.gpu_hours or 0.0) / plan.numbers["world"],
    }


def forms(config: Config, profile: ClusterProfile) -> dict[str, tuple[Config, ClusterProfile]]:
    """Name -> the run with other settings of communication, on other numbers of nodes, or another network."""
    return {
        "copy_a_node": (config, profile),
        "copy_a_node_reshard": (changed(config, 64, "yes", 64), profile),
        "one_copy": (changed(config, 1, "no", 64), profile),
        "one_copy_reshard": (changed(config, 1, "yes", 64), profile),
        "half_the_nodes": (changed(config, 32, "no", 32), profile),
        "quarter_of_the_nodes": (changed(config, 16, "no", 16), profile),
        "quarter_of_the_network": (config, replace(profile, network_gbps=profile.network_gbps / 4)),
    }


def step(config: Config, profile: ClusterProfile) -> dict[str, float]:
    """Seconds of a masked step, its collectives, and GB that a rank exchanges with ranks on other nodes."""
    stage = config.stages[0]
    ranks = world_size(config)
    local = stage.batch // ranks
    phases = step_phases(for_stage(config, stage).model, config.compute, local, ranks, config.optim.name)
    links = links_of(config, profile)
    calls = [(phase.times, each) for phase in phases for each in phase.collectives]
    parts = step_time(config, stage, profile)
    assert parts is not None  # the profile names its GPU
    return {
        "pairs_a_gpu": local,
        "collectives": sum(times * each.calls for times, each in calls),
        "gb_between_nodes": sum(times * each.bytes for times, each in calls if each.nodes(links) > 1) / 1e9,
        "all_ms": 1000 * sum(times * each.seconds(links) for times, each in calls),
        "exposed_ms": 1000 * parts.communication_seconds,
        "arithmetic_ms": 1000 * parts.compute_seconds,
        "step_ms": 1000 * parts.total,
        "utilisation": 100 * parts.utilisation,
    }


def storage(config: Config, run: dict[str, Any], speeds: dict[str, float]) -> dict[str, Any]:
    """Average load of training on a bucket."""
    data = config.data

    def gets(chunk: int) -> float:
        """A chunk is one read, and one more if a shard ends in it (never with R = 1)."""
        return run["samples_per_s"] * (1 / chunk + (run["shards"] / data.samples if chunk > 1 else 0))

    bytes_per_s = run["samples_per_s"] * data.sample_bytes
    return {
        "read_mb": data.chunk * data.sample_bytes / 1e6,
        "gets_per_s": gets(data.chunk),
        "of_one_prefix": gets(data.chunk) / GETS,
        "with_second_requests": gets(data.chunk) * (1 + SHARE),
        "gets_per_s_at_64": gets(64),
        "gets_per_s_one_by_one": gets(1),
        "prefixes_one_by_one": math.ceil(gets(1) / GETS),
        "gb_per_s": bytes_per_s / 1e9,
        "gbit_per_s_a_node": 8 * bytes_per_s / 1e9 / config.resources.nodes,
        "connections_needed": math.ceil(bytes_per_s / 1e6 / PACE),
        "threads": run["gpus"] * data.workers * THREADS,
        "cores_a_node": run["samples_per_s"] / config.resources.nodes / speeds["samples_per_s_a_core"],
        "gets": gets(data.chunk) * run["hours"] * 3600,
        "gets_usd": gets(data.chunk) * run["hours"] * 3600 * USD_PER_GET,
        "terabytes": run["passes"] * data.samples * data.sample_bytes / 1e12,
    }


def host(config: Config) -> dict[str, Any]:
    """Lanes, and memory of a node."""
    data = config.data
    ranks = world_size(config)
    stream = SampleOrder(config.seed, data.samples, data.chunk, data.block, data.lanes)
    loader = max(model_costs.loader_memory(config, stage) for stage in config.stages)
    usual = buffer_bytes(data.lanes, data.block, data.chunk, data.sample_bytes) * (1.5 + MAX_LOOKAHEAD / 2) / 1.5
    return {
        "lanes": data.lanes,
        "lanes_a_rank": data.lanes // ranks,
        "workers": data.workers,
        "lane_block_mb": stream.block_samples * data.sample_bytes / 1e6,
        "buffer_gb": usual / 1e9,
        "loader_gb_a_rank": loader / 1e9,
        "order_mb_a_rank": synthetic.held_bytes(stream, ranks) / 1e6,
        "saving_mb_a_rank": model_costs.checkpoint_memory(config) / 1e6,
        "node_gb": memory_fit.host_bytes(config) / 1e9,
        "worlds": sum(1 for ranks in range(1, data.lanes + 1) if data.lanes % ranks == 0),
        "most_ranks": data.lanes,
    }


def device(config: Config, stage: Stage) -> dict[str, float]:
    """Gigabytes of a rank's GPU: the parts, and the total without ``compute.recompute``."""
    parts = model_costs.stage_memory(config, stage)
    saving_nothing = copy.deepcopy(config)
    saving_nothing.compute.recompute = "no"
    activations = sum(parts.get(part, 0) for part in ("image_activations", "text_activations", "temporary"))
    state = parts["weights"] + parts["moments"] + parts.get("gradients", 0) + parts.get("gathered", 0)
    return {
        "total_gb": parts["total"] / 1e9,
        "state_gb": state / 1e9,
        "activations_gb": activations / 1e9,
        "loss_gb": parts.get("loss", 0) / 1e9,
        "all_kept_gb": model_costs.stage_memory(saving_nothing, stage)["total"] / 1e9,
    }


def checkpoint(config: Config, speeds: dict[str, float]) -> dict[str, Any]:
    """Size of a checkpoint, and how long a rank copies and writes its part."""
    ranks = world_size(config)
    rank = model_costs.state_bytes(config) // ranks
    return {
        "gigabytes": rank * ranks / 1e9,
        "megabytes_a_rank": rank / 1e6,
        "files": ranks + 1,
        "puts_s_at_limit": (ranks + 1) / PUTS,
        "stall_s": rank / 1e6 / speeds["copied_mb_per_s"],
        "written_s": rank / 1e6 / speeds["written_mb_per_s"],
        "least_interval_s": MIN_SECONDS,
        "kept": config.checkpoint.keep + len(config.stages),
    }


def cases(config: Config) -> dict[str, Life]:
    """Name -> scenario: how often a run is interrupted, what a save costs."""
    gpus = world_size(config)
    failing = LLAMA["days"] * 86_400 * LLAMA["gpus"] / LLAMA["interruptions"] / gpus
    between = {"2_h": 7200.0, "8_h": 28_800.0, "24_h": 86_400.0, "failures": failing}
    return {
        f"{name}_{how}": Life(seconds, START, cost, WRITTEN)
        for name, seconds in between.items()
        for how, cost in COSTS.items()
    }


def goodput(life: Life) -> dict[str, float]:
    """Goodput in per cent: with our interval, with fixed ones, at best; and losses that do not depend on the
    interval."""
    interval = interruptions.interval_of_known_costs(life)
    best = interruptions.optimum(life)
    return {
        "between_h": life.between / 3600,
        "ours_s": interval,
        "ours": 100 * interruptions.goodput(life, interval),
        "best_s": best,
        "best": 100 * interruptions.goodput(life, best),
        **{name: 100 * interruptions.goodput(life, every) for name, every in FIXED.items()},
        "told_before": 100 * math.exp(-life.start / life.between),
    }


def measured() -> dict[str, float]:
    """Results of other benchmarks: samples that a core decodes and crops, MB that a rank copies and writes per second
    (two ranks on two cores)."""

    def read(name: str) -> Any:
        return json.loads((Path(__file__).parents[1] / "results" / f"{name}.json").read_text(encoding="utf-8"))

    passes = read("stream")["sets"]["384 px"]["measured"]["S3 to batch on one core"]
    pipelines = {row["pipeline"]: row for row in passes}
    ways = {row["way"]: row for row in read("checkpoint")["cases"] if row["ranks"] == 2}
    return {
        "samples_per_s_a_core": pipelines["ours, mask 0.5"]["samples_per_s"],
        "copied_mb_per_s": rounded(ways["background"]["megabytes"] / 2 / ways["background"]["stall_s"]),
        "written_mb_per_s": rounded(ways["blocking"]["megabytes"] / 2 / ways["blocking"]["written_s"]),
    }


def shorter(value: Any) -> Any:
    """The same with all numbers rounded to four significant digits."""
    if isinstance(value, dict):
        return {name: shorter(inner) for name, inner in value.items()}
    if isinstance(value, float):
        return rounded(value)
    return value
