"""Checks the health of this node before it works, in a process of its own.

    python -m jobs.runtime.health FOLDER [--gpus N]

prints a line of JSON per check: {name, state (ok, fails, fails for all nodes, unknown), text, rates, seconds}. A GPU is
used in this process alone: a node agent, which forks ranks, must not touch one. ``start`` starts the process.
``jobs.host.agents.node_health.judge`` judges all nodes together.

A full shared folder fails for all nodes: each of them would meet it. A full local disk is the fault of its node.

Checks run at the same time, because a disk may hang. After ``SECONDS`` a disk without an answer has failed; the result
of any other check is not known, because a cold file system or a slow start is no fault of the node.
"""

import argparse
import contextlib
import csv
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from flip.common import devices
from flip.files import deletion, ownership
from flip.files.creation import create_sibling, read_regular
from flip.runs.cgroup import HOST_MEMORY, available_memory
from flip.runs.checks import FAILS, FAILS_FOR_ALL, OK, UNKNOWN, Check, Rule, rows_of
from flip.runs.errors import FULL_DISK_ERRNOS
from flip.runs.rundir import write_bytes
from jobs.host.agents.node_health import PRODUCT, SHARED_FOLDER
from jobs.runtime import check_process
from jobs.runtime.check_process import END, CheckProcess, write_row

SECONDS = 9.0
"""For all checks of a node."""
GRACE = 2.0
"""After that, for the process to report which checks have no answer."""
LOCAL_DISK = "local disk"
SHARED_MEMORY = "/dev/shm"
DISKS = (SHARED_FOLDER, LOCAL_DISK, SHARED_MEMORY)
"""Checks that fail if they do not answer."""

MEBIBYTE = 1 << 20
LEAST_MEMORY = 256 * MEBIBYTE
LEAST_FREE = 16 * MEBIBYTE
"""On each disk, and in /dev/shm: batches of a run need more, but their size is the plan's matter."""
FILE_BYTES = MEBIBYTE
FILE_NAME = ".health"
LEFT_SECONDS = 600.0
"""Age after which the file of a check belongs to a process that was killed."""

FATAL_XIDS = (64, 79, 95, 119, 120)
"""Errors of NVIDIA's driver: a row could not be remapped, the GPU is off the bus, an uncontained memory error, and a
GPU system processor without answer. A program may cause most others."""
XID = re.compile(r"NVRM: Xid \(PCI:([0-9A-Fa-f:.]+)[^)]*\): ([0-9]{1,3}),")
MOST_LOG = 16 * MEBIBYTE
MEMORY_ERRORS = ("remapped_rows.failure", "remapped_rows.pending", "retired_pages.pending")
UNCORRECTED = "ecc.errors.uncorrected.volatile.total"

PRODUCT_SIZE = {"cuda": 4096, "cpu": 768}
PRODUCT_SECONDS = 0.3


class HealthSettings(NamedTuple):
    """What is checked. ``folder``: in the shared file system, of this user. ``gpus``: how many are asked for."""

    folder: str
    gpus: int = 0

    def arguments(self) -> list[str]:
        return [self.folder, "--gpus", str(self.gpus)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check the health of this node.")
    parser.add_argument("folder", metavar="FOLDER", help="a folder of this user in the shared file system")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that are asked for (default: %(default)s)")
    parser.add_argument("--output", type=int, default=1, help="descriptor for the results (default: standard output)")
    args = parser.parse_args(arguments)
    settings = HealthSettings(args.folder, args.gpus)
    run_checks(rules(settings), settings, args.output)
    return 0


def rules(settings: HealthSettings) -> Sequence[Rule]:
    """The checks of a node."""
    if settings.gpus:
        return (*CHECKS, *GPU_CHECKS)
    return CHECKS


def run_checks(checks: Sequence[Rule], settings: HealthSettings, output: int, seconds: float = SECONDS) -> None:
    """Run all checks at the same time, and write a line for each to the descriptor ``output``."""
    began = time.monotonic()
    lock = threading.Lock()
    waiting = {rule.name for rule in checks}

    def report(row: Check) -> None:
        with lock:
            if row.name not in waiting:
                return
            waiting.remove(row.name)
            write_row(output, {**row.as_json(), "seconds": time.monotonic() - began})

    def run(rule: Rule) -> None:
        report(_row(rule, settings))

    threads = [threading.Thread(target=run, args=(rule,), daemon=True) for rule in checks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, began + seconds - time.monotonic()))
    for name in sorted(waiting):
        report(Check(_silent_state(name), f"no answer in {seconds:g} s", name=name))
    write_row(output, END)


def _silent_state(name: str) -> str:
    """The state of a check without an answer."""
    if name in DISKS:
        return FAILS
    return UNKNOWN


def _row(rule: Rule, settings: HealthSettings) -> Check:
    try:
        (row,) = rows_of(rule, settings)
    except OSError as error:
        return Check(FAILS, str(error), name=rule.name)
    except (RuntimeError, MemoryError) as error:  # of CUDA: the first line names it
        return Check(FAILS, f"{type(error).__name__}: {error}".splitlines()[0], name=rule.name)
    return row


