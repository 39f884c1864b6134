"""Loads a sweep file as named runs with merged, unresolved configurations (docs/sweeps.md).

name: model_scaling             # default: the file's stem
title: ...                      # one line, for tables and pages
notes: ...                      # text, for pages
cluster: h100                   # default profile
recipe: paper                   # a file in recipes/, or a list of them, the later on top of the earlier
set: {data: {manifest: ...}}    # fields of the configuration that all runs share
runs: {baseline: , model: {model.size: H/14}} # what varies: runs, list, zip, grid (jobs/sweeps/expansion.py)
where: [model.size != H/14 or stages.pretrain.mask > 0]   # the runs that are meant (jobs/sweeps/constraints.py)
seeds: [0, 1, 2]                # each run once per seed: NAME (seed 0, the default), NAME-s1, NAME-s2
paper: {baseline: "8, baseline"}              # published numbers, for reports: a row of paper.yaml, or {imagenet: 74.3}
table: "8"                      # a table of paper.yaml; the report shows all of its rows
baselines: {nearest image: {imagenet: 1.5}}   # scores without training, rows of the report
"""

import fnmatch
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from flip.common.plain_data import ConfigChange, compare, flatten
from flip.common.typed import read_fields
from flip.common.yaml_io import LocatedDict, SourceLocation, read_yaml
from flip.config.identity import ORDERED
from flip.config.json_schema import reference
from flip.config.merge import assignment, expand_dotted_keys, lookup, merge, to_dict
from flip.config.resolve import depends_on_folder, is_relative_profile
from flip.config.schema import MODEL_PRESETS, Config
from flip.runs.errors import ConfigError, nearest, suggestion
from flip.runs.records import EXACT, LIST, MAPPING, Field, FieldType
from jobs.common.cluster_profile import ambiguous, is_profile
from jobs.common.paths import REPOSITORY, SWEEPS, other_kind, use_of
from jobs.common.text import shortened
from jobs.sweeps import expansion
from jobs.sweeps import published as paper
from jobs.sweeps.expansion import NAME, NAME_RULE, Layer, Point

_TEXT_OR_LIST = {"anyOf": [EXACT.schema, {"type": "array", "items": EXACT.schema}]}
_ENTRIES = {"type": "object", "additionalProperties": {"anyOf": [reference("entry"), {"type": "null"}]}}


def _is_text_or_list(value: Any) -> bool:
    return isinstance(value, (str, list))


PROFILE = FieldType("the name of a profile", EXACT.fits)
RECIPES = FieldType("a name or a list of names", _is_text_or_list)
SUFFIXES = (".yaml", ".yml")
MOST_FILES = 8
"""Names of files in an error."""
SETTINGS = FieldType("a mapping", MAPPING.fits, schema=reference(Config.__name__))
RUNS = FieldType("a mapping", MAPPING.fits, schema=_ENTRIES)
ENTRIES = FieldType("a list", LIST.fits, schema={"type": "array", "items": reference("entry")})
AXES = FieldType("a mapping", MAPPING.fits, schema=reference("axes"))
CONDITIONS = FieldType("a line or a list of lines", _is_text_or_list, schema=_TEXT_OR_LIST)
SEEDS = FieldType("a list", LIST.fits, schema={"type": "array", "items": {"type": "integer"}})
SCORES = FieldType(
    "a mapping of names to scores",
    MAPPING.fits,
    schema={"type": "object", "additionalProperties": {"type": "object", "additionalProperties": {"type": "number"}}},
)
TABLE = FieldType("the name of a table, in quotes", EXACT.fits, schema=EXACT.schema)
KEYS = {
    "name": Field(EXACT, "Name of the sweep and of its folder; by default that of the file."),
    "title": Field(EXACT, "One line for tables and pages."),
    "notes": Field(EXACT, "Text for pages."),
    "cluster": Field(PROFILE, "Default cluster profile: a file of sweeps/clusters, or a path."),
    "recipe": Field(RECIPES, "A recipe, or a list of recipes, the later ones on top."),
    "set": Field(SETTINGS, "Settings that all runs of this entry share."),
    "runs": Field(RUNS, "Name of a run -> what it changes."),
    "list": Field(ENTRIES, "Entries, each with a `name`."),
    "zip": Field(AXES, "Fields and their values, varied in step."),
    "grid": Field(AXES, "Fields and their values, in every combination."),
    "where": Field(CONDITIONS, "Conditions that a run must satisfy, such as `model.size != H/14`."),
    "seeds": Field(SEEDS, "Each run once per seed."),
    "commands": Field(MAPPING, "Name -> a program that runs beside the trainings (docs/command.md)."),
    "paper": Field(MAPPING, "Run -> published numbers: a row of paper.yaml, or {imagenet: 74.3}."),
    "table": Field(TABLE, "A table of paper.yaml; the report shows all of its rows."),
    "baselines": Field(SCORES, "Name of a method without training -> its scores in per cent, as rows of the report."),
}
"""Key of a sweep file -> what it may hold. ``jobs.sweeps.json_schemas`` has the definitions to which schemas refer."""


