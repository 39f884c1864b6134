"""What must be true of a year, whatever the weather was. What the code under test wrote is held against what the world
knows of each attempt: ``Life.events``, and the commits that its ``Trainer`` made.
"""

from __future__ import annotations

from flip.runs.rundir import read_json
from jobs.host.restart_policy import DAY, Limits

MAY_BE = {
    "preempted": {"stopped"},
    "warned": {"stopped"},
    "requeued": {"stopped"},
    "forgotten": {"stopped"},
    "limit": {"stopped", "timeout"},
    "node": {"stopped", "node"},
    "cancelled": {"stopped", "cancelled"},
    "oom": {"crash"},
    **{cause: {cause} for cause in ("crash", "hang", "data", "diverged", "config", "permission", "port", "storage")},
}
"""What happened to an attempt -> the causes that it may be put down to."""
FAILED = ("crash", "oom", "hang", "limit")
LIMITS = Limits()
TOGETHER = 300.0
"""Seconds: more than a straggler's step, its save, and a look that has to be repeated."""
EXCUSED = 4 * DAY
"""After something that only a person can fix, people look in within it."""


class Attempt:
    """One attempt, as the world knows it and as the files tell it."""

    def __init__(self, world, life):
        self.run, self.n, self.life, self.begin = life.path.name, life.attempt, life, life.began
        self.happened = {what for _, what in life.events}
        self.end = read_json(world.run(self.run).attempt(self.n) / "end.json")
        self.cause = self.end and self.end["cause"]
        self.action = self.end and self.end["action"]
        self.commits = world.commits.get((self.run, self.n), [])

    def __repr__(self):
        return f"{self.run}/{self.n} {sorted(self.happened)} -> {self.cause}, {self.action}"


def attempts(world):
    """Run -> its attempts, in their order."""
    found = {name: [] for name in world.likes}
    for life in world.lives:
        if life.attempt is not None:
            found[life.path.name].append(Attempt(world, life))
    return {name: sorted(some, key=lambda one: one.n) for name, some in found.items()}


def violations(world, states):
    """Sentences, one per promise that was not kept. ``states``: where each run stands at the end."""
    found = []
    for name, ones in attempts(world).items():
        assert [one.n for one in ones] == list(range(1, len(ones) + 1)), f"{name}: an unknown attempt"
        for check in (_ended, _put_down_rightly, _limits, _writers):
            found += [f"{name}: {text}" for text in check(world, name, states[name], ones)]
    return found + [f"{name}: {text}" for name, text in _left_to_people(world)]


def _ended(world, name, state, ones):
    """Each run completes, or stops with a reason that is one."""
    last = ones[-1] if ones else None
    if state.state == "complete":
        total = max((samples for one in ones for _, samples in one.commits), default=0)
        if total != world.likes[name].total:
            yield f"complete with S = {total}"
    elif state.state == "failed":
        if not state.detail or last.action != "stop":
            yield f"failed without a reason: {last}"
    elif state.state != "cancelled" or name not in world.cancelled:
        yield f"at the end it is {state}"


def _put_down_rightly(world, name, state, ones):
    """No end is put down to what did not happen, none that failed to what is free."""
    for one, following in zip(ones, [*ones[1:], None], strict=False):
        allowed = set().union(*(MAY_BE[what] for what in one.happened))
        if one.life.unseen:
            allowed |= {"node", "stopped"} if not one.happened & {"limit"} else {"node", "stopped", "timeout"}
        if world.run(one.run).result.exists() and one is ones[-1]:
            allowed |= {"complete"}
        if one.run in world.cancelled:
            allowed |= {"cancelled"}
        if "storage" in one.happened and following is not None and following.life.job is not one.life.job:
            allowed |= {"node"}  # what a job's comment said is gone with the job
        if any(other.begin < one.life.ended for other in ones if other.n > one.n):
            allowed |= {"stopped", "node"}  # the later one may have found it without an end
        if one.cause is not None and one.cause not in allowed:
            yield f"{one}, not one of {sorted(allowed)}"


def _limits(world, name, state, ones):
    """A run is stopped when a limit is reached by what counts for it, and not before; and then it is."""
    since, best, token = [], 0, None
    for one in ones:
        if one.life.script.folder.name != token:
            since, token = [], one.life.script.folder.name  # submitted again: a new allowance
        top = max((samples for _, samples in one.commits), default=0)
        since, best = ([] if top > best else [*since, one]), max(best, top)
        failed = [o for o in since if o.happened & set(FAILED)]
        unseen = [o for o in since if o.life.unseen or "node" in o.happened]
        ports = [o for o in since if "port" in o.happened]
        short = [o for o in since if "storage" in o.happened]
        if one.action == "stop":
            if one.cause in ("crash", "hang", "timeout") and len(failed) < LIMITS.failures:
                yield f"{one}: stopped after {failed}"
            if one.cause == "node" and len(unseen) < LIMITS.nodes:
                yield f"{one}: stopped after {unseen}"
            if one.cause == "port" and len(ports) < LIMITS.ports:
                yield f"{one}: stopped after {ports}"
            if one.cause == "storage" and short[-1].begin - short[0].begin < DAY / 2:
                yield f"{one}: gave up on storage after {short[-1].begin - short[0].begin:g} s"
            since, failed, unseen = [], [], []
        crashed = [o for o in failed if o.cause in ("crash", "hang", "timeout")]
        if len(crashed) >= LIMITS.failures or len([o for o in unseen if o.cause == "node"]) >= LIMITS.nodes:
            yield f"{one}: goes on after {since}"
        if len(since) > LIMITS.failures + LIMITS.nodes + LIMITS.ports + 100:
            yield f"{one}: {len(since)} attempts without a commit"


def _writers(world, name, state, ones):
    """Only the newest attempt commits, S grows, and two attempts train together for a moment at most."""
    commits = sorted((at, one.n, samples) for one in ones for at, samples in one.commits)
    for (_, n, samples), (at, later, more) in zip(commits, commits[1:], strict=False):
        if later < n or more <= samples:
            yield f"attempt {later} committed S = {more} at {at:g}, after attempt {n} had S = {samples}"
    for older, newer in zip(ones, ones[1:], strict=False):
        if any(at > newer.begin + 1 for at, _ in older.commits):
            yield f"{older} committed after {newer} had begun"
        if older.life.ended > newer.begin + TOGETHER:
            yield f"{older} and {newer} trained together for {older.life.ended - newer.begin:g} s"


def _left_to_people(world):
    """Nobody had to submit a run again, but where Slurm had lost it, never took it, or was away for too long.

    Or where its canary stopped for good.
    Or where preemption cancels, and killed the batch script before its exit trap was through; or the wall limit came
    to a node that was away, which Slurm had not yet noticed: known, and not fixed, as nothing of ours runs then.
    """
    taken, lives = set(), {name: [] for name in world.likes}
    for life in world.lives:
        lives[life.path.name].append(life)
    for at, names in world.orders:
        excused = any(begin <= at <= begin + EXCUSED for begin in world.excuses)
        for name in names if not excused else ():
            last = [life for life in lives[name] if life.born < at][-1:]
            if (
                name in taken
                and (at, name) not in world.behind
                and not (last and last[0].through > at and (last[0].alone or last[0].job.state == "PREEMPTED"))
            ):
                yield name, f"had to be submitted again at {at / DAY:.1f} d, after {last and last[0].events}"
        taken |= set(names)
