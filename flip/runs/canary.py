"""Canaries: the first run with new resources or code starts alone; the others are held until it has passed.

It passes when it has logged a number of steps, each with a finite loss, or is complete. Then the others are released:
on Slurm by the owner of its job (``jobs/host/job.py``); locally by the supervisor. If
it stops for good they never start, and ``status`` says why; the next submission includes them, with a canary of its
own.

The rule is in the pure functions ``choose`` (which run goes ahead), ``hold_state`` (what holds a run that waits) and
``at_end`` (what an ending canary does with the jobs that wait for it); docs/cluster.md has them as tables. Back ends
only hold and release. Standard library, Python >= 3.6.

On disk: job.json of a canary has ``canary``: steps, and on Slurm ``releases``, the names of the held jobs. job.json of
a run that waits has ``waits_for``, the name of its canary. .slurm/<token>/released.json exists once the jobs of that
submission were released.
"""

from pathlib import Path
from typing import Any, Callable, Dict, Hashable, Iterator, List, Mapping, NamedTuple, Optional, Sequence

from flip.runs import attempts
from flip.runs.metric_lines import metric_file
from flip.runs.rundir import RunDir, create_json, exists, read_record

#: What holds a run that waits for a canary: nothing; its canary, which may still pass; a canary that never will.
FREE = "free"
WAITING = "waiting"
LOST = "lost"

#: The job on Slurm of a run that waits: it does not start until it is released.
JOB_HELD = "held"

#: What an ending canary does with the jobs that wait for it.
RELEASE = "release"
CANCEL = "cancel"
LEAVE = "leave"


# -- the rule ----------------------------------------------------------------------------------------------------------


