"""One rank of a job: trains or evaluates, and records the cause of its end.

``jobs/worker.py`` and ``jobs/evaluator.py`` start it. The number of the attempt (FLIP_ATTEMPT) was won on the host
before any rank started. Signal handlers are installed before slow imports. The last call is ``os._exit``, because the
interpreter's shutdown can hang on loader workers that ignore SIGTERM.
"""

import contextlib
import faulthandler
import logging
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

from flip.common import shutdown
from flip.files import deletion, python_path
from flip.files.creation import RefusedPath, close_umask
from flip.runs import temporary_folders
from flip.runs.checks import Rule, require
from flip.runs.errors import (
    CAUSES,
    STORAGE_ERRNOS,
    ConfigError,
    DataError,
    FlipError,
    StorageError,
    describe,
    start_logging,
)
from flip.runs.restart_policy import PEER_GONE
from flip.runs.rundir import RunDir, load_record, write_bytes

FLIGHT_RECORD_SECONDS = 10.0  # a process that hangs may hold the recorder's lock

#: The work of a rank in an attempt -> (cause, reason) of its end.
Work = Callable[[RunDir, int, shutdown.StopFlag], tuple[str, str]]


def main(path: str, work: Work | None = None) -> int:
    """Run this rank of the run at ``path`` (by default, train) and record its cause. Returns the exit code."""
    flag = shutdown.install()
    faulthandler.enable()
    close_umask()  # for TensorBoard's writer and others that open files themselves
    run = RunDir(path)
    rank = int(os.environ.get("RANK", 0))
    start_logging(sys.stdout, f"rank {rank} ")
    if run.is_complete():  # a cluster may restart a finished job
        return 0
    attempt = int(os.environ["FLIP_ATTEMPT"])
    os.environ["FLIP_RUN"] = str(run.path)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        temporary_folders.delete_left(run, attempt - 1)  # of ranks and supervisors that were killed
    if rank == 0:
        flag.on_set(lambda: _record_stop(run, attempt, flag))
    cause, reason, trace = _run_work(work or _train, run, attempt, flag)
    try:  # before anything is printed: the log may lie on the same full disk
        run.write_cause(attempt, rank, cause, CAUSES[cause], reason, trace=trace, signal=flag.signal, host=host())
    except OSError as error:  # only the exit code is left
        logging.error("the cause could not be written: %s", error)
        if cause in ("crash", "hang", "peer_lost"):  # most likely an echo of the same trouble
            cause = "storage"
    if trace:
        with contextlib.suppress(OSError):  # standard error may be full; that must not change the exit code
            print(trace, file=sys.stderr, flush=True)
    elif cause != "complete":
        logging.error("%s", reason)
    return CAUSES[cause]


def _record_stop(run: RunDir, attempt: int, flag: shutdown.StopFlag) -> None:
    """Called inside a signal handler: must not raise into the interrupted code."""
    with contextlib.suppress(OSError):
        run.record_stop_request(attempt, flag.signal)


def record_end(run: RunDir, attempt: int, cause: str, what: str) -> None:
    """Record the cause for which a watcher is about to end this process, and of a hang the newest collectives."""
    rank = int(os.environ.get("RANK", 0))
    run.write_cause(attempt, rank, cause, CAUSES[cause], what, host=host())
    if cause == "hang":
        recorder = threading.Thread(target=_write_flight_record, args=(run, attempt, rank), daemon=True)
        faulthandler.dump_traceback_later(2 * FLIGHT_RECORD_SECONDS, exit=True)  # if the recorder keeps the interpreter
        recorder.start()
        recorder.join(FLIGHT_RECORD_SECONDS)
        faulthandler.cancel_dump_traceback_later()


def _write_flight_record(run: RunDir, attempt: int, rank: int) -> None:
    with contextlib.suppress(OSError):
        if record := shutdown.flight_record():
            write_bytes(run.logs / str(attempt) / f"collectives.{rank}.json", record)


