"""A sweep file -> its named runs: configurations merged, not yet resolved (docs/contracts.md, Configuration).

name: model_scaling             # default: the file's stem
title: ...                      # one line, for tables and pages
notes: ...                      # text, for pages
cluster: h100                   # default profile
recipe: paper                   # a file in recipes/, or a list of them, the later on top of the earlier
set: {data: {manifest: ...}}    # fields of the configuration that all runs share
grid: {stages.pretrain.mask: [0.5, 0.75]}     # every combination of the values
runs: {baseline: , model: {model.size: H/14}} # named changes; with a grid, each of them at every point of it
seeds: [0, 1, 2]                # each run once per seed: NAME (seed 0, the default), NAME-s1, NAME-s2
paper: {baseline: {imagenet: 74.3}}           # published numbers, for reports
"""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from flip.config.identity import flatten
from flip.config.load import Table, get, merge, nest, read_yaml
from flip.config.schema import Config
from flip.exitcodes import ConfigError

SWEEPS = Path(__file__).resolve().parents[1] / "sweeps"
KEYS: dict[str, tuple[tuple[type, ...], str]] = {
    "name": ((str,), "text"),
    "title": ((str,), "text"),
    "notes": ((str,), "text"),
    "cluster": ((str,), "the name of a profile"),
    "recipe": ((str, list), "a name or a list of names"),
    "set": ((dict,), "a mapping"),
    "grid": ((dict,), "a mapping"),
    "runs": ((dict,), "a mapping"),
    "seeds": ((list,), "a list"),
    "paper": ((dict,), "a mapping"),
}
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_NAME_RULE = "A name is made of a-z, 0-9, ., _ and -, begins with a letter or digit, and has at most 100."
_UNITS = (("b", 10**9), ("m", 10**6), ("k", 10**3))

Layer = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Run:
    """One training to be done. ``arm``: its name without the seed. ``differs``: the settings that vary in the sweep."""

    name: str
    config: Config
    arm: str = ""
    differs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    name: str
    title: str
    notes: str
    cluster: str
    runs: list[Run]
    paper: dict[str, Any] = field(default_factory=dict)
    """Arm -> published numbers."""


@dataclass(frozen=True)
class _File:
    """A sweep file with the lines of its keys."""

    path: Path
    table: Table

    def error(self, key: str, what: str, value: Any = None, remedy: str = "") -> ConfigError:
        """An error at a dotted key: the line is that of the deepest part which the file has."""
        line, here = 0, self.table
        for part in key.split("."):
            if not isinstance(here, Table) or part not in here:
                break
            line, here = here.lines.get(part, line), here[part]
        place = f"{self.path}:{line}" if line else str(self.path)
        return ConfigError(f"{key}: {what}" if key else what, place, value, remedy)


def _short(number: int | float) -> str:
    """12.8b for 12.8e9, where two decimals are enough; else the number as it is."""
    for unit, size in _UNITS:
        if number >= size and number * 100 % size == 0:
            return f"{number / size:g}{unit}"
    return f"{number:g}" if isinstance(number, float) else str(number)


def _slug(key: str, value: Any) -> str:
    """A value as part of a name: text as it is (L/16: l16), anything else after the last word of its key (mask0.5)."""
    last = key.rpartition(".")[2]
    if isinstance(value, str):
        return re.sub(r"[^a-z0-9._-]+", "-", value.lower().replace("/", "")).strip("-.")
    if isinstance(value, list):
        return "-".join([last, *(_slug("", item) for item in value)])
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return last + _short(value)
    return f"{last}-{'none' if value is None else str(value).lower()}"


def _check_keys(file: _File) -> None:
    for key, value in file.table.items():
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS)
            remedy = f"Did you mean {' or '.join(near)}?" if near else f"Keys of a sweep: {', '.join(KEYS)}."
            if key.partition(".")[0] in Config.__dataclass_fields__:
                remedy = f"Fields of the configuration stand under set: set.{key}"
            raise file.error(key, "unknown key in a sweep", remedy=remedy)
        types, wanted = KEYS[key]
        if not isinstance(value, types):
            raise file.error(key, f"needs {wanted}", "nothing" if value is None else value)


def _recipes(file: _File) -> list[Layer]:
    """The layers of the recipes: the files, each above the ``base`` that it names, and the label."""
    names = file.table.get("recipe", [])
    names = [names] if isinstance(names, str) else names
    layers: list[Layer] = []
    for name in names:
        chain: list[Layer] = []
        while name:
            table, path = _recipe(file, name)
            if any(where == str(path) for where, _ in chain):
                raise ConfigError("base: the recipe is its own base", str(path), name)
            name = table.pop("base", None)
            chain.insert(0, (str(path), table))
        layers += chain
    return [*layers, (str(file.path), {"recipe": "+".join(names)})] if names else []


def _recipe(file: _File, name: Any) -> tuple[Table, Path]:
    folders = (file.path.parent / "recipes", SWEEPS / "recipes")
    for path in (folder / f"{name}.yaml" for folder in folders):
        if path.exists():
            return read_yaml(path), path
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise file.error("recipe", "there is no such recipe", name, f"There are: {', '.join(known)}.")


def _named(file: _File) -> list[tuple[str, Layer | None]]:
    """The runs that ``runs`` names; one without a name where only a grid or seeds make the runs."""
    runs = file.table.get("runs")
    if not runs:
        return [("", None)]
    found: list[tuple[str, Layer | None]] = []
    for name, change in runs.items():
        if not _NAME.fullmatch(name):
            raise file.error(f"runs.{name}", "not a name for a run", name, _NAME_RULE)
        if not isinstance(change, (Table, type(None))):
            raise file.error(f"runs.{name}", "needs a mapping of fields", change)
        found.append((name, (str(file.path), change or Table())))
    return found


