"""Lists and deletes folders that runs no longer need, for ``flip clean``.

Each folder has a kind:

- ``trash``: a run directory RUNS_ROOT/.trash/<time>/<sweep>/<run>.
- ``logs``: logs/<n> of a run, except those of its newest attempt and of its newest attempt that failed.
- ``compiled``: compiled/ of a complete run, and compiled.of-... of a run that was copied.
- ``code``: a snapshot .code/<digest> that no run of the sweep, its evaluations or its trash names.

A folder is listed only if it belongs to the current user and is not reached through a link below RUNS_ROOT, if its
run has ended, and if nothing in it has changed for a number of days. Paths come from listing folders, never from a
record: what records name is only spared.
"""

import os
import re
import stat
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from shlex import quote

from flip.files import deletion
from flip.files.ownership import user_name
from flip.runs import attempts, command_record
from flip.runs.errors import ConfigError, FlipError, PermissionDenied, StorageError, suggestion
from flip.runs.lifecycle import ENDED, UNREADABLE
from flip.runs.rundir import RunDir, list_names, parse_file_number, read_record
from flip.runs.side_jobs import SIDE_JOBS
from jobs.common.text import plain
from jobs.local import supervisor
from jobs.submission.apply import lock
from jobs.submission.snapshot import DIGEST
from jobs.submitted_runs import clusters

KINDS = ("trash", "logs", "compiled", "code")
TRASH = ".trash"
DAY = 86400.0
_TIME = re.compile(r"[0-9]{8}-[0-9]{6}(\.[0-9]+)?")
"""Name of a folder of the trash, see ``jobs.submission.apply.move_to_trash``."""
_SET_ASIDE = re.compile(r"compiled\.of-[A-Za-z0-9-]*-[0-9]+")
"""Name of compiled code that came with a copy of a run, see ``jobs.submission.apply``."""
_NO_FAILURE = ("complete", "stopped", "cancelled")
"""Causes of the ends of attempts whose logs explain no failure."""


@dataclass(frozen=True)
class Folder:
    """A folder that can be deleted: RUNS_ROOT/<names>."""

    kind: str
    root: Path
    names: tuple[str, ...]
    sweep: str
    runs: tuple[Path, ...]
    """Runs that must be in one of ``states``."""
    states: tuple[str, ...]
    bytes: int
    """Of its files."""
    days: float
    """Since the last change of anything in it, and since it was moved to the trash."""

    @property
    def path(self) -> Path:
        return self.root.joinpath(*self.names)


