"""The scaling study: its runs in order of importance, their lengths by the calibration, and the sweep that trains them.

A group is a model, a data set, a mask and a seed. At several lengths it trains one trunk at a constant rate and a
cooldown per length; a single length is a run of its own, with the same steps (docs/sweeps.md).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flip.config.identity import flatten
from tools.studies.design import base_lr

NAME = "scaling_study"
"""Of the page, of the folder beside it, and of the sweep."""
MODELS = ("0.5M/8", "2M/8", "8M/8")
DATA = {"1/64": "cache:icons/train-1of64", "1/8": "cache:icons/train-1of8", "all": "cache:icons/train"}
MASKS = ("0", "0.5", "0.75")
LENGTHS = (1, 2, 4)
"""In units (``unit``)."""
PEAKS = (2.5e-4, 5e-4, 1e-3)
"""Peak learning rates that are tried for each model and mask."""
TRIAL = 0.5
"""Length of a trial."""
SEEDS = (0, 1)
TRIAL_SEED = 9
"""Seed of trials, not used by other runs."""
BATCH = 128
WARMUP = 0.1
COOLDOWN = 0.2
"""Warm-up as a share of a unit, the same at every length; cooldown as a share of the run."""

GRAIN = 12_800
"""A unit is a multiple of this: cooldowns then start at the end of a step."""
CORES = 2
BUDGET = 10.7 * 3600
"""Seconds of all runs on CORES cores. The rest of the 12 hours is for start-up, evaluation and cores that wait.

