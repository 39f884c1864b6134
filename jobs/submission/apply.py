"""Carries out a plan in the folder of a sweep, RUNS_ROOT/<sweep>, all or nothing.

No run directory is ever overwritten or deleted: it is created under a temporary name and renamed, or moved to
RUNS_ROOT/.trash/<time>/.
"""

import fcntl
import os
import re
import secrets
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flip.environment import environment
from flip.files import deletion
from flip.files.creation import closed_folder, folder_like, fsync_path, new_folder, open_lock
from flip.files.ownership import is_mine
from flip.runs import canary, checkpoint_folder, formats
from flip.runs.errors import ConfigError
from flip.runs.lifecycle import ENDED
from flip.runs.rundir import RunDir, read_record, write_json, write_text
from jobs.backends.multi import MultiBackend
from jobs.common.filesystem import lock_holder, locked, require_trusted, writing
from jobs.common.job import Backend, Job
from jobs.submission.plan import Action, Plan
from jobs.submission.snapshot import DIGEST, Snapshot, delete_bytecode, verify
from jobs.submitted_runs import clusters
from jobs.submitted_runs.resubmit import NO_COMMAND, SubmitCommand
from jobs.workloads.workload import job_of

PRUNE_SECONDS = 600.0  # for pruned runs to save and end; the next ``--prune`` moves those that need longer


@dataclass(frozen=True)
class StartOptions:
    """What all jobs of a submission have in common."""

    canary_steps: int = 0
    """Steps of a canary before the others with its resources start; 0: all start at once."""
    resubmit_command: SubmitCommand = NO_COMMAND
    """The command that submits the sweep again, for job.json."""
    exposed: Sequence[str] = ()
    """See ``Job.exposed``."""


WITHOUT_CANARY = StartOptions()


@contextmanager
def lock(folder: Path, shared: bool = False) -> Iterator[None]:
    """Create the sweep folder and hold its lock. Raises ConfigError if another command holds it.

    A folder that it created, and in which nothing was written meanwhile, is deleted at the end.

    ``shared``: for a command that only adds jobs beside the runs. Several of these may hold the lock at once, and none
    deletes the folder.
    """
    is_new = not shared and not os.path.lexists(folder)
    path = folder / ".lock"
    with writing(folder):
        require_trusted(closed_folder(folder))
        handle = open_lock(path)
    try:
        how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        with writing(folder):
            is_mine = locked(handle, how, folder) and _is_current(handle, path)
        if not is_mine:
            what = f"another command is at work on this sweep ({lock_holder(handle)})"
            raise ConfigError(what, str(folder), remedy="Wait for it, or end it.")
        try:
            yield
        finally:
            if is_new and os.listdir(folder) == [path.name]:
                deletion.delete_file(path)
                deletion.delete_empty_folder(folder)
    finally:
        os.close(handle)


