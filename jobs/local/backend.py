"""The local backend: runs on this machine, managed by one detached supervisor per sweep folder."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from flip.files import deletion, python_path
from flip.files.creation import open_append, run_folder
from flip.runs.errors import FlipError
from flip.runs.lifecycle import ABSENT, ACTIVE, ENDING, UNKNOWN, UNREADABLE, SchedulerView
from flip.runs.origin import is_copy
from flip.runs.rundir import RunDir, read_record, write_json
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import Job, record_of
from jobs.host import sessions
from jobs.local import supervisor


def seen(runs: Sequence[RunDir]) -> dict[Path, SchedulerView]:
    """Path of a run -> what this machine shows: whether the supervisor serves its sweep, and whether ranks live."""
    served: dict[Path, bool] = {}
    shown = {}
    for run in runs:
        sweep = run.path.parent
        try:
            if sweep not in served:
                served[sweep] = supervisor.is_served(sweep)
            shown[run.path] = _seen(run, served[sweep])
        except OSError as error:
            shown[run.path] = SchedulerView(UNKNOWN, f"it cannot be read: {error}")
        except (ValueError, KeyError):  # damaged: a supervisor leaves it alone
            shown[run.path] = SchedulerView(ABSENT, supervisor.ABSENT_REASON)
    return shown


def _seen(run: RunDir, served: bool) -> SchedulerView:
    job = record_of(run)
    n = run.newest_attempt()
    if is_copy(run, job):
        return SchedulerView(ABSENT, supervisor.ABSENT_REASON)
    if n > 0 and not (run.attempt(n) / "end.json").exists():
        if served:
            return SchedulerView(ACTIVE)
        if live_ranks(run):
            return SchedulerView(ENDING, "its supervisor has died: it saves and stops")
    if served and job:
        return supervisor.idle(job)
    return SchedulerView(ABSENT, supervisor.ABSENT_REASON)


class LocalBackend:
    """See ``jobs.common.job.Backend``. Stateless: any number of instances may exist."""

    seen = staticmethod(seen)

    def __init__(self, profile: ClusterProfile, peer_grace: float = 20.0) -> None:
        self.profile = profile
        self.peer_grace = peer_grace

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
    return [row for row in rows if sessions.is_rank(row["pid"], row["start"], run, n)]


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
