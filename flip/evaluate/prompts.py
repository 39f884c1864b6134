"""The class names and prompt templates of a zero-shot data set, and what a template makes of a name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flip.exitcodes import ConfigError

FORM = 'It is a JSON file: {"names": ["cat", ...], "templates": ["a picture of {}", ...]}.'


@dataclass(frozen=True)
class Prompts:
    """Class c is ``names[c]``; a name may occur twice, so names are no keys (ImageNet has two such pairs)."""

    names: list[str]
    templates: list[str]


def read(path: str) -> Prompts:
    """Raises ConfigError where the file is missing or not of the form."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        prompts = Prompts(list(content["names"]), list(content["templates"]))
    except OSError as error:
        raise ConfigError(f"class names cannot be read: {error.strerror}", path, remedy=FORM) from error
    except (ValueError, KeyError, TypeError) as error:
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
