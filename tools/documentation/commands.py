"""The page with every option of every command, from the parsers."""

import argparse
import contextlib
import importlib
from collections.abc import Iterator

from jobs.__main__ import COMMANDS, PACKAGES
from jobs.common.cli import Parser
from tools.documentation.markdown import code, table

_HEAD = """# Commands and options

Every command, from its parser; `flip COMMAND --help` shows the same.
[commands.md](../commands.md) lists everyday tasks.
"""
_COMMON = ("--json", "-q", "-v", "--version", "-h")
"""The first word of the options that every command has."""


class _Captured(BaseException):
    """Raised in place of parsing: carries the parser of a command. No command catches it."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def text() -> str:
    """The page."""
    parts = [_HEAD, "## Options of every command\n", _options(common_options())]
    summaries = {name: summary for commands in COMMANDS.values() for name, summary in commands.items()}
    for name in PACKAGES:
        for parser in (top := parser_of(name), *subcommands(top)):
            level = "##" if parser is top else "###"
            about = _paragraph(parser.description or summaries[name])
            parts += [f"{level} {parser.prog}\n", f"{about}\n"]
            if own := own_arguments(parser):
                parts.append(_options(own))
            if parser is top and parser.epilog:
                parts.append(f"```text\n{parser.epilog.strip()}\n```\n")
    return "\n".join(parts)


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of a command, without executing the command."""
    with _capturing():
        try:
            importlib.import_module(f"{PACKAGES[name]}.{name}").main([])
        except _Captured as captured:
            return captured.parser
    raise AssertionError(f"flip {name} parses nothing")


@contextlib.contextmanager
def _capturing() -> Iterator[None]:
    def capture(self: argparse.ArgumentParser, *_: object) -> None:
        raise _Captured(self)

    parse = Parser.parse_args
    Parser.parse_args = capture  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Parser.parse_args = parse  # type: ignore[method-assign]


def subcommands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parsers of the subcommands, each once, however many names it has."""
    subcommands: dict[int, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                subcommands[id(command)] = command
    return list(subcommands.values())


def own_arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The arguments of a parser, without its subcommands and the options that every command has."""
    return [
        action
        for action in parser._actions
        if action.help != argparse.SUPPRESS
        and not isinstance(action, argparse._SubParsersAction)
        and not {*action.option_strings} & {*_COMMON}
    ]


def common_options() -> list[argparse.Action]:
    """The options that every command has."""
    return [action for action in Parser(prog="flip")._actions if {*action.option_strings} & {*_COMMON}]


def spelled(action: argparse.Action) -> str:
    """An argument as a person types it: ``-o, --out OUT``, ``TARGET ...``."""
    value = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    if action.choices is not None:
        value = "|".join(map(str, action.choices))
    if action.nargs == 0:
        value = ""
    elif action.nargs in ("*", "+"):
        value += " ..."
    return f"{', '.join(action.option_strings)} {value}".strip()


def _options(actions: list[argparse.Action]) -> str:
    rows = [(code(spelled(action)), _default(action), _help(action)) for action in actions]
    return table(("argument", "default", "effect"), rows)


def _help(action: argparse.Action) -> str:
    return (action.help or "").replace("%(default)s", str(action.default)).replace("<", "&lt;")


def _default(action: argparse.Action) -> str:
    is_positional = not action.option_strings
    if (is_positional and action.nargs in (None, "+")) or (action.required and not is_positional):
        return "required"
    if action.default in (None, False, argparse.SUPPRESS, []) or action.nargs == 0:
        return ""
    return code(action.default)


def _paragraph(about: str) -> str:
    """A description with its indented lines as code."""
    lines = about.replace("``", "`").strip().splitlines()
    return "\n".join(line.replace("<", "&lt;") if not line.startswith(" ") else f"    {line}" for line in lines)
