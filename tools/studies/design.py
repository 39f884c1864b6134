"""Arms, rounds and comparisons of the studies, their cost, and the sweeps that train them; arithmetic without files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

SECONDS = 360.0
"""Core-seconds of training of a run, by the calibration. Much less is useless: during the first 15,000 samples, where
trials of 60 core-seconds ended, clip stays at the loss of chance."""
TRIAL = 0.5
"""Length of a learning-rate trial as a share of the runs of its arm."""
TUNING = 0.15
"""Length of a tuning run as a share of SECONDS, in addition to the run that it starts from."""
SEEDS = (0, 1, 2)
TRIAL_SEED = 9
"""Seed of trials, not used by compared runs."""
WARMUP = 0.05
"""Warm-up as a share of the stage."""
PROBE = 2560
"""Samples of a calibration run."""

PEAKS = (5e-4, 1e-3, 2e-3)
"""Peak learning rates that are tried from scratch, the same in every arm."""
TUNING_PEAKS = (1e-4, 2e-4, 4e-4)
"""Peak learning rates that are tried for tunings."""

Times = Mapping[str, float]
"""Kind of work (``Arm.works``) -> core-seconds per sample."""


@dataclass(frozen=True)
class SmallImages:
    """The first stage of an arm: small images and short texts, for a share of the arm's seconds (CLIPA,
    arXiv 2305.07017)."""

    size: int
    """Side of the images, pixels."""
    tokens: int
    share: float


FULL_RATE = 0.1
"""Peak learning rate at full size after small images, as a share of the first one (as in CLIPA)."""


@dataclass(frozen=True)
class Arm:
    """One compared design. ``after``: the arm whose final weights it starts from; empty: from scratch."""

    name: str
    mask: str
    batch: int = 128
    after: str = ""
    small: SmallImages | None = None

    @property
    def works(self) -> dict[str, float]:
        """Kind of work, which determines the time per sample -> its share of the seconds, in order."""
        full = f"mask {self.mask}, batch {self.batch}"
        small = self.small
        if small is None:
            return {full: 1.0}
        return {f"{full}, {small.size} px, {small.tokens} tokens": small.share, full: 1 - small.share}

    @property
    def seconds(self) -> float:
        return SECONDS * (TUNING if self.after else 1.0)

    @property
    def peaks(self) -> tuple[float, ...]:
        if self.after:
            return TUNING_PEAKS
        return PEAKS

    def trial(self, peak: float) -> str:
        """Name of the trial at a peak learning rate."""
        return f"{self.name}-lr{peak:g}"

    def run(self, seed: int) -> str:
        """Name of the run with a seed, as the field ``seeds`` of a sweep forms it."""
        if seed == 0:
            return self.name
        return f"{self.name}-s{seed}"


@dataclass(frozen=True)
class Round:
    """Arms whose learning rates are chosen together, then their runs. Rounds depend on earlier rounds."""

    name: str
    title: str
    arms: tuple[Arm, ...]


VALIDATION = {
    "name": "validation",
    "manifest": "cache:emoji/noto-v1",
    "classes": "cache:emoji/classes.json",
    "role": "validation",
}
"""The only evaluation set of a trial; other runs use those of the recipe emoji."""

BASE: dict[str, Any] = {
    "data": {"workers": 0},  # the run is one process: its seconds are core-seconds, reading included
    "resources": {"cpus": 1},
    "compute": {"precision": "fp32"},  # supported by any processor; bf16 was no faster at this size
}


def base_lr(peak: float, batch: int) -> float:
    """The learning rate per 256 samples, as a sweep gives it, whose peak at this batch is ``peak``."""
    return float(f"{peak * 256 / batch:.6g}")


def stages(arm: Arm, peak: float, times: Times, share: float = 1.0) -> dict[str, dict[str, Any]]:
    """The stages of a run of the arm that lasts ``share`` of its seconds, each rounded to at least one batch."""
    result = dict[str, dict[str, Any]]()
    small = arm.small
    first = peak
    for name, (work, part) in zip(("pretrain", "full"), arm.works.items(), strict=False):
        steps = max(1, round(share * part * arm.seconds / times[work] / arm.batch))
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


def cost(arm: Arm, times: Times, lengths: Mapping[str, Mapping[str, Any]], samples: float = float("inf")) -> float:
    """Core-seconds of the first ``samples`` of a run with these stages (``stages``), by the calibration."""
    total = 0.0
    for work, length in zip(arm.works, lengths.values(), strict=True):
        done = min(samples, length["samples"])
        total += done * times[work]
        samples -= done
    return total


@dataclass(frozen=True)
class StudyDesign:
    """A study: its arms in rounds, and what is compared."""

    name: str
    """Of its page, docs/NAME.md, of the folder beside it, and of its sweeps."""
    head: str
    """The beginning of the page, Markdown."""
    rounds: tuple[Round, ...]
    """In order of importance: if the study is stopped early, the last are missing."""
    compared: tuple[tuple[str, str, str], ...]

    @cached_property
    def arms(self) -> dict[str, Arm]:
        return {arm.name: arm for each in self.rounds for arm in each.arms}

    def sweep(self, round_: Round, trials: bool = False) -> str:
        return f"{self.name}_{round_.name}{'_trials' if trials else ''}"

    def core_seconds(self) -> float:
        """Core-seconds of training in the complete study, by the calibration."""
        return sum(a.seconds * (len(a.peaks) * (1 if a.after else TRIAL) + len(SEEDS)) for a in self.arms.values())

    def calibration(self) -> dict[str, Any]:
        """The calibration sweep: a short run per kind of work, two at a time, as in the study."""
        fields = {}
        arms = {work: arm for arm in self.arms.values() if not arm.after for work in arm.works}
        for work, arm in arms.items():
            stage = stages(arm, PEAKS[0], dict.fromkeys(arm.works, 1.0))["pretrain"]
            if work != next(iter(arm.works)):
                stage = {"mask": arm.mask, "batch": arm.batch, "base_lr": stage["base_lr"]}
            fields[work_name(work)] = {
                "stages.pretrain": stage | {"samples": PROBE, "warmup": arm.batch},
                "monitor.log_every": 256 // arm.batch,
            }
        return _sweep(f"{self.name}_calibration", "Step times", fields, evaluate=[]) | {"seeds": [0, 1]}

    def calibrated(self) -> dict[str, str]:
        """Run of the calibration sweep -> its kind of work."""
        return {work_name(work): work for arm in self.arms.values() if not arm.after for work in arm.works}

    def trials(self, round_: Round, times: Times, chosen: Mapping[str, float]) -> dict[str, Any]:
        """One run per arm and peak, scored on the validation vendor only. ``chosen``: arm -> peak of earlier rounds."""
        runs = {}
        for arm in round_.arms:
            for peak in arm.peaks:
                if arm.after:
                    source = f"{self._sweep_of(arm.after, True)}/{self.arms[arm.after].trial(chosen[arm.after])}"
                    fields = _branch(source, stages(arm, peak, times)["pretrain"])
                else:
                    fields = _stages(stages(arm, peak, times, TRIAL))
                runs[arm.trial(peak)] = {"seed": TRIAL_SEED, **fields}
        title = f"{round_.title}: trials of learning rates"
        return _sweep(self.sweep(round_, True), title, runs, evaluate=[VALIDATION])

    def runs(self, round_: Round, times: Times, chosen: Mapping[str, float]) -> dict[str, Any]:
        """One run per seed and arm, at the chosen peak learning rates."""
        runs = {}
        for seed in SEEDS:
            for arm in round_.arms:
                lengths = stages(arm, chosen[arm.name], times)
                total = sum(stage["samples"] for stage in lengths.values())
                fields: dict[str, Any] = _stages(lengths) | {"evaluate.every": -(-total // 3)}
                if arm.after:
                    source = f"{self._sweep_of(arm.after)}/{self.arms[arm.after].run(seed)}"
                    fields = _branch(source, lengths["pretrain"])
                runs[arm.run(seed)] = {"seed": seed, **fields}
        return _sweep(self.sweep(round_), round_.title, runs)

    def _sweep_of(self, arm: str, trials: bool = False) -> str:
        return self.sweep(next(each for each in self.rounds if self.arms[arm] in each.arms), trials)


def work_name(work: str) -> str:
    """The name of the calibration run of a kind of work."""
    return work.replace("mask ", "m").replace(", batch ", "-b").replace(", ", "-").replace(" ", "")


def _stages(lengths: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"stages.{name}": stage for name, stage in lengths.items()}


def _branch(source: str, tune: dict[str, Any]) -> dict[str, Any]:
    return {"init": {"run": source, "stage": "pretrain"}, "stages.pretrain": None, "stages.tune": tune}


def _sweep(name: str, title: str, runs: Mapping[str, Any], evaluate: list[Any] | None = None) -> dict[str, Any]:
    scored = {"every": 0} | ({} if evaluate is None else {"sets": evaluate})
    fixed = BASE | {"evaluate": scored}
    return {"name": name, "title": title, "cluster": "pair", "recipe": "emoji", "set": fixed, "runs": dict(runs)}
