"""What Slurm would get for a plan, and when it says that it would start: a batch script per shape.

The asking is ``sbatch --test-only``, which queues nothing. Nothing is written.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from flip.runs.rundir import RunDir
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import Job, JobResources
from jobs.host.slurm_cli import DEADLINE
from jobs.planning.plan import Plan, resources_of
from jobs.slurm import backend, batch_script
from jobs.submission.apply import snapshot_of

CODE, TOKEN = "CODE", "TOKEN"
"""What stands for the digest of the code and for the name of the submission, which are made when it is one."""

_START = re.compile(r"Job \S+ to start at (?P<time>\S+).* processors on (?:nodes )?(?P<nodes>\S+)")
"""Slurm's words, on standard error."""


@dataclass(frozen=True)
class PlannedJob:
    """One sbatch call to come."""

    runs: Sequence[str]
    shape: JobResources
    script: str
    start: str
    """When Slurm would start it, in words; empty where it was not asked."""


def batches(plan: Plan, profile: ClusterProfile, asking: bool = True) -> list[PlannedJob]:
    """Of the runs that start, in the order of their submission. With ``asking`` False Slurm is not asked."""
    jobs = [
        Job(
            RunDir(plan.folder / action.name),
            snapshot_of(action, plan.folder) or plan.folder / ".code" / CODE,
            resources_of(config),
            hooks=plan.folder / ".code" / CODE,
        )
        for action in plan.starting
        if (config := action.wanted.config)
    ]
    asked: dict[JobResources, str] = {}
    found = []
    for group in backend.arrays(jobs, profile.array_size):
        text, size = script(profile, group), group[0].shape
        if size not in asked:
            asked[size] = start(text, profile) if asking else ""
        found.append(PlannedJob([job.run.name for job in group], size, text, asked[size]))
    return found


def script(profile: ClusterProfile, jobs: Sequence[Job]) -> str:
    """The batch script of jobs of one shape, but for CODE and TOKEN."""
    sweep = jobs[0].run.path.parent
    folder = sweep / ".slurm" / TOKEN
    executor = backend.executor_of(profile, jobs[0], folder)
    executor.update_parameters(**batch_script.parameters(profile, jobs[0], folder, f"{sweep.name}.{TOKEN}"))
    if len(jobs) > 1:
        executor.parameters["map_count"] = len(jobs)
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "0")
    return text


def start(text: str, profile: ClusterProfile) -> str:
    """What Slurm says to a script, in words."""
    try:
        with batch_script.clean_environment([*batch_script.FORWARDED_ENV, *profile.env]):
            done = subprocess.run(
                ["sbatch", "--test-only"], input=text, capture_output=True, text=True, timeout=DEADLINE, check=False
            )
    except subprocess.TimeoutExpired:
        return f"Slurm says nothing for {DEADLINE:g} s"
    said = [line.removeprefix("sbatch: ").strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    when = next((match for line in said if (match := _START.search(line))), None)
    if when:
        return "would start at {time} on {nodes}, as things are now".format(**when.groupdict())
    return f"Slurm says: {said[-1] if said else f'nothing, exit code {done.returncode}'}"
