"""Writes, syncs, renames and locks in the folder of runs, and a save and a restore of a training state."""

from __future__ import annotations

import fcntl
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flip.files.creation import atomic_write, create_file, open_lock, open_regular, output_folder
from flip.runs.rundir import RunDir
from jobs.measuring.functions.timing import rounded, seconds

LARGE = 1 << 26
"""Bytes of the large file."""
SMALL = 4096
REPEATS = 20


def files(folder: str) -> dict[str, Any]:
    """MB/s of a large file with a sync, and milliseconds of what the launcher does with small files."""
    place = Path(folder)
    content = os.urandom(LARGE)
    written = seconds(lambda: _write(place / "large", content))
    read = seconds(lambda: _read(place / "large"))
    small = content[:SMALL]
    return {
        "write_megabytes_per_second": rounded(LARGE / written / 1e6),
        "read_megabytes_per_second": rounded(LARGE / read / 1e6),
        "replace_milliseconds": _median(lambda number: _replace(place / "small", small)),
        "create_milliseconds": _median(lambda number: _write(place / f"small-{number}", small)),
        "link_milliseconds": _median(lambda number: os.link(place / "small", place / f"link-{number}")),
        "lock_milliseconds": _median(lambda number: _lock(place / "lock")),
        "locks_exclude": _locks_exclude(place / "lock"),
        "free_gigabytes": rounded(_free_bytes(place) / 1e9),
    }


def saves(folder: str, device: str, megabytes: int) -> dict[str, Any]:
    """Seconds of a save until it is complete and read back, of its stall in the background, and of a restore."""
    import torch

    from flip.checkpoint.restorer import CheckpointRestorer
    from flip.checkpoint.saver import Checkpointer
    from flip.distributed.parallel import World

    run = RunDir(Path(folder) / "sweep" / "run")
    output_folder(run.attempt(1))
    place = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
    world = World(0, 1, place, None, None)
    count = megabytes * 1_000_000 // 4 // 8
    generator = torch.Generator().manual_seed(0)
    state = {f"model.{i}": torch.randn(count, generator=generator).to(device) for i in range(8)}
    saver = Checkpointer(run, 1, world, keep=1, background=True)
    rows = []
    for number in (1, 2):  # the first one makes buffers
        start_time = time.perf_counter()
        saver.save(state, "pretrain", number)
        stall = time.perf_counter() - start_time
        saver.wait()
        rows.append((stall, time.perf_counter() - start_time))
    restored = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    restorer = CheckpointRestorer(run, 1, world)
    start_time = time.perf_counter()
    newest = restorer.newest()
    assert newest is not None, "the save has left no checkpoint"
    restorer.load(newest, restored)
    restoring = time.perf_counter() - start_time
    return {
        "device": device,
        "megabytes": megabytes,
        "stall_seconds": rounded(rows[-1][0]),
        "save_seconds": rounded(rows[-1][1]),
        "restore_seconds": rounded(restoring),
        "equal": all(torch.equal(state[name], restored[name]) for name in state),
    }


def _write(path: Path, content: bytes) -> None:
    with create_file(path) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> None:
    with open_regular(path) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # not from the page cache
        while file.read(1 << 20):
            pass


def _replace(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)


def _lock(path: Path) -> None:
    handle = open_lock(path)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    finally:
        os.close(handle)


def _locks_exclude(path: Path) -> bool:
    """Whether a second lock on an open file is refused while the first one is held."""
    first = open_lock(path)
    second = open_lock(path)
    try:
        fcntl.flock(first, fcntl.LOCK_EX)
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(first)
        os.close(second)
    return False


def _free_bytes(place: Path) -> int:
    filesystem = os.statvfs(place)
    return filesystem.f_bavail * filesystem.f_frsize


def _median(work: Callable[[int], object]) -> float:
    """Milliseconds of a call."""
    times = [seconds(lambda number=number: work(number)) for number in range(REPEATS)]  # type: ignore[misc]
    return rounded(1000 * statistics.median(times))
