"""The runs of a study in order of importance, their cost and settings."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

TRIAL_SEED = 9
"""Seed of trials, not used by compared runs."""
PROBE = 2560
"""Samples of a calibration run."""
VALIDATION = "validation"
"""Name of the set that selects learning rates."""


@dataclass(frozen=True)
class TestSet:
    """A zero-shot set of a study. ``folder``, ``classes``: below the cache."""

    name: str
    folder: str
    classes: str


Times = Mapping[str, float]
"""Kind of work (``Study.calibration``) -> core-seconds per sample."""
Peaks = Mapping[str, float]
"""Runs that share their learning rate (``StudyRun.rates``) -> peak learning rate."""
Entry = dict[str, Any]
"""The settings of a run, as in a sweep file."""


class StudyRun(Protocol):
    """One run of a study."""

    @property
    def name(self) -> str:
        """Of the run and of its file of results."""

    @property
    def sweep(self) -> str:
        """The sweep that trains it."""

    @property
    def kind(self) -> str:
        """``trial`` of a learning rate, ``run``, ``repeat`` of a run, or ``trunk``: only others start from it."""

    @property
    def seed(self) -> int: ...

    @property
    def rates(self) -> str:
        """Name of the runs that share their learning rate."""

    @property
    def peak(self) -> float:
        """Peak learning rate of a trial; 0: the chosen one."""


class StudyDesign(ABC):
    """The runs of a study. Equal entries train equal runs, so entries of trained runs must not change."""

    name: str
    """Of its page, docs/NAME.md, of the folder beside it, and the beginning of the names of its sweeps."""
    further: Sequence[float] = ()
    """Of ``peaks`` those that are tried only if the best of the others is next to them."""

    @abstractmethod
    def runs(self) -> Sequence[StudyRun]:
        """In order of importance: if the study is stopped early, the last are missing."""

    @abstractmethod
    def peaks(self) -> Mapping[str, Sequence[float]]:
        """``StudyRun.rates`` -> peak learning rates that are tried. A single one needs no trial."""

    @abstractmethod
    def calibration(self) -> Mapping[str, Entry]:
        """Kind of work, which determines the time per sample -> the entry of the run that measures it."""

    @abstractmethod
    def samples(self, run: StudyRun, times: Times) -> int:
        """Samples that a run trains itself."""

    @abstractmethod
    def cost(self, run: StudyRun, times: Times) -> float:
        """Core-seconds of these samples by the calibration."""

    @abstractmethod
    def entry(self, run: StudyRun, times: Times, peaks: Peaks) -> Entry:
        """The settings of a run. ``peaks`` has those that it needs (``needs``)."""

    @abstractmethod
    def sweep(self, name: str, entries: Mapping[str, Entry]) -> dict[str, Any]:
        """The sweep file with these runs."""

    def needs(self, run: StudyRun) -> Sequence[str]:
        """``rates`` whose learning rate must be known before the run starts."""
        if run.kind == "trial":
            return ()
        return (run.rates,)

    def source(self, run: StudyRun, peaks: Peaks) -> StudyRun | None:
        """The run from whose checkpoint this one starts."""
        return None

    def training_sets(self) -> Mapping[str, str]:
        """Name of a training set -> its folder below the cache, for the baseline of pixels."""
        return {}

    def test_sets(self) -> Sequence[TestSet]:
        """The sets on which the baseline of pixels is computed, the validation set as well."""
        return ()


def base_lr(peak: float, batch: int) -> float:
    """The learning rate per 256 samples, as a sweep gives it, whose peak at this batch is ``peak``."""
    return float(f"{peak * 256 / batch:.6g}")


def work_name(work: str) -> str:
    """The name of the calibration run of a kind of work."""
    return re.sub(r"[^a-z0-9.]+", "-", work.lower())
