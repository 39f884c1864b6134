"""The calculated seconds of a step on GPUs, what would shorten it, and the loader processes that it needs."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flip.config.derived import for_stage, world_size
from flip.config.resolve import dataset_facts
from flip.config.schema import Config, Stage
from flip.model_costs import USUAL_PASSES, forward_passes, stage_flops
from flip.traffic import exposed_seconds, step_phases
from jobs.common.cli import command
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.text import hours_text, size
from jobs.planning import assumptions, throughput
from jobs.planning.assumptions import MARGIN, RECODED_SHORT, USUAL_WORKERS
from jobs.planning.core_speeds import Images
from jobs.planning.memory_fit import fit_reshard, fits_gpu

WORTH = 0.03
GAIN = 1.01
"""Share of a step that communication must take for advice, and the least factor of a change that it names."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: arithmetic, communication that it does not hide, and the wait for input after both.

    ``core_samples``: samples per second that a core is assumed to prepare. ``input_cores``: of a node, for loader
    processes so that its GPUs never wait. ``utilisation``: FLOPs without
    repetition, as a share of the peak, as ``mfu`` of metrics.
    """

    compute_seconds: float
    communication_seconds: float
    data_seconds: float
    input_cores: float
    utilisation: float
    core_samples: float

    @property
    def total(self) -> float:
        return self.compute_seconds + self.communication_seconds + self.data_seconds


def step_time(
    config: Config, stage: Stage, profile: ClusterProfile, images: Sequence[Images] = (), network: float = 1.0
) -> StepTime | None:
    """Seconds of a step of a resolved configuration; None without GPUs, or if their peak is unknown, as in fp32.

    Input = the batch of a node / (cores of its loaders * ``core_samples``), all of it hidden behind the step before.
    ``images``: of the training data, by default as their manifests say. ``network``: factor of its speed between nodes.
    With ``utilisation`` in the profile, arithmetic and communication take FLOPs / (peak * utilisation).
    """
    peak_known = profile.tflops and (config.compute.precision != "fp32" or profile.utilisation)
    if not config.resources.gpus or not peak_known:
        return None
    work = stage.batch * stage_flops(config, stage) / (world_size(config) * profile.tflops * 1e12)
    share = profile.utilisation or assumptions.arithmetic_share(config, stage, profile)
    compute = work * forward_passes(for_stage(config, stage).compute) / USUAL_PASSES / share
    exposed = 0.0
    if not profile.utilisation:
        exposed = _exposed(config, stage, profile, compute, network)
    speed = throughput.core_samples(config, stage, profile, images)
    loading = stage.batch / config.resources.nodes / speed  # seconds of one core
    busy = compute + exposed
    total = max(busy, loading / _loader_cores(config, profile))
    return StepTime(compute, exposed, total - busy, loading / busy, work / total, speed)


def _exposed(config: Config, stage: Stage, profile: ClusterProfile, compute: float, network: float) -> float:
    """Seconds of communication that ``compute`` seconds do not hide; 0 if the speed of a link is unknown."""
    ranks = world_size(config)
    asked = config.resources
    links = assumptions.links_of(config, profile)
    links = links._replace(network_gbps=network * links.network_gbps)
    if (asked.processes > 1 and not links.nvlink_gbps) or (asked.nodes > 1 and not links.network_gbps):
        return 0.0
    own = for_stage(config, stage)
    phases = step_phases(
        own.model, own.compute, stage.batch // ranks, ranks, own.optim.name, bool(stage.classification), stage.locked
    )
    return exposed_seconds(phases, compute, links)


def _loader_cores(config: Config, profile: ClusterProfile) -> float:
    """Cores of a node that its loaders can use: one per process, without those of the ranks' threads."""
    processes = config.resources.processes
    free = (profile.cpus_per_node or math.inf) - processes * config.compute.threads
    return max(1, min(processes * max(1, config.data.workers), free))


def _steps(config: Config, profile: ClusterProfile) -> list[tuple[Stage, StepTime]]:
    steps = ((stage, step_time(config, stage, profile)) for stage in config.stages)
    return [(stage, step) for stage, step in steps if step is not None]


def fit_cluster(requested: Config, config: Config, profile: ClusterProfile) -> None:
    """Set the fields of a resolved configuration that ``requested`` leaves to ``auto`` and a cluster decides:
    ``compute.reshard`` and ``data.workers``."""
    if requested.compute.reshard == "auto":
        fit_reshard(config, profile)
    if requested.data.workers < 0:
        fit_workers(config, profile)


