"""Classes in files of a user, ``FILE.py:Class``: the one mechanism wherever a configuration names a row of a table.

A sweep file names the file by a path relative to its folder. ``flip submit`` reads it without executing it, checks the
class (``declared``), copies the file into the run's snapshot, and pins it in config.yaml as
``FILE.py:Class@sha256:HEX``; so the config hash covers its content. A rank executes the copy (``load``), and only if it
has this hash. ``monitor.callbacks`` have no hash, as they change no result: the digest of the snapshot covers them.

Plans, reports and exports execute nothing: they know of a class what its body states as constants.
"""

from __future__ import annotations

import ast
import copyreg
import hashlib
import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

from flip.files import python_path
from flip.files.creation import read_regular
from flip.runs.errors import ConfigError, StorageError, describe, suggestion

Row = TypeVar("Row")

FOLDER = "user_files"
"""Folder of a code snapshot that holds the copies of the files."""

LIMIT = 1_000_000
"""Bytes of the largest file: code, not data."""

PATTERN = r"(?:[A-Za-z0-9_][\w-]*/)*[A-Za-z0-9_][\w-]*\.py:[A-Za-z_]\w*(?:@sha256:[0-9a-f]{64})?"
"""Of an entry: for the JSON Schema, too."""

_ENTRY = re.compile(r"([^:]*):([^@]*)(?:@sha256:(.*))?", re.ASCII)
_FORM = re.compile(PATTERN, re.ASCII)
_TYPES: dict[str, type | tuple[type, ...]] = {"int": int, "str": str, "bool": bool, "float": (int, float)}
"""Annotation of an attribute -> the type of its constant."""


class UserClass(NamedTuple):
    """``file``: its path relative to the folder of the sweep file; ``cls``: the name of a class in it; ``digest``: the
    SHA-256 of the file, "" if the entry does not have it."""

    file: str
    cls: str
    digest: str = ""

    @property
    def copy(self) -> str:
        """Path of the copy below ``FOLDER``. Runs of a sweep may have different versions of a file."""
        if self.digest:
            return f"{self.digest[:16]}/{self.file}"
        return self.file

    def __str__(self) -> str:
        entry = f"{self.file}:{self.cls}"
        if self.digest:
            entry += f"@sha256:{self.digest}"
        return entry


def is_entry(value: Any) -> bool:
    """Whether a value has the form FILE.py:Class, with or without a hash."""
    return isinstance(value, str) and _FORM.fullmatch(value) is not None


def parse(entry: str, key: str) -> UserClass:
    """The class that an entry names. ``key``: the setting. Raises ConfigError if it has another form."""
    match = _ENTRY.fullmatch(entry)
    if not is_entry(entry) or match is None:
        remedy = "Name a file in the folder of the sweep file, or below it, and a class: my_metric.py:GradNoise."
        raise ConfigError(f"{key}: needs FILE.py:Class", value=entry, remedy=remedy)
    return UserClass(match[1], match[2], match[3] or "")


# -- the files ---------------------------------------------------------------------------------------------------------

_read: dict[str, bytes] = {}
"""SHA-256 -> content of the files that this process has read to submit them."""


def remember(content: bytes) -> str:
    """The SHA-256 of a file's content. ``declared`` finds the content by it from now on."""
    digest = hashlib.sha256(content).hexdigest()
    _read[digest] = content
    return digest


def folder() -> Path:
    """The folder of the copies: in the run's snapshot, or in the code that runs."""
    return Path(os.environ.get("FLIP_SNAPSHOT") or python_path.ROOT).resolve() / FOLDER


def content(name: UserClass) -> tuple[Path, bytes]:
    """(path, content) of the copy of a file. Raises ConfigError if it is missing or has another hash, StorageError if
    it cannot be read."""
    path = folder() / name.copy
    try:
        text = read_regular(path, LIMIT)
    except FileNotFoundError as error:
        remedy = "Only the run that was submitted with the file executes it; flip.load, evaluate and export do not."
        raise ConfigError("there is no copy of a file of yours here", str(path), str(name), remedy) from error
    except (OSError, ValueError) as error:
        remedy = "Submit the run again: that copies the file."
        raise StorageError(f"the copy of a file of yours cannot be read: {error}", str(path), remedy=remedy) from error
    actual = hashlib.sha256(text).hexdigest()
    if name.digest and actual != name.digest:
        remedy = "Its content is not the one that was submitted, so it is not executed. Submit the run again."
        raise ConfigError("the file has another hash than config.yaml names", str(path), actual, remedy)
    return path, text


# -- without execution -------------------------------------------------------------------------------------------------


