"""From what a person types (nothing, a sweep, sweep/run, a path) to run directories."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from flip.runs.errors import ConfigError
from flip.runs.rundir import RunDir
from jobs.common.text import plain, suggestion

Roots = Path | Sequence[Path]
"""One folder of sweeps, or several, the first one first: see ``jobs.common.cluster_profile.roots``."""


def is_run(path: Path) -> bool:
    """A folder that belongs to somebody else alone is taken for one: its state is then that it cannot be read.

    No run has a name that cannot be printed, of its own or of its sweep: such a folder was not made by a submission.
    """
    if path.name.startswith(".") or not f"{path.parent.name}/{path.name}".isprintable():
        return False
    try:
        return (path / "config.yaml").is_file()
    except PermissionError:
        return True


def runs_below(folder: Path) -> list[RunDir]:
    """The runs in a sweep's folder, by name; none where it is not ours to read."""
    try:
        return [RunDir(path) for path in sorted(folder.iterdir()) if is_run(path)]
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []


def sweeps(root: Path) -> list[Path]:
    """Folders below RUNS_ROOT that hold runs, by name."""
    if not root.is_dir():
        return []
    return [path for path in sorted(root.iterdir()) if not path.name.startswith(".") and runs_below(path)]


def select(typed: str | None, root: Roots) -> list[RunDir]:
    """The runs meant, at least one. ConfigError that names what exists where there are none.

    ``typed``: None (every sweep), a sweep's name, ``sweep/run``, the path of a sweep's or of a run's folder, or of a
    sweep file (its stem is the sweep's name). Of several roots the first that has the name counts.
    """
    roots = _list(root)
    if typed is None:
        found = [run for place in roots for sweep in sweeps(place) for run in runs_below(sweep)]
    else:
        name = Path(typed).stem if typed.endswith((".yaml", ".yml")) else typed
        places = [roots[0] / name, Path(name).expanduser().absolute(), *(place / name for place in roots[1:])]
        found = next((runs for runs in map(_at, places) if runs), [])
    if not found:
        what = "no such sweep or run" if typed else "no runs here"
        raise ConfigError(what, _names(roots), typed, _what_exists(typed, roots))
    return found


def select_many(typed: Sequence[str], root: Roots) -> list[RunDir]:
    """The runs that any of the words means: as ``select`` takes them, or patterns (``*``, ``?``, ``[..]``) of
    ``sweep/run``. A word after ``!`` takes its runs out; where there are no others, out of all. ConfigError where a
    word means nothing, so that a typing error is not taken for all or for none, and where nothing is left.

    Of several roots a pattern is about the first in which it matches a run.
    """
    wanted = [word for word in typed if not word.startswith("!")]
    chosen = {run.path: run for word in wanted or ["*"] for run in _meant(word, _list(root))}
    for word in typed:
        if word.startswith("!"):
            for run in _meant(word[1:], _list(root)):
                chosen.pop(run.path, None)
    if not chosen:
        raise ConfigError("these words leave no run", _names(_list(root)), " ".join(typed))
    return list(chosen.values())


def _meant(word: str, roots: Sequence[Path]) -> list[RunDir]:
    if not set(word) & set("*?[") or any((root / word).exists() for root in roots):
        return select(word, roots)
    pattern = word if "/" in word else f"{word}/*"
    for root in roots:
        runs = [run for sweep in sweeps(root) for run in runs_below(sweep)]
        if found := [run for run in runs if fnmatchcase(f"{run.sweep}/{run.name}", pattern)]:
            return found
    raise ConfigError("no run has such a name", _names(roots), word, _what_exists(None, roots))


def select_one(typed: str, root: Roots) -> RunDir:
    """The single run meant; ConfigError where several are."""
    found = select(typed, root)
    if len(found) > 1:
        names = ", ".join(plain(f"{run.sweep}/{run.name}") for run in found)
        raise ConfigError("several runs are meant", str(found[0].path.parent), typed, f"Name one: {names}.")
    return found[0]


def _list(root: Roots) -> Sequence[Path]:
    return [root] if isinstance(root, Path) else root


def _names(roots: Sequence[Path]) -> str:
    return ", ".join(map(str, roots))


def _at(place: Path) -> list[RunDir]:
    return [RunDir(place)] if is_run(place) else runs_below(place)


def _what_exists(typed: str | None, roots: Sequence[Path]) -> str:
    folders = [root / typed.split("/")[0] if typed else root for root in roots]
    names = [f"{run.sweep}/{run.name}" for folder in folders for run in runs_below(folder)]
    near = suggestion(typed or "", names)
    if not names:
        names = [path.name for root in roots for path in sweeps(root)]
        near = suggestion((typed or "").split("/")[0], names)
    if not names:
        return "Nothing was submitted there. Runs elsewhere: FLIP_RUNS=FOLDER, or --root."
    return plain(f"{near} There are: {', '.join(names)}.".strip())
