"""The run directory (docs/contracts.md, Run directory): names of its files, and the only ways to write them.

Standard library, Python >= 3.6: trainer, launcher and the exit handler on the host share it. Clocks of different hosts
are never compared: order comes from the attempt's number n, which is assigned by an exclusive mkdir.
"""

import contextlib
import functools
import json
import os
import re
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

from flip.files import deletion
from flip.files.creation import (
    atomic_write,
    close_file,
    close_folder,
    close_folders,
    create_sibling,
    fsync_path,
    new_folder,
    read_regular,
    read_trusted,
    refuse_prepared,
    refuse_written_by_others,
    replace_link,
    run_folder,
)
from flip.files.ownership import PathLike
from flip.runs import formats, records
from flip.runs.errors import CRASH, DataError
from flip.runs.formats import FormatError

#: Levels of folders in a run directory: checkpoints/<stage>/<S>-<n>.
RUN_DEPTH = 3

#: Files of a run directory that say what its ranks do: ``RunDir.close``. job.json has a reader, ``RunDir.read_job``.
OBEYED = ("config.yaml", "command.json", "identity.json", "task.json")

#: What to do about a file of OBEYED, or a job.json, that is refused.
SUBMIT_AGAIN = "Submit the run again, which writes a new one"

#: Record in a rank's temporary folder that names its owner: {run, attempt}.
OWNER = "flip.json"


def write_text(path: PathLike, text: str) -> None:
    """Write a file atomically: readers see the old or the new text. A link at ``path`` is replaced."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: PathLike, data: bytes, mode: int = 0o644) -> None:
    """Like write_text, for bytes."""
    with atomic_write(path, mode) as file:
        file.write(data)


def write_new(path: PathLike, data: bytes, mode: int = 0o644) -> Path:
    """Write and sync a new file with a random name in the folder of ``path``, and return its path."""
    temporary, handle = create_sibling(path, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        deletion.delete_file(temporary)
        raise
    return temporary


def write_json(path: PathLike, value: Any) -> None:
    """Write a record atomically, as the text of ``to_json``."""
    write_text(path, to_json(value))


def to_json(value: Any) -> str:
    """The text of a record on disk: sorted keys, and no credentials in its messages."""
    if isinstance(value, dict):
        value = records.without_credentials(value)
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


def create_json(path: PathLike, value: Any) -> bool:
    """Like write_json, but the first writer wins: returns False and changes nothing if the file exists."""
    return create_text(path, to_json(value))


def create_text(path: PathLike, text: str) -> bool:
    """Like create_json, for text."""
    temporary = write_new(path, text.encode("utf-8"))
    try:
        os.link(str(temporary), str(path))
    except FileExistsError:
        # a client of NFS repeats a request whose answer was lost, and then meets its own link
        if not os.path.samestat(os.lstat(str(temporary)), os.lstat(str(path))):
            return False
    finally:
        deletion.delete_file(temporary)
    fsync_path(Path(path).parent)
    return True


def read_json(path: PathLike) -> Optional[Any]:
    """Return the value of a JSON file, or None if it does not exist.

    Raises ValueError with the path if it is not JSON, not a regular file, or larger than ``flip.runs.records`` permits.
    """
    try:
        return _parsed(path)
    except FileNotFoundError:
        return None


def _parsed(path: PathLike, limit: Optional[int] = None, read: Callable[[PathLike, int], bytes] = read_regular) -> Any:
    data = read(path, limit or records.limit_of(Path(path).name))
    try:
        return records.parse(data)
    except ValueError as error:
        raise ValueError("%s: not JSON: %s" % (path, error)) from error


def read_record(path: PathLike, fields: Any = None, limit: Optional[int] = None) -> Optional[Any]:
    """Return a record with values of the types in ``flip.runs.records``, or None if the file does not exist.

    ``fields``: its declaration; by default that of the file's name, or any mapping. ``limit``: its most bytes, by
    default those of the file's name. Raises ValueError with the path and the field, as ``records.checked`` and
    ``read_json`` do; FormatError, which is a ValueError, if another version wrote it, or a required field is absent.
    """
    try:
        value = _parsed(path, limit)
    except FileNotFoundError:
        return None
    return _checked(path, value, fields)


def read_trusted_record(path: PathLike, remedy: str) -> Optional[Any]:
    """``read_record`` for a record that is obeyed: only this user or root can have written the opened file.

    Raises RefusedPath with ``remedy`` if another user owns it or may write to it, or if it is a link; ValueError.
    """
    try:
        value = _parsed(path, read=functools.partial(read_trusted, remedy=remedy))
    except FileNotFoundError:
        return None
    return _checked(path, value)


def _checked(path: PathLike, value: Any, fields: Any = None) -> Any:
    name = re.sub(r"\.[0-9]+\.json\Z", ".json", Path(path).name)  # cause.<rank>.json
    if fields is None and name in formats.BY_FILE:
        formats.check(formats.BY_FILE[name], value, path)
    try:
        return records.checked(value, records.FIELDS.get(name, {}) if fields is None else fields)
    except records.MissingField as error:
        raise formats.missing(error.field, path, formats.RESTORE) from error
    except ValueError as error:
        raise ValueError("%s: %s" % (path, error)) from error


def exists(path: PathLike) -> bool:
    """Whether a file or folder exists. Raises OSError if that is unknown; Python 3.14's Path.exists() says no."""
    try:
        os.stat(str(path))
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def load_record(path: PathLike, fields: Any = None) -> Any:
    """Like read_record, but returns {} if the file does not exist and raises DataError if it is damaged.

    Raises FormatError if another version wrote it.
    """
    try:
        return read_record(path, fields) or {}
    except FormatError:
        raise
    except ValueError as error:
        raise DataError("a record is damaged", path, str(error))


