"""Class names and prompt templates of zero-shot data sets. No torch: checks before submission read them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flip.files.creation import read_regular
from flip.runs.errors import ConfigError, read_error

FORMAT_HELP = 'It is a JSON file: {"names": ["cat", ...], "templates": ["a picture of {}", ...]}.'

WDS = ("classnames.txt", "zeroshot_classification_templates.txt")
"""Files of CLIP_benchmark's format: a name per line, a template per line."""

IMAGENET_CLASSES = 1000

LIMIT = 16 << 20
"""Largest file of names or templates that is read, bytes."""


@dataclass(frozen=True)
class Prompts:
    """Class c is ``names[c]``. A name may occur twice, as two in ImageNet do, so names are no keys."""

    names: list[str]
    templates: list[str]


def read_prompts(path: str) -> Prompts:
    """Raises ConfigError if the file is missing or invalid."""
    try:
        content = json.loads(read_regular(path, LIMIT).decode("utf-8"))
        prompts = Prompts(list(content["names"]), list(content["templates"]))
    except OSError as error:
        raise read_error(error, "class names cannot be read", path, FORMAT_HELP) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"no class names and templates: {type(error).__name__} {error}", path, remedy=FORMAT_HELP
        ) from error
    check_prompts(prompts, path, FORMAT_HELP)
    return prompts


def check_prompts(prompts: Prompts, where: str, remedy: str = "") -> None:
    """Raises ConfigError unless there are names and every template has {} once."""
    if not prompts.names or not all(isinstance(name, str) for name in prompts.names):
        raise ConfigError("needs at least one name, and names must be texts", where, remedy=remedy)
    for template in prompts.templates or [""]:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise ConfigError("a template needs one {} where the name goes", where, template, remedy)


def fill_templates(name: str, templates: Sequence[str]) -> list[str]:
    """The prompts of one class. Braces in a name have no meaning."""
    return [template.replace("{}", name) for template in templates]


def read_folder(folder: str | Path) -> Prompts | None:
    """Read a data set's classes.json, or the two text files of CLIP_benchmark's ``wds_*`` sets.

    None if there is neither. Raises ConfigError if a file is invalid.
    """
    folder = Path(folder)
    if (folder / "classes.json").is_file():
        return read_prompts(str(folder / "classes.json"))
    try:
        names, templates = (read_regular(folder / name, LIMIT).decode("utf-8").splitlines() for name in WDS)
    except OSError:
        return None
    except ValueError as error:
        raise ConfigError(f"no class names and templates: {error}", str(folder)) from error
    prompts = Prompts(names, [line.replace("{c}", "{}") for line in templates if line.strip()])
    check_prompts(prompts, str(folder), f"{WDS[0]} holds a name per line, {WDS[1]} templates with {{c}}.")
    return prompts


def imagenet_prompts(templates: int) -> Prompts:
    """OpenAI's 1000 class names of ImageNet, with 7 (the paper's) or all 80 templates, from the package open_clip.

    Raises ConfigError if open_clip is not installed.
    """
    try:
        from open_clip import zero_shot_metadata as metadata
    except ImportError as error:
        remedy = "Install it (pip install open_clip_torch), or put a classes.json into the data set's folder."
        raise ConfigError("names and templates of ImageNet come with open_clip", remedy=remedy) from error
    choices = {7: metadata.SIMPLE_IMAGENET_TEMPLATES, 80: metadata.OPENAI_IMAGENET_TEMPLATES}
    if templates not in choices:
        raise ConfigError("there are 7 or 80 templates for ImageNet", "templates", templates)
    return Prompts(list(metadata.IMAGENET_CLASSNAMES), [template("{}") for template in choices[templates]])