@dataclass(frozen=True)
class Run:
    """One training run."""

    name: str
    config: Config
    arm: str = ""
    """Its name without the seed."""
    differs: dict[str, Any] = field(default_factory=dict)
    """Its values of the settings that vary in the sweep."""
    against_base: list[ConfigChange] = field(default_factory=list)
    """Differences from the recipe and ``set``."""
    given: frozenset[str] = frozenset()
    """Keys set by the sweep, its recipe or the command line; others have defaults."""
    chosen: frozenset[str] = frozenset()
    """Those of ``given`` that the sweep or the command line sets, not its recipe."""


RunType = TypeVar("RunType")


@dataclass(frozen=True)
class Sweep(Generic[RunType]):
    """A sweep file. ``runs`` are of the type ``Run``, or what is made of them."""

    name: str
    title: str
    notes: str
    cluster: str
    runs: list[RunType]
    names: list[str] = field(default_factory=list)
    """Names of all runs of the file, also of those that ``only`` excludes."""
    paper: dict[str, Any] = field(default_factory=dict)
    """Arm -> published numbers with the settings they need (jobs/sweeps/published.py)."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """All rows of the ``table`` of the paper to compare with."""
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)
    """Name of a method without training -> evaluation set -> per cent."""
    folder: str = ""
    """The working directory, if paths of the file or of ``overrides`` start there."""


@dataclass(frozen=True)
class _File:
    """A sweep file with the line numbers of its keys."""

    path: Path
    table: LocatedDict

    def error(self, key: str, what: str, value: Any = None, remedy: str = "") -> ConfigError:
        """An error at a dotted key, with the line of its deepest part in the file."""
        line = 0
        here = self.table
        for part in key.split("."):
            if not isinstance(here, LocatedDict) or part not in here:
                break
            line = here.lines.get(part, line)
            here = here[part]
        place = f"{self.path}:{line}" if line else str(self.path)
        if key:
            what = f"{key}: {what}"
        return ConfigError(what, place, value, remedy)


def _other_kind(table: Mapping[str, Any]) -> str:
    """The kind of a YAML file whose keys are not those of a sweep: a cluster profile or a recipe; empty: neither."""
    if not table or table.keys() & (KEYS.keys() - {"name", "recipe"}):
        return ""
    if is_profile(table):
        return "cluster profile"
    if table.keys() <= {*Config.__dataclass_fields__, "base"} and "recipe" not in table:
        return "recipe"
    return ""


def _setting_remedy(key: str) -> str:
    """What to do about a field of the configuration at the top of a sweep; empty for other keys."""
    is_setting = key.partition(".")[0] in Config.__dataclass_fields__
    if is_setting:
        return f"Fields of the configuration belong under set: set.{key}"
    return ""


def _recipes(file: _File) -> list[Layer]:
    """The layers of the recipes, each after its ``base``, and the label."""
    names = file.table.get("recipe", [])
    if isinstance(names, str):
        names = [names]
    layers: list[Layer] = []
    for name in names:
        if not (name and isinstance(name, str)):
            raise file.error("recipe", "the name of a recipe is missing", name, "Give a name, or a list of names.")
        chain: list[Layer] = []
        while name:
            table, path = _recipe(file, name)
            if any(where == str(path) for where, _ in chain):
                raise ConfigError("base: the recipe is its own base", str(path), name)
            name = table.pop("base", None)
            chain.insert(0, (str(path), table))
        layers += chain
    if names:
        return [*layers, (str(file.path), {"recipe": "+".join(names)})]
    return []


def _recipe(file: _File, name: Any) -> tuple[LocatedDict, Path]:
    folders = (file.path.parent / "recipes", SWEEPS / "recipes")
    for path in (folder / f"{name}.yaml" for folder in folders):
        if path.exists():
            return read_yaml(path), path
    recipes = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    remedy = f"{suggestion(str(name), recipes)} There are: {', '.join(recipes)}.".strip()
    raise file.error("recipe", "no such recipe", name, remedy)


def _arms(file: _File) -> list[Point]:
    """The points without their seeds."""
    varied = LocatedDict({key: value for key, value in file.table.items() if key in expansion.KEYS and key != "set"})
    varied.lines = file.table.lines
    return expansion.points(varied, SourceLocation(str(file.path)))


def _seeds(file: _File, seeds: Sequence[int] | None, arms: Sequence[Point]) -> list[Point]:
    """A point per seed; without seeds one empty point. Raises ConfigError if a run has a seed of its own besides."""
    place = SourceLocation(str(file.path), "seeds", file.table.lines.get("seeds", 0))
    if seeds is None:
        chosen = file.table.get("seeds", [])
    else:
        chosen = list(seeds)
    repeated = next((seed for i, seed in enumerate(chosen) if seed in chosen[:i]), None)
    if repeated is not None:
        what = "a seed is repeated"
        remedy = "Give each seed once."
        if seeds:
            raise ConfigError(what, "--seeds", repeated, remedy)
        raise place.error(what, repeated, remedy)
    if chosen and seeds is None:
        _refuse_own_seed(file, arms)
    layers = [(place.where, LocatedDict({"seed": seed}, {"seed": place.line})) for seed in chosen]
    points = [Point(seed_tail(seed), (layer,)) for seed, layer in zip(chosen, layers, strict=True)]
    return expansion.distinct(points, place) or [Point()]


def _refuse_own_seed(file: _File, arms: Sequence[Point]) -> None:
    """Raise ConfigError if a sweep that lists seeds also sets ``seed``, which the list would replace.

    ``--seeds`` and ``seed=N`` on the command line replace what the file says, as all options do.
    """
    if "seed" in file.table.get("set", {}):
        what = "has no effect, because the sweep lists seeds"
        raise file.error("set.seed", what, file.table["set"]["seed"], "Remove set.seed, or the list of seeds.")
    for arm in arms:
        for where, layer in arm.layers:
            if "seed" in layer:
                name = arm.name or file.path.stem
                what = f"run {name}: its seed has no effect, because the sweep lists seeds, with which each run starts"
                raise ConfigError(what, where, layer["seed"], "Remove the seed of the run, or the list of seeds.")


def _filter(file: _File, points: Sequence[Point], configs: Sequence[Config]) -> list[int]:
    """Indices of the points that satisfy their conditions. Raises ConfigError for a condition that excludes all."""
    conditions = dict.fromkeys(condition for point in points for condition in point.where)
    settings = [flatten(to_dict(config)) for config in configs]
    keys = {key for values in settings for key in values}
    failing: set[int] = set()
    for condition in conditions:
        condition.check(keys)
        concerned = [i for i, point in enumerate(points) if condition in point.where]
        failed = [i for i in concerned if not condition.holds(points[i].name, settings[i])]
        if len(failed) == len(concerned):
            raise condition.place.error("holds for none of its runs", condition.text, "Fix or remove the line.")
        failing.update(failed)
    if len(failing) == len(points):
        lines = "; ".join(condition.text for condition in conditions)
        raise file.error("where", "no run satisfies every line", lines, "Fix or remove a line.")
    return [i for i in range(len(points)) if i not in failing]


def _varying(key: str, configs: Sequence[Config]) -> str:
    """The key, or its prefix of a named member that some runs lack (stages.unmasked)."""
    parts = key.split(".")
    for n in range(1, len(parts)):
        if any(lookup(config, ".".join(parts[:n])) is None for config in configs):
            return ".".join(parts[:n])
    return key


def _differing(configs: Sequence[Config], own: Sequence[Sequence[Layer]]) -> list[dict[str, Any]]:
    """For each run its values of the settings that differ between runs; a member that some lack (a stage) is a bool."""
    named = (
        key for layers in own for where, layer in layers for key in flatten(expand_dotted_keys(layer, where)) if key
    )
    rows: list[dict[str, Any]] = [{} for _ in configs]
    for key in dict.fromkeys(_varying(key, configs) for key in dict.fromkeys(named)):
        values = [lookup(config, key) for config in configs]
        if any(is_dataclass(value) for value in values):
            values = [value is not None for value in values]
        if any(value != values[0] for value in values):
            for row, value in zip(rows, values, strict=True):
                row[key] = value
    return rows


def _expand(file: _File, overrides: Sequence[str], seeds: Sequence[int] | None) -> list[Run]:
    """Every run: each point once per seed. ``overrides`` change configurations, not the set of runs."""
    below: list[Layer] = [*_recipes(file), (str(file.path), file.table.get("set", LocatedDict()))]
    arms = _arms(file)
    tails = _seeds(file, seeds, arms)
    top = SourceLocation(str(file.path))
    if not any(point.layers or point.name for point in (*arms, *tails)):
        raise top.error("the sweep is empty", remedy="Name runs under runs, or add a grid.")
    arms = [arm if arm.name else replace(arm, name=file.path.stem.lower()) for arm in arms]
    pairs = list(itertools.product(arms, tails))
    points = expansion.distinct([arm + tail for arm, tail in pairs], top)
    for point in points:
        if not NAME.fullmatch(point.name):
            raise top.error("not a valid name of a run", point.name, f"Name it under runs. {NAME_RULE}")
    limited = any(point.where for point in points)
    plain = []
    if limited or not overrides:
        plain = [merge([*below, *point.layers]) for point in points]
    if limited:
        chosen = _filter(file, points, plain)
    else:
        chosen = list(range(len(points)))
    base = merge(below, overrides)
    layers = [points[i].layers for i in chosen]
    if overrides:
        configs = [merge([*below, *points[i].layers], overrides) for i in chosen]
    else:
        configs = [plain[i] for i in chosen]
    names = {(pairs[i][0].name, pairs[i][1].name): points[i].name for i in chosen}
    for i, config in zip(chosen, configs, strict=True):  # each seed starts from the run of its own seed
        config.init.run = names.get((config.init.run, pairs[i][1].name), config.init.run)
    return [
        Run(
            points[i].name,
            config,
            pairs[i][0].name,
            row,
            compare(to_dict(base), to_dict(config), ORDERED),
            _given([*below, *own], overrides),
            _given([below[-1], *own], overrides),
        )
        for i, config, row, own in zip(chosen, configs, _differing(configs, layers), layers, strict=True)
    ]


def _given(layers: Sequence[Layer], overrides: Sequence[str]) -> frozenset[str]:
    """The keys that layers and overrides set; ``model.size`` sets all keys of a size."""
    named = [expand_dotted_keys(layer, where) for where, layer in [*layers, *map(assignment, overrides)]]
    keys = {key for layer in named for key in flatten(layer)}
    if "model.size" in keys:
        keys |= flatten(MODEL_PRESETS[Config().model.size], "model").keys()
    return frozenset(keys)


def _paper(file: _File, arms: set[str]) -> dict[str, Any]:
    """Published numbers by arm, with named rows replaced by their content."""
    paper_rows = {}
    for arm, numbers in file.table.get("paper", {}).items():
        if arm not in arms:
            raise file.error(f"paper.{arm}", "no such run in this sweep", remedy=f"Runs: {', '.join(sorted(arms))}.")
        if isinstance(numbers, str):
            paper_rows[arm] = _row(file, f"paper.{arm}", partial(paper.row, numbers))
            continue
        if not isinstance(numbers, Mapping):
            remedy = (
                f"For example {arm}: {{imagenet: 74.3}}, or a row of sweeps/published/paper.yaml: {arm}: 8, baseline"
            )
            raise file.error(f"paper.{arm}", "needs a mapping of evaluation sets to per cent", numbers, remedy)
        paper_rows[arm] = _scores(file, f"paper.{arm}", numbers)
    return paper_rows


def _baselines(file: _File) -> dict[str, dict[str, float]]:
    """Scores of methods without training, by name."""
    rows = {}
    for name, numbers in file.table.get("baselines", {}).items():
        key = f"baselines.{name}"
        if not isinstance(numbers, Mapping):
            remedy = f"For example {name}: {{imagenet: 1.5}}"
            raise file.error(key, "needs a mapping of evaluation sets to per cent", numbers, remedy)
        rows[name] = _scores(file, key, numbers)
    return rows


def _scores(file: _File, key: str, numbers: Mapping[str, Any]) -> dict[str, Any]:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not -1e6 < number < 1e6:
            raise file.error(f"{key}.{name}", "needs a number, in per cent", number)
    return dict(numbers)


def _row(file: _File, key: str, look: Callable[[], Any]) -> Any:
    """``look()``, with errors located in the sweep file."""
    try:
        return look()
    except ConfigError as error:
        raise file.error(key, error.what, error.value, error.remedy) from error


def is_chosen(name: str, only: str) -> bool:
    """Whether a run has a name that one of the patterns, which spaces separate, matches."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in only.split())


