"""Follows the contract of ``jobs.runtime.rank_process`` without training: it only counts samples and saves checkpoints.

RUN_DIR/play.json controls it: {"total": S to reach, "step": seconds per step, "every": steps per checkpoint,
"attempts": {"<n>": {"<rank>": fault}}}. A fault is one of crash, diverge, hang (ignores SIGTERM), lose (ignores the
first SIGTERM), kill, exit:<code>; ``at`` is the step in the attempt at which the fault occurs.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from flip.common.shutdown import LIFELINE_VARIABLE
from flip.runs import checkpoint_folder
from flip.runs.errors import CAUSES
from flip.runs.rundir import RunDir, read_json, write_json

stop = threading.Event()


def watch_lifeline() -> None:
    lifeline = int(os.environ[LIFELINE_VARIABLE])
    while os.read(lifeline, 1):
        pass
    stop.set()


def save(run: RunDir, samples: int, attempt: int) -> None:
    folder = checkpoint_folder.folder(run, "pretrain", samples, attempt)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.json").write_text(str(samples))
    checkpoint_folder.complete_checkpoint(folder, {"stage": "pretrain", "samples": samples, "attempt": attempt})


def leave(run: RunDir, attempt: int, rank: int, cause: str, reason: str) -> int:
    run.write_cause(attempt, rank, cause, CAUSES[cause], reason)
    return CAUSES[cause]


def work(run: RunDir, attempt: int, rank: int) -> int:
    play = json.loads((run.path / "play.json").read_text())
    first = (read_json(run.attempt(attempt) / "start.json") or {})["first_commit"]
    done = checkpoint_folder.checkpoints(run)
    samples = done[-1].samples_seen if done else 0
    fault = play.get("attempts", {}).get(str(attempt), {}).get(str(rank), "")
    print(f"rank {rank} starts at {samples}", flush=True)
    print(f"GPUs {os.environ.get('CUDA_VISIBLE_DEVICES')}, {os.environ.get('PYTORCH_ALLOC_CONF')}", flush=True)
    print(f"malloc {os.environ.get('GLIBC_TUNABLES')}", flush=True)
    step = 0
    while samples < play["total"]:
        if fault and step == play.get("at", 0):
            misbehave(fault)
            if fault in ("crash", "diverge"):
                name = "crash" if fault == "crash" else "diverged"
                return leave(run, attempt, rank, name, "as asked")
        if stop.wait(play["step"]):
            if rank == 0:
                save(run, samples, attempt)
            return leave(run, attempt, rank, "stopped", "asked to stop")
        samples = samples + 1
        step = step + 1
        if rank == 0:
            write_json(run.status, {"samples": samples, "total": play["total"], "attempt": attempt, "step": samples})
            if step % play["every"] == 0 or (first and step == 1):
                save(run, samples, attempt)
    if rank == 0:
        write_json(run.result, {"run": run.name, "samples": samples})
    return leave(run, attempt, rank, "complete", "")


def misbehave(fault: str) -> None:
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(3600)
    if fault == "lose":
        handler = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, handler))
    if fault.startswith("exit:"):
        os._exit(int(fault[5:]))


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda *_: stop.set())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGUSR2])  # its launcher blocks them until here
    run = RunDir(Path(sys.argv[1]))
    if run.result.exists():
        os._exit(0)
    threading.Thread(target=watch_lifeline, daemon=True).start()
    os._exit(work(run, int(os.environ["FLIP_ATTEMPT"]), int(os.environ["RANK"])))
