"""Faults of the processes that own a job on its first node: the owner, its guard, and the srun of its step.

They are written like those of `tests.storm.faults`.
"""

import contextlib
import os
import signal
import time

from tests.harness.slurm_scene import family
from tests.storm.faults import AGENTS, FOREIGN, _kill, kind

START_DELAYS = (0.0, 0.05, 0.2, 0.5, 1.5)
"""Seconds from the start of a batch shell, which becomes the owner, to its end by SIGKILL."""
LOST_SECONDS = 15.0
"""For which a stopped run must stay stopped: until then the guard may restart its job."""
LONG = 300
"""Seconds to wait for a batch shell."""


@kind(16, sites=(FOREIGN, AGENTS), shows=("stopped",))
def owner_killed(run):
    """The guard restarts the job, whose state is FAILED until then. Agents let their ranks save."""
    _kill_all(run.owners(run.job_number()))
    run.wait_end()
    return "SIGKILL to the owner of the job"


@kind(8, sites=(FOREIGN, AGENTS))
def guard_killed(run):
    """The owner forks another guard. The attempt goes on."""
    number = run.job_number()
    killed = run.guards(number)
    _kill_all(killed)
    run.wait(lambda: run.guards(number) - killed or run.ended() or run.over(), "another guard")
    return "SIGKILL to the guard of the owner"


@kind(24, sites=(FOREIGN,), shows=("stopped", "queued"))
def owner_and_guard_killed(run):
    """Nothing of the job is left that could restart it; `status` shows it, and the run is submitted again."""
    number = run.job_number()
    _kill_all([*run.guards(number), *run.owners(number)])
    assert _is_lost(run), "nothing could restart it"
    _submit_again(run)
    return "SIGKILL to the guard, then to the owner of the job"


@kind(30, sites=(FOREIGN,), shows=("stopped", "queued"))
def owner_killed_at_start(run):
    """An owner that is killed before it has forked its guard is lost; `status` shows it, and the run is submitted
    again."""
    number = run.job_number()
    delay = run.rng.choice(START_DELAYS)
    before = run.owners(number)
    killed = _kill(run)
    new = set()
    limit = time.monotonic() + LONG
    while not new:
        new = run.owners(number) - before
        run.wait(lambda: True, "a batch shell")  # raises if the run has stopped
        assert time.monotonic() < limit, f"timeout while waiting for a batch shell\n{run.story()}"
        time.sleep(0.003)
    time.sleep(delay)
    _kill_all(new)
    if _is_lost(run):
        _submit_again(run)
    return f"{killed}, then SIGKILL to the next owner {delay:g} s after the start of its batch shell"


@kind(24, sites=(AGENTS,), shows=("stopped",))
def batch_step_killed(run):
    """As cgroups do. The tasks of the agents are in another step: one of them restarts the job."""
    for owner in run.owners(run.job_number()):
        _kill_all(family(owner))
    run.wait_end()
    return "SIGKILL to the owner of the job, its guard and srun"


def _kill_all(pids):
    """SIGKILL to all at once: stopped before, none of them can act on the end of another."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _is_lost(run):
    """Wait until another attempt has begun, or the run has been stopped for LOST_SECONDS; returns whether it has."""
    since = []

    def settled():
        if run.run.newest_attempt() > run.attempt:
            return True
        if run.state().state != "stopped":
            since.clear()
            return False
        since.append(time.monotonic())
        return since[-1] - since[0] > LOST_SECONDS

    run.wait(settled, "the next attempt, or a stopped run")
    return run.run.newest_attempt() == run.attempt


def _submit_again(run):
    state = run.state()
    # After an attempt with a recorded end, status repeats its reason, and does not judge the next script.
    assert state.state == "stopped" and "its job ended (FAILED)" in state.reason, state
    assert "submit again" in state.reason, state
    run.scene.resubmit(run.run.name)
    run.intervene(f"submitted again; status: {state.state}, {state.reason}")