def fit_workers(config: Config, profile: ClusterProfile) -> None:
    """Set ``data.workers`` to what GPUs need and a node has cores for; no more than the lanes of a rank."""
    steps = _steps(config, profile)
    if not profile.cpus_per_node or not steps:
        return
    processes = config.resources.processes
    lanes = config.data.lanes // world_size(config)
    room = (config.resources.cpus or profile.cpus_per_node // processes) - config.compute.threads
    needed = math.ceil(MARGIN * max(step.input_cores for _, step in steps) / processes)
    config.data.workers = max(1, min(max(USUAL_WORKERS, needed), room, lanes))


def input_warning(config: Config, profile: ClusterProfile) -> str:
    """What keeps the GPUs of a node idle: the run requests none, or the cores cannot feed them; empty: nothing."""
    if profile.gpus_per_node and not config.resources.gpus:
        gpus = profile.gpus_per_node
        return (
            f"resources.gpus is 0: the run trains on CPUs, though a node of {profile.name} has {gpus} GPUs. Set"
            f" resources: {{processes: {gpus}, gpus: {gpus}}}"
        )
    steps = _steps(config, profile)
    if not steps:
        return ""
    stage, step = max(steps, key=lambda row: row[1].data_seconds)
    if not step.data_seconds:
        return ""
    saving = recoding_advice(config, profile)
    if not saving:
        saving = "Use nodes with more cores or fewer GPUs"
    return (
        f"stage {stage.name}: GPUs wait for input for {100 * step.data_seconds / step.total:.0f} % of the time, which"
        f" the plan counts: a node needs {step.input_cores:.0f} cores for loader processes at"
        f" {throughput.described(config, stage, profile)}, and has {_loader_cores(config, profile):.0f}. {saving}"
    )


def recoding_advice(config: Config, profile: ClusterProfile) -> str:
    """The command that stores smaller images, and what it would save; empty if that is nothing, or unknown."""
    before = throughput.images_of(config)
    after = [throughput.recoded(each) for each in before]
    if after == before:
        return ""
    hours = _gpu_hours(config, profile, before)
    saved = hours - _gpu_hours(config, profile, after)
    if saved < WORTH * hours:
        return ""
    manifests = [each.manifest for each in config.data.sets] or [config.data.manifest]
    total = 0.0
    less = 0.0
    for facts, old, new in zip(dataset_facts(config), before, after, strict=True):
        total += facts.dataset_size * facts.mean_bytes
        less += facts.dataset_size * facts.mean_bytes * (1 - throughput.byte_share(old, new))
    manifest = next(name for name, old, new in zip(manifests, before, after, strict=True) if old != new)
    source = manifest or "MANIFEST"
    recode = command("shards", "recode", source, "--short", RECODED_SHORT, "--out", "NEW_FOLDER")
    return (
        f"Smaller images with restart markers would save about {hours_text(saved)} of {hours_text(hours)} GPU-hours and"
        f" {size(less)} of {size(total)}: {recode}"
    )


def _gpu_hours(config: Config, profile: ClusterProfile, images: Sequence[Images]) -> float:
    seconds = 0.0
    for stage in config.stages:
        step = step_time(config, stage, profile, images)
        if step is not None:
            seconds += step.total * stage.samples / stage.batch
    return seconds * world_size(config) / 3600


def advice(config: Config, profile: ClusterProfile) -> str:
    """One sentence on what would save communication, of the stage where it takes most; empty if it takes little."""
    steps = _steps(config, profile)
    if not steps:
        return ""
    stage, step = max(steps, key=lambda row: row[1].communication_seconds / row[1].total)
    share = step.communication_seconds / step.total
    if share < WORTH:
        return ""
    gains = []
    for description, other, network in _changes(config, profile):
        same = next(each for each in other.stages if each.name == stage.name)
        better = step_time(other, same, profile, network=network)
        if better is not None and better.utilisation > GAIN * step.utilisation:
            gains.append((better.utilisation, description))
    helps = ", ".join(f"{description} {100 * value:.1f} %" for value, description in sorted(gains, reverse=True))
    return (
        f"stage {stage.name}: communication takes {100 * share:.0f} % of a step, the utilisation is"
        f" {100 * step.utilisation:.1f} %;"
        + (f" expected with {helps}" if helps else " no single change that the plan knows would help")
    )


def changed(config: Config, replicate: int, reshard: str, nodes: int) -> Config:
    """A copy with other settings of communication."""
    other = copy.deepcopy(config)
    other.compute.replicate = replicate
    other.compute.reshard = reshard
    other.resources.nodes = nodes
    return other


def _changes(config: Config, profile: ClusterProfile) -> Iterator[tuple[str, Config, float]]:
    """Changes that may save communication and fit the GPUs: words, configuration, factor of the network's speed."""
    nodes = config.resources.nodes
    copies = config.compute.replicate
    settings = {
        f"compute.replicate={nodes} and compute.reshard=no": (nodes, "no", nodes),
        "compute.reshard=no": (copies, "no", nodes),
    }
    if nodes % 2 == 0 and (copies == 1 or copies % 2 == 0):
        few = max(1, copies // 2), config.compute.reshard, nodes // 2
        settings[f"resources.nodes={nodes // 2} (twice the pairs a GPU)"] = few
    for description, values in settings.items():
        other = changed(config, *values)
        if fits_gpu(other, profile):
            yield description, other, 1.0
    yield f"network_gbps={2 * assumptions.links_of(config, profile).network_gbps:g}", config, 2.0
