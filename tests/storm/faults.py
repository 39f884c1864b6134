"""What a cluster, its storage and its people do to runs, each by its name. A new one is a few lines.

A fault returns what it did, in words. It is done when the run is bound for its next attempt, or, of those that end
none, when it is over.
"""

import os
import re
import resource
import signal
import time
from dataclasses import dataclass
from typing import Any

from jobs.host import slurm_cli

GRACE = 20
"""Seconds: more than a step, a save and the way out of two ranks on two busy cores."""
DEADLINE = 15.0
"""``data.deadline`` of the runs: an outage that is longer ends an attempt."""
EVERY, COMMON = {}, []
"""All kinds by name; those that every storm has first."""


@dataclass(frozen=True)
class Kind:
    act: Any
    seconds: float
    """About what it costs its run."""
    fits: Any
    """Layout -> whether that run can be hit by it."""
    damages: bool = False
    """Whether the newest commit is lost by it."""

    @property
    def name(self):
        return self.act.__name__


def kind(seconds, fits=lambda layout: True, common=True, damages=False):
    def known(act):
        EVERY[act.__name__] = Kind(act, seconds, fits, damages)
        if common:
            COMMON.append(EVERY[act.__name__])
        return act

    return known


def alone(layout):
    return layout.world == 1


def together(layout):
    return layout.world > 1


def on_disk(layout):
    return not layout.bucket


# -- the scheduler -------------------------------------------------------------------------------------------------


@kind(18)
def preempted_in_grace(run):
    return _preempt(run, GRACE)


@kind(18)
def preempted_without_grace(run):
    """The signals come together, and KillWait is all there is."""
    return _preempt(run, 0)


def _preempt(run, grace):
    with run.scene.hands:  # the grace is the partition's
        run.here.set_grace(grace)
        run.here.preempt(seconds=3, nodelist=run.job().nodes)
        run.wait_end()
    return f"a job of higher priority takes its nodes, GraceTime {grace} s"


@kind(14, common=False)
def warned(run):
    """The warning signal to all tasks, as before a wall limit."""
    run.slurm("scancel", "--signal=USR2", run.job().id)
    run.wait_end()
    return "USR2 to all tasks"


@kind(50, fits=alone)
def time_limit(run):
    """Its limit is lowered, so that the warning comes next. Slurm looks at limits every half minute; the rank is frozen
    until then, as a machine can be, or it would be done before."""
    (row,) = run.ranks()
    job = run.job()
    ran = slurm_cli.parse_duration(re.search(r"RunTime=(\S+)", run.slurm("scontrol", "show", "job", job.id))[1])
    minutes = 1 if ran < 25 else ran // 60 + 2
    os.kill(row["pid"], signal.SIGSTOP)
    run.slurm("scontrol", "update", f"JobId={job.id}", f"TimeLimit={minutes}")
    run.wait(lambda: run.pending(row["pid"], signal.SIGUSR2) or run.ended(), "the limit's warning")
    if run.alive(row["pid"]):
        os.kill(row["pid"], signal.SIGCONT)
    run.wait_end()
    run.slurm("scontrol", "update", f"JobId={job.id}", f"TimeLimit={round(60 * run.profile.hours)}")
    return "the wall limit, with its warning before"


@kind(25)
def controller_restarted(run):
    """slurmctld goes in good order or by SIGKILL; a rank dies while it is away, and the exit trap waits for it."""
    number = run.rng.choice((signal.SIGTERM, signal.SIGKILL))
    with run.scene.hands:
        run.scene.stop_controller(number)
        told = _kill(run)
        time.sleep(run.rng.choice((3, 6)))
        run.scene.start_controller()
    return f"slurmctld ended by {number.name} and started again; meanwhile {told}"


@kind(35)
def node_lost(run):
    row = run.rng.choice(run.ranks())
    with run.scene.hands:
        run.here.lose(row["node"])
    run.wait_attempt(run.attempt + 1)
    with run.scene.hands:
        run.here.bring_back(row["node"])
    return f"the node of rank {row['rank']} goes, and comes back when the run is elsewhere"