def no_match(path: str | Path, only: str, names: Sequence[str]) -> ConfigError:
    remedy = f"{suggestion(only, names)} Runs: {', '.join(names)}.".strip()
    return ConfigError("no run of the sweep matches", str(path), only, remedy)


def read_sweep(
    path: str | Path,
    overrides: Sequence[str] = (),
    only: str | None = None,
    seeds: Sequence[int] | None = None,
    may_be_empty: bool = False,
) -> Sweep[Run]:
    """The trainings of a sweep file, in its order, with command-line ``overrides`` (KEY=VALUE) above everything.

    ``only``: shell patterns of names, separated by spaces, each of which must match a run unless ``may_be_empty``.
    ``seeds`` replaces the seeds of the file. Raises ConfigError, or PermissionDenied if the file is unreadable.
    """
    file = _File(Path(path), read_yaml(path))
    kind = _other_kind(file.table)
    if kind:
        raise ConfigError(f"a {kind}, not a sweep", str(path), remedy=use_of(kind, str(path)))
    types = {name: key.kind for name, key in KEYS.items()}
    read_fields(file.table, types, SourceLocation(str(file.path)), _setting_remedy)
    table = file.table
    name = table.get("name", file.path.stem)
    if not NAME.fullmatch(name):
        raise file.error("name", "not a name for a sweep", name, NAME_RULE)
    runs = _expand(file, overrides, seeds)
    names = [run.name for run in runs]
    cluster = table.get("cluster", "local")
    folder = ""
    if is_relative_profile(cluster) or any(depends_on_folder(run.config) for run in runs):
        folder = str(Path.cwd())
    published, rows, baselines = head(file.path, table, {run.arm for run in runs} | set(table.get("commands", {})))
    title = table.get("title", "")
    notes = table.get("notes", "")
    runs = chosen(runs, only, may_be_empty, path)
    return Sweep(name, title, notes, cluster, runs, names, published, rows, baselines, folder)