def _is_current(handle: int, path: Path) -> bool:
    """Whether an open file still has its name: a submit that wrote nothing may have deleted it meanwhile."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def create_and_submit(
    plan: Plan,
    snapshot: Snapshot,
    cluster: Backend | MultiBackend,
    record: Mapping[str, Any],
    options: StartOptions = WITHOUT_CANARY,
    on_trash: Callable[[Path, Path], None] = lambda path, target: None,
) -> list[Job]:
    """Create the run directories of runs that start, then submit them. Call it under ``lock``.

    All directories are written under temporary names before the first is renamed, so an error leaves none. Runs that
    were cancelled after the plan was made are left alone.

    Args:
        record: the contents of sweep.json, for reports: name, title, notes, order of runs, expected numbers.
        options: what the jobs have in common.
        on_trash: called with a moved run directory and its place in the trash.
    """
    late = cancelled_meanwhile(plan, plan.cancelled)
    started = [action for action in plan.starting if action.name not in late]
    fresh = [action for action in started if action.kind == "new" or action.moves]
    sourced = [
        action for action in started if action.wanted.starts_from_checkpoint and _needs_source(action, plan.folder)
    ]
    codes = {action.name: snapshot_of(action, plan.folder) or snapshot.path for action in started}
    with writing(plan.folder), ExitStack() as cleanup:
        for action in started:
            if action not in fresh:
                RunDir(plan.folder / action.name).close(accept_open_files=True)  # before the first write into it
        temporaries = {action.name: _temporary_folder(action, plan.folder, snapshot, cleanup) for action in fresh}
        for action in sourced:  # before anything is moved
            action.wanted.check_source()
        write_json(plan.folder / "sweep.json", dict(record))
        for action in fresh:
            target = plan.folder / action.name
            if action.moves:
                on_trash(target, move_to_trash(target))
            os.rename(temporaries[action.name], target)
        fsync_path(plan.folder)
        for code in {*codes.values()} - {snapshot.path}:
            delete_bytecode(code)
        for action in started:
            run = RunDir(plan.folder / action.name)
            if action.adopts:
                action.wanted.adopt(run, action.changes)
            if action not in fresh:
                action.wanted.update(run, older=codes[action.name] != snapshot.path)
            if action.name in plan.copied:
                _set_aside_compiled(run, action.submitter)
        for action in sourced:
            action.wanted.pin(RunDir(plan.folder / action.name))
        jobs = [_job_to_submit(action, plan, snapshot, codes[action.name], options) for action in started]
        jobs = assign_canaries(jobs, plan.folder, options.canary_steps)
        cluster.submit(jobs)
    return jobs


def _temporary_folder(action: Action, folder: Path, snapshot: Snapshot, cleanup: ExitStack) -> Path:
    """A complete run directory under a temporary name. ``cleanup`` deletes it, unless it is renamed before."""
    temporary = folder / f".new-{action.name}.{secrets.token_hex(8)}"
    new_folder(temporary)
    cleanup.callback(deletion.discard_own_folder, temporary)
    for name, text in action.wanted.files().items():
        write_text(temporary / name, text)
    write_json(temporary / "identity.json", _recorded(action.wanted.identity, snapshot, action))
    return temporary


def _needs_source(action: Action, folder: Path) -> bool:
    """Whether the run starts from the checkpoint that ``init`` names; one with checkpoints of its own continues from
    those."""
    return (
        action.kind == "new" or action.moves or not checkpoint_folder.ever_had_checkpoint(RunDir(folder / action.name))
    )


def cancelled_meanwhile(plan: Plan, cancelled_before: Collection[str] = ()) -> list[str]:
    """Names of runs that were to start but are cancelled, except those ``cancelled_before``."""
    names = [action.name for action in plan.starting if action.name not in cancelled_before]
    return [name for name in names if RunDir(plan.folder / name).cancel.exists()]


def assign_canaries(jobs: Sequence[Job], folder: Path, steps: int) -> list[Job]:
    """The same jobs with canaries: of several jobs with equal resources and code, the first becomes the canary unless
    a run of the folder has already passed ``steps`` with them."""
    groups = [
        (canary.group_of({**job.execution(), "cluster": job.cluster}), "" if job.has_steps else job.run.name)
        for job in jobs
    ]

    def is_proven(group: tuple[Hashable, str]) -> bool:
        return any(_proves(RunDir(path.parent), group[0], steps) for path in folder.glob("[!.]*/job.json"))

    assigned = []
    for i, (job, first) in enumerate(zip(jobs, canary.choose(groups, steps, is_proven), strict=True)):
        if first == i:
            job = replace(job, canary=steps)
        elif first is not None:
            job = replace(job, waits_for=jobs[first].run.name)
        assigned.append(job)
    return assigned


def _proves(run: RunDir, group: Hashable, steps: int) -> bool:
    """Whether a run of this group has passed the steps."""
    try:
        record = read_record(run.path / "job.json") or {}
        return canary.group_of(record) == group and canary.passed(run, steps)
    except ValueError:  # damaged: no proof
        return False


def _set_aside_compiled(run: RunDir, user: str) -> None:
    """Rename ``compiled/`` of a copied run: torch unpickles what it holds."""
    if os.path.lexists(run.compiled):
        words = re.sub("[^A-Za-z0-9]+", "-", user)
        os.rename(run.compiled, run.path / f"compiled.of-{words}-{time.time_ns()}")


def snapshot_of(action: Action, folder: Path) -> Path | None:
    """The snapshot that a continuing run keeps; None if it gets the current code, as failed and new runs do, and those
    that have never started: their canary may have failed because of the old code. Also copies of another user's run.

    Raises PermissionDenied if the snapshot is not trusted, or is not what was submitted; FormatError if it is of
    another version.
    """
    run = RunDir(folder / action.name)
    continues = (action.kind == "stopped" and run.newest_attempt() > 0) or action.adopts
    continues = continues and not action.submitter
    stored: dict[str, Any] = {}
    if continues:
        stored = read_record(run.identity) or {}
    code = folder / ".code" / str(stored.get("code"))
    if not DIGEST.fullmatch(code.name) or code.parent != folder / ".code" or not code.is_dir():
        return None
    require_trusted(code, inside=True)
    verify(code)
    formats.check_code(code)
    return code


def _job_to_submit(action: Action, plan: Plan, snapshot: Snapshot, code: Path, options: StartOptions) -> Job:
    run = RunDir(plan.folder / action.name)
    if code == snapshot.path:
        write_json(run.identity, _recorded(read_record(run.identity) or {}, snapshot, action))
    uncancels = action.name in plan.cancelled and not action.moves
    resubmit_command = options.resubmit_command
    command = []
    if resubmit_command.argv:
        command = [*resubmit_command.argv, "--only", action.wanted.name]
    if resubmit_command.argv and action.wanted.ignored_changes:
        command += ["--changed", "keep"]
    return job_of(
        action.wanted,
        run,
        code,
        cluster=action.wanted.cluster,
        uncancels=uncancels,
        command=command,
        command_folder=resubmit_command.folder,
        host_snapshot=snapshot.path,
        exposed=options.exposed,
    )


def _recorded(identity: Mapping[str, Any], snapshot: Snapshot, action: Action) -> dict[str, Any]:
    """identity.json of a run that gets the code of ``snapshot``. Nothing that this adds is hashed."""
    files = {file: checksum for file, checksum in snapshot.user_files.items() if file in action.wanted.code}
    others = {key: value for key, value in identity.items() if key != "user_files"}
    recorded = {"code": snapshot.digest, "uid": os.geteuid(), "environment": environment()}
    if files:
        recorded["user_files"] = files
    return {**others, **recorded}


def prune(plan: Plan, why: str, on_trash: Callable[[Path, Path], None] = lambda path, target: None) -> list[str]:
    """Cancel the pruned runs that are active, wait for their end, move all to the trash. Call it under ``lock``.

    Returns the names of runs that were still saving after PRUNE_SECONDS: they stay, and stay cancelled.
    """
    active = [RunDir(plan.folder / name) for name, existing in plan.pruned.items() if existing.active]
    clusters.request_cancel(active, why, repeat_kills=False)
    end = time.monotonic() + PRUNE_SECONDS
    while active and time.monotonic() < end:
        state_by_run = clusters.states(active)
        active = [run for run in active if state_by_run[run.path].state not in ENDED]
        if active:
            time.sleep(clusters.poll_interval(active))
    left = [run.name for run in active]
    with writing(plan.folder):
        for name in plan.pruned:
            if name not in left:
                on_trash(plan.folder / name, move_to_trash(plan.folder / name))
    return left


def move_to_trash(path: Path) -> Path:
    """Move a run directory RUNS_ROOT/<sweep>/<run> to RUNS_ROOT/.trash/<time>/<sweep>/<run>; returns the new path.

    All users who may create sweeps in RUNS_ROOT may also write to its .trash.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    count = 0
    root = path.parent.parent
    with suppress(FileExistsError):
        folder_like(root / ".trash", root)
    while True:
        bin_ = root / ".trash" / (f"{stamp}.{count}" if count else stamp) / path.parent.name
        target = bin_ / path.name
        if not target.exists() and (is_mine(bin_.parent) or not bin_.parent.exists()):
            closed_folder(bin_)
            os.rename(path, target)
            return target
        count += 1
