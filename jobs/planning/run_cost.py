"""The computed cost of a run: FLOPs, GPU-hours, wall-clock time, money."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from flip.config.derived import at_world, for_stage, usable_nodes, world_size, world_sizes
from flip.config.schema import Config, Stage
from flip.config.validate import plan_numbers
from flip.model_costs import USUAL_PASSES, forward_passes, parameters, stage_flops, stage_memory
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.text import count, formatted, hours_text
from jobs.planning import assumptions, throughput
from jobs.planning.step_time import StepTime, step_time


@dataclass(frozen=True)
class Cost:
    """Totals, which add up over stages and runs. ``gpu_hours``: 0 without GPUs, None if their peak is unknown.
    ``price``: None without a price per GPU-hour."""

    samples: int
    steps: int
    flops: float
    gpu_hours: float | None
    price: float | None

    def cells(self) -> dict[str, Any]:
        """As cells of a table; without a price if there is none. A program has neither samples nor FLOPs."""
        cells: dict[str, Any] = {"samples": None, "steps": None, "FLOPs": None}
        if self.samples:
            cells = {"samples": count(self.samples), "steps": f"{self.steps:,}", "FLOPs": f"{self.flops:.2e}"}
        cells["GPU-hours"] = None
        if self.gpu_hours is not None:
            cells["GPU-hours"] = hours_text(self.gpu_hours)
        if self.price is not None:
            cells["price"] = formatted(self.price, ",.0f")
        return cells


@dataclass(frozen=True)
class Device:
    """One rank in one stage: bytes at the peak of a step (``flip.model_costs.stage_memory``), and computed seconds of a
    step (None if unknown), on GPUs with their parts (``StepTime``)."""

    memory: dict[str, int]
    step_seconds: float | None
    step: StepTime | None = None

    def as_dict(self) -> dict[str, Any]:
        parts = {}
        if self.step is not None:
            parts = asdict(self.step)
        return {"memory": self.memory, "step_seconds": self.step_seconds, **parts}


@dataclass(frozen=True)
class Estimate:
    """The numbers of one run: those of ``plan_numbers``, parameters, and per stage its cost and its device.

    ``wall_hours``: of all steps, without start-up, saves and evaluation; None if unknown. ``attempts``: jobs of the
    run's wall limit that this takes; locally there is no limit.
    """

    parameters: dict[str, int]
    numbers: dict[str, Any]
    stages: list[Cost]
    devices: list[Device]
    cost: Cost
    wall_hours: float | None
    attempts: int | None
    nodes: list[str] = field(default_factory=list)
    """What a range of nodes and spares mean, a line each."""

    def as_dict(self) -> dict[str, Any]:
        rows = zip(self.numbers["stages"], self.stages, self.devices, strict=True)
        stages = [row | asdict(cost) | device.as_dict() for row, cost, device in rows]
        known_numbers: dict[str, Any] = {
            "parameters": self.parameters,
            "wall_hours": self.wall_hours,
            "attempts": self.attempts,
        }
        if self.nodes:
            known_numbers["nodes"] = self.nodes
        return {**self.numbers, **known_numbers, "stages": stages, "cost": asdict(self.cost)}


def estimate(config: Config, profile: ClusterProfile) -> Estimate:
    """The cost of a resolved, valid configuration on a cluster.

    Wall-clock time on CPUs = samples * training FLOPs per pair / (threads of all ranks * ``core_gflops``). GPU-hours =
    steps * GPUs * ``StepTime.total``. Training costs 3 forward passes, or 4 if micro-batches or recomputed blocks
    repeat one; the FLOPs of the plan are without repetition. Samples are whole batches. A run that extends another one
    costs what follows after its checkpoint.
    """
    numbers = plan_numbers(config)
    stages = []
    devices = []
    times = list[float | None]()
    first = 0
    if config.init.extend:
        first = config.init.samples
    for stage, row in zip(config.stages, numbers["stages"], strict=True):
        done = min(max(first - row["start"], 0), row["end"] - row["start"])
        samples = row["end"] - row["start"] - done
        steps = row["steps"] - done // row["batch"]
        work = float(samples * stage_flops(config, stage))
        step = step_time(config, stage, profile)
        hours = None
        price = None
        seconds = None
        if not config.resources.gpus:
            hours = 0.0
            seconds = samples / stage.batch * (_step_seconds(config, stage, profile) or 0.0)
        elif step is not None:
            seconds = steps * step.total
            hours = seconds * numbers["world"] / 3600
            price = None
            if profile.price_per_gpu_hour:
                price = hours * profile.price_per_gpu_hour
        times.append(seconds)
        stages.append(Cost(samples, steps, work, hours, price))
        devices.append(Device(stage_memory(config, stage), seconds / steps if seconds and steps else None, step))
    wall = None
    if None not in times:
        wall = sum(filter(None, times)) / 3600
    if profile.kind == "local":
        limit = math.inf
    else:
        limit = config.resources.hours
    attempts = None
    if wall is not None:
        attempts = max(1, math.ceil(wall / limit))
    lines = [*_range(config, profile), *_spares(config, wall)]
    return Estimate(parameters(config.model), numbers, stages, devices, total(stages), wall, attempts, lines)


def _range(config: Config, profile: ClusterProfile) -> Iterator[str]:
    """Of each number of nodes of a range: its ranks, micro-batches, and the seconds of a step of each stage."""
    if not config.resources.least_nodes:
        return
    for nodes, ranks in zip(usable_nodes(config), world_sizes(config), strict=True):
        other = at_world(config, ranks)
        seconds = [_step_seconds(other, stage, profile) for stage in other.stages]
        speeds = [
            f"{stage.name} {stage.batch / time:,.0f} samples/s"
            for stage, time in zip(other.stages, seconds, strict=True)
            if time
        ]
        accumulated = ""
        if other.compute.accumulate > 1:
            accumulated = f", {other.compute.accumulate} micro-batches"
        yield f"{nodes}: {ranks} ranks{accumulated}" + "".join(f", {speed}" for speed in speeds)


def _step_seconds(config: Config, stage: Stage, profile: ClusterProfile) -> float | None:
    """Computed seconds of a step; None if they are unknown."""
    if config.resources.gpus:
        step = step_time(config, stage, profile)
        return None if step is None else step.total
    again = forward_passes(for_stage(config, stage).compute) / USUAL_PASSES
    speed = 1e9 * assumptions.core_gflops(config, stage, profile) * config.compute.threads * world_size(config)
    return again * stage.batch * stage_flops(config, stage) / speed


def _spares(config: Config, wall_hours: float | None) -> Iterator[str]:
    """What the spare nodes add to the nodes that work."""
    resources = config.resources
    if not resources.spares:
        return
    share = 100 * resources.spares / resources.nodes
    hours = ""
    if wall_hours is not None:
        hours = f", {resources.spares * wall_hours:,.1f} node-hours"
    yield f"{resources.spares} spare: {share:.0f} % more nodes than work{hours}"


def total(costs: Iterable[Cost]) -> Cost:
    """The sum. GPU-hours are None if any part has None; the price is that of the parts with GPUs."""
    costs = list(costs)

    def add(values: list[float | None]) -> float | None:
        if not values or None in values:
            return None
        return sum(v for v in values if v is not None)

    return Cost(
        sum(c.samples for c in costs),
        sum(c.steps for c in costs),
        sum(c.flops for c in costs),
        add([c.gpu_hours for c in costs]),
        add([c.price for c in costs if c.gpu_hours != 0]),
    )


def makespan(hours: Sequence[float | None], profile: ClusterProfile) -> float | None:
    """Hours until runs of these lengths have ended, if as many run at once as the profile admits; None if unknown."""
    known_hours = [length for length in hours if length is not None]
    if not known_hours or len(known_hours) < len(hours):
        return None
    at_once = profile.parallel or (1 if profile.kind == "local" else len(known_hours))
    if len(known_hours) > 1:
        return max(*known_hours, sum(known_hours) / at_once)
    return known_hours[0]


def assumption(profile: ClusterProfile, gpus: bool = True) -> str:
    """The assumption behind GPU-hours and wall-clock times, in words. ``gpus``: whether any run uses them."""
    rest = "; ".join(["start-up, saves and evaluation are not included", *assumptions.remarks(profile)])
    if not gpus:
        return f"wall-clock time at {assumptions.described_cores(profile)}; {rest}"
    if not profile.tflops:
        return f"no GPU-hours: the profile {profile.name} names neither a known gpu nor peak_tflops"
    if profile.utilisation:
        peak = f"of {profile.tflops:g} TFLOP/s ({profile.gpu or 'a GPU'})"
        return f"GPU-hours at an assumed {100 * profile.utilisation:g} % {peak}, the profile's utilisation; {rest}"
    if not assumptions.uses_measured_gpu(profile):
        rest = f"none of it was measured on GPUs; {rest}"
    return (
        f"GPU-hours of runs in bf16 from arithmetic at {assumptions.described_arithmetic(profile)},"
        f" {assumptions.described_links(profile)}, and input at {throughput.origin(profile)}; {rest}"
    )
