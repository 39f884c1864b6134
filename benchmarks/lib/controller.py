"""Requests of a sweep to Slurm's controller, counted at our own commands, and the effect of its limit on requests.

Slurm's commands are stubs that record every call (``slurm_stub.Site``); each is one or a few requests to the
controller. The limit is Slurm's own (slurm.conf, ``rl_enable``, off by default): a token bucket per user, filled at a
steady rate; a client that gets no token sleeps for a second and retries.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lib.slurm_stub import ROOT, Site, status
from flip.runs.rundir import RunDir
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import Job, JobResources
from jobs.host.slurm_cli import DEADLINE
from jobs.slurm.backend import SlurmBackend

MAX_ARRAY = 1001
MAX_JOBS = 10_000
"""Defaults of MaxArraySize and MaxJobCount (slurm.conf)."""
BUCKET = 30
REFILL = 2.0
"""Defaults of rl_bucket_size, and of rl_refill_rate per rl_refill_period of a second (slurm.conf)."""
KILL_WAIT = 30
"""Default of KillWait (slurm.conf), seconds: time for the owner of a job that is preempted without grace."""
STEP = "step"
"""In the list of calls: the end of the ranks."""

ANSWERS = """
state=RUNNING times=
if grep -qx {step} {calls}; then  # preempted in grace: ended by itself
  state=COMPLETING times="PreemptTime=2030-01-01T00:00:00 EndTime=2030-01-01T00:00:00"
fi
case "$*" in
*config*) echo "ClusterName = bench" ;;
*show*) echo "JobId=57 JobState=$state Reason=None Restarts=0 RunTime=01:00:00 TimeLimit=1-00:00:00 $times" ;;
esac
"""


@dataclass
class Calls:
    """Counts calls of Slurm's commands during an action."""

    site: Site

    def during(self, do: Any) -> dict[str, int]:
        before = self._all()
        do()
        return dict(self._all() - before)

    def _all(self) -> Counter[str]:
        return Counter(self.site.calls.read_text().split() if self.site.calls.exists() else [])


def counted(folder: Path, runs: int) -> dict[str, dict[str, int]]:
    """Calls by action: submit a sweep of ``runs`` runs with the same resources, show its status; one of its jobs starts
    and ends preempted."""
    path = os.environ["PATH"]
    try:
        site = Site(folder)
        script = folder / "bin" / "scontrol"
        answers = ANSWERS.format(step=STEP, calls=site.calls)
        script.write_text(f"#!/bin/sh\necho scontrol >>{site.calls}\n{answers}")
        calls = Calls(site)
        sweep = folder / "runs" / "sweep"
        jobs = []
        for i in range(runs):
            run = RunDir(sweep / f"run{i}")
            run.path.mkdir(parents=True)
            run.config.write_text("schema: 1\n", encoding="utf-8")
            jobs.append(Job(run, ROOT, JobResources(1, 8, 8, 12, 24.0)))
        commands = {
            "submit": calls.during(
                lambda: SlurmBackend(ClusterProfile(name="bench", kind="slurm", python=sys.executable)).submit(jobs)
            )
        }
        commands["status"] = _one(calls.during(lambda: status(site, runs, 1)), 2)
        site.environment |= {"SLURM_JOB_ID": "57", "SLURM_RESTART_COUNT": "0"}
        run = jobs[0].run
        return commands | _calls_of_start(site, run, folder / "step")
    finally:
        os.environ["PATH"] = path


def _calls_of_start(site: Site, run: RunDir, script: Path) -> dict[str, dict[str, int]]:
    """Calls by the owner of a job: until its ranks end because they were asked to stop, and after that."""
    cause = json.dumps({"cause": "stopped", "code": 75, "reason": "asked to stop"})
    script.write_text(f"sleep 1\necho '{cause}' >{run.attempt(1)}/cause.0.json\necho {STEP} >>{site.calls}\nexit 75\n")
    earlier = len(site.calls.read_text().split())
    site.command(ROOT / "jobs" / "host" / "job.py", run.path, "--script", script, code=75)
    words = site.calls.read_text().split()[earlier:]
    border = words.index(STEP)
    return {"begin": dict(Counter(words[:border])), "end": dict(Counter(words[border + 1 :]))}


def _one(calls: dict[str, int], times: int) -> dict[str, int]:
    return {name: count // times for name, count in calls.items()}


def storm(jobs: int, calls: int, seed: int, bucket: int = BUCKET, refill: float = REFILL) -> dict[str, Any]:
    """All jobs end at once, each with so many sequential calls, under the limit: second by second.

    A command that has waited for DEADLINE is taken as unanswered, and repeated.
    """
    rng = np.random.default_rng(seed)
    left = np.full(jobs, calls)
    since = np.zeros(jobs)
    tokens = float(bucket)
    second = 0
    unanswered = 0
    requests = 0
    soon = 0
    while left.any():
        waiting = rng.permutation(np.flatnonzero(left))
        requests += len(waiting)
        through = waiting[: int(tokens)]
        tokens = min(float(bucket), tokens - len(through) + refill)
        left[through] -= 1
        late = (second - since >= DEADLINE) & (left > 0)
        late[through] = False
        unanswered += int(late.sum())
        since[through] = second
        since[late] = second
        second += 1
        if second > KILL_WAIT:
            soon = soon
        else:
            soon = int((left == 0).sum())
    return {"requests": requests, "seconds": second, "unanswered": unanswered, "jobs_done_within_kill_wait": soon}
