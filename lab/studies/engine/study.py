"""What the engine asks of a study: its design, and the sections of its page.

A study is one file of ``lab/studies`` with an object ``STUDY``, usually an `ArmStudy` (`arms.py` there), which needs
arms, budgets, seeds and questions only.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

from flip.runs.errors import ConfigError
from flip.runs.rundir import read_json, sorted_glob
from jobs.pages.document import Block
from lab.studies.engine.design import StudyDesign
from lab.studies.engine.results import Results, read_calibration, read_choices, results_folder


class Study(StudyDesign):
    """A design with its page."""

    head: str
    """The beginning of the page, Markdown."""
    results_class: type[Results] | None = None
    """A class of results of its own."""

    @abstractmethod
    def sections(self, results: Results) -> list[Block]:
        """The page below its head."""

    def files(self, results: Results) -> dict[str, str]:
        """Name -> content of further files beside the figures of the page."""
        return {}

    def predict(self, results: Results) -> dict[str, Any]:
        """The content of prediction.json. Raises ConfigError if nothing can be predicted now."""
        raise ConfigError("this study predicts nothing", value=self.name, remedy="Leave out --predict.")


def read(study: Study, docs: Path) -> Results:
    """The study in docs/NAME. Raises ConfigError if a file is missing, damaged or of another design."""
    folder = docs / study.name
    calibration = read_calibration(study, folder / "calibration.json")
    choices = read_choices(study, folder / "choices.json")
    try:
        records = {path.stem: read_json(path) or {} for path in sorted_glob(results_folder(folder), "*.json")}
        kind = study.results_class or Results
        results = kind(study, folder, calibration, records, choices, read_json(folder / "prediction.json"))
        results.baseline = read_json(folder / "baseline.json")
        results.check()
    except (ValueError, KeyError, TypeError) as error:
        remedy = "Restore the file from the repository."
        raise ConfigError("a result cannot be read", str(results_folder(folder)), str(error), remedy) from error
    return results
