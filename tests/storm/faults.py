"""Faults of a cluster, its storage and its users. A new one is a few lines.

A fault is a function of the run that returns a description of what it did. It returns when the attempt that it ends has
ended, or, if it ends none, when it is over.
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
"""Seconds: more than two ranks on two busy cores need for a step, a save and their exit."""
DEADLINE = 15.0
"""``data.deadline`` of the runs: a longer outage ends the attempt."""
HOME = "home"
FOREIGN = "foreign"
AGENTS = "agents"
"""Sites: `tests.harness.storm_site`, `tests.harness.foreign_storm_site` and `tests.harness.agents_storm_site`."""
EVERY = {}
COMMON = []
"""All kinds by name; those that every storm on the home site injects first."""


@dataclass(frozen=True)
class Kind:
    act: Any
    seconds: float
    """Approximate cost for the run."""
    fits: Any
    """Layout -> whether the fault can be injected into that run."""
    damages: bool = False
    """Whether it destroys the newest checkpoint."""
    sites: tuple = (HOME, FOREIGN, AGENTS)
    shows: tuple = ()
    """States that ``status`` may show because of it, besides running and waiting."""

    @property
    def name(self):
        return self.act.__name__


def kind(seconds, fits=lambda layout: True, common=True, damages=False, sites=(HOME, FOREIGN, AGENTS), shows=()):
    def register(act):
        EVERY[act.__name__] = Kind(act, seconds, fits, damages, sites, shows)
        if common and HOME in sites:
            COMMON.append(EVERY[act.__name__])
        return act

    return register


def single_rank(layout):
    return layout.world == 1


def multiple_ranks(layout):
    return layout.world > 1


def on_disk(layout):
    return not layout.bucket


# -- the scheduler -------------------------------------------------------------------------------------------------


@kind(18)
def preempted_in_grace(run):
    return _preempt(run, GRACE)


@kind(18)
def preempted_without_grace(run):
    """The signals arrive together; only KillWait remains for the save."""
    return _preempt(run, 0)


def _preempt(run, grace):
    with run.hands():  # the grace period belongs to the partition
        run.scene.set_grace(run, grace)
        run.here.preempt(seconds=3, nodelist=run.job().nodes)
        run.wait_end()
    return f"a job of higher priority takes its nodes, GraceTime {grace} s"


@kind(14, common=False)
def warned(run):
    """The warning signal to all tasks, as before a wall limit."""
    run.slurm("scancel", "--signal=USR2", run.job().id)
    run.wait_end()
    return "USR2 to all tasks"


@kind(50, fits=single_rank, sites=(HOME, FOREIGN))
def time_limit(run):
    """Lower the time limit so that the warning comes next. Slurm checks limits every half minute; the rank is stopped
    until then, or it would finish before. (A node agent would end a stopped rank.)"""
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
    return "the wall limit, after its warning signal"


@kind(25)
def controller_restarted(run):
    """slurmctld ends by SIGTERM or SIGKILL; a rank dies meanwhile, and the owner waits for slurmctld."""
    number = run.rng.choice((signal.SIGTERM, signal.SIGKILL))
    with run.hands():
        controller = run.scene.signal_controller(number)
        killed = _kill(run)  # slurmctld takes seconds to end, in which the run might finish
        run.scene.wait_controller(controller)
        time.sleep(run.rng.choice((3, 6)))
        run.scene.start_controller()
    return f"slurmctld ended by {number.name} and started again; meanwhile {killed}"


@kind(35)
def node_lost(run):
    row = run.rng.choice(run.ranks())
    with run.hands():
        run.here.lose(row["node"])
    if run.scene.has_spare(run):
        run.wait_attempt(run.attempt + 1)
        returns = "when the run is on another node"
    else:
        run.wait_queued()
        returns = "when Slurm has requeued the run, which has no other node"
    with run.hands():
        run.here.bring_back(row["node"])
    return f"the node of rank {row['rank']} fails, and returns {returns}"


# -- processes -----------------------------------------------------------------------------------------------------


@kind(14)
def rank_killed(run):
    return _kill(run)


def _kill(run):
    row = run.rng.choice(run.ranks())
    os.kill(row["pid"], signal.SIGKILL)
    return f"SIGKILL to rank {row['rank']}"


@kind(45, fits=multiple_ranks)
def rank_hung(run):
    """The watchdog of the waiting peer notices it."""
    row = run.rng.choice(run.ranks())
    os.kill(row["pid"], signal.SIGSTOP)
    run.wait_end()
    return f"SIGSTOP to rank {row['rank']}"


@kind(45, fits=single_rank)
def straggler(run):
    """The node loses contact with Slurm, which starts the run elsewhere; the old rank is stopped and continues
    later."""
    (row,) = run.ranks()
    old = run.attempt
    with run.hands():
        family = run.scene.cut_off(row["node"], row["pid"])
    os.kill(row["pid"], signal.SIGSTOP)
    run.wait(lambda: run.run.newest_attempt() > old, "the next attempt")
    late = run.rng.random() < 0.5
    if late:
        run.wait_steps_of(old + 1, 2)
    os.kill(row["pid"], signal.SIGCONT)
    run.wait(lambda: not any(run.alive(pid) for pid in family), "the straggler's exit")
    with run.hands():
        run.here.bring_back(row["node"])
    return f"attempt {old} is cut off, and continues when attempt {old + 1} {'trains' if late else 'has started'}"


# -- files and users -----------------------------------------------------------------------------------------------


@kind(50, fits=on_disk)
def disk_full(run):
    """Limit the files of these processes to half a checkpoint shard: the next save fails, twice."""
    run.wait(lambda: run.checkpoints(), "a checkpoint")
    limit = min(facts["bytes"] for facts in run.checkpoints()[-1].record["files"].values()) // 2
    for row in run.ranks():
        resource.prlimit(row["pid"], resource.RLIMIT_FSIZE, (limit, limit))
    run.wait_end()
    return f"files are limited to {limit:,} bytes"


@kind(20, damages=True)
def checkpoint_damaged(run):
    """Change a byte of the newest checkpoint before the next attempt reads it."""
    run.wait(lambda: len(run.checkpoints()) > 1, "two checkpoints")
    if run.scene.restarts_at_once:  # the ranks stand still meanwhile
        for row in run.ranks():
            os.kill(row["pid"], signal.SIGSTOP)
        newest = run.checkpoints()[-1]
        run.damage(newest)
        killed = _kill(run)
        run.wait_end()
        return f"a flipped byte in {newest.path.parent.name}/{newest.path.name}, then {killed}"
    killed = _kill(run)
    run.wait_end()
    newest = run.checkpoints()[-1]
    run.damage(newest)
    return f"{killed}, then a flipped byte in {newest.path.parent.name}/{newest.path.name}"


@kind(4)
def submitted_twice(run):
    """Submit again, whatever the state of the run; a proof checks the result at the end."""
    run.scene.submit_again(run.run.name)
    return "the same submit command again"


@kind(16, sites=(HOME,))
def tree_edited(run):
    """Break trainer, rank process and owner in the working tree, then make the run start again."""
    run.scene.edit_tree()
    return f"`raise` in every program of the working tree, then {_kill(run)}"


# -- storage -------------------------------------------------------------------------------------------------------


@kind(60)
def storage_away(run):
    """No connection until the attempt has ended."""
    run.line.away = True
    run.wait_end()
    run.line.away = False
    return f"no connection for longer than data.deadline ({DEADLINE:g} s)"


@kind(12, common=False)
def storage_restarts(run):
    """Kill the server of all runs, and start it before any retry deadline."""
    before = run.line.counts["away"]
    with run.hands():
        run.scene.server.kill()
        run.wait(lambda: run.line.counts["away"] > before + 2 or run.over(), "requests in vain", 8, strict=False)
        run.scene.server.start()
    os.environ["AWS_ENDPOINT_URL"] = run.scene.server.address  # the proofs read there
    return "the server of all runs is killed and started again"


@kind(8)
def storage_throttles(run):
    """Answer all reads and writes with errors for a while."""
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
