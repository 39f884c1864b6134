"""Parsers of all commands, without executing the commands."""

import argparse
import contextlib
import importlib

from jobs.__main__ import PACKAGES
from jobs.common.cli import Parser


class _Captured(BaseException):
    """Raised in place of parsing: carries the parser of a command. No command catches it."""

    def __init__(self, parser):
        self.parser = parser


def parser_of(name):
    """Return the parser of a command."""
    with _capturing():
        try:
            importlib.import_module(f"{PACKAGES[name]}.{name}").main([])
        except _Captured as captured:
            return captured.parser
    raise AssertionError(f"flip {name} parses nothing")


@contextlib.contextmanager
def _capturing():
    def capture(self, *_):
        raise _Captured(self)

    parse = Parser.parse_args
    Parser.parse_args = capture
    try:
        yield
    finally:
        Parser.parse_args = parse


def subcommands(parser):
    """Return the parsers of the subcommands, each once, however many names it has."""
    parsers = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                parsers[id(command)] = command
    return list(parsers.values())
