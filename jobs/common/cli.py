"""Shared by all commands: option parser, exit codes, and command lines to show.

Imported before arguments are parsed, so it imports nothing large.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CUT_OFF = 141
"""Exit code of a closed pipe, as shells report SIGPIPE."""


class Parser(argparse.ArgumentParser):
    """The parser of every command: options cannot be abbreviated, and an error names the nearest known option."""

    def __init__(self, *args: Any, **options: Any) -> None:
        defaults = {"formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(*args, **{**defaults, **options, "allow_abbrev": False})

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        if "_ARGCOMPLETE" in os.environ:  # the shell asks for completions
            from jobs.common.completion import complete

            complete(self)
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            from jobs.common.text import nearest

            near = [nearest(word.partition("=")[0], self._options())[:1] for word in unknown]
            hints = [f" (did you mean {names[0]}?)" if names else "" for names in near]
            words = (word + hint for word, hint in zip(unknown, hints, strict=True))
            self.error(f"unrecognized arguments: {' '.join(words)}")
        return options

    def _options(self) -> set[str]:
        """Long options, including those of subcommands."""
        options = {name for name in self._option_string_actions if name.startswith("--")}
        for action in self._actions:
            for below in action.choices.values() if isinstance(action, argparse._SubParsersAction) else ():
                options |= below._options()
        return options


def add_root_option(parser: argparse.ArgumentParser) -> None:
    """Add --root, whose value ``jobs.common.cluster_profile.roots`` takes."""
    parser.add_argument(
        "--root", help="folder of run directories; default: FLIP_RUNS, else ./runs, then the runs_root of each profile"
    )


def run_command(work: Callable[[], int]) -> int:
    """Exit code of ``work()``; a FlipError is printed to standard error, and its code returned."""
    from flip.runs.errors import FlipError  # after parsing: --help must be fast

    try:
        return work()
    except FlipError as error:
        print(error, file=sys.stderr)
        return error.code


def quietly(main: Callable[[], int]) -> int:
    """``main()`` with flushed output; 141 without a message if the pipe is closed, 78 if a package is missing."""
    try:
        try:
            return main()
        finally:
            print(end="", flush=True)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("flip", "jobs", "tools"):
            raise
        remedy = "Run `make install`, then `source .venv/bin/activate`."
        print(f"{error.name} is not installed for this Python ({sys.executable}). {remedy}", file=sys.stderr)
        return 78
    except BrokenPipeError:
        devnull = os.open(os.devnull, os.O_WRONLY)
        for handle in (1, 2):  # buffered output would raise again at exit
            os.dup2(devnull, handle)
        return CUT_OFF


def command(name: str) -> str:
    """Command line of a command of jobs/, from the current folder, with this interpreter."""
    from jobs.common.paths import COMMANDS  # --help must be fast

    return shlex.join([shorter(Path(sys.executable)), shorter(COMMANDS / name)])


def again() -> str:
    """The command line of this process."""
    return f"{command(Path(sys.argv[0]).name)} {shlex.join(sys.argv[1:])}"


def shorter(path: Path) -> str:
    """The path relative to the current folder if it is below it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
