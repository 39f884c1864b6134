"""The design of studies of arms that train at equal measured cost with paired seeds: runs, lengths, cost, sweeps.

The peak learning rates of each arm are tried once by short trials, scored on the validation set alone. Then every arm
trains with every seed. Questions compare two arms by the differences of equal seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lab.studies.engine.design import PROBE, TRIAL_SEED, VALIDATION, Entry, Peaks, StudyRun, TestSet, Times, base_lr
from lab.studies.engine.study import Study

WARMUP = 0.05
"""Warm-up as a share of the stage."""
FULL_RATE = 0.1
"""Peak learning rate at full size after small images, as a share of the first one (as in CLIPA)."""
POINTS = 3
"""Evaluations of a run during training, the last one included."""

EMOJI = {
    "name": VALIDATION,
    "manifest": "cache:emoji/noto-v1",
    "classes": "cache:emoji/classes.json",
    "role": "validation",
}
"""The validation set of the recipe emoji."""

ONE_CORE: Mapping[str, Any] = {
    "data": {"workers": 0},  # the run is one process: its seconds are core-seconds, reading included
    "resources": {"cpus": 1},
    "compute": {"precision": "fp32"},  # supported by any processor; bf16 was no faster at this size
}


@dataclass(frozen=True)
class SmallImages:
    """The first stage of an arm: small images and short texts, for a share of the arm's seconds (CLIPA,
    arXiv 2305.07017)."""

    size: int
    """Side of the images, pixels."""
    tokens: int
    share: float


@dataclass(frozen=True)
class Arm:
    """One compared design. ``after``: the arm whose final weights it starts from; empty: from scratch."""

    name: str
    mask: str
    batch: int = 128
    after: str = ""
    small: SmallImages | None = None
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Further settings of its runs, by dotted keys."""

    @property
    def works(self) -> dict[str, float]:
        """Kind of work, which determines the time per sample -> its share of the seconds, in order."""
        full = f"mask {self.mask}, batch {self.batch}"
        if self.settings:
            full += f", {self.name}"
        small = self.small
        if small is None:
            return {full: 1.0}
        return {f"{full}, {small.size} px, {small.tokens} tokens": small.share, full: 1 - small.share}


@dataclass(frozen=True)
class Round:
    """Arms that train together: a sweep of trials, then a sweep of runs. Arms may start from arms of earlier rounds."""

    name: str
    title: str
    arms: tuple[Arm, ...]


@dataclass(frozen=True)
class ArmRun:
    """A trial of an arm if it has a peak, else the run with a seed. Its name is as the field ``seeds`` of a sweep
    forms it."""

    sweep: str
    rates: str
    """Name of the arm."""
    seed: int
    peak: float = 0.0

    @property
    def name(self) -> str:
        if self.peak:
            return f"{self.rates}-lr{self.peak:g}"
        if self.seed == 0:
            return self.rates
        return f"{self.rates}-s{self.seed}"

    @property
    def kind(self) -> str:
        if self.peak:
            return "trial"
        return "run"


