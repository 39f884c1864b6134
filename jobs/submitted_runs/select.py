"""Resolves command-line arguments (a sweep, SWEEP/RUN, a pattern, a path, or nothing) to run directories.

``roots``: folders of sweeps in order of priority, see ``jobs.common.cluster_profile.roots``.
"""

import argparse
import os
import shlex
import stat
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

from flip.runs.errors import ConfigError, suggestion
from flip.runs.rundir import RunDir
from flip.runs.side_jobs import REQUEST
from jobs.common import cluster_profile
from jobs.common.text import plain

RECORDS = ("config.yaml", REQUEST, "identity.json", "job.json", "status.json", "result.json")
"""Records by which a folder is a run directory; all but the second are of a training run."""


def select(word: str | None, roots: Sequence[Path]) -> list[RunDir]:
    """The runs of one argument, at least one. Raises ConfigError that lists existing runs.

    ``word``: None (every sweep), the name of a sweep, SWEEP/RUN, the path of the folder of a sweep or run, or of a
    sweep file (its stem is the name). The first root that has the name counts.
    """
    if word is None:
        runs = [run for place in roots for sweep in sweeps(place) for run in runs_below(sweep)]
    else:
        if word.endswith((".yaml", ".yml")):
            name = Path(word).stem
        else:
            name = word
        places = [roots[0] / name, Path(name).expanduser().absolute(), *(place / name for place in roots[1:])]
        runs = next((matches for matches in map(_at, places) if matches), [])
    if not runs:
        what = "no such sweep or run" if word else "no runs here"
        raise ConfigError(what, _names(roots), word, _existing(word, roots))
    return runs


def select_many(names: Sequence[str], roots: Sequence[Path]) -> list[RunDir]:
    """The runs of several arguments, at least one run.

    An argument has one of the forms of ``select``, or is a pattern (``*``, ``?``, ``[..]``) of SWEEP/RUN, which applies
    to the first root in which it matches a run. An argument with a leading ``!`` excludes runs. Without arguments, or
    with exclusions only, all runs are meant. Raises ConfigError if an argument matches nothing.
    """
    if not names:
        return select(None, roots)
    included = [word for word in names if not word.startswith("!")] or ["*"]
    chosen = {run.path: run for word in included for run in _matching(word, roots)}
    for word in names:
        if word.startswith("!"):
            for run in _matching(word[1:], roots):
                chosen.pop(run.path, None)
    if not chosen:
        raise ConfigError("no run matches", _names(roots), " ".join(names))
    return list(chosen.values())


def select_single(word: str, roots: Sequence[Path]) -> RunDir:
    """The only run of an argument. Raises ConfigError if it means several."""
    runs = select(word, roots)
    if len(runs) > 1:
        names = ", ".join(plain(f"{run.sweep}/{run.name}") for run in runs)
        raise ConfigError("ambiguous: matches several runs", str(runs[0].path.parent), word, f"Choose from: {names}.")
    return runs[0]


def chosen(args: argparse.Namespace) -> list[RunDir]:
    """The runs that a command line names, see ``jobs.common.cli.add_run_arguments``."""
    return select_many(args.target, cluster_profile.roots(args.root))


def models(names: Sequence[str], root: str | None) -> list[Path]:
    """Folders of models: of the runs that the words name, and folders that are no sweep, such as exported models."""
    folders = [Path(word) for word in names if Path(word).is_dir() and not runs_below(Path(word))]
    rest = [word for word in names if Path(word) not in folders]
    if rest:
        folders += [run.path for run in select_many(rest, cluster_profile.roots(root))]
    return folders


def runs_below(folder: Path) -> list[RunDir]:
    """Runs in the folder of a sweep, by name; empty if it is unreadable."""
    return [RunDir(path) for path in _entries(folder) if is_run(path)]


def sweeps(root: Path) -> list[Path]:
    """Folders below RUNS_ROOT with runs, by name; empty if it is unreadable."""
    return [path for path in _entries(root) if not path.name.startswith(".") and runs_below(path)]


def is_run(path: Path) -> bool:
    """Whether the folder is a run directory: it holds a record that only run directories hold.

    One without config.yaml counts, so that a run whose job goes on does not vanish; so does one without read
    permission, with the state unknown. Submissions create no names with control characters.
    """
    if path.name.startswith(".") or not f"{path.parent.name}/{path.name}".isprintable():
        return False
    return any(_is_file_of_run(path, name) for name in RECORDS)


def _matching(word: str, roots: Sequence[Path]) -> list[RunDir]:
    """The runs of an argument without a leading ``!``. Raises ConfigError if there are none."""
    if not set(word) & set("*?[") or any(os.path.exists(root / word) for root in roots):
        return select(word, roots)
    pattern = word if "/" in word else f"{word}/*"
    for root in roots:
        runs = [run for sweep in sweeps(root) for run in runs_below(sweep)]
        if matches := [run for run in runs if fnmatchcase(f"{run.sweep}/{run.name}", pattern)]:
            return matches
    raise ConfigError("no run matches", _names(roots), word, _existing(None, roots))


def _at(place: Path) -> list[RunDir]:
    """The run at a path, or the runs of the sweep at this path."""
    if is_run(place):
        return [RunDir(place)]
    return runs_below(place)


def _entries(folder: Path) -> list[Path]:
    """Paths in a folder, by name. Empty if it is missing or unreadable: the runs of other roots must still be shown."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []
    except OSError as error:
        _warn(f"warning: {error}; its runs are not shown")
        return []


def _is_file_of_run(path: Path, name: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path / name).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # another user's, or below a folder that this user cannot enter, or on a mount that is gone
        return os.path.lexists(path)


def _existing(word: str | None, roots: Sequence[Path]) -> str:
    """The remedy for an argument without runs: similar and existing names, or the root if it is the path of one."""
    if word:
        folder = Path(word).expanduser()
        for place in (folder, folder / "runs"):
            if sweeps(place):
                return plain(f"This folder has sweeps. To use their names: --root {shlex.quote(str(place))}")
    else:
        name = ".." if runs_below(Path(".")) else "."  # a sweep is the current folder, or the folder of runs is
        if sweeps(Path(name)):
            return plain(f"{Path(name).resolve()} has sweeps. To use their names: --root {name}")
    folders = [root / word.split("/")[0] if word else root for root in roots]
    names = [f"{run.sweep}/{run.name}" for folder in folders for run in runs_below(folder)]
    near = suggestion(word or "", names)
    if not names:
        names = [path.name for root in roots for path in sweeps(root)]
        near = suggestion((word or "").split("/")[0], names)
    if not names:
        return "Nothing was submitted there. Runs elsewhere: FLIP_RUNS=FOLDER, or --root."
    return plain(f"{near} There are: {', '.join(names)}.".strip())


def _names(roots: Sequence[Path]) -> str:
    """The roots as text for an error."""
    return ", ".join(map(str, roots))


@lru_cache(maxsize=64)  # once per folder, not at every refresh
def _warn(text: str) -> None:
    print(plain(text), file=sys.stderr)