@dataclass
class Listing:
    """Folders that can be deleted, and others that stay: path -> reason."""

    folders: list[Folder] = field(default_factory=list)
    spared: dict[Path, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(folder.bytes for folder in self.folders)


def listing(roots: Iterable[Path], words: Sequence[str], kinds: Collection[str], days: float) -> Listing:
    """What can be deleted in the folders of runs ``roots``.

    ``words``: names or patterns of sweeps; none: all sweeps. ``days``: since the last change of a folder, at least.
    Raises ConfigError if a word names no sweep.
    """
    result = Listing()
    sweeps_by_root = {root: _sweeps(root) for root in _distinct(roots)}
    names = sorted(set().union(*sweeps_by_root.values()))
    for word in words:
        if not any(fnmatchcase(name, word) for name in names):
            near = f"{suggestion(word, names)} There are: {', '.join(names) or 'none'}.".strip()
            raise ConfigError("no such sweep", ", ".join(map(str, sweeps_by_root)), word, plain(near))
    for root, sweeps in sweeps_by_root.items():
        for sweep in sorted(sweeps):
            if not words or any(fnmatchcase(sweep, word) for word in words):
                for kind in kinds:
                    _add(result, kind, root, sweep, days)
    _spare_active(result)
    return result


def delete(chosen: Sequence[Folder], days: float, on_delete: Callable[[Folder], None]) -> list[FlipError]:
    """Delete folders of a listing, and return the errors. Calls ``on_delete`` after each deletion.

    Holds the lock of a sweep, so that nothing is submitted meanwhile, and lists again: runs may have started since.
    """
    errors: list[FlipError] = []
    for kind, root, sweep in dict.fromkeys((folder.kind, folder.root, folder.sweep) for folder in chosen):
        group = [folder for folder in chosen if (folder.kind, folder.root, folder.sweep) == (kind, root, sweep)]
        try:
            with nullcontext() if kind == "trash" else lock(root / sweep):
                now = Listing()
                _add(now, kind, root, sweep, days)
                _spare_active(now)
                still = {folder.names for folder in now.folders}
                for folder in group:
                    if folder.names in still:
                        errors += _delete(folder, on_delete)
        except FlipError as error:
            errors.append(error)
    return errors


def _delete(folder: Folder, on_delete: Callable[[Folder], None]) -> list[FlipError]:
    emptied = 0  # folders above it
    if folder.kind == "trash":
        emptied = 2
    try:
        deletion.delete_folder_below(folder.root, folder.names, emptied)
    except PermissionError as error:
        return [PermissionDenied(error.strerror or "not deleted", str(error.filename or folder.path))]
    except OSError as error:
        return [StorageError(f"not deleted: {error.strerror or error}", str(error.filename or folder.path))]
    on_delete(folder)
    return []


def _distinct(roots: Iterable[Path]) -> list[Path]:
    """The roots that exist, without a second path to the same folder."""
    distinct: dict[str, Path] = {}
    for root in roots:
        if os.path.isdir(root):
            distinct.setdefault(os.path.realpath(root), root)
    return list(distinct.values())


def _sweeps(root: Path) -> set[str]:
    """Names of the sweeps in a root and in its trash."""
    names = {path.name for path in _visible(root)}
    for place in _trash(root):
        names |= {path.name for path in _visible(place)}
    return names


def _spare_active(result: Listing) -> None:
    """Move folders whose runs have not ended to ``spared``; one query for all."""
    states = clusters.states(RunDir(path) for path in {path for folder in result.folders for path in folder.runs})
    folders = result.folders
    result.folders = []
    for folder in folders:
        active = [path for path in folder.runs if states[path].state not in folder.states]
        if active:
            state = states[active[0]]
            reason = f"{active[0].name} is {state.state}"
            if state.reason:
                result.spared[folder.path] = f"{reason}: {state.reason}"
            else:
                result.spared[folder.path] = reason
        else:
            result.folders.append(folder)


def _add(result: Listing, kind: str, root: Path, sweep: str, days: float) -> None:
    """Add the folders of one kind and sweep to a listing, whatever the states of their runs."""
    folder = root / sweep
    if kind == "trash":
        for place in _trash(root):
            _add_trash(result, root, place / sweep, days)
    elif folder.is_symlink():
        result.spared[folder] = f"is a symbolic link: use --root {folder.resolve().parent}"
    elif _is_own_folder(folder):
        {"logs": _add_logs, "compiled": _add_compiled, "code": _add_code}[kind](result, root, folder, days)


def _add_trash(result: Listing, root: Path, sweep: Path, days: float) -> None:
    if sweep.is_symlink():
        result.spared[sweep] = "is a symbolic link"
    elif _is_own_folder(sweep):
        for path in _entries(sweep):
            if command_record.has_files(RunDir(path)):
                result.spared[path] = (
                    f"holds files of a program, which are never deleted here: rm -r {quote(str(path))}"
                )
                continue
            _append(result, "trash", root, path, [path], days)


def _add_logs(result: Listing, root: Path, sweep: Path, days: float) -> None:
    for run in map(RunDir, filter(_is_own_folder, _visible(sweep))):
        if not _is_own_folder(run.logs):
            continue
        numbers = [n for path in _entries(run.logs) if (n := parse_file_number(path.name)) is not None]
        try:
            needed = _needed_logs(run, numbers)
        except UNREADABLE as error:
            result.spared[run.logs] = f"a file of its run is damaged: {error}"
            continue
        for n in sorted(set(numbers) - needed):
            if os.path.lexists(run.logs / str(n)):  # its name may have had leading zeros
                _append(result, "logs", root, run.logs / str(n), [run.path], days)


def _needed_logs(run: RunDir, numbers: Sequence[int]) -> set[int]:
    """The newest attempt, and the newest one that failed or whose end was not recorded. Raises one of UNREADABLE."""
    begun = run.attempt_numbers()
    causes = {end["attempt"]: end["cause"] for end in attempts.ends(run)}
    failed = [n for n in begun if causes.get(n) not in _NO_FAILURE]
    return {max([*begun, *numbers], default=0), *failed[-1:]}


def _add_compiled(result: Listing, root: Path, sweep: Path, days: float) -> None:
    for run in map(RunDir, filter(_is_own_folder, _visible(sweep))):
        names = [path.name for path in _entries(run.path) if _SET_ASIDE.fullmatch(path.name)]
        for name in names:
            _append(result, "compiled", root, run.path / name, [run.path], days)
        if os.path.lexists(run.compiled) and os.path.lexists(run.result):
            _append(result, "compiled", root, run.compiled, [run.path], days, ("complete",))


def _add_code(result: Listing, root: Path, sweep: Path, days: float) -> None:
    code = sweep / ".code"
    if not _is_own_folder(code):
        return
    try:
        unused = set(filter(DIGEST.fullmatch, list_names(code))) - _used_code(root, sweep)
    except UNREADABLE as error:
        result.spared[code] = f"a record of a run, which names its code, cannot be read: {error}"
        return
    if unused and supervisor.is_served(sweep):
        result.spared[code] = "the supervisor of the sweep is running"
        return
    for name in sorted(unused):
        _append(result, "code", root, code / name, _runs(sweep), days)


def _append(
    result: Listing,
    kind: str,
    root: Path,
    path: Path,
    runs: Sequence[Path],
    days: float,
    states: tuple[str, ...] = ENDED,
) -> None:
    """Add a folder to a listing if it is old enough; to ``spared`` if it is no folder of this user alone."""
    try:
        total, changed = measure(path)
    except OSError as error:
        result.spared[path] = error.strerror or str(error)
        return
    names = path.relative_to(root).parts
    sweep = names[0]
    if kind == "trash":
        sweep = names[2]
        changed = max(changed, path.parent.lstat().st_mtime)
    age = max(0.0, (time.time() - changed) / DAY)
    if age >= days:
        result.folders.append(Folder(kind, root, names, sweep, tuple(runs), states, total, age))


def _used_code(root: Path, sweep: Path) -> set[str]:
    """Digests that any run of the sweep, its evaluations or its trash names.

    Raises one of UNREADABLE if a run cannot be read: it may name any snapshot.
    """
    used = set()
    for folder in (sweep, sweep / SIDE_JOBS, *(place / sweep.name for place in _trash(root))):
        for path in (folder / name for name in list_names(folder) if not name.startswith(".")):
            if not stat.S_ISDIR(path.stat().st_mode):
                continue
            identity = read_record(path / "identity.json") or {}
            job = read_record(path / "job.json") or {}
            used.add(str(identity.get("code", "")))
            used |= {Path(job[key]).name for key in ("snapshot", "hooks") if job.get(key)}
    return used


def measure(path: Path) -> tuple[int, float]:
    """Bytes of the files below a folder, and the last change. Raises OSError if this user does not own all folders."""
    total = 0
    changed = 0.0

    def add(place: str, is_folder: bool) -> None:
        nonlocal total, changed
        info = os.lstat(place)
        if is_folder and not stat.S_ISDIR(info.st_mode):
            raise OSError(0, "is no folder, or a symbolic link")
        if is_folder and info.st_uid != os.geteuid():
            raise OSError(0, f"it is, or contains, a folder of {user_name(info.st_uid)}")
        changed = max(changed, info.st_mtime)
        if stat.S_ISREG(info.st_mode):
            total += info.st_size

    add(str(path), True)
    for place, folders, names in os.walk(path, onerror=_raise):
        for name in folders:
            link = os.path.islink(os.path.join(place, name))
            add(os.path.join(place, name), not link)
        for name in names:
            add(os.path.join(place, name), False)
    return total, changed


def _raise(error: OSError) -> None:
    raise error


def _runs(sweep: Path) -> list[Path]:
    """Folders of a sweep that may be runs, also links and damaged ones, and its evaluations."""
    return [*_visible(sweep), *_visible(sweep / SIDE_JOBS)]


def _visible(folder: Path) -> list[Path]:
    """Folders in a folder, and links to folders, that are not hidden."""
    return [path for path in _entries(folder) if not path.name.startswith(".") and os.path.isdir(path)]


def _trash(root: Path) -> list[Path]:
    """The folders of this user in the trash of a root."""
    trash = root / TRASH
    if trash.is_symlink():
        return []
    return [path for path in _entries(trash) if _TIME.fullmatch(path.name) and _is_own_folder(path)]


def _entries(folder: Path) -> list[Path]:
    """Paths in a folder; none if it is missing or cannot be read: nothing in it is then deleted."""
    try:
        return [folder / name for name in list_names(folder)]
    except OSError:
        return []


def _is_own_folder(path: Path) -> bool:
    """Whether a path is a folder of this user, and no link."""
    try:
        info = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid()
