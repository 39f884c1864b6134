"""The classes of ``monitor.callbacks``: read and checked before a run is submitted, never executed."""

import ast
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from flip.common import user_classes
from flip.common.user_classes import LIMIT, UserClass
from flip.config.callback_names import ARGUMENTS, KEY, VALUE, parse
from flip.files.creation import read_regular
from flip.runs.errors import ConfigError, PermissionDenied, suggestion
from jobs.common import trust


def read(entries: Sequence[str], folder: Path) -> dict[str, bytes]:
    """Path relative to ``folder`` -> content of the files of ``monitor.callbacks``.

    Raises:
        ConfigError: a file or class does not exist, or has a method or attribute that training would not understand.
        PermissionDenied: a file may not be read, or another user could have written it.
    """
    contents: dict[str, bytes] = {}
    for name in parse(entries):
        path = folder / name.file
        if name.file not in contents:
            contents[name.file] = content(path, KEY)
        try:
            _check_class(path, contents[name.file], name)
        except ConfigError as error:
            raise ConfigError(f"{KEY}: {error.what}", error.where, error.value, error.remedy) from error
    return contents


def content(path: Path, key: str) -> bytes:
    """The content of a user's file, which the setting ``key`` names. Raises as ``read``."""
    if not path.is_file():
        remedy = "Put it into the folder of the sweep file, or below it."
        raise ConfigError(f"{key}: no such file", str(path), remedy=remedy)
    remedy = "Or read it, and name a copy of your own."
    trust.require_trusted_file(path, f"the file of {key}", remedy)
    try:
        return read_regular(os.path.realpath(path), LIMIT)
    except PermissionError as error:
        raise PermissionDenied(f"{key}: may not be read", str(path), remedy="Run chmod u+r on it.") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: cannot be read", str(path), str(error)) from error


def _check_class(path: Path, text: bytes, name: UserClass) -> None:
    definition = user_classes.find(user_classes.definitions(text, str(path)), name, str(path))
    where = f"{path}, class {name.cls}"
    methods = [node for node in definition.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for method in methods:
        _check_method(where, method)
    if not definition.bases and not any(method.name in ARGUMENTS for method in methods):
        raise ConfigError("has no method to call", where, remedy=f"Give it one of: {', '.join(ARGUMENTS)}.")
    for node in definition.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["every"]:
            _check_every(where, node.value)
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["values"]:
            _check_values(where, node.value)
    _check_returned(where, definition)


def _check_method(where: str, method: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
    if method.name.startswith("_"):
        return
    if method.name not in ARGUMENTS:
        remedy = suggestion(method.name, list(ARGUMENTS)) or f"Training calls: {', '.join(ARGUMENTS)}."
        remedy += " The name of any other method starts with an underscore."
        raise ConfigError("training calls no method of this name", where, method.name, remedy)
    user_classes.check_arguments(where, method, ARGUMENTS[method.name] + 1)


def _check_every(where: str, value: ast.expr) -> None:
    every = user_classes.literal(value)
    if every is not None and (type(every) is not int or every < 1):
        raise ConfigError("every: needs a whole number from 1", where, every)


def _check_values(where: str, value: ast.expr) -> None:
    names = user_classes.literal(value)
    if names is None:
        return
    if not isinstance(names, list | tuple) or not all(isinstance(x, str) and VALUE.fullmatch(x) for x in names):
        remedy = 'A tuple of names, as in values = ("noise",).'
        raise ConfigError("values: needs names of numbers", where, names, remedy)


def _check_returned(where: str, definition: ast.ClassDef) -> None:
    """Raise ConfigError if ``step`` returns a number that ``values`` does not name, as far as both are written out."""
    named = _named_values(definition)
    steps = [node for node in definition.body if isinstance(node, ast.FunctionDef) and node.name == "step"]
    if named is None or not steps:
        return
    returned = [node.value for node in ast.walk(steps[0]) if isinstance(node, ast.Return)]
    keys = [key for value in returned if isinstance(value, ast.Dict) for key in value.keys]
    for key in keys:
        if isinstance(key, ast.Constant) and key.value not in named:
            remedy = f"Write values = ({key.value!r},) in the class, with all names of numbers."
            raise ConfigError("step returns a number that `values` does not name", where, key.value, remedy)


def _named_values(definition: ast.ClassDef) -> Collection[object] | None:
    """The names in ``values`` of a class, none without it; None if they are not written out in its body."""
    if definition.bases:
        return None
    named: Collection[object] = ()
    for node in definition.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["values"]:
            literal = user_classes.literal(node.value)
            if not isinstance(literal, list | tuple):
                return None
            named = literal
        elif re.search(r"\bvalues\b *[=:(]", ast.unparse(node)):  # with an annotation, or of self
            return None
    return named
