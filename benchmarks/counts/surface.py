"""What users meet: commands, options, fields of files, kinds of files, environment variables."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from benchmarks.counts.code import Module, texts
from benchmarks.counts.rows import Row, listed

FREE_OWNERS = {"ClusterProfile": "profile", "Config": "config"}
"""Dataclass -> the name that variables of it have in the code. A key of a free dictionary is found behind this name."""
VARIABLE = re.compile(r"\bFLIP_[A-Z0-9_]*[A-Z0-9]\b")
ENVIRONMENTS = ("environ", "environment", "env")
"""Names that hold environment variables."""
FILE_NAME = re.compile(
    r"[\w<][\w<>.*-]*\.(?:json|jsonl|yaml|yml|toml|csv|tsv|html|md|txt|lock|log|out|err|npy|npz|safetensors|tar|parquet|onnx|pt|pid|sh|conf)"
)
"""A name with an ending that the product writes or reads."""


def rows(modules: Sequence[Module], root: Path) -> list[Row]:
    """All rows of this module."""
    from flip.config.schema import Config
    from flip.runs.run_files import RUN_FILES, SWEEP_FILES
    from jobs.common.cluster_profile import ClusterProfile
    from jobs.common.documents import DOCUMENTS
    from jobs.sweeps.sweep_file import KEYS

    parsers = command_parsers()
    return [
        listed("commands", [parser.prog for parser in parsers]),
        listed("options", options(parsers)),
        listed("arguments without a dash", arguments(parsers)),
        listed("configuration fields", field_names(Config)),
        listed("profile fields", [*field_names(ClusterProfile), *free_keys(ClusterProfile, modules)]),
        listed("keys of a sweep file", KEYS),
        listed("file kinds of runs and sweeps", [*RUN_FILES, *SWEEP_FILES]),
        listed("names of files in the code", file_names(modules)),
        listed("numbers of formats", format_numbers(modules)),
        listed("documents of --json", DOCUMENTS),
        listed("environment variables of FLIP", own_variables(modules, root)),
        listed("environment variables of others", read_variables(modules)),
        Row("lines of generated schemas", sum(_lines(path) for path in (root / "sweeps" / "schemas").glob("*.json"))),
    ]


def command_parsers() -> list[argparse.ArgumentParser]:
    """The parser of each command of ``flip``, and those of its subcommands."""
    from jobs.__main__ import PACKAGES

    parsers: list[argparse.ArgumentParser] = []
    for name, package in PACKAGES.items():
        parsers += with_subcommands(_parser_of(f"{package}.{name}"))
    return parsers


def with_subcommands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parser and those of its subcommands at any depth, each once, however many names it has."""
    parsers = {id(parser): parser}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                parsers.update((id(each), each) for each in with_subcommands(command))
    return list(parsers.values())


def options(parsers: Sequence[argparse.ArgumentParser]) -> Iterator[str]:
    """Each option of each parser, hidden ones too. Options that all commands have count once."""
    common = _shared(parsers)
    yield from (f"flip ... {name}" for name in common)
    for parser in parsers:
        for action in parser._actions:
            name = _longest(action)
            if name and name not in common:
                yield f"{parser.prog} {name}"


def arguments(parsers: Sequence[argparse.ArgumentParser]) -> Iterator[str]:
    """Each positional argument of each parser, without the names of its subcommands."""
    for parser in parsers:
        for action in parser._actions:
            if not action.option_strings and not isinstance(action, argparse._SubParsersAction):
                yield f"{parser.prog} {action.dest}"


