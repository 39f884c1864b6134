"""JSON Schema of the YAML files that users write: sweeps, recipes and cluster profiles."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from flip.config import json_schema
from flip.config.json_schema import Node, closed, reference, references
from flip.config.schema import MODEL_PRESETS, Config
from flip.runs.records import EXACT, MAPPING, Field
from jobs.common.paths import PROFILES, SWEEPS
from jobs.sweeps import command_file, expansion
from jobs.sweeps.sweep_file import KEYS

_HEAD: Node = {"$schema": json_schema.DIALECT}
_SETTINGS = Config.__name__
"""The definition of all settings."""


def sweep(recipes: Iterable[str] | None = None, profiles: Iterable[str] | None = None) -> Node:
    """``recipes``, ``profiles``: the names to accept; default: the files of sweeps/recipes and sweeps/clusters."""
    recipe = {"enum": sorted(names(SWEEPS / "recipes") if recipes is None else recipes)}
    cluster = _profile(profiles)
    keys = {name: json_schema.of_table(key) for name, key in KEYS.items()}
    keys["recipe"] |= {"anyOf": [recipe, {"type": "array", "items": recipe}]}
    keys["cluster"] |= cluster
    axis = closed({name: keys[name] for name in expansion.KEYS})
    keywords = references("axis", axis["properties"])
    definitions = _settings(cluster)
    fields = references(_SETTINGS, definitions[_SETTINGS]["properties"])
    members = definitions[_SETTINGS]["patternProperties"]
    definitions["entry"] = closed({**keywords, "name": EXACT.schema, **fields}, members)
    definitions["axis"] = axis
    definitions["axes"] = {
        "type": "object",
        "properties": _values(fields),
        "patternProperties": _values(members),
        "additionalProperties": {"anyOf": [{"type": "array"}, reference("axis")]},
    }
    definitions["program"] = closed(_program_keys(definitions))
    keys["commands"] |= {"additionalProperties": reference("program")}
    shared = {name: keys[name] for name in command_file.TOP}
    of_program = closed({**shared, **references("program", definitions["program"]["properties"])})
    kinds = {"if": {"required": ["command"]}, "then": of_program, "else": closed({**keys, **keywords})}
    return {**_HEAD, "title": "Sweep", "type": "object", **kinds, "definitions": definitions}


def _program_keys(definitions: dict[str, Node]) -> dict[str, Node]:
    """The keys of a program, in a file or below ``commands``. Adds its sections to ``definitions``."""
    keys = {name: json_schema.of_table(KEYS[name]) for name in (*command_file.VARIED, "seeds")}
    keys["set"] = json_schema.of_table(Field(MAPPING, "Parameters that all runs share."))
    for name, key in command_file.SECTION.items():
        keys[name] = json_schema.of_table(key)
        if kind := command_file.SECTION_KINDS.get(name):
            definitions |= json_schema.definitions(kind)
            keys[name] = {**reference(kind.__name__), "description": key.meaning}
    definitions[command_file.ResumeSettings.__name__]["properties"]["arguments"] = {
        **json_schema.of_table(command_file.WORDS), "description": "Words that are added once a checkpoint exists.",
    }  # fmt: skip
    definitions[command_file.EvaluateSettings.__name__]["properties"]["command"] = {
        **json_schema.of_table(command_file.WORDS), "description": "Words of the command; {checkpoint}: the last one.",
    }  # fmt: skip
    return keys


def _values(fields: Mapping[str, Node]) -> Node:
    """Fields of a grid: a list of values each, or named entries."""
    return {key: {"anyOf": [{"type": "array", "items": node}, reference("axis")]} for key, node in fields.items()}


def names(folder: Path) -> list[str]:
    """Names of the YAML files of a folder."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _profile(profiles: Iterable[str] | None) -> Node:
    profile_names = sorted(names(PROFILES) if profiles is None else profiles)
    return {"anyOf": [{"enum": profile_names}, {"type": "string", "pattern": r"\.ya?ml$"}]}


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
    base = {**EXACT.schema, "description": "The recipe that this one changes."}
    recipe = closed({"base": base, **settings["properties"]}, settings["patternProperties"])
    return {**_HEAD, "title": "Recipe", **recipe, "definitions": definitions}


def profile() -> Node:
    from jobs.common.cluster_profile import ClusterProfile

    (node,) = json_schema.definitions(ClusterProfile).values()
    return {**_HEAD, "title": "Cluster profile", **node}


SCHEMAS: dict[str, Callable[[], Node]] = {"sweep": sweep, "recipe": recipe, "profile": profile}