def declared(entry: str, table: Mapping[str, Row], base: type[Row], default: str) -> Row:
    """A row of a table by its name; of a user's class, a stand-in with the attributes that the file states.

    For plans, reports and exports. Methods are those of ``base``. If this process does not know the file, as for
    the report of a run of long ago, the row ``default``.
    """
    if entry in table:
        return table[entry]
    known: Row | None = _declared(entry, base)  # type: ignore[arg-type]
    return known or table[default]


@cache
def _declared(entry: str, base: Any) -> Any:
    name = parse(entry, base.__name__)
    text = _read.get(name.digest)
    if text is None:
        try:
            _, text = content(name)
        except (ConfigError, StorageError):
            return None
    return stand_in(name, text, base, name.file)


def stand_in(name: UserClass, text: bytes, base: type[Row], where: str) -> Row:
    """Check a class of a user's file by its text, and return an object with its constants.

    ``where``: the file, for errors. Raises ConfigError if the file has no such class, or if the class does not fit
    ``base``: another base, a missing method or attribute, another number of arguments.
    """
    classes = definitions(text, where)
    definition = find(classes, name, where)
    place = f"{where}, class {name.cls}"
    chain, known = _bases(definition, classes, base, place)
    _check_methods(chain, known, place)
    constants = dict[str, Any]()
    for each in reversed(chain):
        constants |= _constants(each, base, place)
    required = [key for key in _annotations(base) if not hasattr(known, key) and key not in constants]
    if required:
        what = f"lacks the attribute {required[0]}, which plans need"
        raise ConfigError(what, place, remedy=f"Write {required[0]} = ... into the class; see {_source(base)}.")
    made: Any = type(name.cls, (known,), constants)
    made.__abstractmethods__ = frozenset()
    result: Row = made()
    return result


def definitions(text: bytes, where: str) -> dict[str, ast.ClassDef]:
    """Name -> class of a Python file. Raises ConfigError if it is not valid."""
    try:
        tree = ast.parse(text, where)
    except (SyntaxError, ValueError) as error:
        raise ConfigError("is not valid Python", where, str(error), "Correct the file.") from error
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def find(classes: Mapping[str, ast.ClassDef], name: UserClass, where: str) -> ast.ClassDef:
    """The class that an entry names. Raises ConfigError if there is none."""
    if name.cls not in classes:
        remedy = suggestion(name.cls, list(classes)) or f"Its classes: {', '.join(classes) or 'none'}."
        raise ConfigError("the file has no such class", where, name.cls, remedy)
    return classes[name.cls]


def imported(text: bytes, where: str) -> Iterator[str]:
    """The first parts of the names of all modules that a file imports, anywhere in it; "" for relative imports."""
    for node in ast.walk(ast.parse(text, where)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "" if node.level else str(node.module).partition(".")[0]


def check_arguments(where: str, method: ast.FunctionDef | ast.AsyncFunctionDef, number: int) -> None:
    """Raise ConfigError unless a method can be called with ``number`` arguments, including self."""
    if isinstance(method, ast.AsyncFunctionDef):
        remedy = "Write `def` instead of `async def`."
        raise ConfigError("training does not wait for `async` methods", where, method.name, remedy)
    arguments = method.args
    most = len(arguments.posonlyargs) + len(arguments.args)
    least = most - len(arguments.defaults)
    required = [argument.arg for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
                if default is None]  # fmt: skip
    if required or least > number or (most < number and arguments.vararg is None):
        what = f"training calls this method with {number} arguments, including self"
        raise ConfigError(what, where, f"{method.name}({ast.unparse(arguments)})", "Give it these arguments.")


def literal(value: ast.expr) -> Any:
    """The value of an expression of constants; None for any other."""
    try:
        return ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError):
        return None


def _bases(
    definition: ast.ClassDef, classes: Mapping[str, ast.ClassDef], base: type, place: str
) -> tuple[list[ast.ClassDef], type]:
    """(the class and its bases in the same file, the first base that is ``base`` or a class of its module)."""
    module = vars(sys.modules[base.__module__])
    chain = [definition]
    while True:
        names = [ast.unparse(each).rpartition(".")[2] for each in chain[-1].bases]
        inside = [classes[each] for each in names if each in classes and classes[each] not in chain]
        for each in names:
            known = module.get(each)
            if each not in classes and isinstance(known, type) and issubclass(known, base):
                return chain, known
        if not inside:
            remedy = f"Write class {definition.name}({base.__name__}), from {base.__module__} import {base.__name__}."
            raise ConfigError(f"is not derived from {base.__name__}", place, remedy=remedy)
        chain.append(inside[0])