def _points(file: _File) -> list[tuple[str, Layer | None]]:
    """The points of the grid, named by their values."""
    grid = file.table.get("grid")
    if not grid:
        return [("", None)]
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise file.error("grid", f"{key} needs a list of values", values)
        if any(isinstance(value, Mapping) for value in values):
            raise file.error("grid", f"{key}: a mapping has no short name", remedy="Name such runs under runs.")
    points: list[tuple[str, Layer | None]] = []
    for values in itertools.product(*grid.values()):
        changes = dict(zip(grid, values, strict=True))
        name = "-".join(_slug(key, value) for key, value in changes.items() if len(grid[key]) > 1)
        points.append((name, (str(file.path), Table(changes, grid.lines))))
    return points


def _seeds(file: _File, seeds: Sequence[int] | None) -> list[tuple[str, Layer | None]]:
    chosen = file.table.get("seeds", []) if seeds is None else list(seeds)
    layers = [(str(file.path), Table({"seed": seed}, {"seed": file.table.lines.get("seeds", 0)})) for seed in chosen]
    # The default seed adds nothing to a name: seeds that are asked for later stand beside the runs that are there.
    tails = ["" if seed == Config.seed else f"s{seed}" for seed in chosen]
    return list(zip(tails, layers, strict=True)) or [("", None)]


def _varying(key: str, configs: Sequence[Config]) -> str:
    """The key itself, or the part of it down to the named member that some of the runs lack (stages.unmasked)."""
    parts = key.split(".")
    for n in range(1, len(parts)):
        if any(get(config, ".".join(parts[:n])) is None for config in configs):
            return ".".join(parts[:n])
    return key


def _differing(configs: Sequence[Config], own: Sequence[Sequence[Layer]]) -> list[dict[str, Any]]:
    """For each run the settings that its own layers or another's name, where their values are not all the same.

    A member that some runs lack, say a stage, is True or False.
    """
    named = (key for layers in own for where, layer in layers for key in flatten(nest(layer, where)) if key)
    rows: list[dict[str, Any]] = [{} for _ in configs]
    for key in dict.fromkeys(_varying(key, configs) for key in named):
        values = [get(config, key) for config in configs]
        if any(is_dataclass(value) for value in values):
            values = [value is not None for value in values]
        if any(value != values[0] for value in values):
            for row, value in zip(rows, values, strict=True):
                row[key] = value
    return rows


def _expand(file: _File, overrides: Sequence[str], seeds: Sequence[int] | None) -> list[Run]:
    """Every run: its arm (a named run at a point of the grid) once per seed."""
    below: list[Layer] = [*_recipes(file), (str(file.path), file.table.get("set", Table()))]
    arms: dict[str, str] = {}
    own: dict[str, list[Layer]] = {}
    for (head, change), (point, cell), (tail, seed) in itertools.product(
        _named(file), _points(file), _seeds(file, seeds)
    ):
        layers = [layer for layer in (change, cell, seed) if layer is not None]
        arm = "-".join(part for part in (head, point) if part) or file.path.stem.lower()
        name = f"{arm}-{tail}" if tail else arm
        key = "grid" if cell else "seeds" if seed else "runs"
        if not layers:
            raise file.error("", "an empty sweep: it makes no run", remedy="Name runs under runs, or give a grid.")
        if not _NAME.fullmatch(name):
            raise file.error(key, "makes what is not a name for a run", name, f"Name it under runs. {_NAME_RULE}")
        if name in own:
            remedy = "Take the repeated value out, or give the runs names under runs."
            raise file.error(key, "two runs have the same name", name, remedy)
        arms[name], own[name] = arm, layers
    configs = [merge([*below, *layers], overrides) for layers in own.values()]
    rows = _differing(configs, list(own.values()))
    return [Run(name, config, arms[name], row) for name, config, row in zip(own, configs, rows, strict=True)]


def _check_paper(file: _File, arms: set[str]) -> None:
    for arm, numbers in file.table.get("paper", {}).items():
        if arm not in arms:
            raise file.error(f"paper.{arm}", "no such run in this sweep", remedy=f"Runs: {', '.join(sorted(arms))}.")
        if not isinstance(numbers, Mapping):
            remedy = f"For example {arm}: {{imagenet: 74.3}}"
            raise file.error(f"paper.{arm}", "needs a mapping of evaluation sets to per cent", numbers, remedy)
        for name, number in numbers.items():
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
                raise file.error(f"paper.{arm}.{name}", "needs a number, in per cent", number)


def load(
    path: str | Path, overrides: Sequence[str] = (), only: str | None = None, seeds: Sequence[int] | None = None
) -> Sweep:
    """The runs of a sweep file, in its order, with command-line ``overrides`` (KEY=VALUE) above everything.

    ``only`` keeps the runs whose names match a shell pattern; ``seeds`` replaces the file's. Raises ConfigError for
    anything in the file that cannot be meant, PermissionDenied where it may not be read.
    """
    file = _File(Path(path), read_yaml(path))
    _check_keys(file)
    table = file.table
    name = table.get("name", file.path.stem)
    if not _NAME.fullmatch(name):
        raise file.error("name", "not a name for a sweep", name, _NAME_RULE)
    runs = _expand(file, overrides, seeds)
    _check_paper(file, {run.arm for run in runs})
    if only is not None:
        kept = [run for run in runs if fnmatch.fnmatchcase(run.name, only)]
        if not kept:
            names = ", ".join(run.name for run in runs)
            raise ConfigError("no run of the sweep matches", "--only", only, f"Runs: {names}.")
        runs = kept
    title, notes = table.get("title", ""), table.get("notes", "")
    return Sweep(name, title, notes, table.get("cluster", "local"), runs, dict(table.get("paper", {})))