It was 11.25 hours, with the same unit, until the repeat of 8M was shortened.
"""
PROBE = 2560
"""Samples of a calibration run."""

Times = Mapping[str, float]
"""Kind of work (``Group.work``) -> core-seconds per sample."""


@dataclass(frozen=True)
class StudyPoint:
    """What is compared: runs that differ in nothing but their seed."""

    model: str = "2M/8"
    data: str = "1/8"
    mask: str = "0.5"
    length: float = 2

    def __str__(self) -> str:
        return f"{self.model}, {self.data} of the data, mask {self.mask}, length {self.length:g}"


@dataclass(frozen=True)
class Group:
    """Runs that share a trunk. ``peak``: the learning rate of a trial; 0: the chosen one. ``repeat``: trained again."""

    model: str = "2M/8"
    data: str = "1/8"
    mask: str = "0.5"
    lengths: tuple[float, ...] = (2,)
    seed: int = 0
    peak: float = 0.0
    repeat: bool = False

    @property
    def work(self) -> str:
        """Kind of work, which determines the time per sample."""
        return f"{self.model}, mask {self.mask}"

    @property
    def name(self) -> str:
        share = self.data.partition("/")[2] or "1"
        if self.peak:
            end = f"-lr{self.peak:g}"
        else:
            end = f"-s{self.seed}" + "-repeat" * self.repeat
        return f"{self.model.partition('/')[0].lower()}-data{share}-mask{self.mask}{end}"

    def point(self, length: float) -> StudyPoint:
        return StudyPoint(self.model, self.data, self.mask, length)


@dataclass(frozen=True)
class StudyRun:
    """One run. ``length``: in units; 0: the trunk of the group."""

    group: Group
    length: float

    @property
    def name(self) -> str:
        if self.length:
            return f"{self.group.name}-x{self.length:g}"
        return f"{self.group.name}-trunk"

    @property
    def kind(self) -> str:
        if self.group.peak:
            return "trial"
        if not self.length:
            return "trunk"
        if self.group.repeat:
            return "repeat"
        return "run"

    @property
    def trunk(self) -> StudyRun | None:
        """The run that this one extends."""
        if self.length and len(self.group.lengths) > 1:
            return StudyRun(self.group, 0)
        return None

    @property
    def units(self) -> float:
        """What it trains itself, in units."""
        if not self.length:
            return (1 - COOLDOWN) * max(self.group.lengths)
        return self.length * (COOLDOWN if self.trunk else 1.0)

    def cost(self, times: Times, size: int) -> float:
        """Core-seconds of training by the calibration, with units of ``size`` samples."""
        return self.units * size * times[self.group.work]


REFERENCE = StudyPoint()
MASKED = tuple(Group(mask=mask, lengths=LENGTHS) for mask in ("0.5", "0", "0.75"))
"""The reference at three lengths, without a mask, and with a larger one."""
AXES = (Group(model="8M/8"), Group(data="all"), Group(model="0.5M/8"), Group(data="1/64"))
"""One step along an axis from the reference."""
JOINT = (Group("8M/8", "all"), Group("8M/8", "all", lengths=(4,)))
"""Model and data together, then length, too. They share no trunk, which would leave no result for three hours."""
ARMS = tuple(dict.fromkeys((each.model, each.mask) for each in (*MASKED, *AXES)))
"""(model, mask) that get learning rates of their own; other data sets and lengths use those."""
REPEATS = (
    Group("0.5M/8", repeat=True),
    Group("2M/8", repeat=True),
    Group("8M/8", lengths=(TRIAL,), seed=TRIAL_SEED, repeat=True),
)
"""One run of each size, trained again later. Of the largest it is the chosen trial, in a quarter of the time."""
ROUNDS: tuple[tuple[str, tuple[Group, ...]], ...] = (
    (
        "trials of learning rates",
        tuple(
            Group(model, mask=mask, lengths=(TRIAL,), seed=TRIAL_SEED, peak=p) for model, mask in ARMS for p in PEAKS
        ),
    ),
    ("masks and lengths, first seed", MASKED),
    ("model and data, first seed", AXES),
    ("masks and lengths, second seed", tuple(replace(g, seed=SEEDS[1]) for g in MASKED)),
    ("model and data, second seed", tuple(replace(g, seed=SEEDS[1]) for g in AXES)),
    ("model and data together", JOINT[:1]),
    ("repeated runs", REPEATS),
    ("model, data and length together", JOINT[1:]),
)
"""In order of importance: if the study is stopped early, the last are missing."""


def jobs_of(group: Group) -> list[StudyRun]:
    """The trunk of a group, if it has several lengths, and its runs."""
    trunk = []
    if len(group.lengths) > 1:
        trunk = [StudyRun(group, 0)]
    return trunk + [StudyRun(group, length) for length in group.lengths]


def all_jobs() -> list[StudyRun]:
    return [job for _, groups in ROUNDS for group in groups for job in jobs_of(group)]


def unit(times: Times) -> int:
    """Samples of a unit, so that all runs fit BUDGET; a multiple of GRAIN."""
    costs = [job.cost(times, 1) for job in all_jobs()]
    return max(1, int(CORES * BUDGET / sum(costs) // GRAIN)) * GRAIN


def startable(missing: Sequence[StudyRun], complete: Collection[str]) -> list[StudyRun]:
    """The jobs whose trunk is ``complete`` (names of runs); trials come before all others, which need their result."""
    trials = [job for job in missing if job.kind == "trial" and job.name not in complete]
    return [
        job for job in trials or missing if job.name not in complete and (not job.trunk or job.trunk.name in complete)
    ]


# -- sweeps ------------------------------------------------------------------------------------------------------------


def calibration() -> dict[str, Any]:
    """The calibration sweep: two short runs per kind of work, two at a time, as in the study."""
    runs = {}
    for model, mask in ARMS:
        stage = {"samples": PROBE, "batch": BATCH, "mask": mask, "base_lr": base_lr(PEAKS[0], BATCH), "warmup": BATCH}
        fields = {"stages.pretrain": stage, "model.size": model, "monitor.log_every": 2, "evaluate.sets": []}
        runs[_work_name(Group(model, mask=mask).work)] = fields
    return _sweep(f"{NAME}_calibration", "Step times", runs) | {"seeds": [0, 1]}


def calibrated() -> dict[str, str]:
    """Run of the calibration sweep -> its kind of work."""
    works = (Group(model, mask=mask).work for model, mask in ARMS)
    return {_work_name(work): work for work in works}


def _work_name(work: str) -> str:
    return work.replace("/8, mask ", "-mask").lower()


def sweep(jobs: Iterable[StudyRun], size: int, peaks: Mapping[tuple[str, str], float]) -> dict[str, Any]:
    """A sweep with these runs. ``size``: samples of a unit. ``peaks``: (model, mask) -> chosen peak."""
    return _sweep(NAME, "Scaling study", {job.name: entry(job, size, peaks) for job in jobs})


def entry(job: StudyRun, size: int, peaks: Mapping[tuple[str, str], float]) -> dict[str, Any]:
    """The settings of a run, as in the sweep file. Equal entries train equal runs."""
    group = job.group
    peak = job.group.peak or peaks[job.group.model, job.group.mask]
    stage: dict[str, Any] = {"batch": BATCH, "mask": group.mask, "base_lr": base_lr(peak, BATCH)}
    stage["warmup"] = warmup(size)
    fields: dict[str, Any] = {"seed": group.seed, "model.size": group.model, "data.manifest": DATA[group.data]}
    fields["evaluate.every"] = size // 2 // BATCH * BATCH
    if job.length:
        stage |= {"samples": int(job.length * size), "schedule": "wsd", "cooldown": _cooldown(job.length, size)}
    else:
        ends = [int(length * size) - _cooldown(length, size) for length in group.lengths]
        stage |= {"samples": max(ends), "schedule": "constant"}
        fields["checkpoint.keep_at"] = ends
    if group.seed == TRIAL_SEED or not job.length:
        fields["evaluate.sets"] = [VALIDATION]
    if job.trunk:
        start = stage["samples"] - stage["cooldown"]
        fields["init"] = {"run": f"{NAME}/{job.trunk.name}", "samples": start, "extend": True}
    return fields | {"stages.pretrain": stage}


DATA_KEY = "data.manifest"
SETTINGS = tuple(f"stages.pretrain.{key}" for key in ("samples", "batch", "mask", "base_lr", "warmup", "schedule"))
SETTINGS += ("stages.pretrain.cooldown", "seed", "model.size", "init.samples")


def settings(table: Mapping[str, Any]) -> dict[str, Any]:
    """What must agree between a run and its design, of an ``entry`` or of the resolved configuration by dotted keys."""
    flat = flatten(table)
    return {key: flat.get(key) or 0 for key in SETTINGS} | {DATA_KEY: str(flat[DATA_KEY]).rpartition("/")[2]}


VALIDATION = {
    "name": "validation",
    "manifest": "cache:icons/bi",
    "classes": "cache:icons/bi/classes.json",
    "role": "validation",
}
"""The only evaluation set of trials and trunks; other runs use those of the recipe icons."""


def warmup(size: int) -> int:
    """Samples of warm-up, with units of ``size`` samples."""
    return round(WARMUP * size / BATCH) * BATCH


def _cooldown(length: float, size: int) -> int:
    return int(length * size * COOLDOWN) // BATCH * BATCH


def _sweep(name: str, title: str, runs: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": name, "title": title, "cluster": "pair", "recipe": "icons", "runs": dict(runs)}


def points() -> list[StudyPoint]:
    """The compared points, in order."""
    return list(dict.fromkeys(job.group.point(job.length) for job in all_jobs() if job.kind == "run"))
