"""What runs inside a job, once per rank: environment -> training or an evaluation -> cause and exit code.

``jobs/worker.py`` and ``jobs/evaluator.py`` start it. The attempt's number (FLIP_ATTEMPT) was won on the host before
any rank started. Signals are caught before anything slow is imported. The last line is ``os._exit``: interpreter
shutdown can hang on loader workers that ignore SIGTERM, and the code must leave.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import logging
import os
import shutil
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

from flip.distributed import shutdown
from flip.runs.errors import CAUSES, ConfigError, DataError, FlipError, StorageError, scrub, start_logging
from flip.runs.rundir import OWNER, RunDir, load_record, read_json
from jobs.host.restart_policy import PEER_GONE

STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS, errno.ETIMEDOUT, errno.EFBIG)
"""Errors of files that pass by themselves or by somebody's hand, and say nothing against the run."""


Work = Callable[[RunDir, int, shutdown.StopFlag], tuple[str, str]]
"""What a rank does in an attempt -> (cause, reason) of its end; what it raises is judged here."""


def main(path: str, work: Work | None = None) -> int:
    """Run this rank of the run at ``path``; the exit code. Leaves cause.<rank>.json for every end of its own.

    ``work``: what to do; by default, train.
    """
    flag = shutdown.install()
    faulthandler.enable()
    run, rank = RunDir(path), int(os.environ.get("RANK", 0))
    start_logging(sys.stdout, f"rank {rank} ")
    if run.result.exists():  # a cluster may start a finished job once more
        return 0
    attempt = int(os.environ["FLIP_ATTEMPT"])
    os.environ["FLIP_RUN"] = str(run.path)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        clear_temporaries(run, attempt)
    if rank == 0:
        flag.on_set(lambda: _note_told(run, attempt, flag))
    cause, reason, trace = _judged(work or _train, run, attempt, flag)
    try:  # before anything is printed: the log may lie on the same full disk
        run.write_cause(attempt, rank, cause, CAUSES[cause], reason, trace=trace, signal=flag.signal, host=host())
    except OSError as error:  # the exit code is all that is left to tell
        logging.error("the cause could not be written: %s", error)
    if trace:
        with contextlib.suppress(OSError):  # standard error may be full; that must not change the exit code
            print(trace, file=sys.stderr, flush=True)
    elif cause != "complete":
        logging.error("%s", reason)
    return CAUSES[cause]


def clear_temporaries(run: RunDir, attempt: int) -> None:
    """Delete temporary folders that earlier attempts of the run left on this node: multiprocessing's of killed ranks,
    and the stores of attempts whose supervisor was killed.

    They are known by the record that ``flip.data.worker_pool`` and ``jobs.local.rank_processes`` write into each; a
    folder that cannot be deleted stays.
    """
    temporary = Path(tempfile.gettempdir())
    for mark in (*temporary.glob(f"pymp-*/{OWNER}"), *temporary.glob(f"flip-store-*/{OWNER}")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            owner = read_json(mark) or {}
            if owner["run"] == str(run.path) and owner["attempt"] < attempt and mark.stat().st_uid == os.geteuid():
                shutil.rmtree(mark.parent, ignore_errors=True)


def _note_told(run: RunDir, attempt: int, flag: shutdown.StopFlag) -> None:
    """Called inside a signal's handler: nothing may come out of it into whatever runs then."""
    with contextlib.suppress(OSError):
        run.record_stop_signal(attempt, flag.signal)


def note_hang(run: RunDir, attempt: int, what: str) -> None:
    """Called by the watchdog just before it ends this process."""
    run.write_cause(attempt, int(os.environ.get("RANK", 0)), "hang", CAUSES["hang"], what, host=host())


def host() -> str:
    """The name by which the scheduler knows this machine."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _train(run: RunDir, attempt: int, flag: shutdown.StopFlag) -> tuple[str, str]:
    _check_identity(run)
    from flip.concurrency import prepare_forkserver

    prepare_forkserver()  # it gets ready while this process imports torch
    from flip.training.trainer import TrainingStopped, train

    try:
        train(run, attempt, flag, partial(note_hang, run, attempt))
    except TrainingStopped as stopped:
        return "stopped", str(stopped)
    return "complete", ""


def evaluate(run: RunDir, attempt: int, flag: shutdown.StopFlag) -> tuple[str, str]:
    """The work of a rank of an evaluation job, as ``_train`` is that of a rank of a run."""
    from flip.evaluation import job

    try:
        job.evaluate(run, attempt, flag, partial(note_hang, run, attempt))
    except job.EvaluationStopped as stopped:
        return "stopped", str(stopped)
    return "complete", ""


def _judged(work: Work, run: RunDir, attempt: int, flag: shutdown.StopFlag) -> tuple[str, str, str]:
    """(cause, reason, traceback or empty) of this rank's end."""
    try:
        _check_snapshot()
        return (*work(run, attempt, flag), "")
    except FlipError as error:
        return error.cause, str(error), ""
    except OSError as error:
        cause = "storage" if error.errno in STORAGE else "crash"
        return cause, f"{type(error).__name__}: {error}", scrub(traceback.format_exc())
    except Exception as error:  # the outermost frame of a process: whatever it is, the ledger must know it
        text = f"{type(error).__name__}: {error}"
        return "peer_lost" if PEER_GONE.search(text) else "crash", text, scrub(traceback.format_exc())


def in_process(run: RunDir, attempt: int) -> None:
    """Train as the only rank, in the calling process; what goes wrong comes out as it is (jobs/debug.py)."""
    from flip.training.trainer import TrainingStopped, train

    start_logging(sys.stdout)
    _check_identity(run)
    try:
        train(run, attempt, shutdown.install(), lambda what: None)
    except TrainingStopped as stopped:
        logging.info("%s", stopped)


def _check_snapshot() -> None:
    """The code that runs must be the code that was submitted."""
    import flip

    snapshot, here = os.environ.get("FLIP_SNAPSHOT", ""), Path(str(flip.__file__)).resolve()
    if snapshot and not here.is_relative_to(Path(snapshot).resolve()):
        raise ConfigError(
            "the library does not come from the run's snapshot", here, remedy=f"PYTHONPATH must begin with {snapshot}."
        )


def _check_identity(run: RunDir) -> None:
    """Configuration, data sets, tokenizer and class names must be those that were submitted.

    Raises DataError where one is another, StorageError where one is not there: a node may lack the file system.
    """
    from flip.config import merge
    from flip.config.identity import diff_identity, identity

    stored, config = load_record(run.identity), merge.read_config(run.config)
    if stored and identity(config, "")["hash"] != stored.get("hash"):
        changes = diff_identity(stored, config)
        if absent := [
            change for change in changes if change.is_missing_content
        ]:  # another node may see it, or this one later
            missing = "; ".join(f"{change.key}: {change.now}" for change in absent)
            remedy = "It was there when the run was submitted: mount it on this node, or put it back."
            raise StorageError(f"what the run reads is not there: {missing}", host(), remedy=remedy)
        changed = "; ".join(map(str, changes[:3]))
        remedy = "Put back what was there, or submit the sweep again: it says what to do about a run that changed."
        raise DataError(f"the run is not what was submitted any more: {changed}", run.path, remedy=remedy)


def leave(code: int) -> NoReturn:
    """End this process with ``code``, and with nothing left in the temporary folder."""
    if "multiprocessing.util" in sys.modules:
        from multiprocessing import util

        shutil.rmtree(util.get_temp_dir(), ignore_errors=True)  # the fork server's socket, else removed at an exit
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a full disk must not change the exit code
            stream.flush()
    os._exit(code)
