"""What a run will cost, by arithmetic: FLOPs, GPU-hours at an assumed utilisation, money."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from flip import flops
from flip.config.schema import Config
from flip.config.validate import plan_numbers
from jobs.profile import Profile


@dataclass(frozen=True)
class Cost:
    """Sums that add up over stages and runs. GPU-hours and price are None where the profile cannot tell."""

    samples: int
    steps: int
    flops: float
    gpu_hours: float | None
    price: float | None


@dataclass(frozen=True)
class Estimate:
    """The numbers of one run: those of ``plan_numbers``, parameters, and per stage FLOPs and GPU-hours."""

    parameters: dict[str, int]
    numbers: dict[str, Any]
    stages: list[Cost]
    cost: Cost

    def as_dict(self) -> dict[str, Any]:
        stages = [row | asdict(cost) for row, cost in zip(self.numbers["stages"], self.stages, strict=True)]
        return {**self.numbers, "parameters": self.parameters, "stages": stages, "cost": asdict(self.cost)}


def estimate(config: Config, profile: Profile) -> Estimate:
    """The cost of a resolved, valid configuration on a cluster.

    GPU-hours = samples * training FLOPs per pair / (peak * utilisation), training being 3 times the forward pass
    (the assumption of all our plans). Samples are those really drawn: whole batches.
    """
    numbers = plan_numbers(config)
    stages = []
    for stage in numbers["stages"]:
        samples = stage["end"] - stage["start"]
        work = float(samples * flops.training_flops(config.model, stage["mask"], stage["positions"])["total"])
        stages.append(_cost(samples, stage["steps"], work, profile if config.resources.gpus else None))
    return Estimate(flops.parameters(config.model), numbers, stages, total(stages))


def _cost(samples: int, steps: int, work: float, profile: Profile | None) -> Cost:
    if profile is None or not profile.peak_tflops:
        return Cost(samples, steps, work, None, None)
    hours = work / (profile.peak_tflops * 1e12 * profile.utilisation) / 3600
    price = hours * profile.price_per_gpu_hour if profile.price_per_gpu_hour else None
    return Cost(samples, steps, work, hours, price)


def total(costs: Iterable[Cost]) -> Cost:
    """The sum; an unknown part makes a sum unknown."""
    costs = list(costs)

    def add(values: list[float | None]) -> float | None:
        return None if not values or None in values else sum(v for v in values if v is not None)

    return Cost(
        sum(c.samples for c in costs),
        sum(c.steps for c in costs),
        sum(c.flops for c in costs),
        add([c.gpu_hours for c in costs]),
        add([c.price for c in costs]),
    )


def assumption(profile: Profile) -> str:
    """The words that go with every number of GPU-hours."""
    if not profile.peak_tflops:
        return f"no GPU-hours: the profile {profile.name} names no peak_tflops"
    return (
        f"GPU-hours at an assumed {100 * profile.utilisation:g} % of {profile.peak_tflops:g} TFLOP/s"
        f" ({profile.gpu or 'a card'}; the assumption of all our plans)"
    )
