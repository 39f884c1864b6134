"""Measures this machine: facts, then the rows one after the other, each limited.

Rows work in folders below the folder of runs, which are deleted afterwards: of their own, or shared (``SHARED``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from flip import environment
from flip.common import devices
from flip.common.host import core_seconds, others_since, this_host
from flip.files import python_path
from flip.runs.credentials import scrub
from flip.runs.errors import FlipError
from flip.runs.lifecycle import FINAL
from flip.runs.rundir import RunDir
from jobs.common.paths import REPOSITORY
from jobs.host.rank_entry import allocator
from jobs.measuring.limited import run_limited
from jobs.measuring.rows import NO_TIME, RowPlan
from jobs.planning.measurement import (
    MEASURED,
    SKIPPED,
    TIME_LIMIT,
    Machine,
    MeasuredRow,
    Measurement,
    driver,
)
from jobs.submitted_runs import clusters

GPU_QUERY = ("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
IN_FOLDER = ("disk", "saves")
"""Functions that work in a folder of the row."""
SHARED = ("fault", "input", "reads")
"""Functions that work in a folder of all rows: one row makes the data, or the run, that the next one uses again."""
DETACHED = ("fault",)
"""Functions whose processes are not children of the row: they look like those of others."""
STOP_SECONDS = 25.0
"""Seconds before its limit at which such a row ends its processes itself: the end of the row does not."""
TOGETHER = ("collective_rank",)
"""Functions of which each node of a job runs a part."""
RANK_VARIABLES = (
    "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "FLIP_STORE",
    "FLIP_RUN", "FLIP_ATTEMPT", "FLIP_SNAPSHOT",
)  # fmt: skip
SLURM_SETTINGS = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")
"""Variables that Slurm's commands need to reach their cluster."""


def gpu_names() -> list[str]:
    """Names of the GPUs that this process may use, by nvidia-smi; empty without a driver.

    CUDA_VISIBLE_DEVICES, which nvidia-smi ignores, may leave fewer.
    """
    if not driver():
        return []
    ended = run_limited(GPU_QUERY, 20, os.environ)
    names = [line.strip() for line in ended.output.splitlines() if line.strip()]
    visible = devices.named_gpus(os.environ)
    if visible is None:
        return names
    return names[: len(visible)]


def describe_machine(gpus: Sequence[str]) -> Machine:
    """What this machine is, without its name."""
    host = this_host()
    return Machine(
        processor=environment.processor(),
        cores=host.cores,
        memory_gb=round(host.memory / 1e9, 1),
        gpu=gpus[0] if gpus else "",
        gpus=len(gpus),
        driver=driver(),
        platform=str(environment.environment()["platform"]).split("-with-")[0],
    )


