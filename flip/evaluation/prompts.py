"""The class names and prompt templates of a zero-shot data set, and what a template makes of a name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flip.runs.errors import ConfigError
from flip.runs.ownership import read_regular

FORM = 'It is a JSON file: {"names": ["cat", ...], "templates": ["a picture of {}", ...]}.'


WDS = ("classnames.txt", "zeroshot_classification_templates.txt")
"""Files of CLIP_benchmark's layout: a name per line, a template per line."""


LIMIT = 16 << 20
"""Bytes of a file of names or templates."""


@dataclass(frozen=True)
class Prompts:
    """Class c is ``names[c]``; a name may occur twice, so names are no keys (ImageNet has two such pairs)."""

    names: list[str]
    templates: list[str]


def read(path: str) -> Prompts:
    """Raises ConfigError where the file is missing or not of the form."""
    try:
        content = json.loads(read_regular(path, LIMIT).decode("utf-8"))
        prompts = Prompts(list(content["names"]), list(content["templates"]))
    except OSError as error:
        raise ConfigError(f"class names cannot be read: {error.strerror}", path, remedy=FORM) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"no class names and templates: {type(error).__name__} {error}", path, remedy=FORM) from error
    check(prompts, path, FORM)
    return prompts


def check(prompts: Prompts, where: str, remedy: str = "") -> None:
    """Raises ConfigError unless there are names and every template has one place for them."""
    if not prompts.names or not all(isinstance(name, str) for name in prompts.names):
        raise ConfigError("needs at least one name, and names must be texts", where, remedy=remedy)
    for template in prompts.templates or [""]:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise ConfigError("a template needs one {} where the name goes", where, template, remedy)


def fill(name: str, templates: Sequence[str]) -> list[str]:
    """The prompts of one class; braces in a name mean themselves."""
    return [template.replace("{}", name) for template in templates]


def of_folder(folder: str | Path) -> Prompts | None:
    """What a data set's folder brings: classes.json, or the two text files of CLIP_benchmark's ``wds_*`` sets.

    None where it brings neither. Raises ConfigError where they are not of their form.
    """
    folder = Path(folder)
    if (folder / "classes.json").is_file():
        return read(str(folder / "classes.json"))
    try:
        names, templates = (read_regular(folder / name, LIMIT).decode("utf-8").splitlines() for name in WDS)
    except OSError:
        return None
    except ValueError as error:
        raise ConfigError(f"no class names and templates: {error}", str(folder)) from error
    found = Prompts(names, [line.replace("{c}", "{}") for line in templates if line.strip()])
    check(found, str(folder), f"{WDS[0]} holds a name per line, {WDS[1]} templates with {{c}}.")
    return found


def imagenet(templates: int) -> Prompts:
    """OpenAI's 1000 names of ImageNet's classes, with 7 (the paper's) or all 80 templates, out of open_clip's package.

    Raises ConfigError where that is not installed.
    """
    try:
        from open_clip import zero_shot_metadata as known
    except ImportError as error:
        remedy = "Install it (pip install open_clip_torch), or put a classes.json into the data set's folder."
        raise ConfigError("names and templates of ImageNet come with open_clip", remedy=remedy) from error
    chosen = {7: known.SIMPLE_IMAGENET_TEMPLATES, 80: known.OPENAI_IMAGENET_TEMPLATES}
    if templates not in chosen:
        raise ConfigError("there are 7 or 80 templates for ImageNet", "templates", templates)
    return Prompts(list(known.IMAGENET_CLASSNAMES), [template("{}") for template in chosen[templates]])