# -- the checks --------------------------------------------------------------------------------------------------------


def check_folder(folder: Path, if_full: str = FAILS) -> Check:
    """Write, sync, rename, read and remove a file of its own. ``if_full``: the result for a full disk."""
    try:
        return _check_folder(folder, if_full)
    except OSError as error:
        result = FAILS
        if error.errno in FULL_DISK_ERRNOS:
            result = if_full
        return Check(result, f"{folder}: {error.strerror}")


def _check_folder(folder: Path, if_full: str) -> Check:
    available = shutil.disk_usage(folder).free
    temporary, handle = create_sibling(folder / FILE_NAME)  # the next attempt removes files with such a name
    os.close(handle)
    data = os.urandom(FILE_BYTES)
    try:
        write_bytes(temporary, data)
        same = read_regular(temporary) == data
        _remove_left(folder, temporary.stat().st_mtime)
    finally:
        deletion.delete_file(temporary, missing_ok=True)
    if not same:
        return Check(FAILS, f"{folder}: a file of {FILE_BYTES} bytes is read back with other bytes")
    if available < LEAST_FREE:
        return Check(if_full, f"{folder}: {available / MEBIBYTE:.0f} MiB are free")
    return Check(OK, f"{folder}: {available / MEBIBYTE:.0f} MiB are free")


def _remove_left(folder: Path, now: float) -> None:
    """Remove what killed checks of this user have left. ``now``: by the clock of the file system."""
    for path in folder.glob(f"{FILE_NAME}.tmp.*"):
        with contextlib.suppress(OSError):
            if ownership.is_mine(path) and now - path.lstat().st_mtime > LEFT_SECONDS:
                deletion.delete_file(path)


def check_memory() -> Check:
    available = available_memory()
    if available is None:
        return Check(UNKNOWN, f"{HOST_MEMORY} does not say how much memory is available")
    evidence = f"{available / MEBIBYTE:.0f} MiB are available"
    if available < LEAST_MEMORY:
        return Check(FAILS, evidence)
    return Check(OK, evidence)


def check_gpu_count(asked: int) -> Check:
    import torch

    usable = torch.cuda.device_count()
    evidence = f"{usable} of {asked} GPUs can be used"
    if devices.VISIBLE in os.environ:
        evidence += f" ({devices.VISIBLE}={os.environ[devices.VISIBLE]})"
    if usable < asked:
        return Check(FAILS, evidence)
    return Check(OK, evidence)


def check_memory_errors() -> Check:
    """Ask nvidia-smi for errors of GPU memory since the driver was loaded."""
    fields = ("index", *MEMORY_ERRORS, UNCORRECTED)
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
    except (FileNotFoundError, PermissionError):
        return Check(UNKNOWN, "nvidia-smi cannot be started")
    except subprocess.TimeoutExpired:
        return Check(UNKNOWN, f"no answer of nvidia-smi in {SECONDS:g} s")
    if done.returncode:
        return Check(UNKNOWN, f"nvidia-smi ended with {done.returncode}: {done.stdout.strip()[:200]}")
    rows = [dict(zip(fields, map(str.strip, row), strict=False)) for row in csv.reader(io.StringIO(done.stdout))]
    bad = [
        f"GPU {row['index']}: {name} is {row[name]}"
        for row in rows
        for name in MEMORY_ERRORS
        if row.get(name, "").lower() in ("yes", "1")
    ]
    if bad:
        return Check(FAILS, "; ".join(bad))
    counts = {row["index"]: row.get(UNCORRECTED, "") for row in rows}
    return Check(OK, "uncorrected errors: " + ", ".join(f"GPU {index}: {number}" for index, number in counts.items()))


def gpu_places() -> set[str]:
    """The places of this job's GPUs on the bus, as the driver writes them; empty if torch does not show them."""
    import torch

    try:
        gpus: list[Any] = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return {f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}" for gpu in gpus}
    except (AttributeError, RuntimeError):
        return set()


def check_driver_log(path: Path = Path("/dev/kmsg"), own_places: Callable[[], Collection[str]] = gpu_places) -> Check:
    """Look for Xid errors in the kernel's log, which starts at boot. Often only root may read it.

    The log is that of all GPUs of the node: errors of those of other jobs are no reason to leave it.
    """
    try:
        errors = sorted({match.groups() for match in XID.finditer(_kernel_log(path))})
    except OSError as error:
        return Check(UNKNOWN, f"the log of the kernel cannot be read: {error.strerror}")
    texts = [f"Xid {number} of GPU {place}" for place, number in errors]
    evidence = f"since boot: {', '.join(texts) or 'no Xid'}"
    fatal = {place.lower() for place, number in errors if int(number) in FATAL_XIDS}
    if not fatal:
        return Check(OK, evidence)
    own = own_places()
    if not own:
        return Check(UNKNOWN, f"{evidence}; perhaps of another job")
    if fatal & set(own):
        return Check(FAILS, evidence)
    return Check(OK, evidence)


