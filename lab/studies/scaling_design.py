"""The design of the scaling study: its runs in order of importance, their lengths by the calibration, the prediction.

A group is a model, a data set, a mask and a seed. At several lengths it trains one trunk at a constant rate and a
cooldown per length; a single length is a run of its own, with the same steps (docs/sweeps.md).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from flip.runs.errors import ConfigError
from jobs.reporting import laws
from jobs.reporting.laws import Form, Law
from lab.studies import scaling_stats
from lab.studies.engine import intervals
from lab.studies.engine.design import PROBE, TRIAL_SEED, VALIDATION, Entry, Peaks, TestSet, Times, base_lr
from lab.studies.engine.intervals import Array
from lab.studies.engine.results import Record, Results, is_zero_shot_test, results_folder, score
from lab.studies.engine.study import Study
from lab.studies.scaling_stats import Spread

if TYPE_CHECKING:
    from lab.studies.engine.design import StudyRun

NAME = "scaling_study"
"""Of the page, of the folder beside it, and of the sweep."""
MODELS: Mapping[str, Mapping[str, Any]] = {
    "0.5M/8": {
        "model.embed": 64,
        "model.image": {"width": 64, "layers": 4},
        "model.text": {"width": 64},
    },
    "2M/8": {},
    "8M/8": {
        "model.embed": 256,
        "model.image": {"width": 256, "layers": 8, "heads": 4},
        "model.text": {"width": 256, "heads": 4},
    },
}
"""Name, by parameters and patch -> what differs from the model of the recipe icons."""
DATA = {"1/64": "cache:icons/train-1of64", "1/8": "cache:icons/train-1of8", "all": "cache:icons/train"}
FAMILIES = ("tabler", "carbon", "game-icons")
"""Test families: a set of a picture per class, which the committed runs were scored on."""
EVERY = tuple(f"{family}-all" for family in FAMILIES)
"""All pictures of these families whose names training has, which the recipe icons scores."""
MASKS = ("0", "0.5", "0.75")
LENGTHS = (1, 2, 4)
"""In units (``unit``)."""
PEAKS = (2.5e-4, 5e-4, 1e-3)
"""Peak learning rates that are tried for each model and mask."""
FURTHER = (1.25e-4, 2e-3)
"""Peaks that are tried as well if the best of the others is next to them; their cost is not in the budget."""
TRIAL = 0.5
"""Length of a trial."""
SEEDS = (0, 1)
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
ICONS = {
    "name": VALIDATION,
    "manifest": "cache:icons/bi",
    "classes": "cache:icons/bi/classes.json",
    "role": "validation",
}
"""The only evaluation set of trials and trunks; other runs use those of the recipe icons."""

HEAD = """\
# A scaling study: model, data and length on 300,000 icons

`make scaling-study` trains the runs that have no committed result and writes this page (`python -m lab.study --study
scaling`). It asks the questions of the paper's scaling section at a size that two idle CPU cores train in less than 12
hours, by the calibration; the runs below shared theirs with other work and took longer ("Time"). Model, data and length
are smaller than the paper's by factors of 40 to 100,000, so that it is no replication. On the test families no
run reaches a baseline without a model, the nearest training picture at 16 x 16 pixels from the same data: this is a
study of early training.

    python -m lab.icons
    python -m lab.study --study scaling --plan           # what is missing, and its hours
    make scaling-study MINUTES=80                        # a part; the next call continues
    python -m lab.study --study scaling --predict        # before the joint corner is trained