def measure(
    rows: Sequence[RowPlan],
    machine: Machine,
    root: Path,
    minutes: float,
    names: bool = False,
    earlier: Mapping[str, MeasuredRow] | None = None,
    progress: Callable[[Measurement], None] = lambda so_far: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Measurement:
    """Run all rows in at most ``minutes``, in folders below ``root``.

    ``names``: whether the host may be named. ``earlier``: rows that are not run again. ``progress``
    gets the measurement after each row. Raises MeasurementStopped once ``stopped`` returns True.
    """
    start_time = time.monotonic()
    end = time.monotonic() + 60 * minutes
    installed = environment.environment()
    empty = Measurement(
        date=datetime.date.today().isoformat(),
        nodes=1,
        machine=machine,
        packages=installed["packages"],
        rows=(),
        names=[socket.gethostname()] if names else [],
        python=installed["python"],
    )
    so_far = empty
    busy = []
    with temporary_folder(root) as shared:
        for row in rows:
            before = core_seconds()
            done = (earlier or {}).get(row.name) or run_row(row, root, end, stopped, shared)
            if row.function not in DETACHED:
                busy.append(others_since(before))
            spent = round((time.monotonic() - start_time) / 60, 2)
            so_far = dataclasses.replace(empty, rows=(*so_far.rows, done), load=_cores(busy), minutes=spent)
            progress(so_far)
    return so_far


@contextlib.contextmanager
def temporary_folder(root: Path) -> Iterator[Path | None]:
    """A folder that rows share, deleted afterwards; None if it cannot be created, which each row reports itself."""
    try:
        folder = tempfile.TemporaryDirectory(prefix=".measure-", dir=root, ignore_cleanup_errors=True)
    except OSError:
        yield None
        return
    with folder as name:
        yield Path(name)


def private(text: str, root: Path) -> str:
    """A text without the names of users, hosts, paths and credentials that it may have."""
    text = scrub(text)
    text = text.replace(str(root), "/")
    text = re.sub(r"(?<![\w.])/+(?:[\w.+@-]+/+)*[\w.+@-]+", "...", text)
    for name in filter(None, (os.environ.get("USER", ""), socket.gethostname())):
        text = re.sub(rf"\b{re.escape(name)}\b", "...", text)
    return text


def run_row(
    row: RowPlan,
    root: Path,
    end: float,
    stopped: Callable[[], bool] = lambda: False,
    shared: Path | None = None,
) -> MeasuredRow:
    """Run one row until its limit or ``end``, a moment of the monotonic clock. ``shared``: a folder of several rows."""
    if row.skipped:
        return MeasuredRow(row.name, row.what, SKIPPED, detail=row.skipped)
    limit = min(row.limit, end - time.monotonic())
    least = 0.0
    if row.function in DETACHED:
        least = STOP_SECONDS
    if limit <= least:
        return MeasuredRow(row.name, row.what, SKIPPED, detail=NO_TIME)
    if row.function in SHARED and shared is not None:
        try:
            return _limited(row, shared, limit, root, stopped)
        except BaseException:
            _end_runs(shared)
            raise
    try:
        with tempfile.TemporaryDirectory(prefix=".measure-", dir=root, ignore_cleanup_errors=True) as folder:
            return _limited(row, Path(folder), limit, root, stopped)
    except OSError as error:
        return MeasuredRow(row.name, row.what, "failed", detail=private(str(error), root))


def _end_runs(shared: Path) -> None:
    """End the runs of faults that have not ended, without a save: their folder is deleted next."""
    runs = [RunDir(path.parent) for path in shared.glob("runs/*/*/job.json")]
    try:
        states = clusters.states(runs)
        active = [run for run in runs if states[run.path].state not in FINAL]
        clusters.request_cancel(active, "the measurement was interrupted")
        clusters.cancel(active, [run.path for run in active])
    except (FlipError, OSError) as error:
        print(f"runs of the measurement may still run: {error}", file=sys.stderr)


def _limited(row: RowPlan, folder: Path, limit: float, root: Path, stopped: Callable[[], bool]) -> MeasuredRow:
    options = {**row.options}
    if row.function in (*IN_FOLDER, *SHARED):
        options["folder"] = str(folder)
    if row.function in DETACHED:
        options["seconds"] = limit - STOP_SECONDS
    command = [sys.executable, "-m", "jobs.measuring.functions", row.function, json.dumps(options)]
    variables = _allocator(row)
    variables |= {name: value for name, value in os.environ.items() if row.function in TOGETHER or not _of_rank(name)}
    variables |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    variables |= python_path.variables(REPOSITORY) | {"TMPDIR": str(folder)}
    ended = run_limited(command, limit, variables, stopped)
    if ended.status == TIME_LIMIT and limit < row.limit:
        return MeasuredRow(row.name, row.what, SKIPPED, {}, NO_TIME, ended.seconds)
    detail = private(ended.detail, root)
    if ended.status == TIME_LIMIT and not detail:
        detail = f"it took more than {limit:.0f} s"
    if ended.status != MEASURED:
        return MeasuredRow(row.name, row.what, ended.status, {}, detail, ended.seconds)
    values = json.loads(ended.output.strip().splitlines()[-1])
    return MeasuredRow(row.name, row.what, MEASURED, values, "", ended.seconds)


def _allocator(row: RowPlan) -> dict[str, str]:
    """Settings of the allocators, as the ranks of a run on this device have them."""
    settings = allocator(os.environ)
    if row.options.get("device") != "cpu":
        settings.pop("GLIBC_TUNABLES", None)
    return settings


def _of_rank(name: str) -> bool:
    """Whether a variable belongs to the rank of a job, so that a row that starts ranks of its own must not see it."""
    return name in RANK_VARIABLES or (name.startswith("SLURM_") and name not in SLURM_SETTINGS)


def _cores(busy: Sequence[tuple[float, float]]) -> float:
    """Cores that other processes used on average; about 0 on an idle machine."""
    total = sum(passed for _, passed in busy)
    if total <= 0:
        return 0.0
    return round(max(0.0, sum(used for used, _ in busy)) / total * this_host().cores, 2)
