"""Measures nodes of a Slurm cluster: one job by the existing submission, whose nodes run ``jobs.measuring.node``."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flip.common.cache import cache_root
from flip.common.host import cores
from flip.files.creation import closed_folder, run_folder
from flip.runs.checks import require
from flip.runs.errors import ConfigError, FlipError
from flip.runs.lifecycle import ENDED
from flip.runs.rundir import RunDir, write_json, write_text
from jobs.backends.table import open_backend
from jobs.common.cli import command, note
from jobs.common.cluster_profile import ClusterProfile, require_trusted_programs
from jobs.common.filesystem import require_trusted, writing
from jobs.common.job import Job, JobResources
from jobs.common.paths import REPOSITORY, runs_root
from jobs.measuring import machine, node, rows
from jobs.planning import preflight
from jobs.planning.measurement import MEASURED, Measurement, read_measurement
from jobs.slurm import site, site_checks
from jobs.submission.snapshot import take
from jobs.submitted_runs.clusters import request_cancel, states

FOLDER = ".measure"
"""Below the folder of runs: measuring jobs, which `status` and `report` leave out."""
EXTRA_HOURS = 0.1
"""Of the wall limit, beyond the minutes of the measurement: start, and the nodes that wait for each other."""
POLL_SECONDS = 2.0
JOB_SHARE = 0.6
"""Share of the minutes that the measuring job gets; the faults that are caused in jobs of their own get the rest."""
RUNS_AT_ONCE = 2
FAULT_NODES = 2
FAULT_JOBS = 4
"""Jobs of the faults: nodes of each, at once, and in all."""


def question(profile: ClusterProfile, nodes: int, minutes: float) -> str:
    """The cost of a measuring job, and whether to submit it."""
    fault_nodes = RUNS_AT_ONCE * min(FAULT_NODES, nodes)
    hours = (JOB_SHARE * nodes + (1 - JOB_SHARE) * fault_nodes) * minutes / 60
    cost = f"{hours:.2g} node-hours"
    if profile.gpus_per_node:
        cost = f"{hours * profile.gpus_per_node:.2g} GPU-hours"
    return (
        f"This submits a job on {nodes} nodes of partition {profile.partition or 'by default'}, then up to"
        f" {FAULT_JOBS} small ones, for up to {minutes:g} minutes, {cost} at most. Submit?"
    )


def check(profile: ClusterProfile, nodes: int, minutes: float) -> None:
    """Raise ConfigError or StorageError if the job cannot be submitted."""
    if minutes / 60 + EXTRA_HOURS > profile.hours:
        remedy = f"Give fewer minutes than {60 * (profile.hours - EXTRA_HOURS):.0f}, or raise hours."
        raise ConfigError("the profile's time limit is too short", f"{profile.name}, hours", profile.hours, remedy)
    require_trusted_programs(profile)
    require([preflight.SCHEDULER], profile, False, True)


def measure(
    profile: ClusterProfile, nodes: int, minutes: float, manifests: Sequence[str], only: Sequence[str] | None,
    names: bool, share: float, progress: Callable[[Measurement], None] = lambda so_far: None,
) -> Measurement:  # fmt: skip
    """Submit the job, wait for its end, then cause faults in jobs of their own; returns the result.

    ``progress`` gets the measurement before the faults, which may be interrupted.

    Raises FlipError with the reason if there is none.
    """
    folder = runs_root(profile.runs_root) / FOLDER
    with writing(folder):
        require_trusted(closed_folder(folder))
        run = RunDir(folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}")
        run_folder(run.path)
        request = {
            "minutes": JOB_SHARE * minutes,
            "manifests": list(manifests),
            "only": only,
            "names": names,
            "share": share,
            "gpus": profile.gpus_per_node,
        }
        write_json(run.path / node.REQUEST, request)
        write_text(run.config, "schema: 1\n")
    resources = JobResources(
        nodes, 1, profile.gpus_per_node, profile.cpus_per_node or cores(), minutes / 60 + EXTRA_HOURS
    )
    environment = {"FLIP_CACHE": str(cache_root())}
    code = take(REPOSITORY, folder / ".code").path
    plain = dataclasses.replace(profile, agents=False)  # a killed row must not restart the process of its node
    with writing(folder):
        open_backend(plain).submit([Job(run, code, resources, environment, module="jobs.measuring.node")])
    note(f"the job is {run.path}; to end it: {command('cancel', run.path)}")
    _wait(run)
    measured = read_measurement(str(run.path / node.RESULT))
    progress(measured)
    return with_faults(measured, profile, folder, 60 * (1 - JOB_SHARE) * minutes, only)


def with_faults(
    measured: Measurement, profile: ClusterProfile, root: Path, seconds: float, only: Sequence[str] | None
) -> Measurement:
    """The measurement with the rows of faults in jobs of the cluster, which run for at most ``seconds``."""
    device = "cuda" if measured.machine.gpus else "cpu"
    fields = dataclasses.asdict(profile) | {"agents": True, "measured": ""}
    plans = rows.scheduled_faults(device, measured.nodes, profile.gpus_per_node, fields)
    done = []
    end = time.monotonic() + seconds
    with machine.temporary_folder(root) as shared:
        for plan in plans:
            if only and plan.name not in only:
                continue
            note(f"{plan.what}: in jobs of their own")
            start_time = time.monotonic()
            row = machine.run_row(plan, root, end, shared=shared)
            if plan.options["kind"] == "preemption" and row.status == MEASURED:
                row = dataclasses.replace(row, values={**row.values, **_requeue_delay(profile)})
            done.append(row)
            measured = dataclasses.replace(
                measured, minutes=round(measured.minutes + (time.monotonic() - start_time) / 60, 2)
            )
    return dataclasses.replace(measured, rows=(*measured.rows, *done))


def _requeue_delay(profile: ClusterProfile) -> dict[str, Any]:
    """How long Slurm waits before it starts a requeued job, and the setting that decides."""
    try:
        seconds, setting = site_checks.requeue_delay(site.read(profile))
    except FlipError:
        return {}
    return {"requeue_seconds": seconds, "setting": setting}


def _wait(run: RunDir) -> None:
    """Wait for the end of the job, and note its state. Raises FlipError if it has no result."""
    last = ""
    try:
        while True:
            state = states([run])[run.path]
            words = f"{state.state}: {state.reason}".rstrip(": ")
            if words != last:
                note(words)
                last = words
            if state.state in ENDED:
                break
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        request_cancel([run], "the measurement was interrupted")
        raise
    if state.state != "complete":
        remedy = f"The output of its nodes: {_logs(run)}"
        raise FlipError("the measuring job has no result", str(run.path), words, remedy)


def _logs(run: RunDir) -> Path:
    return run.path / "logs"
