"""Shell completion of commands, options, sweeps, runs and profiles, by argcomplete (docs/commands.md)."""

import argparse
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from jobs.common import paths


def command(commands: Iterable[str]) -> str:
    """The command on the line that the shell completes. If that is the word to complete: print those that fit, exit."""
    line = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])].split(" ")
    completed = [word for word in line[:-1] if word]
    if len(completed) < 2:
        parser = argparse.ArgumentParser(add_help=False)
        parser.add_argument("command", choices=sorted(commands))
        complete(parser)
    os.environ["_ARGCOMPLETE"] = "2"  # argcomplete drops the word flip, and this one
    if len(completed) > 1:
        return completed[1]
    return ""


def complete(parser: argparse.ArgumentParser) -> None:
    """Print the completions of the line that the shell has in its environment, and exit."""
    import argcomplete

    for action in actions_of(parser):
        completer = completer_of(action.dest, bool(action.option_strings))
        if completer is not None:
            action.completer = completer  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser)


def actions_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments of a parser and of its subcommands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from actions_of(below)


def completer_of(argument: str, is_option: bool) -> Callable[..., list[str]] | None:
    """The function that lists completions of an argument, as argcomplete calls it; None: argcomplete's own rules.

    ``argument``: its ``dest`` in the parser.
    """
    completers: dict[tuple[str, bool], Callable[..., list[str]]] = {
        ("sweep", True): _sweeps,
        ("name", False): _sweeps,
        ("cluster", True): _profiles,
        ("run", False): _runs,
        ("target", False): _runs,
        ("runs", False): _runs,
    }
    return completers.get((argument, is_option))


def _sweeps(prefix: str, **_: Any) -> list[str]:
    """Names in sweeps/, and files in the folder of the prefix."""
    shipped = [path.stem for path in paths.SWEEPS.glob("*.yaml")]
    return shipped + [str(path) for path in Path(os.path.dirname(prefix)).glob("*.yaml")]


def _profiles(prefix: str, **_: Any) -> list[str]:
    return [path.stem for path in paths.PROFILES.glob("*.yaml")]


def _runs(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Sweeps below the folders of runs; after ``SWEEP/`` the runs of that sweep."""
    from jobs.common.cluster_profile import roots

    sweep, slash, _rest = prefix.rpartition("/")
    names = []
    for root in filter(Path.is_dir, roots(getattr(parsed_args, "root", None))):
        for path in (root / sweep).glob("*"):
            if path.is_dir() and not path.name.startswith("."):
                names.append(f"{sweep}{slash}{path.name}{'' if slash else '/'}")
    return names
