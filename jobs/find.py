"""From what a person types (nothing, a sweep, sweep/run, a path) to run directories."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from flip.exitcodes import ConfigError
from flip.rundir import RunDir
from jobs.table import plain


def is_run(path: Path) -> bool:
    """A folder that belongs to somebody else alone is taken for one: its state is then that it cannot be read."""
    try:
        return not path.name.startswith(".") and (path / "config.yaml").is_file()
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


def resolve(typed: str | None, root: Path) -> list[RunDir]:
    """The runs meant, at least one. ConfigError that names what exists where there are none.

    ``typed``: None (every sweep), a sweep's name, ``sweep/run``, the path of a sweep's or of a run's folder, or of a
    sweep file (its stem is the sweep's name).
    """
    if typed is None:
        found = [run for sweep in sweeps(root) for run in runs_below(sweep)]
    else:
        name = Path(typed).stem if typed.endswith((".yaml", ".yml")) else typed
        places = [root / name, Path(name).expanduser().absolute()]
        found = next((runs for runs in map(_at, places) if runs), [])
    if not found:
        raise ConfigError(
            "no such sweep or run" if typed else "no runs here", str(root), typed, _what_exists(typed, root)
        )
    return found


def several(typed: Sequence[str], root: Path) -> list[RunDir]:
    """The runs that any of the words means: as ``resolve`` takes them, or patterns (``*``, ``?``, ``[..]``) of
    ``sweep/run``. A word after ``!`` takes its runs out; where there are no others, out of all. ConfigError where a
    word means nothing, so that a typing error is not taken for all or for none, and where nothing is left.
    """
    wanted = [word for word in typed if not word.startswith("!")]
    chosen = {run.path: run for word in wanted or ["*"] for run in _meant(word, root)}
    for word in typed:
        if word.startswith("!"):
            for run in _meant(word[1:], root):
                chosen.pop(run.path, None)
    if not chosen:
        raise ConfigError("these words leave no run", str(root), " ".join(typed))
    return list(chosen.values())


def _meant(word: str, root: Path) -> list[RunDir]:
    if not set(word) & set("*?[") or (root / word).exists():
        return resolve(word, root)
    pattern = word if "/" in word else f"{word}/*"
    found = [run for run in resolve(None, root) if fnmatchcase(f"{run.sweep}/{run.name}", pattern)]
    if not found:
        raise ConfigError("no run has such a name", str(root), word, _what_exists(None, root))
    return found


def one(typed: str, root: Path) -> RunDir:
    """The single run meant; ConfigError where several are."""
    found = resolve(typed, root)
    if len(found) > 1:
        names = ", ".join(plain(f"{run.sweep}/{run.name}") for run in found)
        raise ConfigError("several runs are meant", str(root), typed, f"Name one: {names}.")
    return found[0]


def _at(place: Path) -> list[RunDir]:
    return [RunDir(place)] if is_run(place) else runs_below(place)


def _what_exists(typed: str | None, root: Path) -> str:
    sweep = root / typed.split("/")[0] if typed else root
    names = [f"{run.sweep}/{run.name}" for run in runs_below(sweep)] or [path.name for path in sweeps(root)]
    names = [plain(name) for name in names]
    return (
        f"There are: {', '.join(names)}."
        if names
        else "Nothing was submitted there. Runs elsewhere: FLIP_RUNS=FOLDER, or --root."
    )