# -- processes -----------------------------------------------------------------------------------------------------


@kind(14)
def rank_killed(run):
    return _kill(run)


def _kill(run):
    row = run.rng.choice(run.ranks())
    os.kill(row["pid"], signal.SIGKILL)
    return f"SIGKILL to rank {row['rank']}"


@kind(45, fits=together)
def rank_hung(run):
    """Its peer waits, and is the one whose watchdog notices."""
    row = run.rng.choice(run.ranks())
    os.kill(row["pid"], signal.SIGSTOP)
    run.wait_end()
    return f"SIGSTOP to rank {row['rank']}"


@kind(45, fits=alone)
def straggler(run):
    """The node is cut off from Slurm, which starts the run elsewhere; the old rank is slow, and goes on after that."""
    (row,) = run.ranks()
    old = run.attempt
    with run.scene.hands:
        family = run.scene.cut_off(row["node"], row["pid"])
    os.kill(row["pid"], signal.SIGSTOP)
    run.wait(lambda: run.run.newest_attempt() > old, "the next attempt")
    late = run.rng.random() < 0.5
    if late:
        run.wait_steps_of(old + 1, 2)
    os.kill(row["pid"], signal.SIGCONT)
    run.wait(lambda: not any(run.alive(pid) for pid in family), "the straggler's end by itself")
    with run.scene.hands:
        run.here.bring_back(row["node"])
    return f"attempt {old} is cut off and goes on when attempt {old + 1} {'trains' if late else 'has begun'}"


# -- files and people ----------------------------------------------------------------------------------------------


@kind(50, fits=on_disk)
def disk_full(run):
    """No file of these processes may grow beyond half a checkpoint's shard: the next commit fails, twice."""
    run.wait(lambda: run.commits(), "a commit")
    limit = min(facts["bytes"] for facts in run.commits()[-1].record["files"].values()) // 2
    for row in run.ranks():
        resource.prlimit(row["pid"], resource.RLIMIT_FSIZE, (limit, limit))
    run.wait_end()
    return f"no file may have more than {limit:,} bytes"


@kind(20, damages=True)
def checkpoint_damaged(run):
    """A byte of the newest commit is another one when the next attempt looks for it."""
    run.wait(lambda: len(run.commits()) > 1, "two commits")
    told = _kill(run)
    run.wait_end()
    newest = run.commits()[-1]
    run.damage(newest)
    return f"{told}, then a flipped byte in {newest.path.parent.name}/{newest.path.name}"


@kind(4)
def submitted_twice(run):
    """Whatever the run does meanwhile; what came of it is looked at in the end."""
    run.scene.submit_again()
    return "the same submit command once more"


@kind(16)
def tree_edited(run):
    """Trainer, worker and trap of the working tree raise from now on; then the run has to start again."""
    run.scene.edit_tree()
    return f"a `raise` in every program of the working tree, then {_kill(run)}"


# -- storage -------------------------------------------------------------------------------------------------------


@kind(60)
def storage_away(run):
    """Until the attempt has ended of it."""
    run.line.away = True
    run.wait_end()
    run.line.away = False
    return f"no connection for longer than data.deadline ({DEADLINE:g} s)"


@kind(12, common=False)
def storage_restarts(run):
    """The server of all runs is killed, and back before anybody's patience ends."""
    before = run.line.counts["away"]
    with run.scene.hands:
        run.scene.server.kill()
        run.wait(lambda: run.line.counts["away"] > before + 2 or run.over(), "requests in vain", 8, strict=False)
        run.scene.server.start()
    return "the server of all runs is killed and started again"


@kind(8)
def storage_throttles(run):
    """Every answer for a while, to reads and to writes."""
    return run.disturb(("slowdown", "throttle", "server", "expired"), 1, 24, writes=True)


@kind(8)
def storage_flips(run):
    return run.disturb(("flip",), 0.5, 6)


@kind(8, common=False)
def storage_breaks_off(run):
    return run.disturb(("refuse", "reset", "short"), 0.5, 9)


@kind(12, common=False)
def storage_stalls(run):
    return run.disturb(("stall", "silence"), 0.5, 4)
