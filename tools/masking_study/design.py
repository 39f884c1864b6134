"""Arms, rounds and comparisons of the study, their cost, and the sweeps that train them; arithmetic without files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
"""``Arm.work`` -> core-seconds per sample."""


@dataclass(frozen=True)
class Arm:
    """One compared design. ``after``: the arm whose final weights it starts from; empty: from scratch."""

    name: str
    mask: str
    batch: int = 128
    after: str = ""

    @property
    def work(self) -> str:
        """The kind of work, which determines the time per sample."""
        return f"mask {self.mask}, batch {self.batch}"

    @property
    def seconds(self) -> float:
        return SECONDS * (TUNING if self.after else 1.0)

    @property
    def peaks(self) -> tuple[float, ...]:
        return TUNING_PEAKS if self.after else PEAKS

    def trial(self, peak: float) -> str:
        """Name of the trial at a peak learning rate."""
        return f"{self.name}-lr{peak:g}"

    def run(self, seed: int) -> str:
        """Name of the run with a seed, as the field ``seeds`` of a sweep forms it."""
        return self.name if seed == 0 else f"{self.name}-s{seed}"


@dataclass(frozen=True)
class Round:
    """Arms whose learning rates are chosen together, then their runs. Rounds depend on earlier rounds."""

    name: str
    title: str
    arms: tuple[Arm, ...]

    @property
    def sweep(self) -> str:
        return f"study_{self.name}"

    @property
    def trials(self) -> str:
        return f"study_{self.name}_trials"


ROUNDS = (
    Round("arms", "Masking at equal cost", (Arm("clip", "0"), Arm("mask50", "0.5"), Arm("mask75", "0.75"))),
    Round(
        "tuning",
        "Unmasked tuning, and the same time masked",
        (
            Arm("mask50-unmasked", "0", after="mask50"),
            Arm("mask50-masked", "0.5", after="mask50"),
            Arm("mask75-unmasked", "0", after="mask75"),
            Arm("mask75-masked", "0.75", after="mask75"),
        ),
    ),
    Round("batch", "The batch at equal cost", (Arm("mask75-b64", "0.75", 64), Arm("mask75-b256", "0.75", 256))),
)
"""In order of importance: if the study is stopped early, the last are missing."""
ARMS = {arm.name: arm for each in ROUNDS for arm in each.arms}
ROUND_OF = {arm.name: each for each in ROUNDS for arm in each.arms}

COMPARED = (
    ("masking", "mask50", "clip"),
    ("masking", "mask75", "clip"),
    ("masking", "mask75", "mask50"),
    ("unmasked tuning", "mask50-unmasked", "mask50-masked"),
    ("unmasked tuning", "mask75-unmasked", "mask75-masked"),
    ("tuned or not", "mask50-unmasked", "mask50"),
    ("tuned or not", "mask75-unmasked", "mask75"),
    ("batch", "mask75-b64", "mask75"),
    ("batch", "mask75-b256", "mask75"),
)
"""(question, arm, the arm that it is compared with)."""

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


def core_seconds() -> float:
    """Core-seconds of training in the complete study, by the calibration."""
    return sum(a.seconds * (len(a.peaks) * (1 if a.after else TRIAL) + len(SEEDS)) for a in ARMS.values())


def stage(arm: Arm, peak: float, times: Times, share: float = 1.0) -> dict[str, Any]:
    """The stage of a run of the arm that lasts ``share`` of its seconds, rounded to at least one batch."""
    steps = max(1, round(share * arm.seconds / times[arm.work] / arm.batch))
    base_lr = float(f"{peak * 256 / arm.batch:.6g}")  # a sweep's learning rate is per 256 samples
    warmup = round(WARMUP * steps) * arm.batch
    return {"mask": arm.mask, "batch": arm.batch, "samples": steps * arm.batch, "base_lr": base_lr, "warmup": warmup}


def calibration() -> dict[str, Any]:
    """The calibration sweep: a short run per kind of work, two at a time, as in the study."""
    by_work = {arm.work: arm for arm in ARMS.values() if not arm.after}
    fields = {
        arm.name: {
            "stages.pretrain": {"mask": arm.mask, "batch": arm.batch, "samples": PROBE, "warmup": arm.batch},
            "monitor.log_every": 256 // arm.batch,
        }
        for arm in by_work.values()
    }
    return _sweep("study_calibration", "Step times", fields, evaluate=[]) | {"seeds": [0, 1]}


def trials(round_: Round, times: Times, chosen: Mapping[str, float]) -> dict[str, Any]:
    """One run per arm and peak, scored on the validation vendor only. ``chosen``: arm -> peak of earlier rounds."""
    runs = {}
    for arm in round_.arms:
        for peak in arm.peaks:
            fields: dict[str, Any] = {"stages.pretrain": stage(arm, peak, times, TRIAL)}
            if arm.after:
                source = f"{ROUND_OF[arm.after].trials}/{ARMS[arm.after].trial(chosen[arm.after])}"
                fields = _branch(source, stage(arm, peak, times))
            runs[arm.trial(peak)] = {"seed": TRIAL_SEED, **fields}
    return _sweep(round_.trials, f"{round_.title}: trials of learning rates", runs, evaluate=[VALIDATION])


def runs(round_: Round, times: Times, chosen: Mapping[str, float]) -> dict[str, Any]:
    """One run per seed and arm, at the chosen peak learning rates."""
    runs = {}
    for seed in SEEDS:
        for arm in round_.arms:
            last = stage(arm, chosen[arm.name], times)
            fields: dict[str, Any] = {"stages.pretrain": last, "evaluate.every": -(-last["samples"] // 3)}
            if arm.after:
                fields = _branch(f"{ROUND_OF[arm.after].sweep}/{ARMS[arm.after].run(seed)}", last)
            runs[arm.run(seed)] = {"seed": seed, **fields}
    return _sweep(round_.sweep, round_.title, runs)


def _branch(source: str, tune: dict[str, Any]) -> dict[str, Any]:
    return {"init": {"run": source, "stage": "pretrain"}, "stages.pretrain": None, "stages.tune": tune}


def _sweep(name: str, title: str, runs: Mapping[str, Any], evaluate: list[Any] | None = None) -> dict[str, Any]:
    scored = {"every": 0} | ({} if evaluate is None else {"sets": evaluate})
    fixed = BASE | {"evaluate": scored}
    return {"name": name, "title": title, "cluster": "pair", "recipe": "emoji", "set": fixed, "runs": dict(runs)}
