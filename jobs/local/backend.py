"""The local backend: runs on this machine, looked after by one detached supervisor per sweep folder."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flip.runs import ownership
from flip.runs.errors import ConfigError, FlipError
from flip.runs.ownership import closed_folder
from flip.runs.rundir import RunDir, read_record, write_json
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import UNREADABLE, Job, JobState, is_complete, unreadable_state
from jobs.host import attempts, canary
from jobs.local import rank_processes, supervisor


class LocalBackend:
    """See ``jobs.common.job.Backend``. Knows nothing that is not in the files: any number of them may exist."""

    def __init__(self, profile: ClusterProfile, peer_grace: float = 20.0) -> None:
        self.profile, self.peer_grace = profile, peer_grace

    def submit(self, jobs: Sequence[Job]) -> None:
        """Write each job.json, then see that a supervisor is there. FlipError where it cannot be started."""
        if not jobs:
            return
        sweep = jobs[0].run.path.parent
        closed_folder(sweep / ".supervisor")
        settings = {
            "parallel": self.profile.parallel or 1,
            "peer_grace": self.peer_grace,
            "stop_grace": float(self.profile.signal_seconds),
        }
        write_json(sweep / ".supervisor" / "settings.json", settings)
        for order, job in enumerate(jobs):
            if job.run.path.parent != sweep:
                raise ConfigError("one submission holds the runs of one sweep", str(sweep), str(job.run.path))
            write_json(job.run.path / "job.json", self._record(job, order))
            if job.uncancels:  # why it was cancelled stays in the attempt's end
                job.run.cancel.unlink(missing_ok=True)  # last: a supervisor would start what the old job.json says
        start_supervisor(sweep, jobs[0].host_code)

    def _record(self, job: Job, order: int) -> dict[str, Any]:
        return {
            "kind": "local",
            "cluster": self.profile.name,
            "order": order,
            "python": self.profile.python or sys.executable,
            "module": job.module,
            "snapshot": str(Path(job.snapshot).absolute()),
            "hooks": str(job.host_code),
            "world": job.shape.world,
            "shape": asdict(job.shape),
            "env": dict(job.env),
            "canary": {"steps": job.canary} if job.canary else None,
            "waits_for": job.waits_for,
            "notify": self.profile.notify,
            "command": list(job.command),
            "after": job.run.newest_attempt(),
            "time": time.time(),
        }

    def states(self, runs: Sequence[RunDir]) -> dict[Path, JobState]:
        return states(runs)

    def cancel(self, runs: Sequence[RunDir], again: Collection[Path] = ()) -> None:
        """A supervisor sees cancel.json by itself; where there is none, ranks on their way out get the signal again.
        All are told before the first trouble is raised."""
        troubles = []
        for run in runs:
            try:
                if not supervisor.is_served(run.path.parent):
                    self.requeue(run)
            except UNREADABLE as error:  # OSError, too, where the processes are another user's
                troubles.append(f"{run.name}: {error}")
        if troubles:
            remedy = "What of these still runs saves and ends by itself, or by the hand of who submitted it."
            raise FlipError("not signalled", value="; ".join(troubles), remedy=remedy)

    def requeue(self, run: RunDir) -> None:
        if not ownership.is_mine(run.attempt(run.newest_attempt()) / "pids.json"):
            return  # a record of another user could name any process of this one
        for row in live_ranks(run):
            with contextlib.suppress(ProcessLookupError):
                os.kill(row["pid"], signal.SIGTERM)


def states(runs: Sequence[RunDir]) -> dict[Path, JobState]:
    """Path of a run -> state, by the files and by whether a supervisor is there."""
    served: dict[Path, bool] = {}
    found = {}
    for run in runs:
        sweep = run.path.parent
        try:
            if sweep not in served:
                served[sweep] = supervisor.is_served(sweep)
            found[run.path] = _state(run, served[sweep])
        except UNREADABLE as error:
            found[run.path] = unreadable_state(run, error, damaged="failed")
    return found


def _state(run: RunDir, served: bool) -> JobState:
    n = run.newest_attempt()
    running = n > 0 and not (run.attempt(n) / "end.json").exists() and (served or bool(live_ranks(run)))
    cancelled = attempts.cancel_reason(run) if run.cancel.exists() else ""
    if running:
        detail = cancelled or ("" if served else "its supervisor is gone")
        return JobState("running", n, f"{detail}: it saves and stops" if detail else "")
    if is_complete(run):
        return JobState("complete", n)
    if cancelled:
        return JobState("cancelled", n, cancelled)
    job = read_record(run.path / "job.json")
    if job is None:
        return JobState("stopped", n, "never submitted")
    verdict = attempts.current_end(run)
    if verdict is not None and verdict["action"] == "stop":
        return JobState("failed" if verdict["cause"] != "cancelled" else "cancelled", n, verdict["reason"])
    reason = verdict["reason"] if verdict else ""
    ahead = canary.canary_of(run, job)
    if (
        n <= attempts.submitted_after(run)
        and ahead is not None
        and not canary.passed(ahead, canary.canary_record(ahead).get("steps", 0))
    ):
        standing = _state(ahead, served)
        if served and standing.state in ("queued", "running", "waiting"):
            return JobState("queued", n, f"waits for its canary {ahead.name}")
        return JobState("stopped", n, canary.stuck_reason(ahead, standing.state, standing.detail))
    if not served:
        return JobState("stopped", n, "; ".join(filter(None, [reason, "no supervisor is running: submit again"])))
    if verdict is not None and verdict["delay"] > 0:
        return JobState("waiting", n, f"{reason}; starts again {verdict['delay']:g} s after that")
    return JobState("queued", n, reason)


def live_ranks(run: RunDir) -> list[dict[str, Any]]:
    """Rows {rank, pid, start} of the newest attempt's processes that still run here."""
    rows = read_record(run.attempt(run.newest_attempt()) / "pids.json") or []
    return [row for row in rows if rank_processes.alive(row["pid"], row["start"])]


def start_supervisor(sweep: Path, code: Path) -> None:
    """Start a supervisor from the folder ``code``; it detaches itself. If one is running already it ends at once."""
    journal = sweep / ".supervisor" / "log"
    with open(journal, "ab") as output:
        done = subprocess.run(
            [sys.executable, "-m", "jobs.local.supervisor", str(sweep)],
            cwd=code,
            env={**os.environ, "PYTHONPATH": str(code)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            check=False,
        )
    if done.returncode != 0:
        said = journal.read_text(encoding="utf-8", errors="replace").split("\n")[-2:-1] or [str(done.returncode)]
        raise FlipError("the supervisor did not start", str(sweep), said[0], f"All its words are in {journal}.")