def field_names(kind: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of the fields of a dataclass and of its sections; members of lists as NAME."""
    hints = typing.get_type_hints(kind)
    for field in fields(kind):
        hint = hints[field.name]
        member = next((each for each in (hint, *typing.get_args(hint)) if is_dataclass(each)), None)
        if member is None:
            yield prefix + field.name
        elif member is hint:
            yield from field_names(member, f"{prefix}{field.name}.")
        else:
            yield from field_names(member, f"{prefix}{field.name}.NAME.")


def free_keys(kind: Any, modules: Sequence[Module]) -> Iterator[str]:
    """NAME.KEY of each key that the code asks of a field whose type is a dictionary, as in ``profile.options``."""
    hints = typing.get_type_hints(kind)
    free = {field.name for field in fields(kind) if typing.get_origin(hints[field.name]) is dict}
    for module in modules:
        for container, key in lookups(module.tree):
            field = getattr(container, "attr", "")
            is_asked = field in free and _last_name(getattr(container, "value", None)) == FREE_OWNERS[kind.__name__]
            if is_asked and isinstance(key, ast.Constant):
                yield f"{field}.{key.value}"


def file_names(modules: Sequence[Module]) -> Iterator[str]:
    """File names that stand in the code as texts, without their folders."""
    for module in modules:
        for text in texts(module.tree):
            name = text.rpartition("/")[2]
            if FILE_NAME.fullmatch(name):
                yield name


def format_numbers(modules: Sequence[Module]) -> Iterator[str]:
    """Constants that hold the version number of a format."""
    for module in modules:
        for name, value in _constants(module):
            if re.fullmatch(r"_?([A-Z]+_)*(VERSION|SCHEMA|FORMAT|NUMBER)", name) and isinstance(value, int):
                yield f"{module.name}.{name}"


def own_variables(modules: Sequence[Module], root: Path) -> Iterator[str]:
    """Names FLIP_... in texts of the code and in its shell scripts."""
    for module in modules:
        for text in texts(module.tree):
            yield from VARIABLE.findall(text)
    for folder in ("flip", "jobs", "tools"):
        for path in (root / folder).rglob("*.sh"):
            yield from VARIABLE.findall(path.read_text(encoding="utf-8"))


def read_variables(modules: Sequence[Module]) -> Iterator[str]:
    """Other environment variables that the code names as keys of an environment."""
    constants = {name: value for module in modules for name, value in _constants(module)}
    for module in modules:
        for container, key in lookups(module.tree):
            if _last_name(container) not in ENVIRONMENTS:
                continue
            if isinstance(key, ast.Constant):
                name = key.value
            else:
                name = constants.get(_last_name(key))
            if isinstance(name, str) and name.isidentifier() and name.isupper() and not VARIABLE.fullmatch(name):
                yield name


def lookups(tree: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """(container, key) of each lookup: X[KEY], KEY in X, a method X.get(KEY), and {KEY} & X.keys()."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript):
            yield node.value, node.slice
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.In, ast.NotIn)):
            yield node.comparators[0], node.left
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            yield node.func.value, node.args[0]
        elif isinstance(node, ast.BinOp) and isinstance(node.left, ast.Set) and isinstance(node.right, ast.Call):
            for key in node.left.elts:
                yield getattr(node.right.func, "value", node.right), key


def _parser_of(module: str) -> argparse.ArgumentParser:
    """The parser that a command makes, without executing the command."""

    class Captured(BaseException):
        """Raised in place of parsing. No command catches it."""

    parsers: list[argparse.ArgumentParser] = []

    def capture(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> Any:
        parsers.append(parser)
        raise Captured

    parse = argparse.ArgumentParser.parse_known_args
    argparse.ArgumentParser.parse_known_args = capture  # type: ignore[method-assign, assignment]
    try:
        importlib.import_module(module).main([])
    except Captured:
        return parsers[0]
    finally:
        argparse.ArgumentParser.parse_known_args = parse  # type: ignore[method-assign]
    raise AssertionError(f"{module} parses nothing")


def _shared(parsers: Sequence[argparse.ArgumentParser]) -> set[str]:
    """Options that every command has, but for --json, which a few commands cannot have."""
    names = [{_longest(action) for action in parser._actions} - {""} for parser in parsers]
    shared = set.intersection(*names)
    if shared:
        shared |= {"--json"} & set.union(*names)
    return shared


def _longest(action: argparse.Action) -> str:
    return max(action.option_strings, key=len, default="")


def _last_name(node: ast.AST | None) -> str:
    """``c`` of an expression ``c`` or ``a.b.c``; empty for any other."""
    return getattr(node, "id", "") or getattr(node, "attr", "")


def _constants(module: Module) -> Iterator[tuple[str, Any]]:
    """(name, value) of the constants at the top of a module that hold a text or a number."""
    for node in module.tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    yield target.id, node.value.value


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())