def _kernel_log(path: Path) -> str:
    """Each read of /dev/kmsg is a record; one may be overwritten while it is read (EPIPE)."""
    parts = []
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        size = 0
        while size < MOST_LOG:
            try:
                part = os.read(handle, 1 << 14)
            except BrokenPipeError:
                continue
            except BlockingIOError:
                break
            if not part:
                break
            parts.append(part)
            size += len(part)
    finally:
        os.close(handle)
    return b"".join(parts).decode("utf-8", "replace")


def check_product(asked: int) -> Check:
    """Multiply matrices of small whole numbers, whose product is exact in any order of sums."""
    if asked:
        return _check_gpu_products(asked)
    import numpy as np

    size = PRODUCT_SIZE["cpu"]
    numbers = np.arange(size * size, dtype=np.int64).reshape(size, size)
    left, right = (((numbers * factor) % 9 - 4).astype(np.float32) for factor in (7, 11))
    began = time.perf_counter()
    product = left @ right
    rate = 2 * size**3 / (time.perf_counter() - began)
    wrong = int((product.sum(1, dtype=np.float64) != left.astype(np.float64) @ right.sum(1, dtype=np.float64)).sum())
    if wrong:
        return Check(FAILS, f"the product is wrong in {wrong} of {size} rows")
    return Check(OK, f"{rate / 1e9:.0f} GFLOP/s on the CPU")


def _check_gpu_products(asked: int) -> Check:
    import torch

    rates = {}
    wrong = []
    torch.backends.cuda.matmul.allow_tf32 = True  # whole numbers this small are exact in TF32
    for device in devices.gpus_of_ranks(asked):
        rows, rate = _gpu_product(torch, device)
        rates[f"{torch.cuda.get_device_name(device)}, GPU {device.index}"] = rate
        if rows:
            wrong.append(f"GPU {device.index}: {rows} rows")
    if not rates:
        return Check(UNKNOWN, "no GPU can be used")
    if wrong:
        return Check(FAILS, f"the product is wrong: {', '.join(wrong)}", rates=tuple(rates.items()))
    text = ", ".join(f"{name}: {rate / 1e12:.3g} TFLOP/s" for name, rate in rates.items())
    return Check(OK, text, rates=tuple(rates.items()))


def _gpu_product(torch: Any, device: Any) -> tuple[int, float]:
    """(rows of the product that are wrong, operations per second)."""
    size = PRODUCT_SIZE["cuda"]
    numbers = torch.arange(size * size, dtype=torch.int64, device=device).view(size, size)
    left, right = (((numbers * factor) % 9 - 4).float() for factor in (7, 11))
    expected = left.double() @ right.double().sum(1)
    product = left @ right
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    count = 0
    while time.perf_counter() - began < PRODUCT_SECONDS:
        for _ in range(4):
            product = left @ right
        torch.cuda.synchronize(device)
        count += 4
    rate = 2 * size**3 * count / (time.perf_counter() - began)
    return int((product.double().sum(1) != expected).sum()), rate


FOLDER_QUESTION = "is space left, and can a file be written, synced, renamed, read and removed?"
CHECKS = (
    Rule(SHARED_FOLDER, lambda node: check_folder(Path(node.folder), FAILS_FOR_ALL), FOLDER_QUESTION),
    Rule(LOCAL_DISK, lambda node: check_folder(Path(tempfile.gettempdir())), FOLDER_QUESTION),
    Rule(SHARED_MEMORY, lambda node: check_folder(Path(SHARED_MEMORY)), FOLDER_QUESTION),
    Rule("memory", lambda node: check_memory(), "is a little memory available?"),
    Rule(PRODUCT, lambda node: check_product(node.gpus), "is a product right on every GPU, or a small one on the CPU?"),
)
"""Of every node, for ``HealthSettings``."""
GPU_CHECKS = (
    Rule("GPUs", lambda node: check_gpu_count(node.gpus), "can as many GPUs be used as are asked for?"),
    Rule("GPU memory errors", lambda node: check_memory_errors(), "is no repair of GPU memory pending or failed?"),
    Rule(
        "driver log",
        lambda node: check_driver_log(),
        "has the driver logged no error since boot with which a GPU of this job needs a reset?",
    ),
)
"""Of a node whose GPUs are used, in addition."""


# -- for the agent -----------------------------------------------------------------------------------------------------


def start(settings: HealthSettings, may_fork: bool) -> CheckProcess:
    """Start the checks of this node. ``may_fork``: this process has imported torch, has one thread and has not touched
    a GPU; otherwise the checks start in a new interpreter. Raises OSError."""
    return check_process.start(partial(_check, settings, may_fork), "health check", SECONDS + GRACE)


def _check(settings: HealthSettings, may_fork: bool, output: int) -> None:
    arguments = [*settings.arguments(), "--output", str(output)]
    if not may_fork:
        os.set_inheritable(output, True)
        os.execv(sys.executable, [sys.executable, "-m", "jobs.runtime.health", *arguments])
    main(arguments)


if __name__ == "__main__":
    code = main()
    os._exit(code)  # a thread may wait for a disk