def head(path: Path, table: LocatedDict, arms: set[str]) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """(``paper``, ``rows``, ``baselines``) of the table of a sweep file with these arms."""
    file = _File(path, table)
    rows = []
    if "table" in table:
        rows = _row(file, "table", lambda: list(paper.rows(table["table"]).values()))
    return _paper(file, arms), rows, _baselines(file)


class Named(Protocol):
    """A run of a sweep file."""

    @property
    def name(self) -> str: ...


NamedType = TypeVar("NamedType", bound=Named)


def chosen(runs: Sequence[NamedType], only: str | None, may_be_empty: bool, path: str | Path) -> list[NamedType]:
    """The runs that ``only`` selects. Raises ConfigError if a pattern matches none, unless ``may_be_empty``."""
    if only is None:
        return list(runs)
    names = [run.name for run in runs]
    selected = [run for run in runs if is_chosen(run.name, only)]
    unmatched = [pattern for pattern in only.split() if not any(is_chosen(name, pattern) for name in names)]
    if (unmatched or not selected) and not may_be_empty:
        raise no_match(path, " ".join(unmatched) or only, names)
    return selected


def seed_tail(seed: int) -> str:
    """The last part of the name of a run with this seed.

    The default seed adds nothing to a name, so that seeds can be added to existing runs.
    """
    if seed == Config.seed:
        return ""
    return f"s{seed}"


