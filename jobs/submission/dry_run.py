"""The jobs that a plan would submit to Slurm: batch scripts and expected start times. Writes and queues nothing."""

import re
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from flip.runs.errors import ConfigError
from flip.runs.rundir import RunDir
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import Job, JobResources
from jobs.common.paths import REPOSITORY
from jobs.host.slurm_cli import DEADLINE
from jobs.slurm import backend, batch_script
from jobs.slurm.batch_script import FORWARDED_ENV, clean_environment
from jobs.submission.apply import assign_canaries, snapshot_of
from jobs.submission.plan import Plan
from jobs.submission.snapshot import NO_USER_FILES, current_digest
from jobs.workloads.workload import job_of

# placeholders for the digest of the code and for the name of the submission
CODE = "CODE"
TOKEN = "TOKEN"  # noqa: S105
START = re.compile(r"Job \S+ to start at (?P<time>\S+).* processors on (?:nodes )?(?P<nodes>\S+)")  # of sbatch


@dataclass(frozen=True)
class PlannedJob:
    """One sbatch call to come. ``start``: what it waits for, or its expected start time, in words; empty if Slurm was
    not asked."""

    runs: Sequence[str]
    shape: JobResources
    script: str
    start: str


def planned_jobs(
    plan: Plan, profile: ClusterProfile, query: bool = True, canary: int | None = None,
    user_files: Mapping[str, bytes] = NO_USER_FILES,
) -> list[PlannedJob]:  # fmt: skip
    """The jobs of the runs that start, in the order of their submission.

    ``query``: ask Slurm for start times. ``canary``: steps of a canary, 0: none; by default as in the profile.
    ``user_files``: as ``snapshot.take``.
    """
    folder = plan.folder / ".code"
    code = present = folder / CODE
    with suppress(ConfigError):  # too much code, which `submit` refuses
        present = folder / current_digest(REPOSITORY, user_files)  # which may have passed its canary
    jobs = [
        job_of(
            action.wanted,
            RunDir(plan.folder / action.name),
            snapshot_of(action, plan.folder) or present,
            cluster=action.wanted.cluster,
            host_snapshot=code,
        )
        for action in plan.starting
    ]
    steps = profile.canary if canary is None else canary
    jobs = [
        replace(job, snapshot=code) if job.snapshot == present else job
        for job in assign_canaries(jobs, plan.folder, steps)
    ]
    starts: dict[JobResources, str] = {}
    planned = []
    jobs.sort(key=lambda job: not job.waits_for)
    for group in backend.group_into_arrays(jobs, profile.array_size):
        script = _script_of(profile, group)
        shape = group[0].resources
        canary_run = group[0].waits_for
        if not canary_run and shape not in starts:
            if query:
                starts[shape] = expected_start(script, profile)
            else:
                starts[shape] = ""
        if canary_run:
            start = f"held until {canary_run} has passed {steps} steps"
        else:
            start = starts[shape]
        planned.append(PlannedJob([job.run.name for job in group], shape, script, start))
    return planned


def _script_of(profile: ClusterProfile, jobs: Sequence[Job]) -> str:
    """The batch script of an array, except for CODE and TOKEN."""
    sweep = jobs[0].run.path.parent
    return batch_script.script_text(profile, jobs, sweep / ".slurm" / TOKEN, f"{sweep.name}.{TOKEN}")


def expected_start(script: str, profile: ClusterProfile) -> str:
    """The answer of ``sbatch --test-only``, in words."""
    command = ["sbatch", "--test-only"]
    try:
        with clean_environment([*FORWARDED_ENV, *profile.env]):
            done = subprocess.run(command, input=script, capture_output=True, text=True, timeout=DEADLINE, check=False)
    except subprocess.TimeoutExpired:
        return f"Slurm did not answer for {DEADLINE:g} s"
    lines = [line.removeprefix("sbatch: ").strip() for line in (done.stderr + done.stdout).splitlines()]
    match = next((match for line in lines if (match := START.search(line))), None)
    if match:
        return "would start at {time} on {nodes}, as things are now".format(**match.groupdict())
    return f"Slurm says: {next(filter(None, reversed(lines)), f'nothing, exit code {done.returncode}')}"
