"""A rank process that does not train: it logs every signal that it receives, and exits as RUN_DIR/play.json specifies.

Keys of play.json: ``steps``, the number of steps of 0.05 s until the run is complete; ``save``, seconds between the
stop signal and the exit; ``ignore``, names of signals that are logged but not obeyed; ``exit``, a code with which the
process exits at the start, without a cause; ``crash``, the message of a crash with a cause; ``memory``, MB that it
fills at the start; ``daemon``, seconds for which a process of its own session lives; ``attempts``, other values for
single attempts, by number.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from flip.runs.errors import CAUSES
from flip.runs.rundir import RunDir, write_json

STEP = 0.05
NOTED = ("TERM", "USR2", "CONT", "USR1", "HUP", "INT")
STOP = ("TERM", "USR2", "USR1")
"""What ``flip.common.shutdown`` takes as a request to stop."""


class Signals:
    """Signals in the order of arrival. Python calls handlers late and by number, but writes to the pipe at once."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self._pipe, inlet = os.pipe()
        os.set_blocking(inlet, False)
        signal.set_wakeup_fd(inlet)
        for name in NOTED:
            signal.signal(getattr(signal, f"SIG{name}"), lambda *_: None)
        variables = {"node": "SLURMD_NODENAME", "gpus": "CUDA_VISIBLE_DEVICES", "address": "MASTER_ADDR"}
        facts = {"pid": os.getpid(), "cpus": sorted(os.sched_getaffinity(0))}
        self.write({**facts, **{key: os.environ.get(name, "") for key, name in variables.items()}})
        signal.pthread_sigmask(
            signal.SIG_UNBLOCK, [getattr(signal, f"SIG{name}") for name in STOP]
        )  # jobs/host/rank_entry.py blocks

    def write(self, line: dict[str, object]) -> None:
        with open(self.log, "a") as file:
            file.write(json.dumps(line) + "\n")

    def wait(self, until: float) -> list[str]:
        """Wait for signals until the given time; returns the names of those that arrive first."""
        if not select.select([self._pipe], [], [], max(0.0, until - time.monotonic()))[0]:
            return []
        names = [signal.Signals(number).name.removeprefix("SIG") for number in os.read(self._pipe, 512)]
        for name in names:
            self.write({"signal": name})
        return names


def work(run: RunDir, attempt: int, rank: int, signals: Signals) -> int:
    play = json.loads((run.path / "play.json").read_text())
    play |= play.get("attempts", {}).get(str(attempt), {})
    if "exit" in play:
        return play["exit"]
    if "crash" in play:
        host = os.environ["SLURMD_NODENAME"]
        run.write_cause(attempt, rank, "crash", CAUSES["crash"], play["crash"], host=host)
        return CAUSES["crash"]
    if "daemon" in play:
        subprocess.Popen(["sleep", play["daemon"]], start_new_session=True)
    memory = b"x" * (play.get("memory", 0) << 20)
    stop_signal = ""
    end = time.monotonic() + play["steps"] * STEP
    while time.monotonic() < end:
        for name in signals.wait(end):
            if name not in STOP:
                continue
            if rank == 0:
                run.record_stop_request(attempt, f"SIG{name}")
            if not stop_signal and name not in play.get("ignore", []):
                stop_signal = f"SIG{name}"
                end = time.monotonic() + play.get("save", 0.0)
    del memory
    if not stop_signal and rank == 0:
        write_json(run.result, {"run": run.name, "attempt": attempt})
    return leave(run, attempt, rank, stop_signal)


def leave(run: RunDir, attempt: int, rank: int, stop_signal: str) -> int:
    """Write the cause as ``jobs.runtime.rank_process`` does, and return its exit code."""
    if stop_signal:
        cause = "stopped"
        reason = f"signal {stop_signal}"
    else:
        cause = "complete"
        reason = ""
    host = os.environ.get("SLURMD_NODENAME", "")
    run.write_cause(attempt, rank, cause, CAUSES[cause], reason, trace="", signal=stop_signal, host=host)
    return CAUSES[cause]


def main(path: str) -> int:
    run = RunDir(path)
    attempt = int(os.environ["FLIP_ATTEMPT"])
    rank = int(os.environ["RANK"])
    (run.path / "signals").mkdir(exist_ok=True)
    signals = Signals(run.path / "signals" / f"{attempt}.{rank}.jsonl")
    if run.result.exists():
        return 0
    code = work(run, attempt, rank, signals)
    signals.wait(0.0)  # logs signals that arrived in the meantime
    return code


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stdout.flush()
    os._exit(code)
