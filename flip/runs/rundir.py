"""The run directory (docs/contracts.md, Run directory): names of its files, and the only ways to write them.

Standard library, Python >= 3.6: trainer, launcher and the exit trap on the host share it. Clocks of different hosts are
never compared: order comes from the attempt's number n, which is won by an exclusive mkdir.
"""

import json
import os
import re
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

from flip.runs import records
from flip.runs.errors import DataError, scrub
from flip.runs.ownership import PathLike, create_beside, open_regular, read_regular

#: Bytes that no line of metrics reaches.
LINE_LIMIT = 1 << 16

#: Name of the record in a rank's temporary folder: {run, attempt}, its owner.
OWNER = "flip.json"


def write_text(path: PathLike, text: str) -> None:
    """Write a file atomically: readers see the old text or the new, never a part. A link at ``path`` is replaced."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: PathLike, data: bytes) -> None:
    """As ``write_text``."""
    temporary = write_new(path, data)
    try:
        os.replace(str(temporary), str(path))
    except OSError:
        temporary.unlink()
        raise
    sync_folder(Path(path).parent)


def write_new(path: PathLike, data: bytes, mode: int = 0o644) -> Path:
    """Write and sync a new file with a random name beside ``path`` and return its path."""
    temporary, handle = create_beside(path, mode)
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink()
        raise
    return temporary


def write_json(path: PathLike, value: Any) -> None:
    write_text(path, _to_json(value))


def _to_json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


def create_json(path: PathLike, value: Any) -> bool:
    """Like write_json, but the first writer wins: returns False and changes nothing if the file exists."""
    temporary = write_new(path, _to_json(value).encode("utf-8"))
    try:
        os.link(str(temporary), str(path))
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    sync_folder(Path(path).parent)
    return True


def read_json(path: PathLike) -> Optional[Any]:
    """Return the value of a JSON file, or None if it does not exist.

    Raises ValueError with the path if it is not JSON, not a regular file, or larger than ``RECORD_LIMIT``.
    """
    try:
        return _parsed(path)
    except FileNotFoundError:
        return None


def _parsed(path: PathLike) -> Any:
    data = read_regular(path)
    try:
        return records.parse(data)
    except ValueError as error:
        raise ValueError("%s: not JSON: %s" % (path, error)) from error


def read_record(path: PathLike, fields: Any = None) -> Optional[Any]:
    """Return a record with values of the types in ``flip.runs.records``, or None if the file does not exist.

    ``fields``: its declaration; by default the one for the file's name, or any mapping. Raises ValueError with the path
    and the field as ``records.checked`` does, and as ``read_json``.
    """
    try:
        value = _parsed(path)
    except FileNotFoundError:
        return None
    try:
        name = re.sub(r"\.[0-9]+\.json\Z", ".json", Path(path).name)  # cause.<rank>.json
        return records.checked(value, records.FIELDS.get(name, {}) if fields is None else fields)
    except ValueError as error:
        raise ValueError("%s: %s" % (path, error)) from error


def load_record(path: PathLike, fields: Any = None) -> Any:
    """Like read_record, for what cannot go on without it: {} if the file does not exist, DataError if it is damaged."""
    try:
        return read_record(path, fields) or {}
    except ValueError as error:
        raise DataError("a record is damaged", path, str(error))


def newest_first(path: Path) -> Iterator[Dict[str, Any]]:
    """Yield the last lines of a file of metrics (64 KiB of it), the newest first; damaged lines are left out.

    A file that does not exist or cannot be read has none.
    """
    try:
        with open_regular(path) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - LINE_LIMIT))
            lines = file.read().split(b"\n")[:-1]
    except (OSError, ValueError):
        return
    for line in reversed(lines):
        try:
            yield records.checked(records.parse(line), records.LINE)
        except ValueError:
            continue


def sorted_glob(folder: Path, pattern: str) -> List[Path]:
    """Paths below a folder by a pattern, in order; none where it is not there, or not ours to look into."""
    try:
        return sorted(folder.glob(pattern))
    except PermissionError:
        return []


def parse_int(name: str) -> Optional[int]:
    """The number that a file's name is, None where it is none: other digits than 0 .. 9 are digits to int() and not."""
    return int(name) if re.match(r"[0-9]+\Z", name) else None


