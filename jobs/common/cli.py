"""What all commands share: the parser of their options, how they end if they cannot go on, how they are typed.

A command cannot go on if its reader has gone (``python jobs/status.py | head -1``), or if a package that it needs is
missing (the wrong Python).

Imported before arguments are parsed, so it must cost nothing.
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
"""Exit code: what a shell says of a program that SIGPIPE ended. Not that signal: a lost connection sends it too."""


class Parser(argparse.ArgumentParser):
    """The parser of every command: options cannot be abbreviated, and an error names the nearest known option."""

    def __init__(self, *args: Any, **options: Any) -> None:
        defaults = {"formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(*args, **{**defaults, **options, "allow_abbrev": False})

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        if "_ARGCOMPLETE" in os.environ:  # the shell asks for completions
            from jobs.common.completion import complete

            complete(self)
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            from jobs.common.text import nearest

            near = [nearest(word.partition("=")[0], self._options())[:1] for word in unknown]
            hints = [f" (did you mean {names[0]}?)" if names else "" for names in near]
            words = (word + hint for word, hint in zip(unknown, hints, strict=True))
            self.error(f"unrecognized arguments: {' '.join(words)}")
        return found

    def _options(self) -> set[str]:
        """Long options, those of subcommands included."""
        found = {name for name in self._option_string_actions if name.startswith("--")}
        for action in self._actions:
            for below in action.choices.values() if isinstance(action, argparse._SubParsersAction) else ():
                found |= below._options()
        return found


def add_root_option(parser: argparse.ArgumentParser) -> None:
    """Add --root, whose value ``jobs.common.cluster_profile.roots`` takes."""
    parser.add_argument(
        "--root", help="folder of run directories; default: FLIP_RUNS, else ./runs, then the runs_root of each profile"
    )


def run_command(work: Callable[[], int]) -> int:
    """The exit code of ``work()``; if it raises a FlipError, that is printed, and its code is returned."""
    from flip.runs.errors import FlipError  # not before the options are parsed

    try:
        return work()
    except FlipError as error:
        print(error, file=sys.stderr)
        return error.code


def quietly(main: Callable[[], int]) -> int:
    """``main()``, its output written out; 141 and no word where the reader has gone; 78 where a package is missing."""
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
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for handle in (1, 2):  # what is left for them would complain at the interpreter's end
            os.dup2(nowhere, handle)
        return CUT_OFF


def command(name: str) -> str:
    """How a person calls a command of ours from here, with the interpreter of this process."""
    from jobs.common.paths import COMMANDS  # only where it is shown: --help must be quick

    return shlex.join([shorter(Path(sys.executable)), shorter(COMMANDS / name)])


def again() -> str:
    """The command line of this process, to be typed once more."""
    return f"{command(Path(sys.argv[0]).name)} {shlex.join(sys.argv[1:])}"


def shorter(path: Path) -> str:
    """A path as a person would type it from here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
