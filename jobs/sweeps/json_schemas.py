"""JSON Schema of the YAML files that users write: sweeps, recipes and cluster profiles."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from flip.config import json_schema
from flip.config.json_schema import Node, closed, reference, references
from flip.config.schema import MODEL_PRESETS, Config
from jobs.common.paths import PROFILES, SWEEPS

_HEAD: Node = {"$schema": json_schema.DIALECT}
_TEXT: Node = {"type": "string"}
_LINES: Node = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]}
_ENTRY = reference("entry")
_ENTRIES: Node = {"type": "object", "additionalProperties": {"anyOf": [_ENTRY, {"type": "null"}]}}
_SETTINGS = Config.__name__
"""The definition of all settings."""

_SWEEP: dict[str, tuple[Node, str]] = {
    "name": (_TEXT, "Name of the sweep and of its folder; by default that of the file."),
    "title": (_TEXT, "One line for tables and pages."),
    "notes": (_TEXT, "Text for pages."),
    "seeds": ({"type": "array", "items": {"type": "integer"}}, "Each run once per seed."),
    "paper": ({"type": "object"}, "Run -> published numbers: a row of paper.yaml, or {imagenet: 74.3}."),
    "table": (_TEXT, "A table of paper.yaml; the report shows all of its rows."),
}
_KEYWORDS: dict[str, Node] = {
    "set": {"allOf": [reference(_SETTINGS)], "description": "Settings that all runs of this entry share."},
    "where": {**_LINES, "description": "Conditions that a run must satisfy, such as `model.size != H/14`."},
    "runs": {**_ENTRIES, "description": "Name of a run -> what it changes."},
    "list": {"type": "array", "items": _ENTRY, "description": "Entries, each with a `name`."},
    "zip": {"allOf": [reference("axes")], "description": "Fields and their values, varied in step."},
    "grid": {"allOf": [reference("axes")], "description": "Fields and their values, in every combination."},
}
"""What an entry may hold beside settings."""


def sweep(recipes: Iterable[str] | None = None, profiles: Iterable[str] | None = None) -> Node:
    """``recipes``, ``profiles``: the names to accept; default: the files of sweeps/recipes and sweeps/clusters."""
    recipe = {"enum": sorted(names(SWEEPS / "recipes") if recipes is None else recipes)}
    cluster = _profile(profiles)
    own = {name: {**node, "description": text} for name, (node, text) in _SWEEP.items()}
    text = "A recipe, or a list of recipes, the later ones on top."
    own["recipe"] = {"anyOf": [recipe, {"type": "array", "items": recipe}], "description": text}
    own["cluster"] = {**cluster, "description": "Default cluster profile: a file of sweeps/clusters, or a path."}
    keywords = references("axis", _KEYWORDS)
    definitions = _settings(cluster)
    fields = references(_SETTINGS, definitions[_SETTINGS]["properties"])
    members = definitions[_SETTINGS]["patternProperties"]
    definitions["entry"] = closed({**keywords, "name": _TEXT, **fields}, members)
    definitions["axis"] = closed(_KEYWORDS)
    definitions["axes"] = {
        "type": "object",
        "properties": _values(fields),
        "patternProperties": _values(members),
        "additionalProperties": {"anyOf": [{"type": "array"}, reference("axis")]},
    }
    return {**_HEAD, "title": "Sweep", **closed({**keywords, **own}), "definitions": definitions}


def _values(fields: Mapping[str, Node]) -> Node:
    """Fields of a grid: a list of values each, or named entries."""
    return {key: {"anyOf": [{"type": "array", "items": node}, reference("axis")]} for key, node in fields.items()}


def names(folder: Path) -> list[str]:
    """Names of the YAML files of a folder."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _profile(profiles: Iterable[str] | None) -> Node:
    known = sorted(names(PROFILES) if profiles is None else profiles)
    return {"anyOf": [{"enum": known}, {"type": "string", "pattern": r"\.ya?ml$"}]}


def _settings(cluster: Node) -> dict[str, Node]:
    """The definitions of all sections of settings, with the known names of sizes and clusters."""
    definitions = json_schema.definitions(Config)
    for section, name, values in (("Model", "size", {"enum": list(MODEL_PRESETS)}), ("Resources", "cluster", cluster)):
        properties = definitions[section]["properties"]
        properties[name] = {**values, "description": properties[name]["description"]}
    return definitions


def recipe(profiles: Iterable[str] | None = None) -> Node:
    """Settings, and ``base``: the recipe below this one."""
    definitions = _settings(_profile(profiles))
    settings = definitions.pop(_SETTINGS)
    base = {**_TEXT, "description": "The recipe that this one changes."}
    recipe = closed({"base": base, **settings["properties"]}, settings["patternProperties"])
    return {**_HEAD, "title": "Recipe", **recipe, "definitions": definitions}


def profile() -> Node:
    from jobs.common.cluster_profile import ClusterProfile

    (node,) = json_schema.definitions(ClusterProfile).values()
    return {**_HEAD, "title": "Cluster profile", **node}


SCHEMAS: dict[str, Callable[[], Node]] = {"sweep": sweep, "recipe": recipe, "profile": profile}
