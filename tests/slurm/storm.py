"""Faults that a cluster and its storage send, each by its name, and storms of them by a seed. A new one is a few lines.

A fault is done when the run is on the way to its next attempt, or bound to be; one of the storage when it is over.
"""

import random
import time

from flip.config.stages import spans
from jobs import scheduler
from tests.arena import INTERVAL

GRACE = 20
"""Seconds: more than a step, a save and the way out of four ranks on two cores."""
FAULTS, STORAGE = {}, {}


def fault(act):
    FAULTS[act.__name__] = act
    return act


def storage(act):
    """For runs with a ``store``."""
    STORAGE[act.__name__] = act
    return act


@fault
def preempted(run):
    """Without grace: the signals come together, and KillWait is all there is."""
    run.here.set_grace(0)
    run.preempt()


@fault
def preempted_in_grace(run):
    run.here.set_grace(GRACE)
    run.preempt()


@fault
def rank_killed(run):
    run.kill(rank=run.rng.randrange(run.world))


@fault
def warned(run):
    """The warning signal to all tasks, as before a wall limit."""
    run.faults += 1
    scheduler.call("scancel", "--signal=USR2", run.job().id)


@fault
def limited(run):
    """The wall limit itself, which an hour's job is given late. Slurm looks at limits every half minute."""
    run.faults += 1
    n, id_ = run.run.newest_attempt(), run.job().id
    run.here.call("scontrol", "update", f"JobId={id_}", "TimeLimit=1")
    run.wait(lambda: run.job().state == "PENDING" or run.run.newest_attempt() > n, "the limit", 150)
    run.here.call("scontrol", "update", f"JobId={id_}", f"TimeLimit={round(60 * run.profile.hours)}")


@fault
def node_lost(run):
    """The node of the last ranks."""
    _lose(run, run.world - 1)


@fault
def batch_host_lost(run):
    """The node of rank 0 and of the batch script."""
    _lose(run, 0)


def _lose(run, rank):
    run.faults += 1
    n = run.run.newest_attempt()
    (node,) = {row["node"] for row in run.ranks() if row["rank"] == rank}
    run.here.lose(node)
    run.wait_attempt(n + 1)
    run.here.bring_back(node)


@storage
def storage_throttles(run):
    """Every answer, for a while."""
    run.store.disturb(run, ("slowdown", "throttle", "server", "expired"), 1, 24)


@storage
def storage_flips(run):
    run.store.disturb(run, ("flip",), 0.5, 6)


@storage
def storage_breaks_off(run):
    run.store.disturb(run, ("refuse", "reset", "short"), 0.5, 9)


@storage
def storage_stalls(run):
    run.store.disturb(run, ("stall", "silence"), 0.5, 4)


@storage
def storage_restarts(run):
    """Killed, and back before anybody's patience ends."""
    run.store.go()
    before = run.store.done["away"]
    run.wait(lambda: run.store.done["away"] > before + 5 or run.run.result.exists(), "requests in vain")
    run.store.come_back()


@storage
def storage_away(run):
    """Until the attempt has ended of it."""
    run.faults += 1
    n = run.run.newest_attempt()
    run.store.go()
    run.wait(lambda: (run.run.attempt(n) / "end.json").exists(), "the end of patience")
    run.store.come_back()
    run.wait_attempt(n + 1)


def hit(run, name, step):
    """One fault when that step is logged; the next attempt's ranks live when it returns, or the storage is well."""
    run.wait_step(step)
    if name in STORAGE:
        STORAGE[name](run)
        return
    n = run.run.newest_attempt()
    FAULTS[name](run)
    run.wait_attempt(n + 1)


def rage(run, seed, faults=tuple(FAULTS), most=5, gap=3 * INTERVAL):
    """A storm: by the seed, up to ``most`` of these faults, less than ``gap`` steps apart, until it is nearly over."""
    run.rng = random.Random(seed)
    last = sum(span.steps for span in spans(run.config))
    step = 0
    for _ in range(most):
        step = max(run.last_step(), step) + run.rng.randrange(1, gap)
        if step > last - 4:
            return
        name = run.rng.choice(faults)
        print(f"{time.strftime('%H:%M:%S')} step {step}: {name}", flush=True)
        hit(run, name, step)