Every complete run leaves a file in scaling_study/results with the digests of its configuration and of its data. Runs
with such a file are not trained again, so that another machine goes on with what is missing."""
AXES = ("parameters", "data_samples", "samples")
"""Fields of a record that a law has as axes."""


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
class ScalingRun:
    """One run. ``length``: in units; 0: the trunk of the group."""

    group: Group
    length: float

    @property
    def name(self) -> str:
        if self.length:
            return f"{self.group.name}-x{self.length:g}"
        return f"{self.group.name}-trunk"

    @property
    def sweep(self) -> str:
        return NAME

    @property
    def seed(self) -> int:
        return self.group.seed

    @property
    def rates(self) -> str:
        return self.group.work

    @property
    def peak(self) -> float:
        return self.group.peak

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
    def trunk(self) -> ScalingRun | None:
        """The run that this one extends."""
        if self.length and len(self.group.lengths) > 1:
            return ScalingRun(self.group, 0)
        return None

    @property
    def units(self) -> float:
        """What it trains itself, in units."""
        if not self.length:
            return (1 - COOLDOWN) * max(self.group.lengths)
        return self.length * (COOLDOWN if self.trunk else 1.0)


REFERENCE = StudyPoint()
MASKED = tuple(Group(mask=mask, lengths=LENGTHS) for mask in ("0.5", "0", "0.75"))
"""The reference at three lengths, without a mask, and with a larger one."""
STEPS = (Group(model="8M/8"), Group(data="all"), Group(model="0.5M/8"), Group(data="1/64"))
"""One step along an axis from the reference."""
JOINT = (Group("8M/8", "all"), Group("8M/8", "all", lengths=(4,)))
"""Model and data together, then length, too. They share no trunk, which would leave no result for three hours."""
ARMS = tuple(dict.fromkeys((each.model, each.mask) for each in (*MASKED, *STEPS)))
"""(model, mask) that get learning rates of their own; other data sets and lengths use those."""
WORKS = {Group(model, mask=mask).work: (model, mask) for model, mask in ARMS}
"""Kind of work, by which learning rates are named as well -> (model, mask)."""
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
    ("model and data, first seed", STEPS),
    ("masks and lengths, second seed", tuple(replace(g, seed=SEEDS[1]) for g in MASKED)),
    ("model and data, second seed", tuple(replace(g, seed=SEEDS[1]) for g in STEPS)),
    ("model and data together", JOINT[:1]),
    ("repeated runs", REPEATS),
    ("model, data and length together", JOINT[1:]),
)
"""In order of importance: if the study is stopped early, the last are missing."""


def jobs_of(group: Group) -> list[ScalingRun]:
    """The trunk of a group, if it has several lengths, and its runs."""
    trunk = []
    if len(group.lengths) > 1:
        trunk = [ScalingRun(group, 0)]
    return trunk + [ScalingRun(group, length) for length in group.lengths]


def all_jobs() -> list[ScalingRun]:
    return [job for _, groups in ROUNDS for group in groups for job in jobs_of(group)]


def further_trials() -> list[ScalingRun]:
    fields: dict[str, Any] = {"lengths": (TRIAL,), "seed": TRIAL_SEED}
    groups = (Group(model, mask=mask, peak=p, **fields) for model, mask in WORKS.values() for p in FURTHER)
    return [job for group in groups for job in jobs_of(group)]


def unit(times: Times) -> int:
    """Samples of a unit, so that all runs fit BUDGET; a multiple of GRAIN."""
    costs = [job.units * times[job.group.work] for job in all_jobs()]
    return max(1, int(CORES * BUDGET / sum(costs) // GRAIN)) * GRAIN


def points() -> list[StudyPoint]:
    """The compared points, in order."""
    return list(dict.fromkeys(job.group.point(job.length) for job in all_jobs() if job.kind == "run"))


def warmup(size: int) -> int:
    """Samples of warm-up, with units of ``size`` samples."""
    return round(WARMUP * size / BATCH) * BATCH


def _cooldown(length: float, size: int) -> int:
    return int(length * size * COOLDOWN) // BATCH * BATCH


def is_predicted(run: ScalingRun) -> bool:
    """Whether a run belongs to the joint corner, whose accuracy is predicted before it is trained."""
    return run.group in JOINT


# -- results -----------------------------------------------------------------------------------------------------------


@dataclass
class ScalingResults(Results):
    """The results so far, by points."""

    @cached_property
    def unit(self) -> int:
        return unit(self.times)

    @cached_property
    def tests(self) -> Mapping[str, int]:
        """Zero-shot test set -> its pictures, 0 if unknown; of the complete runs, else those of new ones."""
        scored = (_pictures(_tests(record)) for record in self.records.values())
        return next(filter(None, scored), dict.fromkeys(EVERY, 0))

    def check(self) -> None:
        """Raise ConfigError also if runs were scored on different pictures: their accuracies cannot be compared."""
        super().check()
        for name, record in self.records.items():
            scored = _pictures(_tests(record))
            if scored and scored != self.tests:
                path = str(results_folder(self.folder) / f"{name}.json")
                remedy = "Move it away. To score all runs on the sets of today: --again."
                raise ConfigError(f"a result has other test pictures than {self.tests}", path, scored, remedy)

    def points(self, point: StudyPoint) -> dict[int, Record]:
        """Seed -> record of the runs of a point."""
        jobs = [job for job in all_jobs() if job.kind == "run" and job.group.point(job.length) == point]
        return {job.group.seed: self.records[job.name] for job in jobs if job.name in self.records}

    def first(self, repeat: ScalingRun) -> Record | None:
        """Record of the run that ``repeat`` trains again. Of the trials it is the one with the chosen peak."""
        group = repeat.group
        same = group.point(repeat.length), group.seed
        peaks = 0.0, self.peaks.get(group.work)
        firsts = (job for job in [*all_jobs(), *further_trials()] if not job.group.repeat and job.group.peak in peaks)
        names = [job.name for job in firsts if (job.group.point(job.length), job.group.seed) == same]
        return next((self.records[name] for name in names if name in self.records), None)

    def scores(self, point: StudyPoint) -> list[float]:
        """Accuracy of each run of a point: the mean over the test families."""
        return [score(each) for each in self.points(point).values()]

    def pictures(self, points: Sequence[StudyPoint]) -> Array:
        """Covariance of the accuracies of points by the choice of the test pictures."""
        return intervals.covariance([self._tested(point) for point in points])

    @cached_property
    def is_answered(self) -> bool:
        """Whether all compared runs kept their answers to each test picture."""
        runs = [items for point in points() for items in self._tested(point)]
        return bool(runs) and intervals.is_answered(runs)

    def _tested(self, point: StudyPoint) -> list[intervals.Items]:
        """The zero-shot results of each run of a point, in the order of the sets' names."""
        return [sorted(_tests(each), key=lambda item: item["name"]) for each in self.points(point).values()]

    def complete(self, point: StudyPoint) -> bool:
        """Whether all runs of a point that the study asks for have a result."""
        jobs = [job for job in all_jobs() if job.kind == "run" and job.group.point(job.length) == point]
        return all(job.name in self.records for job in jobs if self.asked(job) is not False)

    @cached_property
    def unsettled(self) -> bool:
        """Whether runs of the reference, which determine the spread between seeds, have no result."""
        jobs = (job for job in all_jobs() if job.trunk and not is_predicted(job))
        return not all(job.name in self.records for job in jobs)

    @cached_property
    def spread(self) -> Spread | None:
        """Between seeds, pooled over the points with several."""
        return scaling_stats.spread({point: self.scores(point) for point in points()})

    def asked(self, run: StudyRun) -> bool | None:
        """Whether a run belongs to the study: no further seed if the difference from the reference is clear. None: not
        known yet, because the first seed or runs that determine the spread have no result, or because the joint corner
        waits for its prediction."""
        job = as_scaling_run(run)
        group = job.group
        if job.kind == "trial":
            return super().asked(run)
        if is_predicted(job) and not self.prediction:
            return None
        if group.seed not in SEEDS[1:] or len(group.lengths) > 1:
            return True
        first = [self.points(point).get(0) for point in (group.point(job.length), REFERENCE)]
        if not all(first) or self.unsettled:
            return None
        terms = [(sign, [score(each)]) for sign, each in zip((1.0, -1.0), first, strict=True) if each]
        difference = self.spread and scaling_stats.contrast(terms, self.spread)
        return not difference or not scaling_stats.is_clear(difference)