def find_sweep(typed: str) -> Path:
    """The sweep file of a path (from here or the repository), or of a name here or in sweeps/.

    A name stands for NAME.yaml or NAME.yml. Raises ConfigError if there is none, or if a name means several files.
    """
    if "://" in typed:
        remedy = "Download it first, for example with curl -O, and give its path."
        raise ConfigError("a sweep is a file on this machine, not an address", "SWEEP", typed, remedy)
    own = [Path(typed).expanduser(), REPOSITORY / typed, Path(f"{typed}.yaml"), Path(f"{typed}.yml")]
    places = [*own, SWEEPS / f"{typed}.yaml"]
    files = [place for place in places if place.is_file()]
    if files:
        others = [file for file in files[1:] if not file.samefile(files[0])]
        if others and re.fullmatch(r"[^/.~][^/]*", typed) and not typed.endswith((".yaml", ".yml")):
            raise ambiguous("sweep", typed, [files[0], others[0]])
        return files[0]
    if places[0].is_dir():
        what = "a folder, not a sweep file"
    else:
        what = "no such sweep file"
    remedy = other_kind(typed, "sweep") or _similar_files(places[0])
    raise ConfigError(what, str(places[0].absolute()), remedy=remedy)


def _similar_files(path: Path) -> str:
    """The remedy for a missing sweep file: similar names in its folder and in sweeps/, else all of both."""
    if path.is_dir():
        folder = path
    else:
        folder = path.parent
    own: dict[str, str] = {}
    if folder.is_dir():
        own = {file.stem: str(folder / file.name) for file in sorted(folder.iterdir()) if file.suffix in SUFFIXES}
    shipped = {file.stem: file.stem for file in sorted(SWEEPS.glob("*.yaml"))}
    sweep_files = {**shipped, **own}
    near = [sweep_files[name] for name in nearest(path.stem, sweep_files)]
    near += [file for name, file in own.items() if name.startswith(path.stem) and file not in near]
    if near:
        return f"Did you mean {' or '.join(near)}?"
    here = ""
    if own:
        here = f"{folder.absolute()} contains: {shortened(list(own.values()), MOST_FILES)}. "
    return f"{here}sweeps/ contains: {', '.join(shipped)}."