@dataclass(frozen=True)
class ArmDesign(Study):
    """The design of a study of arms. The defaults are for the emoji of the quickstart, on two cores."""

    name: str
    head: str
    rounds: tuple[Round, ...]
    questions: tuple[tuple[str, str, str], ...]
    """What is asked, an arm, and the arm that is subtracted from it."""
    seconds: float = 360.0
    """Core-seconds of training of a run, by the calibration. Much less is useless on the emoji: during the first 15,000
    samples, where trials of 60 core-seconds ended, CLIP without a mask stays at the loss of chance."""
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    """Peak learning rates that are tried from scratch, the same in every arm."""
    further: tuple[float, ...] = ()
    """Beyond both ends of ``rates``: an arm tries the next of them while its best rate is at the edge."""
    trial: float = 0.5
    """Length of a trial as a share of the runs of its arm."""
    tuning: float = 0.15
    """Length of an arm that starts from another, as a share of ``seconds``, in addition to that run."""
    tuning_rates: tuple[float, ...] = (1e-4, 2e-4, 4e-4)
    recipe: str = "emoji"
    validation: Mapping[str, str] = field(default_factory=lambda: EMOJI)
    """The only evaluation set of a trial; other runs use those of the recipe."""
    tests: tuple[str, ...] = ("twemoji", "openmoji")
    """The test sets; the verdicts are about the first."""
    added_sets: Mapping[str, Mapping[str, str]] = field(default_factory=dict, hash=False)
    """Test sets that the recipe lacks: name -> further fields of the set. They have no baseline of pixels, because
    training need not have their classes."""
    about: str = ""
    """The last paragraph of the page."""

    # -- the plan ------------------------------------------------------------------------------------------------------

    @cached_property
    def arms(self) -> dict[str, Arm]:
        return {arm.name: arm for each in self.rounds for arm in each.arms}

    def runs(self) -> Sequence[StudyRun]:
        """Compared runs come first: with known learning rates, a study that is stopped early lacks trials only."""
        compared: list[StudyRun] = []
        trials: list[StudyRun] = []
        for each in self.rounds:
            for seed in self.seeds:
                compared += [self.run(arm, seed) for arm in each.arms]
            for arm in each.arms:
                trials += [self.trial_of(arm, peak) for peak in self.tried(arm) if len(self.tried(arm)) > 1]
        return [*compared, *trials]

    def run(self, arm: Arm, seed: int) -> ArmRun:
        return ArmRun(self._sweep_of(arm), arm.name, seed)

    def trial_of(self, arm: Arm, peak: float) -> ArmRun:
        return ArmRun(f"{self._sweep_of(arm)}_trials", arm.name, TRIAL_SEED, peak)

    def peaks(self) -> Mapping[str, Sequence[float]]:
        return {arm.name: self.tried(arm) for arm in self.arms.values()}

    def tried(self, arm: Arm) -> tuple[float, ...]:
        """The peak learning rates that may be tried for an arm, ascending."""
        if arm.after:
            return self.tuning_rates
        return tuple(sorted((*self.rates, *self.further)))

    def needs(self, run: StudyRun) -> Sequence[str]:
        after = self.arms[run.rates].after
        needed = [] if run.kind == "trial" else [run.rates]
        if after:
            needed.append(after)
        return needed

    def source(self, run: StudyRun, peaks: Peaks) -> StudyRun | None:
        after = self.arms[run.rates].after
        if not after:
            return None
        if run.kind == "trial" and len(self.tried(self.arms[after])) > 1:
            return self.trial_of(self.arms[after], peaks[after])
        return self.run(self.arms[after], 0 if run.kind == "trial" else run.seed)

    def _sweep_of(self, arm: Arm) -> str:
        return next(f"{self.name}_{each.name}" for each in self.rounds if arm in each.arms)

    # -- lengths and cost ----------------------------------------------------------------------------------------------

    def length(self, run: StudyRun) -> float:
        """Length of a run as a share of the seconds of its arm: a tuning is tried at its full length."""
        if run.kind == "trial" and not self.arms[run.rates].after:
            return self.trial
        return 1.0

    def seconds_of(self, arm: Arm) -> float:
        """Core-seconds of a run of the arm, without those of the run from which it starts."""
        if arm.after:
            return self.seconds * self.tuning
        return self.seconds

    def core_seconds(self, runs: Iterable[StudyRun] | None = None) -> float:
        """Core-seconds of training by the calibration, of these runs or of all that may be asked for."""
        if runs is None:
            runs = self.runs()
        return sum(self.length(run) * self.seconds_of(self.arms[run.rates]) for run in runs)

    def stages(self, arm: Arm, peak: float, times: Times, share: float = 1.0) -> dict[str, dict[str, Any]]:
        """The stages of a run that lasts ``share`` of its arm's seconds, each rounded to at least one batch."""
        result = dict[str, dict[str, Any]]()
        small = arm.small
        first = peak
        for name, (work, part) in zip(("pretrain", "full"), arm.works.items(), strict=False):
            steps = max(1, round(share * part * self.seconds_of(arm) / times[work] / arm.batch))
            length = {
                "samples": steps * arm.batch,
                "base_lr": base_lr(first, arm.batch),
                "warmup": round(WARMUP * steps) * arm.batch,
            }
            sizes = {}
            if small and not result:
                sizes = {"image": {"size": small.size}, "text": {"length": small.tokens}}
            result[name] = {"mask": arm.mask, "batch": arm.batch, **length, **sizes}
            first = peak * FULL_RATE
        return result

    def stages_of(self, run: StudyRun, times: Times, peaks: Peaks) -> dict[str, dict[str, Any]]:
        return self.stages(self.arms[run.rates], run.peak or peaks[run.rates], times, self.length(run))

    def lengths(self, run: StudyRun, times: Times) -> dict[str, int]:
        """Kind of work -> samples of a run. They do not depend on its learning rate."""
        arm = self.arms[run.rates]
        stages = self.stages(arm, self.tried(arm)[0], times, self.length(run))
        return {work: stage["samples"] for work, stage in zip(arm.works, stages.values(), strict=True)}

    def samples(self, run: StudyRun, times: Times) -> int:
        return sum(self.lengths(run, times).values())

    def cost(self, run: StudyRun, times: Times, samples: float = float("inf")) -> float:
        """Core-seconds of the first ``samples`` of a run, by the calibration."""
        total = 0.0
        for work, length in self.lengths(run, times).items():
            done = min(samples, length)
            total += done * times[work]
            samples -= done
        return total

    # -- sweeps --------------------------------------------------------------------------------------------------------

    def calibration(self) -> Mapping[str, Entry]:
        entries = {}
        for arm in self.arms.values():
            if arm.after:
                continue
            stages = self.stages(arm, self.rates[0], dict.fromkeys(arm.works, 1.0)).values()
            for work, stage in zip(arm.works, stages, strict=True):
                entries[work] = {
                    "stages.pretrain": stage | {"samples": PROBE, "warmup": arm.batch},
                    "monitor.log_every": max(1, 256 // arm.batch),
                    **arm.settings,
                }
        return entries

    def entry(self, run: StudyRun, times: Times, peaks: Peaks) -> Entry:
        arm = self.arms[run.rates]
        stages = self.stages_of(run, times, peaks)
        fields: Entry = {"seed": run.seed}
        source = self.source(run, peaks)
        if source:
            fields["init"] = {"run": f"{source.sweep}/{source.name}", "stage": "pretrain"}
            fields |= {"stages.pretrain": None, "stages.tune": stages["pretrain"]}
        else:
            fields |= {f"stages.{name}": stage for name, stage in stages.items()}
            if run.kind != "trial":
                fields["evaluate.every"] = -(-self.samples(run, times) // POINTS)
        return fields | dict(arm.settings)

    def training_sets(self) -> Mapping[str, str]:
        return {"train": f"{self.recipe}/train"}

    def test_sets(self) -> Sequence[TestSet]:
        classes = self.validation["classes"].removeprefix("cache:")
        of_recipe = [name for name in self.tests if name not in self.added_sets]
        tests = [TestSet(name, f"{self.recipe}/{name}", classes) for name in of_recipe]
        return [TestSet(VALIDATION, self.validation["manifest"].removeprefix("cache:"), classes), *tests]

    def sweep(self, name: str, entries: Mapping[str, Entry]) -> dict[str, Any]:
        title = next((each.title for each in self.rounds if name.startswith(f"{self.name}_{each.name}")), name)
        evaluate: dict[str, Any] = {"every": 0}
        if name.endswith("_trials"):
            title += ": trials of learning rates"
            evaluate["sets"] = [dict(self.validation)]
        elif self.added_sets:
            evaluate["sets"] = {name: {"name": name, **fields} for name, fields in self.added_sets.items()}
        fixed = {**ONE_CORE, "evaluate": evaluate}
        return {
            "name": name,
            "title": title,
            "cluster": "pair",
            "recipe": self.recipe,
            "set": fixed,
            "runs": dict(entries),
        }
