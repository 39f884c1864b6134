"""A sweep folder whose runs are executed by the fake rank process, under the real supervisor."""

import shutil
from pathlib import Path

from flip.runs import attempts
from flip.runs.lifecycle import ENDED
from flip.runs.rundir import RunDir, read_json
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import Job, JobResources
from jobs.host import sessions
from jobs.local import backend
from jobs.submitted_runs import clusters
from tests.harness.common import ROOT, make_run, wait_until


class LocalSweep:
    """The runs of a sweep, and actions on them."""

    def __init__(self, folder: Path) -> None:
        self.sweep = folder / "runs" / "sweep"
        self.sweep.mkdir(parents=True)
        self.snapshot = folder / "snapshot"
        self.snapshot.mkdir()
        for package in ("flip", "jobs"):
            (self.snapshot / package).symlink_to(ROOT / package)
        shutil.copy(ROOT / "tests" / "jobs" / "fake_rank.py", self.snapshot)
        self.cluster = backend.LocalBackend(ClusterProfile(name="local", signal_seconds=5), peer_grace=0.5)
        self.worlds: dict[str, int] = {}

    def run(self, name="run", world=1, total=6, step=0.05, every=2, **play) -> RunDir:
        run = make_run(self.sweep / name, play={"total": total, "step": step, "every": every, **play})
        self.worlds[name] = world
        return run

    def submit(self, *runs: RunDir, parallel=1, gpus=0, **fields) -> None:
        self.cluster.profile.parallel = parallel
        shapes = [JobResources(processes=self.worlds[r.name], gpus=gpus) for r in runs]
        self.cluster.submit(
            [Job(r, self.snapshot, s, module="fake_rank", **fields) for r, s in zip(runs, shapes, strict=True)]
        )

    def state(self, run: RunDir) -> str:
        return clusters.states([run])[run.path].state

    def until(self, condition, seconds=40.0):
        wait_until(condition, "a state of the sweep", seconds, 0.02, self.journal)

    def until_state(self, run: RunDir, *states: str) -> None:
        """Wait until the run is in one of the states, and, if that is an end, until its supervisor has recorded it."""
        self.until(lambda: self.state(run) in states)
        if self.state(run) in ENDED:
            self.until(lambda: not attempts.unended(run))

    def until_moving(self, run: RunDir, n: int, step: int = 1) -> None:
        """Wait until attempt n has completed ``step`` steps."""
        self.until(lambda: run.newest_attempt() == n and (read_json(run.status) or {}).get("attempt") == n)
        self.until(lambda: (read_json(run.status) or {})["step"] >= step)

    def supervisor(self) -> int:
        return (read_json(self.sweep / ".supervisor" / "pid.json") or {})["pid"]

    def pids(self, run: RunDir) -> list[int]:
        return [row["pid"] for row in backend.live_ranks(run)]

    def journal(self) -> str:
        log = self.sweep / ".supervisor" / "log"
        if log.exists():
            return log.read_text()
        return "no journal"

    def left(self) -> list[int]:
        """Return the pids of live processes that name this sweep."""
        pids = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                command_line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            pid = int(entry.name)
            if str(self.sweep).encode() in command_line and sessions.alive(pid, sessions.start_time(pid)):
                pids.append(pid)
        return pids