def choose(
    groups: Sequence[Hashable], steps: int, is_proven: Callable[[Any], bool] = lambda group: False
) -> List[Optional[int]]:
    """For each run that starts, the index of its canary: its own if it is one, None if it starts at once.

    Args:
        groups: what a canary proves, one value per run (``group_of``).
        steps: that a canary has to pass; 0: there are no canaries (``--no-canary``).
        is_proven: whether a run of a group has passed before. Not called for groups of a single run.
    """
    members: Dict[Hashable, List[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    chosen: List[Optional[int]] = [None] * len(groups)
    for group, indices in members.items():
        if steps and len(indices) > 1 and not is_proven(group):
            for index in indices:
                chosen[index] = indices[0]
    return chosen


def group_of(job: Mapping[str, Any]) -> Hashable:
    """What a canary proves for all runs with equal values, by job.json: resources, code, environment, cluster."""
    resources = tuple(sorted((job.get("shape") or {}).items()))
    environment = tuple(sorted((job.get("env") or {}).items()))
    return job.get("cluster") or "", resources, job.get("snapshot"), job.get("module"), environment


class Wait(NamedTuple):
    """What is known of a run that waits for a canary, and of the canary."""

    released: Optional[bool] = False
    """Locally whether the canary has passed; on Slurm whether the job was released. None: unknown to this user."""
    job: str = JOB_HELD
    """The job of the run that waits: held, queued (released by hand), gone."""
    current: bool = True
    """Whether it waits for the newest submission of its canary."""
    canary: str = "running"
    """State of the canary (``flip.runs.lifecycle``)."""
    ending: bool = False
    """Whether the job of a complete canary is still in Slurm's queue: its owner releases the others."""


def hold_state(wait: Wait) -> str:
    """FREE, WAITING or LOST: what holds a run that waits for a canary."""
    if wait.released or wait.job == "queued":
        return FREE
    if wait.released is None and (wait.job == "gone" or wait.canary == "complete"):
        return FREE  # for users who cannot see the release it waits as long as Slurm shows its job as held
    if wait.current and wait.canary in ("queued", "running", "waiting", "unknown"):
        return FREE if wait.job == "gone" else WAITING
    if wait.current and wait.canary == "complete" and wait.ending and wait.job == JOB_HELD:
        return WAITING
    return LOST


def at_end(action: str, has_passed: bool) -> str:
    """RELEASE, CANCEL or LEAVE: what happens to the held jobs when an attempt of their canary has ended.

    ``action``: of the restart policy. A canary that starts again leaves them held.
    """
    if action == "done":
        return RELEASE
    if action == "stop":
        return RELEASE if has_passed else CANCEL
    return LEAVE


def lost_reason(name: str, state: str, reason: str) -> str:
    """Why a run will not be released any more: the state of its canary, as a sentence."""
    return "its canary %s is %s%s: submit again" % (name, state, " (%s)" % reason if reason else "")


# -- the store ---------------------------------------------------------------------------------------------------------


def canary_record(run: RunDir) -> Dict[str, Any]:
    """The ``canary`` field of job.json; empty for any other run."""
    return canary_of(read_record(run.path / "job.json") or {})


def canary_of(job: Mapping[str, Any]) -> Dict[str, Any]:
    """The ``canary`` field of a job.json that has been read."""
    return job.get("canary") or {}


def releases(run: RunDir) -> List[str]:
    """Names of the jobs on Slurm that a canary releases; empty for any other run."""
    return list(canary_record(run).get("releases", ()))


def has_passed(canary: RunDir, record: Mapping[str, Any]) -> bool:
    """Whether a canary has passed the steps of its ``record`` (``canary_of``). An empty one passes with a step."""
    return passed(canary, record.get("steps", 0))


def passed(run: RunDir, steps: int) -> bool:
    """Whether a run has logged that many steps since it was submitted, over all its attempts, or is complete."""
    if run.is_complete():
        return True
    after = attempts.submitted_after(run)
    lowest: Optional[int] = None
    highest = 0
    for n in [number for number in run.attempt_numbers() if number > after]:
        for step in _steps(run, n):  # a loss that is not finite is never logged
            if lowest is None:
                lowest = step
                highest = step
            else:
                lowest = min(lowest, step)
                highest = max(highest, step)
            if highest - lowest >= steps:
                return True  # nearly always in the first lines of a long file
    return False


def _steps(run: RunDir, n: int) -> Iterator[int]:
    """The steps that attempt n logged. Damaged lines are left out: they must not keep others held."""
    for line in metric_file(run, n):
        yield line["step"]


def awaited(run: RunDir, job: Mapping[str, Any]) -> Optional[RunDir]:
    """The canary for which a run waits by its job.json; None if it has none, if its job on Slurm was released, or if
    an attempt has started since."""
    name = job.get("waits_for")
    if not name or run.newest_attempt() > job.get("after", 0):
        return None
    if "token" in job and file_exists(released_file(run, job["name"])):
        return None
    return RunDir(run.path.parent / name)


def is_released(run: RunDir, job: Mapping[str, Any], canary: RunDir) -> Optional[bool]:
    """``Wait.released``. On Slurm None if another user submitted the run, whose folder cannot be read."""
    if "token" in job:
        return file_exists(released_file(run, job["name"]))
    return has_passed(canary, canary_record(canary))


def is_current(canary: RunDir, job: Mapping[str, Any]) -> bool:
    """``Wait.current``. Locally nothing but the folder of the canary connects the two."""
    return "token" not in job or job["name"] in releases(canary)


def file_exists(path: Path) -> Optional[bool]:
    """Whether a file of a submission exists; None if unknown, because its folder (0700) belongs to another user."""
    try:
        return exists(path)
    except PermissionError:
        return None


def held_names(run: RunDir, record: Mapping[str, Any]) -> List[str]:
    """Names of the jobs that this canary has not released yet, or whose release this user cannot see.

    ``record``: of the canary (``canary_of``). Who acts on the names takes it from ``RunDir.read_job``.
    """
    return [name for name in record.get("releases", ()) if file_exists(released_file(run, name)) is not True]


def record_release(run: RunDir, name: str) -> None:
    """Record that the jobs of that name were released."""
    create_json(released_file(run, name), {"canary": run.name})


def released_file(run: RunDir, name: str) -> Path:
    """Exists once the jobs of that name were released. The end of the name is the token of their submission."""
    return run.path.parent / ".slurm" / name.rpartition(".")[2] / "released.json"
