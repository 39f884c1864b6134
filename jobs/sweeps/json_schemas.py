"""JSON Schema of the YAML files that users write: sweeps, recipes and cluster profiles."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from flip.config import json_schema
from flip.config.json_schema import Node
from flip.config.schema import MODEL_PRESETS, Config
from jobs.common.paths import PROFILES, SWEEPS

_TEXT: Node = {"type": "string"}
_LINES: Node = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]}
_ENTRY = {"$ref": "#/definitions/entry"}
_ENTRIES: Node = {"type": "object", "additionalProperties": {"anyOf": [_ENTRY, {"type": "null"}]}}

_SWEEP: dict[str, tuple[Node, str]] = {
    "name": (_TEXT, "Name of the sweep and of its folder; by default that of the file."),
    "title": (_TEXT, "One line for tables and pages."),
    "notes": (_TEXT, "Text for pages."),
    "seeds": ({"type": "array", "items": {"type": "integer"}}, "Each run once per seed."),
    "paper": ({"type": "object"}, "Run -> published numbers: a row of paper.yaml, or {imagenet: 74.3}."),
    "table": (_TEXT, "A table of paper.yaml; the report shows all of its rows."),
}


def sweep(recipes: Iterable[str] | None = None, profiles: Iterable[str] | None = None) -> Node:
    """``recipes``, ``profiles``: the names to accept; default: the files of sweeps/recipes and sweeps/clusters."""
    recipe = {"enum": sorted(names(SWEEPS / "recipes") if recipes is None else recipes)}
    cluster = _profile(profiles)
    settings = _settings(cluster)
    fields = {key: {"$ref": f"#/definitions/settings/properties/{key}"} for key in settings["properties"]}
    own = {name: {**node, "description": text} for name, (node, text) in _SWEEP.items()}
    text = "A recipe, or a list of recipes, the later ones on top."
    own["recipe"] = {"anyOf": [recipe, {"type": "array", "items": recipe}], "description": text}
    own["cluster"] = {**cluster, "description": "Default cluster profile: a file of sweeps/clusters, or a path."}
    axis = _closed(_keywords())
    return {
        **_closed({**_keywords(), **own}, title="Sweep"),
        "definitions": {
            "settings": settings,
            "entry": {**settings, "properties": {**_keywords(), "name": _TEXT, **fields}},
            "axes": {
                "type": "object",
                "properties": _values(fields, axis),
                "patternProperties": _values(settings["patternProperties"], axis),
                "additionalProperties": {"anyOf": [{"type": "array"}, axis]},
            },
        },
    }


def _values(fields: Mapping[str, Node], axis: Node) -> Node:
    """Fields of a grid: a list of values each, or named entries."""
    return {key: {"anyOf": [{"type": "array", "items": node}, axis]} for key, node in fields.items()}


def names(folder: Path) -> list[str]:
    """Names of the YAML files of a folder."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _profile(profiles: Iterable[str] | None) -> Node:
    known = sorted(names(PROFILES) if profiles is None else profiles)
    return {"anyOf": [{"enum": known}, {"type": "string", "pattern": r"\.ya?ml$"}]}


def _settings(cluster: Node) -> Node:
    """The section of all settings, with the known names of sizes and clusters."""
    settings = json_schema.section(Config)
    places = {"model.size": {"enum": list(MODEL_PRESETS)}, "resources.cluster": cluster}
    for key, node in places.items():
        section, _, name = key.partition(".")
        for properties, field in ((settings["properties"], key), (settings["properties"][section]["properties"], name)):
            described = {}
            if text := properties[field].get("description"):
                described = {"description": text}
            properties[field] = {**node, **described}
    return settings


def recipe(profiles: Iterable[str] | None = None) -> Node:
    """Settings, and ``base``: the recipe below this one."""
    settings = _settings(_profile(profiles))
    base = {**_TEXT, "description": "The recipe that this one changes."}
    return {**settings, **_closed({"base": base, **settings["properties"]}, title="Recipe")}


def profile() -> Node:
    from jobs.common.cluster_profile import ClusterProfile

    return {**json_schema.section(ClusterProfile), "$schema": json_schema.DIALECT, "title": "Cluster profile"}


def _closed(properties: Node, title: str = "") -> Node:
    """An object with these properties and no others; with a title, a document."""
    head = {}
    if title:
        head = {"$schema": json_schema.DIALECT, "title": title}
    return {**head, "type": "object", "properties": properties, "additionalProperties": False}


def _keywords() -> Node:
    """What an entry may hold beside settings."""
    settings = {"$ref": "#/definitions/settings"}
    axes = {"$ref": "#/definitions/axes"}
    return {
        "set": {"allOf": [settings], "description": "Settings that all runs of this entry share."},
        "where": {**_LINES, "description": "Conditions that a run must satisfy, such as `model.size != H/14`."},
        "runs": {**_ENTRIES, "description": "Name of a run -> what it changes."},
        "list": {"type": "array", "items": _ENTRY, "description": "Entries, each with a `name`."},
        "zip": {"allOf": [axes], "description": "Fields and their values, varied in step."},
        "grid": {"allOf": [axes], "description": "Fields and their values, in every combination."},
    }


SCHEMAS: dict[str, Callable[[], Node]] = {"sweep": sweep, "recipe": recipe, "profile": profile}