def _check_methods(chain: list[ast.ClassDef], known: type, place: str) -> None:
    methods = [node for each in chain for node in each.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    missing: frozenset[str] = getattr(known, "__abstractmethods__", frozenset()) - {method.name for method in methods}
    if missing:
        remedy = f"Define {', '.join(sorted(missing))}; see {_source(known)}."
        raise ConfigError(f"lacks the method {min(missing)}", place, remedy=remedy)
    for method in methods:
        model = inspect.getattr_static(known, method.name, None)
        if isinstance(model, classmethod):
            model = model.__func__
        if inspect.isfunction(model):
            check_arguments(place, method, len(inspect.signature(model).parameters))


def _annotations(base: type) -> dict[str, str]:
    """Attribute -> type of those that a class and its bases state."""
    return {key: kind for each in reversed(base.__mro__) for key, kind in inspect.get_annotations(each).items()}


def _constants(definition: ast.ClassDef, base: type, place: str) -> dict[str, Any]:
    """The attributes of ``base`` that the body of a class sets. Raises ConfigError if one is no constant."""
    constants = {}
    kinds = _annotations(base)
    for node in definition.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            key, value = ast.unparse(node.targets[0]), node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            key, value = ast.unparse(node.target), node.value
        else:
            continue
        if key not in kinds:
            continue
        constants[key] = literal(value)
        if not _fits(constants[key], kinds[key]):
            what = f"{key} needs a constant of type {kinds[key]}, which plans read without executing the file"
            raise ConfigError(what, place, ast.unparse(value), f"Write {key} = and the value itself.")
    return constants


def _fits(value: Any, kind: str) -> bool:
    if kind in _TYPES:
        return isinstance(value, _TYPES[kind]) and (kind == "bool" or not isinstance(value, bool))
    if kind.startswith("tuple"):
        return isinstance(value, tuple)
    return not kind.startswith("Mapping") or isinstance(value, dict)


def _source(base: type) -> str:
    return f"{base.__name__} in {base.__module__.replace('.', '/')}.py"


# -- with execution ----------------------------------------------------------------------------------------------------


def named(entry: str, table: Mapping[str, Row], base: type[Row]) -> Row:
    """A row of a table by its name; of a user's class, its object, of which a process has one.

    Only processes of a run call it. Raises as ``load``.
    """
    if entry in table:
        return table[entry]
    made: Row = _object(entry, base)  # type: ignore[arg-type]
    return made


@cache
def _object(entry: str, base: Any) -> Any:
    cls = load(entry, base)
    try:
        return cls()
    except Exception as error:  # whatever a user's code raises
        raise ConfigError("cannot be created", entry, describe(error), "Correct the class.") from error


@cache
def load(entry: str, base: Any) -> Any:
    """The class that a pinned entry names: executes its file, once in a process.

    Its objects can be sent to loader processes. Raises ConfigError if the file has another hash, raises an error, or
    has no such class derived from ``base``; StorageError if it cannot be read.
    """
    name = parse(entry, base.__name__)
    if not name.digest:
        remedy = "Submit it with `flip submit`, which copies the file and adds its hash."
        raise ConfigError("a file is executed by its hash alone, which this entry does not have", value=entry,
                          remedy=remedy)  # fmt: skip
    loaded = module(name)
    cls = getattr(loaded, name.cls, None)
    if not isinstance(cls, type) or not issubclass(cls, base):
        remedy = f"Derive it from {base.__name__} of {base.__module__}."
        raise ConfigError(f"is no class derived from {base.__name__}", entry, remedy=remedy)
    copyreg.pickle(cls, lambda each: (_restored, (entry, base, each.__dict__)))
    return cls


def _restored(entry: str, base: Any, state: dict[str, Any]) -> Any:
    """An object of a user's class in another process."""
    cls = load(entry, base)
    made = cls.__new__(cls)
    made.__dict__.update(state)
    return made


def module(name: UserClass) -> ModuleType:
    """The module of the copy of a file, executed once, without its folder in the import path.

    What is executed are the bytes whose hash was compared. Raises ConfigError if it raises an error.
    """
    path, text = content(name)
    own = f"flip_user_files.{name.copy[:-3].replace('/', '.')}"
    loaded = sys.modules.get(own)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    made = ModuleType(own)
    made.__file__ = str(path)
    sys.modules[own] = made  # for dataclasses, which look it up
    try:
        exec(compile(text, str(path), "exec"), made.__dict__)  # noqa: S102 - the bytes have the hash
    except BaseException as error:
        del sys.modules[own]
        if isinstance(error, (Exception, SystemExit)):
            what = "a file of yours raises an error when it is imported"
            raise ConfigError(what, str(path), describe(error), "Correct the file, and submit again.") from error
        raise
    return made