def sync_folder(path: PathLike) -> None:
    """Make renames inside a folder durable."""
    handle = os.open(str(path), os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class RunDir:
    """RUNS_ROOT/<sweep>/<run>/ by its parts. Making one touches nothing on disk."""

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

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def sweep(self) -> str:
        return self.path.parent.name

    def __repr__(self) -> str:
        return "RunDir(%r)" % str(self.path)

    # -- attempts: n is the fencing token ---------------------------------------------------------------------------

    def attempt_numbers(self) -> List[int]:
        """Numbers of all attempts begun, ascending."""
        try:
            names = os.listdir(str(self.attempts))
        except FileNotFoundError:
            return []
        return sorted(n for n in map(parse_int, names) if n is not None)

    def newest_attempt(self) -> int:
        """The highest n, 0 where no attempt has begun."""
        return (self.attempt_numbers() or [0])[-1]

    def start_attempt(self, start: Dict[str, Any]) -> int:
        """Win the next n by exclusive mkdir, write its start.json (facts about host, job, world) and return n."""
        self.attempts.mkdir(parents=True, exist_ok=True)
        n = self.newest_attempt() + 1
        while True:
            try:
                self.attempt(n).mkdir()
                break
            except FileExistsError:
                n += 1
        sync_folder(self.attempts)
        self._clear_temporaries()
        write_json(self.attempt(n) / "start.json", dict(start, attempt=n, time=time.time()))
        return n

    def _clear_temporaries(self) -> None:
        """Delete what a killed writer left. A straggler that is writing this very moment fails, and only it does.

        Of attempts the newest are looked at: each start has done it for those before.
        """
        newest = [self.attempt(n) for n in self.attempt_numbers()[-4:]]
        for folder in [self.path, self.eval, self.anomalies] + newest:
            for name in os.listdir(str(folder)) if folder.is_dir() else []:
                # but those of an attempt that begins now, and of a command that cancels the run this very moment
                if (".tmp." in name or ".new." in name) and not name.startswith(("start.", "cancel.")):
                    try:
                        (folder / name).unlink()
                    except FileNotFoundError:  # its writer lives and has renamed it
                        continue

    def attempt(self, n: int) -> Path:
        return self.attempts / str(n)

    def is_current_attempt(self, n: int) -> bool:
        """Whether attempt n is still the newest: only then may it delete, or write files whose names lack n."""
        return self.newest_attempt() == n

    def open_logs(self, n: int) -> Path:
        """Make logs/<n>/ and let ``logs/latest`` point to it."""
        folder = self.logs / str(n)
        folder.mkdir(parents=True, exist_ok=True)
        link = self.logs / "latest.new"
        if link.is_symlink():
            link.unlink()
        link.symlink_to(str(n))
        os.replace(str(link), str(self.logs / "latest"))
        return folder

    def record_ready(self, n: int, samples: int) -> None:
        """Leave when attempt n was ready to train, and from which S: until then it started and restored."""
        create_json(self.attempt(n) / "ready.json", {"samples": samples, "time": time.time()})

    def record_stop_signal(self, n: int, signal: str) -> None:
        """Leave that attempt n was told to stop: it may be killed before it can leave a cause."""
        create_json(self.attempt(n) / "told.json", {"signal": signal, "time": time.time()})

    def was_signalled(self, n: int) -> bool:
        return (self.attempt(n) / "told.json").exists()

    def record_time_limit(self, n: int) -> None:
        """Leave that attempt n outlived its wall limit: what ends it then leaves no time to say so."""
        create_json(self.attempt(n) / "limit.json", {"time": time.time()})

    def hit_time_limit(self, n: int) -> bool:
        return (self.attempt(n) / "limit.json").exists()

    def record_progress(self, n: int) -> None:
        """Leave that attempt n kept something that the next one need not do again, where that is no commit."""
        create_json(self.attempt(n) / "progress.json", {"time": time.time()})

    def made_progress(self, n: int) -> bool:
        return (self.attempt(n) / "progress.json").exists()

    def write_cause(self, n: int, rank: int, cause: str, code: int, reason: str, **facts: Any) -> bool:
        """Leave why this process ends; a rank's first cause stays. Shape: {cause, code, reason, rank, ...facts}."""
        record = dict(facts, cause=cause, code=code, reason=scrub(reason), rank=rank, time=time.time())
        return create_json(self.attempt(n) / ("cause.%d.json" % rank), record)

    def causes(self, n: int) -> List[Dict[str, Any]]:
        """The causes that the processes of attempt n left, by rank."""
        found = []
        for path in self.attempt(n).glob("cause.*.json"):
            rank = parse_int(path.name[len("cause.") : -len(".json")])
            if rank is not None:
                found.append(self._cause(path, rank))
        return sorted(found, key=lambda record: record["rank"])

    @staticmethod
    def _cause(path: Path, rank: int) -> Dict[str, Any]:
        try:
            record = read_record(path)
            if record is not None:
                return dict(record, rank=rank)
        except ValueError:  # cut off by a crash of its host, which is an end as bad as a crash
            pass
        return {"rank": rank, "cause": "crash", "code": 70, "reason": "%s cannot be read" % path.name}