def host() -> str:
    """The scheduler's name of this machine."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _train(run: RunDir, attempt: int, flag: shutdown.StopFlag) -> tuple[str, str]:
    require(OF_TRAINING, run)
    from flip.concurrency import prepare_forkserver

    prepare_forkserver()  # it starts while this process imports torch
    from flip.data.kernel import decoders

    logging.info("image decoders: %s", decoders())
    from flip.training.trainer import TrainingStopped, train

    try:
        train(run, attempt, flag, partial(record_end, run, attempt))
    except TrainingStopped as stopped:
        return "stopped", str(stopped)
    return "complete", ""


def evaluate(run: RunDir, attempt: int, flag: shutdown.StopFlag) -> tuple[str, str]:
    """The work of a rank of an evaluation job."""
    from flip.evaluation import evaluation_job

    try:
        evaluation_job.evaluate(run, attempt, flag, partial(record_end, run, attempt))
    except evaluation_job.EvaluationStopped as stopped:
        return "stopped", str(stopped)
    return "complete", ""


def _run_work(work: Work, run: RunDir, attempt: int, flag: shutdown.StopFlag) -> tuple[str, str, str]:
    """(cause, reason, traceback or "") of the end of this rank."""
    try:
        require(OF_ALL_WORK)
        return (*work(run, attempt, flag), "")
    except FlipError as error:
        return error.cause, str(error), ""
    except RefusedPath as error:
        return "permission", str(error), ""
    except OSError as error:
        if error.errno in STORAGE_ERRNOS or _denied_in(run, error):
            cause = "storage"
        else:
            cause = "crash"
        return cause, describe(error), traceback.format_exc()
    except Exception as error:  # the outermost frame: any cause must be recorded
        text = describe(error)
        return "peer_lost" if PEER_GONE.search(text) else "crash", text, traceback.format_exc()


def _denied_in(run: RunDir, error: OSError) -> bool:
    """Whether access to a file of the run was denied. ``begin`` has just written there, so the denial may pass, as that
    of an expired ticket does: it counts as storage, which is tried again for a day."""
    named = [str(name) for name in (error.filename, error.filename2) if isinstance(name, str | os.PathLike)]
    return isinstance(error, PermissionError) and any(Path(name).is_relative_to(run.path) for name in named)


def in_process(run: RunDir, attempt: int) -> None:
    """Train as the only rank, in the calling process. Errors are not converted (flip debug)."""
    from flip.training.trainer import TrainingStopped, train

    start_logging(sys.stdout)
    require(OF_TRAINING, run)
    try:
        train(run, attempt, shutdown.install(), lambda *_: None)
    except TrainingStopped as stopped:
        logging.info("%s", stopped)


def _check_snapshot() -> None:
    """ConfigError unless the code that runs is the code that was submitted."""
    snapshot = os.environ.get("FLIP_SNAPSHOT", "")
    library = Path(python_path.__file__).resolve().parents[1]
    if snapshot and not library.is_relative_to(Path(snapshot).resolve()):
        remedy = f"PYTHONPATH must begin with {snapshot}."
        raise ConfigError("the library does not come from the run's snapshot", library, remedy=remedy)


def _check_identity(run: RunDir) -> None:
    """Configuration, data sets and tokenizer must be those that were submitted, and class names must not be missing.

    Raises DataError if one differs, StorageError if one is missing: a node may lack the file system.
    """
    from flip.config import merge
    from flip.config.identity import diff_identity, is_missing_content, is_same_run, missing_class_names

    stored = load_record(run.identity)
    config = merge.read_config(run.config)
    is_changed = bool(stored) and not is_same_run(stored, config)
    changes = []
    if is_changed:
        changes = diff_identity(stored, config)
    absent = [f"{change.key}: {change.now}" for change in changes if is_missing_content(change)]
    absent += [f"class names: {path}" for path in missing_class_names(stored, config)]
    if absent:
        remedy = "It existed when the run was submitted: mount it on this node, or restore it."
        raise StorageError(f"data of the run are missing: {'; '.join(absent)}", host(), remedy=remedy)
    if is_changed:
        changed = "; ".join(map(str, changes[:3]))
        remedy = "Restore it, or submit the sweep again, which lists the options for changed runs."
        raise DataError(f"the run has changed since it was submitted: {changed}", run.path, remedy=remedy)


OF_ALL_WORK = (Rule("code", _check_snapshot, "does it come from the run's snapshot?"),)
"""Of every rank, before it works."""
OF_TRAINING = (
    Rule("configuration and data", _check_identity, "are they those that were submitted, and is no file missing?"),
)
"""Of a rank that trains, for its run, before it imports torch."""


def exit_process(code: int) -> NoReturn:
    """End this process with ``code`` and delete its temporary folder."""
    if "multiprocessing.util" in sys.modules:
        from multiprocessing import util

        deletion.discard_own_folder(util.get_temp_dir())  # the fork server's socket
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a full disk must not change the exit code
            stream.flush()
    os._exit(code)