def read_lenient(path: PathLike) -> Dict[str, Any]:
    """A record; empty if it is absent, unreadable or damaged: the state of the run reports that."""
    try:
        return read_record(path) or {}
    except (OSError, ValueError):
        return {}


def list_names(folder: Path) -> List[str]:
    """Sorted names in a folder; none if it does not exist.

    Raises OSError if it cannot be read; Path.glob of Python 3.12 and newer returns the names read until then.
    """
    try:
        return sorted(os.listdir(str(folder)))
    except (FileNotFoundError, NotADirectoryError):
        return []


def sorted_glob(folder: Path, pattern: str) -> List[Path]:
    """Sorted paths below a folder that match a pattern; none if it does not exist or may not be read."""
    try:
        return sorted(folder.glob(pattern))
    except PermissionError:
        return []


def parse_file_number(name: str) -> Optional[int]:
    """The number that a file's name spells with the digits 0 to 9 (int() accepts others), or None."""
    if re.match(r"[0-9]+\Z", name):
        return int(name)
    return None


class RunDir:
    """The paths of RUNS_ROOT/<sweep>/<run>/. Creating the object touches nothing on disk."""

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path).absolute()
        self.config = self.path / "config.yaml"
        self.identity = self.path / "identity.json"
        self.status = self.path / "status.json"
        self.result = self.path / "result.json"
        self.cancel = self.path / "cancel.json"
        self.attempts = self.path / "attempts"
        self.metrics = self.path / "metrics"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.pins = self.path / "pins"
        self.eval = self.path / "eval"
        self.anomalies = self.path / "anomalies"
        self.traces = self.path / "traces"
        self.export = self.path / "export"
        self.logs = self.path / "logs"
        self.compiled = self.path / "compiled"

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def sweep(self) -> str:
        return self.path.parent.name

    def __repr__(self) -> str:
        return "RunDir(%r)" % str(self.path)

    def is_complete(self) -> bool:
        """Whether nothing is left to train or to evaluate: result.json exists. Raises OSError if that is unknown."""
        return exists(self.result)

    # -- what a job obeys -------------------------------------------------------------------------------------------

    def read_job(self) -> Dict[str, Any]:
        """job.json for processes that act on it; empty if it does not exist. Commands that show it use read_record.

        It names programs, code and an environment, so it must be this user's alone. Raises RefusedPath if another
        user owns it or may write to it, or if it is a link; ValueError as ``read_record``; OSError.
        """
        record: Dict[str, Any] = read_trusted_record(self.path / "job.json", SUBMIT_AGAIN) or {}
        return record

    def refuse_other_version(self, job: Dict[str, Any]) -> None:
        """Raise FormatError unless this version can start the run. ``job``: what ``read_job`` has returned; OSError."""
        formats.require(records.NEEDED_TO_START, job, self.path / "job.json", "%s." % SUBMIT_AGAIN)
        formats.check_code(Path(job["snapshot"]))

    def close(self, accept_open_files: bool = False) -> None:
        """Take write access to the folders of the run away from other users.

        A copy without modes leaves them open to a group. Raises RefusedPath if the folder belongs to
        another user, or if another user may have written one of OBEYED; OSError.

        Args:
            accept_open_files: close own files of OBEYED that others may write to, instead of refusing them: for a
                submission, which writes them anew.
        """
        close_folder(self.path)
        close_folders(self.path, RUN_DEPTH)
        for name in OBEYED:
            if accept_open_files:
                close_file(self.path / name)
            else:
                refuse_written_by_others(self.path / name, SUBMIT_AGAIN)

    # -- attempts: n is the fencing token ---------------------------------------------------------------------------

    def attempt_numbers(self) -> List[int]:
        """Numbers of all started attempts, ascending."""
        try:
            names = os.listdir(str(self.attempts))
        except FileNotFoundError:
            return []
        return sorted(n for n in map(parse_file_number, names) if n is not None)

    def newest_attempt(self) -> int:
        """The highest n, or 0 if no attempt has started."""
        return (self.attempt_numbers() or [0])[-1]

    def start_attempt(self, start: Dict[str, Any], after: Optional[int] = None) -> int:
        """Reserve the next n by an exclusive mkdir, write its start.json (host, job, world size) and return n.

        ``after``: reserve only the number that follows this one; returns 0 if another process has an attempt after it.
        Closes the folders of the run to other users first: a copy without modes leaves them open to a group.
        """
        run_folder(self.attempts)
        close_folders(self.path, RUN_DEPTH)
        n = self.newest_attempt() + 1
        while True:
            if after is not None and n != after + 1:
                return 0
            try:
                new_folder(self.attempt(n))
                break
            except FileExistsError:
                n += 1
        fsync_path(self.attempts)
        self._clear_temporaries()
        write_json(self.attempt(n) / "start.json", dict(start, attempt=n, time=time.time()))
        return n

    def _clear_temporaries(self) -> None:
        """Delete temporary files of killed writers.

        If an older attempt is still writing, that write fails; no other write is affected. Only the newest four
        attempts are searched, because each start has cleared the earlier ones.
        """
        newest = [self.attempt(n) for n in self.attempt_numbers()[-4:]]
        for folder in [self.path, self.eval, self.anomalies] + newest:
            if not folder.is_dir() or (folder != self.path and folder.is_symlink()):
                continue
            for name in os.listdir(str(folder)):
                # start.* and cancel.* may be in use: an attempt starts, or a command cancels the run, at this moment
                if deletion.is_temporary(name) and not name.startswith(("start.", "cancel.")):
                    deletion.delete_file(folder / name, missing_ok=True)  # a live writer may have renamed it

    def attempt(self, n: int) -> Path:
        """The folder of attempt n."""
        return self.attempts / str(n)

    def is_current_attempt(self, n: int) -> bool:
        """Whether attempt n is the newest: only then may it delete, or write files without n in their names."""
        return self.newest_attempt() == n

    def open_logs(self, n: int) -> Path:
        """Create logs/<n>/ and point ``logs/latest`` to it.

        The shell of a batch script opens files there by name: raises PermissionError if a link is prepared.
        """
        run_folder(self.logs)
        folder = run_folder(self.logs / str(n))
        refuse_prepared(folder)
        with contextlib.suppress(IsADirectoryError):  # a copy of the link's target, by scp -r or cp -rL
            replace_link(self.logs / "latest", str(n))
        return folder

    def record_ready(
        self,
        n: int,
        samples_seen: int,
        environment: Optional[Dict[str, Any]] = None,
        restoring: float = 0.0,
        accumulate: int = 1,
    ) -> None:
        """Record that attempt n has started up and restored, and trains from S = ``samples_seen`` in ``environment``
        (``flip.environment``). ``restoring``: seconds since it looked for a checkpoint. ``accumulate``: micro-batches
        of a step, which depend on the number of nodes if that is a range."""
        record = {
            "samples": samples_seen,
            "environment": environment or {},
            "restoring": restoring,
            "accumulate": accumulate,
            "time": time.time(),
        }
        create_json(self.attempt(n) / "ready.json", record)

    def record_stop_request(self, n: int, signal: str) -> None:
        """Record that attempt n received a stop request: it may be killed before it can record a cause."""
        create_json(self.attempt(n) / "told.json", {"signal": signal, "time": time.time()})

    def stop_requested(self, n: int) -> bool:
        return exists(self.attempt(n) / "told.json")

    def record_time_limit(self, n: int) -> None:
        """Record that attempt n exceeded its wall limit: it may be killed before it can record a cause."""
        create_json(self.attempt(n) / "limit.json", {"time": time.time()})

    def hit_time_limit(self, n: int) -> bool:
        return exists(self.attempt(n) / "limit.json")

    def record_progress(self, n: int) -> None:
        """Record progress of attempt n that is no checkpoint: results that the next attempt need not compute again."""
        create_json(self.attempt(n) / "progress.json", {"time": time.time()})

    def has_progress(self, n: int) -> bool:
        return exists(self.attempt(n) / "progress.json")

    def write_cause(self, n: int, rank: int, cause: str, code: int, reason: str, **fields: Any) -> bool:
        """Record why this process ends: {cause, code, reason, rank, time, ...facts}. The first cause of a rank counts.

        Returns False, and writes nothing, if the rank has a cause already.
        """
        record = dict(fields, cause=cause, code=code, reason=reason, rank=rank, time=time.time())
        return create_json(self.attempt(n) / ("cause.%d.json" % rank), record)

    def causes(self, n: int) -> List[Dict[str, Any]]:
        """The recorded causes of the processes of attempt n, sorted by rank. An unreadable record counts as a crash."""
        causes = []
        for name in list_names(self.attempt(n)):
            match = re.match(r"cause\.([0-9]+)\.json\Z", name)
            if not match:
                continue
            rank = int(match.group(1))
            try:
                record = read_record(self.attempt(n) / name)
            except ValueError:  # cut off by a crash of its host
                record = None
            crash = {"cause": "crash", "code": CRASH, "reason": "%s cannot be read" % name}
            causes.append(dict(record or crash, rank=rank))
        return sorted(causes, key=lambda record: record["rank"])
