"""Results of the paper (sweeps/published/paper.yaml): rows of tables, and the settings that a row needs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flip.common.plain_data import flatten
from flip.common.yaml_io import read_yaml
from flip.config.schema import MODEL_PRESETS
from flip.runs.errors import ConfigError
from flip.runs.records import PUBLISHED
from jobs.common.paths import SWEEPS

RESULTS = SWEEPS / "published" / "paper.yaml"

RESERVED = PUBLISHED.keys() - {"*"}
"""Keys of a row other than evaluation sets."""


@dataclass(frozen=True)
class Published:
    """One row of the paper, as in sweep.json."""

    row: str
    top1: Mapping[str, float]
    """Evaluation set -> per cent."""
    run: str = ""
    """SWEEP/RUN that reproduces it, if no run of the sweep does."""
    not_yet: str = ""
    """Why no run can reproduce it."""
    within: float | None = None
    """Largest gap that counts as agreement, in points."""
    time: float | None = None
    """Training time in a figure of the paper, in units of one of its runs; None: not drawn."""
    needs: Mapping[str, Any] = field(default_factory=dict)
    """Configuration key -> value required for a comparison; None: absent."""
    near: Mapping[str, float] = field(default_factory=dict)
    """Configuration key -> allowed relative difference."""
    images: Mapping[str, int] = field(default_factory=dict)
    """Evaluation set -> images that are scored."""


def rows(table: str) -> dict[str, dict[str, Any]]:
    """Rows of a table of the paper by their full names (``1a, mask 50 %``), with the settings that they need.

    Raises ConfigError if the table does not exist.
    """
    paper = read_yaml(RESULTS)
    tables = paper["tables"]
    if table not in tables:
        raise ConfigError("no such table of the paper", str(RESULTS), table, f"There are: {', '.join(tables)}.")
    base = _recipe(paper["recipe"])
    result = {}
    for name, row in tables[table]["rows"].items():
        needs = {}
        if not row.get("other_model"):  # it has no settings
            needs = {**base, **flatten(tables[table]["needs"]), **flatten(row.get("needs", {}))}
        if "model.size" in needs:
            needs |= flatten(MODEL_PRESETS[needs["model.size"]], "model")
        absent = [key for key, value in needs.items() if value is None]
        needs = {
            key: value
            for key, value in needs.items()
            if value != "any" and not any(key.startswith(f"{prefix}.") for prefix in absent)
        }
        defaults = {key: tables[table].get(key, paper[key]) for key in ("within", "images", "near")}
        row = {key: value for key, value in row.items() if key != "other_model"}
        row = {**defaults, **row, "needs": needs}
        result[f"{table}, {name}"] = {"row": f"{table}, {name}", "title": tables[table]["title"], **row}
    return result


def row(name: str) -> dict[str, Any]:
    """The row with that full name. Raises ConfigError that lists the rows of its table."""
    table = rows(name.partition(",")[0])
    if name not in table:
        raise ConfigError("no such row of the paper", str(RESULTS), name, f"There are: {'; '.join(table)}.")
    return table[name]


def _recipe(name: str) -> dict[str, Any]:
    recipe = read_yaml(SWEEPS / "recipes" / f"{name}.yaml")
    return flatten({section: values for section, values in recipe.items() if section != "compute"})


def published(entry: Mapping[str, Any]) -> Published:
    """A row from its mapping in sweep.json, which may hold only numbers."""
    top1 = {key: value for key, value in entry.items() if key not in RESERVED}
    texts = {key: entry[key] for key in RESERVED if key in entry and key != "title"}
    return Published(**{"row": "", **texts}, top1=top1)
