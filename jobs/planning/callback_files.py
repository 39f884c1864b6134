"""The files of a user's classes (``monitor.callbacks``): read and checked before a run is submitted, never imported."""

import ast
import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from flip.config.callback_names import ARGUMENTS, VALUE, CallbackName, parse
from flip.files.creation import read_regular
from flip.runs.errors import ConfigError, PermissionDenied, suggestion
from jobs.common import trust

LIMIT = 1_000_000
"""Bytes of the largest file: code, not data."""
_KEY = "monitor.callbacks"


def paths(entries: Iterable[str], folder: Path) -> list[Path]:
    """The files of ``monitor.callbacks`` of a sweep file in ``folder``, each once; entries need not be valid."""
    return list(dict.fromkeys(folder / entry.partition(":")[0] for entry in entries))


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
            contents[name.file] = _content(path)
        _check_class(path, contents[name.file], name)
    return contents


def _content(path: Path) -> bytes:
    if not path.is_file():
        remedy = "Put it into the folder of the sweep file, or below it."
        raise ConfigError(f"{_KEY}: no such file", str(path), remedy=remedy)
    remedy = "Or read it, and name a copy of your own."
    trust.require_trusted_file(path, f"the file of {_KEY}", remedy)
    try:
        return read_regular(os.path.realpath(path), LIMIT)
    except PermissionError as error:
        raise PermissionDenied(f"{_KEY}: may not be read", str(path), remedy="Run chmod u+r on it.") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{_KEY}: cannot be read", str(path), str(error)) from error


def _check_class(path: Path, content: bytes, name: CallbackName) -> None:
    try:
        tree = ast.parse(content, str(path))
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{_KEY}: is not valid Python", str(path), str(error)) from error
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if name.cls not in classes:
        remedy = suggestion(name.cls, list(classes)) or f"Its classes: {', '.join(classes) or 'none'}."
        raise ConfigError(f"{_KEY}: the file has no such class", str(path), name.cls, remedy)
    where = f"{path}, class {name.cls}"
    definition = classes[name.cls]
    methods = [node for node in definition.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for method in methods:
        _check_method(where, method)
    if not definition.bases and not any(method.name in ARGUMENTS for method in methods):
        raise ConfigError(f"{_KEY}: has no method to call", where, remedy=f"Give it one of: {', '.join(ARGUMENTS)}.")
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
        raise ConfigError(f"{_KEY}: training calls no method of this name", where, method.name, remedy)
    if isinstance(method, ast.AsyncFunctionDef):
        raise ConfigError(f"{_KEY}: training does not wait for `async` methods", where, method.name)
    number = ARGUMENTS[method.name] + 1
    arguments = method.args
    most = len(arguments.posonlyargs) + len(arguments.args)
    least = most - len(arguments.defaults)
    required = [argument.arg for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
                if default is None]  # fmt: skip
    if required or least > number or (most < number and arguments.vararg is None):
        what = f"{_KEY}: training calls this method with {number} arguments, including self"
        raise ConfigError(what, where, f"{method.name}({ast.unparse(arguments)})")


def _check_every(where: str, value: ast.expr) -> None:
    every = _literal(value)
    if every is not None and (type(every) is not int or every < 1):
        raise ConfigError(f"{_KEY}: every: needs a whole number from 1", where, every)


def _check_values(where: str, value: ast.expr) -> None:
    names = _literal(value)
    if names is None:
        return
    if not isinstance(names, list | tuple) or not all(isinstance(x, str) and VALUE.fullmatch(x) for x in names):
        remedy = 'A tuple of names, as in values = ("noise",).'
        raise ConfigError(f"{_KEY}: values: needs names of numbers", where, names, remedy)


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
            raise ConfigError(f"{_KEY}: step returns a number that `values` does not name", where, key.value, remedy)


def _named_values(definition: ast.ClassDef) -> Collection[object] | None:
    """The names in ``values`` of a class, none without it; None if they are not written out in its body."""
    if definition.bases:
        return None
    named: Collection[object] = ()
    for node in definition.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["values"]:
            literal = _literal(node.value)
            if not isinstance(literal, list | tuple):
                return None
            named = literal
        elif re.search(r"\bvalues\b *[=:(]", ast.unparse(node)):  # with an annotation, or of self
            return None
    return named


def _literal(value: ast.expr) -> object:
    """The value of an expression of constants; None for any other, which training checks."""
    try:
        return ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError):
        return None
