"""Arms, rounds and comparisons of the study, their cost, and the sweeps that train them; arithmetic without files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SECONDS = 360.0
"""Core-seconds of training of a run, by the calibration: the size of the whole study (``core_seconds``). Much less says
nothing: in the first 15,000 samples clip stays at the loss of chance, where trials of 60 core-seconds ended."""
TRIAL = 0.5
"""Length of a learning-rate trial as a share of the runs of its arm."""
TUNING = 0.15
"""Length of a tuning as a share of SECONDS, in addition to the run that it starts from."""
SEEDS = (0, 1, 2)
TRIAL_SEED = 9
"""Seed of trials; no compared run has it."""
WARMUP = 0.05
"""Share of a stage."""
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
        """Name of its trial."""
        return f"{self.name}-lr{peak:g}"

    def run(self, seed: int) -> str:
        """The name of its run, as ``seeds`` of a sweep makes them."""
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
"""The most important first: if the study is stopped early, the last are missing."""

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
    "data": {"workers": 0},  # one process is the whole run: its seconds are core-seconds, reading included
    "resources": {"cpus": 1},
    "compute": {"precision": "fp32"},  # any processor can; bf16 was no faster at this size
}


def arm(name: str) -> Arm:
    return next(one for each in ROUNDS for one in each.arms if one.name == name)


def core_seconds() -> float:
    """Core-seconds of training in the whole study, by the calibration."""
    arms = [one for each in ROUNDS for one in each.arms]
    return sum(one.seconds * (len(one.peaks) * (1 if one.after else TRIAL) + len(SEEDS)) for one in arms)


def samples(seconds: float, each: float, batch: int) -> int:
    """The whole number of batches nearest to ``seconds`` at ``each`` core-seconds per sample, at least one; samples."""
    return batch * max(1, round(seconds / each / batch))


def stage(one: Arm, peak: float, times: Times, share: float = 1.0) -> dict[str, Any]:
    """The stage of a run of the arm that lasts ``share`` of its seconds."""
    total = samples(share * one.seconds, times[one.work], one.batch)
    base_lr = float(f"{peak * 256 / one.batch:.6g}")  # a sweep's learning rate is per 256 samples
    warmup = round(WARMUP * total / one.batch) * one.batch
    return {"mask": one.mask, "batch": one.batch, "samples": total, "base_lr": base_lr, "warmup": warmup}


def calibration() -> dict[str, Any]:
    """The calibration sweep: a short run per kind of work, two at a time, as in the study."""
    works = {one.work: one for each in ROUNDS for one in each.arms if not one.after}
    fields = {
        one.name: {"stages.pretrain": _probe(one), "monitor.log_every": 256 // one.batch} for one in works.values()
    }
    return _sweep("study_calibration", "Step times", fields, evaluate=[]) | {"seeds": [0, 1]}


def _probe(one: Arm) -> dict[str, Any]:
    return {"mask": one.mask, "batch": one.batch, "samples": PROBE, "warmup": one.batch}


def trials(each: Round, times: Times, chosen: Mapping[str, float]) -> dict[str, Any]:
    """One run per arm and peak, scored on the validation vendor alone. ``chosen``: arm -> peak, of rounds before."""
    runs = {}
    for one in each.arms:
        for peak in one.peaks:
            fields: dict[str, Any] = {"seed": TRIAL_SEED}
            if one.after:
                source = f"{_round(one.after).trials}/{arm(one.after).trial(chosen[one.after])}"
                fields |= _branch(source, stage(one, peak, times))
            else:
                fields["stages.pretrain"] = stage(one, peak, times, TRIAL)
            runs[one.trial(peak)] = fields
    return _sweep(each.trials, f"{each.title}: trials of learning rates", runs, evaluate=[VALIDATION])


def runs(each: Round, times: Times, chosen: Mapping[str, float]) -> dict[str, Any]:
    """One run per seed and arm, at the chosen peak learning rates."""
    made: dict[str, dict[str, Any]] = {}
    for seed in SEEDS:
        for one in each.arms:
            part = stage(one, chosen[one.name], times)
            fields: dict[str, Any] = {"seed": seed}
            if one.after:
                fields |= _branch(f"{_round(one.after).sweep}/{arm(one.after).run(seed)}", part)
            else:
                fields |= {"stages.pretrain": part, "evaluate.every": -(-part["samples"] // 3)}
            made[one.run(seed)] = fields
    return _sweep(each.sweep, each.title, made)


def _round(name: str) -> Round:
    return next(each for each in ROUNDS if arm(name) in each.arms)


def _branch(source: str, part: dict[str, Any]) -> dict[str, Any]:
    return {"init": {"run": source, "stage": "pretrain"}, "stages.pretrain": None, "stages.tune": part}


def _sweep(name: str, title: str, made: Mapping[str, Any], evaluate: list[Any] | None = None) -> dict[str, Any]:
    scored = {"every": 0} | ({} if evaluate is None else {"sets": evaluate})
    fixed = BASE | {"evaluate": scored}
    return {"name": name, "title": title, "cluster": "pair", "recipe": "emoji", "set": fixed, "runs": dict(made)}
