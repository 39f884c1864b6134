"""JSON Schema of the YAML files that users write: sweeps, recipes and cluster profiles."""

from flip.config import json_schema
from flip.config.json_schema import Node
from flip.config.schema import Config

_TEXT: Node = {"type": "string"}
_LINES: Node = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]}
_ENTRY = {"$ref": "#/definitions/entry"}
_ENTRIES: Node = {"type": "object", "additionalProperties": {"anyOf": [_ENTRY, {"type": "null"}]}}

_SWEEP: dict[str, tuple[Node, str]] = {
    "name": (_TEXT, "Name of the sweep and of its folder; by default that of the file."),
    "title": (_TEXT, "One line for tables and pages."),
    "notes": (_TEXT, "Text for pages."),
    "cluster": (_TEXT, "Default cluster profile: a file of sweeps/clusters."),
    "recipe": (_LINES, "A recipe, or a list of recipes, the later ones on top."),
    "seeds": ({"type": "array", "items": {"type": "integer"}}, "Each run once per seed."),
    "paper": ({"type": "object"}, "Run -> published numbers: a row of paper.yaml, or {imagenet: 74.3}."),
    "table": (_TEXT, "A table of paper.yaml; the report shows all of its rows."),
}


def sweep() -> Node:
    settings = json_schema.section(Config)
    fields = {key: {"$ref": f"#/definitions/settings/properties/{key}"} for key in settings["properties"]}
    own = {name: {**node, "description": text} for name, (node, text) in _SWEEP.items()}
    axis = _closed(_keywords())
    return {
        **_closed({**_keywords(), **own}, title="Sweep"),
        "definitions": {
            "settings": settings,
            "entry": {**settings, "properties": {**_keywords(), "name": _TEXT, **fields}},
            "axes": {
                "type": "object",
                "properties": {
                    key: {"anyOf": [{"type": "array", "items": node}, axis]} for key, node in fields.items()
                },
                "additionalProperties": {"anyOf": [{"type": "array"}, axis]},
            },
        },
    }


def recipe() -> Node:
    """Settings, and ``base``: the recipe below this one."""
    settings = json_schema.section(Config)
    base = {**_TEXT, "description": "The recipe that this one changes."}
    return {**settings, **_closed({"base": base, **settings["properties"]}, title="Recipe")}


def profile() -> Node:
    from jobs.common.cluster_profile import ClusterProfile

    return {**json_schema.section(ClusterProfile), "$schema": json_schema.DIALECT, "title": "Cluster profile"}


def _closed(properties: Node, title: str = "") -> Node:
    """An object with these properties and no others; with a title, a document."""
    head = {"$schema": json_schema.DIALECT, "title": title} if title else {}
    return {**head, "type": "object", "properties": properties, "additionalProperties": False}


def _keywords() -> Node:
    """What an entry may hold beside settings."""
    settings, axes = {"$ref": "#/definitions/settings"}, {"$ref": "#/definitions/axes"}
    return {
        "set": {"allOf": [settings], "description": "Settings that all runs of this entry share."},
        "where": {**_LINES, "description": "Conditions that a run must satisfy, such as `model.size != H/14`."},
        "runs": {**_ENTRIES, "description": "Name of a run -> what it changes."},
        "list": {"type": "array", "items": _ENTRY, "description": "Entries, each with a `name`."},
        "zip": {"allOf": [axes], "description": "Fields and their values, varied in step."},
        "grid": {"allOf": [axes], "description": "Fields and their values, in every combination."},
    }


SCHEMAS = {"sweep": sweep, "recipe": recipe, "profile": profile}
