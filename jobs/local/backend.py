"""The local backend: runs on this machine, managed by one detached supervisor per sweep folder."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from flip.runs import attempts, deletion, python_path
from flip.runs.errors import FlipError
from flip.runs.files import open_append, run_folder
from flip.runs.origin import is_copy
from flip.runs.rundir import RunDir, read_record, write_json
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import UNREADABLE, Job, JobState, is_complete, record_of, unreadable_state
from jobs.host import canary
from jobs.local import rank_processes, supervisor


def states(runs: Sequence[RunDir]) -> dict[Path, JobState]:
    """Path of a run -> state, from its files and the lock of the supervisor."""
    served: dict[Path, bool] = {}
    result = {}
    for run in runs:
        sweep = run.path.parent
        try:
            if sweep not in served:
                served[sweep] = supervisor.is_served(sweep)
            result[run.path] = _state(run, served[sweep])
        except UNREADABLE as error:
            result[run.path] = unreadable_state(run, error, damaged="failed")
    return result


def _state(run: RunDir, served: bool) -> JobState:
    n, copied = run.newest_attempt(), is_copy(run, record_of(run))
    running = n > 0 and not copied and not (run.attempt(n) / "end.json").exists() and (served or bool(live_ranks(run)))
    cancelled = attempts.cancel_reason(run) if run.cancel.exists() else ""
    if running:
        detail = cancelled or ("" if served else "its supervisor has died")
        return JobState("running", n, f"{detail}: it saves and stops" if detail else "")
    if is_complete(run):
        return JobState("complete", n)
    if cancelled:
        return JobState("cancelled", n, cancelled)
    job = read_record(run.path / "job.json")
    if job is None or copied:
        return JobState(
            "stopped", n, "copied or moved to this folder, and not submitted since" if copied else "never submitted"
        )
    end = attempts.current_end(run)
    if end is not None and end["action"] == "stop":
        return JobState("failed" if end["cause"] != "cancelled" else "cancelled", n, end["reason"])
    reason = end["reason"] if end else ""
    first = canary.holding(run, job) if n <= attempts.submitted_after(run) else None
    if first is not None:
        state_of_first = _state(first, served)
        if served and state_of_first.state in ("queued", "running", "waiting"):
            return JobState("queued", n, f"waits for its canary {first.name}")
        return JobState("stopped", n, canary.stuck_reason(first, state_of_first.state, state_of_first.detail))
    if not served:
        return JobState("stopped", n, "; ".join(filter(None, [reason, "no supervisor is running: submit again"])))
    if end is not None and end["delay"] > 0:
        return JobState("waiting", n, f"{reason}; starts again {end['delay']:g} s after that")
    return JobState("queued", n, reason)


class LocalBackend:
    """See ``jobs.common.job.Backend``. Stateless: any number of instances may exist."""

    states = staticmethod(states)

    def __init__(self, profile: ClusterProfile, peer_grace: float = 20.0) -> None:
        self.profile, self.peer_grace = profile, peer_grace

    def submit(self, jobs: Sequence[Job]) -> None:
        """Write each job.json, then start a supervisor if there is none. Raises FlipError if it does not start."""
        if not jobs:
            return
        sweep = jobs[0].run.path.parent
        run_folder(sweep / ".supervisor")
        settings = {
            "parallel": self.profile.parallel or 1,
            "peer_grace": self.peer_grace,
            "stop_grace": float(self.profile.signal_seconds),
        }
        write_json(sweep / ".supervisor" / "settings.json", settings)
        for order, job in enumerate(jobs):
            write_json(job.run.path / "job.json", self._record(job, order))
            if job.uncancels:  # why it was cancelled stays in the attempt's end
                # last: a supervisor would start what the old job.json says
                deletion.delete_file(job.run.cancel, missing_ok=True)
        start_supervisor(sweep, jobs[0].host_code)

    def _record(self, job: Job, order: int) -> dict[str, Any]:
        return job.record(
            kind="local",
            cluster=self.profile.name,
            order=order,
            python=self.profile.python or sys.executable,
            canary={"steps": job.canary} if job.canary else None,
            notify=self.profile.notify,
        )

    def cancel(self, runs: Sequence[RunDir], again: Collection[Path] = ()) -> None:
        """Signal the ranks of runs without a supervisor, which would read cancel.json. Errors are raised at the end."""
        problems = []
        for run in runs:
            try:
                if not supervisor.is_served(run.path.parent):
                    self.signal_ranks(run)
            except UNREADABLE as error:  # an OSError if the processes are another user's
                problems.append(f"{run.name}: {error}")
        if problems:
            remedy = "Their processes save and end by themselves, or the user who submitted them must cancel."
            raise FlipError("not signalled", value="; ".join(problems), remedy=remedy)

    def signal_ranks(self, run: RunDir) -> None:
        for row in live_ranks(run):
            with contextlib.suppress(ProcessLookupError):
                os.kill(row["pid"], signal.SIGTERM)


def live_ranks(run: RunDir) -> list[dict[str, Any]]:
    """Rows {rank, pid, start} of the newest attempt's processes that still run on this host, as this user."""
    n = run.newest_attempt()
    rows = read_record(run.attempt(n) / "pids.json") or []
    return [row for row in rows if rank_processes.is_rank(row["pid"], row["start"], run, n)]


def start_supervisor(sweep: Path, code: Path) -> None:
    """Start a supervisor with the code in ``code``. It detaches itself, and ends at once if another is running."""
    journal = sweep / ".supervisor" / "log"
    with open_append(journal) as output:
        done = subprocess.run(
            [sys.executable, "-m", "jobs.local.supervisor", str(sweep)],
            cwd=code,
            env={**os.environ, **python_path.variables(code)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            check=False,
        )
    if done.returncode != 0:
        last = journal.read_text(encoding="utf-8", errors="replace").split("\n")[-2:-1] or [str(done.returncode)]
        raise FlipError("the supervisor did not start", str(sweep), last[0], f"Its log is {journal}.")