def _tests(record: Record) -> list[Mapping[str, Any]]:
    return list(filter(is_zero_shot_test, record["evaluations"]))


def _pictures(items: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Set -> its pictures, 0 if unknown."""
    return {item["name"]: int(item.get("n", 0)) for item in items}


def as_scaling_run(run: StudyRun) -> ScalingRun:
    assert isinstance(run, ScalingRun)
    return run


def law(study: ScalingResults, form: Form | None = None, longest: float = LENGTHS[-1]) -> tuple[Law, list[Record]]:
    """The law over parameters, data and samples of the runs at mask 0.5 outside the joint corner, and their records.

    ``longest``: length of the longest runs that are used. Raises ValueError if they do not determine it.
    """
    jobs = [job for job in all_jobs() if job.kind == "run" and not is_predicted(job) and job.length <= longest]
    records = [study.records[j.name] for j in jobs if j.group.mask == REFERENCE.mask and j.name in study.records]
    return laws.fit([[each[axis] for axis in AXES] for each in records], list(map(score, records)), form), records


# -- the study ---------------------------------------------------------------------------------------------------------


class ScalingDesign(Study):
    """The design of the scaling study."""

    name = NAME
    head = HEAD
    results_class = ScalingResults
    further = FURTHER

    def runs(self) -> Sequence[StudyRun]:
        trials = [job for job in all_jobs() if job.kind == "trial"]
        return [*trials, *further_trials(), *(job for job in all_jobs() if job.kind != "trial")]

    def peaks(self) -> Mapping[str, Sequence[float]]:
        return dict.fromkeys(WORKS, tuple(sorted((*PEAKS, *FURTHER))))

    def calibration(self) -> Mapping[str, Entry]:
        entries = {}
        stage = {"samples": PROBE, "batch": BATCH, "base_lr": base_lr(PEAKS[0], BATCH), "warmup": BATCH}
        for work, (model, mask) in WORKS.items():
            entries[work] = {**MODELS[model], "stages.pretrain": stage | {"mask": mask}, "monitor.log_every": 2}
        return entries

    def samples(self, run: StudyRun, times: Times) -> int:
        return round(as_scaling_run(run).units * unit(times))

    def cost(self, run: StudyRun, times: Times) -> float:
        job = as_scaling_run(run)
        return job.units * unit(times) * times[job.group.work]

    def source(self, run: StudyRun, peaks: Peaks) -> StudyRun | None:
        return as_scaling_run(run).trunk

    def entry(self, run: StudyRun, times: Times, peaks: Peaks) -> Entry:
        job = as_scaling_run(run)
        size = unit(times)
        group = job.group
        stage: dict[str, Any] = {"batch": BATCH, "mask": group.mask}
        stage["base_lr"] = base_lr(group.peak or peaks[group.work], BATCH)
        stage["warmup"] = warmup(size)
        fields: Entry = {"seed": group.seed, **MODELS[group.model], "data.manifest": DATA[group.data]}
        fields["evaluate.every"] = size // 2 // BATCH * BATCH
        if job.length:
            stage |= {"samples": int(job.length * size), "schedule": "wsd", "cooldown": _cooldown(job.length, size)}
        else:
            ends = [int(length * size) - _cooldown(length, size) for length in group.lengths]
            stage |= {"samples": max(ends), "schedule": "constant"}
            fields["checkpoint.keep_at"] = ends
        if group.seed == TRIAL_SEED or not job.length:
            fields["evaluate.sets"] = [dict(ICONS)]
        if job.trunk:
            start = stage["samples"] - stage["cooldown"]
            fields["init"] = {"run": f"{NAME}/{job.trunk.name}", "samples": start, "extend": True}
        return fields | {"stages.pretrain": stage}

    def training_sets(self) -> Mapping[str, str]:
        return {name: manifest.removeprefix("cache:") for name, manifest in DATA.items()}

    def test_sets(self) -> Sequence[TestSet]:
        folders = {VALIDATION: "icons/bi", **{name: f"icons/{name}" for name in (*FAMILIES, *EVERY)}}
        return [TestSet(name, folder, f"{folder}/classes.json") for name, folder in folders.items()]

    def sweep(self, name: str, entries: Mapping[str, Entry]) -> dict[str, Any]:
        return {"name": name, "title": "Scaling study", "cluster": "pair", "recipe": "icons", "runs": dict(entries)}

    def predict(self, results: Results) -> dict[str, Any]:
        """Predict the error of each run of the joint corner, by the law of the others.

        Raises ConfigError if runs of the law are missing, or if one of the joint corner is complete.
        """
        assert isinstance(results, ScalingResults)
        path = results.folder / "prediction.json"
        late = [job.name for job in all_jobs() if is_predicted(job) and job.name in results.records]
        missing = [as_scaling_run(run) for run in results.missing() if run.kind in ("trial", "run")]
        early = [job.name for job in missing if not is_predicted(job)]
        if late or early or results.prediction:
            if late:
                reason = "is complete"
            elif early:
                reason = "is missing"
            else:
                reason = "exists"
            what = f"a prediction is made once, before the joint corner and after all other runs: {reason}"
            remedy = "Keep the file, or complete the other runs."
            raise ConfigError(what, (late or early or [str(path)])[0], remedy=remedy)
        try:
            fitted, records = law(results)
            parameters = max(each["parameters"] for each in records)
            data = max(each["data_samples"] for each in records)
            lengths = [length for group in JOINT for length in group.lengths]
            points = {str(each): (parameters, data, each * results.unit) for each in lengths}
            predicted = {length: fitted.predict(point, runs=1) for length, point in points.items()}
        except ValueError as error:
            remedy = "Train more points or seeds; a law that does not fit predicts nothing."
            raise ConfigError("the joint corner cannot be predicted", results.folder, str(error), remedy) from error
        return {
            "what": "zero-shot error of a run of the joint corner by its length in units, from the runs below",
            "form": fitted.form.name,
            "lack_of_fit": str(fitted.lack or "not tested"),
            "errors": {
                length: {"value": 1 - each.value, "low": 1 - each.high, "high": 1 - each.low}
                for length, each in predicted.items()
            },
            "exponents": [vars(each) for each in fitted.exponents()],
            "runs": {each["run"]: each["configuration"] for each in records},
            "time": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        }
