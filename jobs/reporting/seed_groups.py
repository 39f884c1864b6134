"""Groups runs that differ only in their seed, as to results: the rows of a results table."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from flip import model_costs
from flip.config.identity import UNHASHED, generic_key
from flip.config.schema import ImageTower, Model, TextTower
from flip.evaluation.metrics.result_files import precision
from flip.evaluation.metrics.score import Score, score_of
from flip.monitoring.results import Outcome, set_roles, stages_of
from flip.runs.rundir import read_lenient
from jobs.common.text import percent
from jobs.reporting.goodput import resources
from jobs.submitted_runs import resubmit
from jobs.sweeps.published import Published, published

COUNTED = "useful training steps; lost work, evaluation and start-up not counted"
"""What training time, hours and samples per second count."""
NO_MASK = "-"
FREE = UNHASHED - {"resources.nodes", "resources.processes", "resources.gpus"} | {"seed"}
"""Settings that may differ in a group: the seed, and those that do not change results."""


@dataclass(frozen=True)
class GroupScore:
    """The score of a group, 0..1. ``low``, ``high``: 95 % interval of one run, if it has one, or the extremes of
    several."""

    mean: float
    low: float | None
    high: float | None
    label: str
    """Its name, such as ``top-1`` (``flip.evaluation.metrics.score``)."""
    chance: float | None
    runs: int
    by_seed: Mapping[int, float]
    """Seed -> score of its run; empty for models of others."""

    def __str__(self) -> str:
        has_interval = self.low is not None and self.high is not None
        return percent(self.mean) + (f" ({percent(self.low)}-{percent(self.high)})" if has_interval else "")


@dataclass(frozen=True)
class SeedGroup:
    """Runs of one design: a single run, or several seeds."""

    name: str
    outcomes: Sequence[Outcome]
    published: Published | None = None
    """The row of the paper that it reproduces."""

    @property
    def complete(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.state == "complete"]

    @property
    def state(self) -> str:
        """The common state, or the number of runs per state."""
        states = [outcome.state for outcome in self.outcomes]
        kinds = list(dict.fromkeys(states))
        if len(kinds) == 1:
            return kinds[0]
        return ", ".join(f"{states.count(kind)} {kind}" for kind in kinds)

    @property
    def mask(self) -> str:
        """Mask ratios of the stages, in order; NO_MASK: it has no stages."""
        stages = stages_of(self.outcomes[0].settings).values()
        return " > ".join(str(fields["mask"]) for fields in stages if "mask" in fields) or NO_MASK

    @property
    def is_published(self) -> bool:
        """Whether it is a model of open_clip that was not trained here: it has no seed, cost or course."""
        return "model.open_clip" in self.outcomes[0].settings

    def items(self, name: str) -> list[tuple[Outcome, Score]]:
        """(run, final score on an evaluation set) of all runs that were scored by the metric of the first."""
        results = [(outcome, item) for outcome in self.outcomes for item in outcome.evaluations]
        scores = [(outcome, score_of(item)) for outcome, item in results if item["name"] == name]
        return [(outcome, score) for outcome, score in scores if score.label == scores[0][1].label]

    def score(self, name: str) -> GroupScore | None:
        """Final score on an evaluation set; None if no run has it."""
        items = self.items(name)
        if not items:
            return None
        first = items[0][1]
        values = [score.value for _, score in items]
        low, high = first.interval or (None, None)
        if len(values) > 1:
            low = min(values)
            high = max(values)
        seeds = [(outcome.settings.get("seed"), score.value) for outcome, score in items]
        by_seed = {seed: value for seed, value in seeds if seed is not None}
        return GroupScore(fmean(values), low, high, first.label, first.chance, len(values), by_seed)

    @property
    def precision(self) -> str:
        """Precision of its final scores; several if the runs differ."""
        return ", ".join(dict.fromkeys(precision(item) for outcome in self.outcomes for item in outcome.evaluations))

    @property
    def throughput_varies(self) -> bool:
        """Whether the throughput of a run varied, so that its cost is not that of the method."""
        return any(outcome.throughput_varies for outcome in self.outcomes)

    def mean(self, value: Callable[[Outcome], float | None]) -> float | None:
        """Mean over the complete runs (over all if none is complete) that have the value."""
        numbers = [value(outcome) for outcome in self.complete or self.outcomes]
        values = [number for number in numbers if number is not None]
        if values:
            return fmean(values)
        return None

    @property
    def done(self) -> float | None:
        """Share of the samples of all runs that were seen; None: unknown."""
        done = [outcome.progress["samples"] or 0 for outcome in self.outcomes]
        total = sum(stage.get("samples", 0) for o in self.outcomes for stage in stages_of(o.settings).values())
        if total:
            return min(1.0, sum(done) / total)
        return None

    def progress(self, key: str) -> float | None:
        """Mean of samples, steps, seconds or samples_per_second, as ``mean``."""
        return self.mean(lambda outcome: outcome.progress[key])


def hours(outcome: Outcome, unit: str, seconds: float | None = None) -> float | None:
    """Hours (``goodput.resources``) of useful training, until now or of ``seconds``.

    ``unit``: ``GPU-hours`` or ``core-hours``; None for a run of the other kind.
    """
    if seconds is None:
        seconds = outcome.progress["seconds"]
    width, kind = resources(outcome.settings)
    if seconds is None or "resources.nodes" not in outcome.settings or unit != f"{kind}-hours":
        return None
    return seconds * width / 3600


def flops(outcome: Outcome, samples_seen: float | None = None) -> float | None:
    """Training FLOPs until now or until S = ``samples_seen``, computed from the configuration; None: unknown."""
    if samples_seen is None:
        samples_seen = outcome.progress["samples"]
    stages = stages_of(outcome.settings).values()
    if samples_seen is None or not stages:
        return None
    try:
        model = Model(
            embed=outcome.settings["model.embed"],
            image=ImageTower(**_fields(outcome.settings, "model.image.", ImageTower)),
            text=TextTower(**_fields(outcome.settings, "model.text.", TextTower)),
        )
        total = 0.0
        left = float(samples_seen)
        for stage in stages:
            part = min(left, -(-stage["samples"] // stage["batch"]) * stage["batch"])
            image = replace(model.image, **_fields(stage, "image.", ImageTower))
            text = replace(model.text, **_fields(stage, "text.", TextTower))
            total += part * model_costs.pair_flops(
                replace(model, image=image, text=text),
                stage["batch"],
                str(stage["mask"]),
                text_mask=str(stage.get("text_mask", "0")),
                optimizer=outcome.settings.get("optim.name", "adamw"),
                copies=outcome.settings.get("compute.replicate", 1),
                has_head=bool(stage.get("classification")),
            )
            left -= part
        return total
    except (KeyError, TypeError, ValueError, ArithmeticError):  # a configuration that this version cannot read
        return None


def _fields(settings: Mapping[str, Any], prefix: str, kind: Any) -> dict[str, Any]:
    return {name: settings[prefix + name] for name in kind.__dataclass_fields__ if prefix + name in settings}


def hours_unit(groups: Sequence[SeedGroup]) -> str:
    """``GPU-hours``, or ``core-hours`` if no run has a GPU."""
    gpus = any(outcome.settings.get("resources.gpus") for group in groups for outcome in group.outcomes)
    if gpus:
        return "GPU-hours"
    return "core-hours"


def sweep_record(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """sweep.json of the folder that the runs share: name, title, notes, runs, paper, baselines; {} if it is absent."""
    folders = {outcome.run.path.parent for outcome in outcomes}
    if len(folders) == 1:
        return read_lenient(folders.pop() / "sweep.json")
    return {}


def source(outcome: Outcome) -> Any:
    """What a run starts from, to be compared: of a run of the same sweep its name without the seed, with stage and S;
    else the digest of the checkpoint."""
    settings = outcome.settings
    run = Path(settings.get("init.run") or "/")
    if run.parent != outcome.run.path.parent:
        return settings.get("init.commit")
    return run.name.removesuffix(f"-s{settings.get('seed')}"), settings.get("init.stage"), settings.get("init.samples")


def _design(outcome: Outcome, free: Collection[str]) -> str:
    """The folder and the settings that are not ``free``, as text; of a run without settings its path."""
    design = {key: value for key, value in outcome.settings.items() if generic_key(key) not in free}
    if "init.commit" in design:
        design["init.commit"] = source(outcome)
    if design:
        return repr((outcome.run.path.parent, design))
    return str(outcome.run.path)


def group_by_seed(outcomes: Sequence[Outcome]) -> list[SeedGroup]:
    """Groups in the order of their first runs; runs that differ only in the seed are in the same group.

    Seeds that were added later may also differ in settings that do not change results, such as the wall limit. Runs of
    one seed that differ in such settings were made to compare those, for example in speed: they stay apart. So does a
    run that repeats another one, seed included.
    """
    paper = sweep_record(outcomes).get("paper", {})
    designs = [_design(outcome, FREE) for outcome in outcomes]
    seeds = Counter((design, outcome.settings.get("seed")) for design, outcome in zip(designs, outcomes, strict=True))
    repeated = {design for (design, _), runs in seeds.items() if runs > 1}
    members_of: dict[str, list[Outcome]] = {}
    for design, outcome in zip(designs, outcomes, strict=True):
        if design in repeated:
            key = _design(outcome, {"seed"})
        else:
            key = design
        if outcome.settings.get("seed") in [member.settings.get("seed") for member in members_of.get(key, ())]:
            key = str(outcome.run.path)  # the same seed again is no further seed
        members_of.setdefault(key, []).append(outcome)
    names = {key: _name(members) for key, members in members_of.items()}
    rows = {name: published(entry) for name, entry in paper.items() if entry}
    return [SeedGroup(names[key], members, rows.get(names[key])) for key, members in members_of.items()]


def labels(groups: Sequence[SeedGroup]) -> list[str]:
    """Names of the groups, with their sweep or a number if another group has the same."""
    names = [group.name for group in groups]
    names = [f"{g.outcomes[0].run.sweep}/{n}" if names.count(n) > 1 else n for g, n in zip(groups, names, strict=True)]
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]


def _name(members: Sequence[Outcome]) -> str:
    """The name of the first run without its suffix -s<seed>."""
    first = members[0]
    return first.run.name.removesuffix(f"-s{first.settings.get('seed')}")


def sets(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """Name of a result -> role of its evaluation set, tests first, as configured or as in results."""
    return dict(sorted(set_roles(outcomes).items(), key=lambda item: item[1] != "test"))


def set_label(groups: Sequence[SeedGroup], name: str) -> str | None:
    """The label of the scores of all groups on an evaluation set; None if they differ, or if there is no score."""
    labels = {score.label for group in groups if (score := group.score(name)) is not None}
    if len(labels) == 1:
        return labels.pop()
    return None


def seeds_caution(groups: Sequence[SeedGroup]) -> str:
    """A caution about complete designs with a single seed, else empty."""
    own = {
        label: group.complete
        for label, group in zip(labels(groups), groups, strict=True)
        if group.complete and not group.is_published
    }
    single = {label: runs[0] for label, runs in own.items() if len(runs) == 1}
    if not single:
        return ""
    if len(groups) == 1:
        what = "One seed"
    elif len(single) == len(own) > 1:
        what = "One seed of each cannot rank the runs"
    else:
        what = f"One seed of {', '.join(single)} cannot rank the runs"
    designs = [resubmit.design_of(outcome.run, outcome.settings.get("seed", 0)) for outcome in single.values()]
    first = next(iter(single.values()))
    how = resubmit.with_seeds(first.run, (0, 1, 2), list(dict.fromkeys(designs)))
    if how is None:
        how = "submit the sweep again with --seeds 0 1 2"
    return f"{what}: intervals cover the choice of test images, not differences between seeds. For three seeds: {how}"


def by_sweep_order(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """In the order of the sweep file, as recorded in sweep.json; other runs by name."""
    folders = {outcome.run.path.parent for outcome in outcomes}
    orders: dict[Path, list[str]] = {f: read_lenient(f / "sweep.json").get("runs", []) for f in folders}

    def position(outcome: Outcome) -> tuple[str, int, str]:
        order = orders[outcome.run.path.parent]
        name = outcome.run.name
        return str(outcome.run.path.parent), order.index(name) if name in order else len(order), name

    return sorted(outcomes, key=position)
