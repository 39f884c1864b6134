"""Properties that must hold after every simulated year. They compare the files of the code under test with what the
simulation recorded of each attempt: ``WonAttempt``, and the checkpoints of its ``Trainer``.

With node agents a life of a job may have several attempts. The limits count restarts in the job and requeues together.
"""

from __future__ import annotations

from flip.runs.restart_policy import DAY, Limits
from flip.runs.rundir import read_json

MAY_BE = {
    "preempted": {"stopped"},
    "warned": {"stopped"},
    "requeued": {"stopped"},
    "forgotten": {"stopped"},
    "limit": {"stopped", "timeout"},
    "node": {"stopped", "node"},
    "cancelled": {"stopped", "cancelled"},
    "agent": {"node"},
    "task": {"node", "crash"},  # if it was the only one, the exit trap may be faster than the coordinator
    "owner": {"stopped", "node"},
    "batch step": {"stopped", "node"},  # node: its ranks were killed before they had saved
    "oom": {"crash"},
    "killed": {"crash"},
    "frozen": {"hang"},
    **{cause: {cause} for cause in ("crash", "hang", "data", "diverged", "config", "permission", "port", "storage")},
}
"""What happened to an attempt -> the causes that it may be put down to."""
FAILED = ("crash", "oom", "killed", "hang", "frozen", "limit")
OF_JOB = {"preempted", "warned", "requeued", "forgotten", "limit", "cancelled"}
"""What also happens to the later attempts of a job: one may start while Slurm ends the job."""
LIMITS = Limits()
TOGETHER = 300.0
"""Seconds: more than a straggler's step, its save, and a look that has to be repeated."""
RECORDING = 1200.0
"""Seconds from the last rank's end to its record, at most, if files can be written."""
LONGEST_IDLE = DAY
"""Seconds for which a job may hold nodes without ranks."""
EXCUSED = 4 * DAY
"""After something that only a person can fix, people look in within it."""


class Attempt:
    """One attempt: events that the simulation recorded, and the end that the files contain."""

    def __init__(self, world, life, won):
        self.run = life.path.name
        self.n = won.n
        self.life = life
        self.won = won
        self.start = won.began
        self.ended = won.ended
        self.happened = set(won.events)
        for earlier in life.won_attempts[: life.won_attempts.index(won)]:
            self.happened |= OF_JOB & set(earlier.events)
        self.end = read_json(world.run(self.run).attempt(self.n) / "end.json")
        self.cause = self.end and self.end["cause"]
        self.action = self.end and self.end["action"]
        self.checkpoints = world.checkpoints.get((self.run, self.n), [])

    @property
    def unseen(self):
        """Whether nobody has seen its end: neither the exit trap, nor a coordinator that started the next attempt."""
        return self.life.unseen and self.won is self.life.won_attempts[-1]

    def __repr__(self):
        return f"{self.run}/{self.n} {sorted(self.happened)} -> {self.cause}, {self.action}"


def attempts(world):
    """Run -> its attempts in order."""
    by_run = {name: [] for name in world.likes}
    for life in world.lives:
        by_run[life.path.name] += [Attempt(world, life, won) for won in life.won_attempts]
    return {name: sorted(run_attempts, key=lambda attempt: attempt.n) for name, run_attempts in by_run.items()}


def violations(world, states):
    """One sentence per violated property. ``states``: the final state of each run."""
    messages = []
    for name, run_attempts in attempts(world).items():
        assert [attempt.n for attempt in run_attempts] == list(range(1, len(run_attempts) + 1)), (
            f"{name}: the attempts are not numbered consecutively"
        )
        for check in (_ended, _causes_match_events, _limits, _writers, _order, _ranks, _idle):
            messages += [f"{name}: {text}" for text in check(world, name, states[name], run_attempts)]
    return messages + [f"{name}: {text}" for name, text in _unneeded_resubmissions(world)]


def _ended(world, name, state, run_attempts):
    """Each run completes, or stops with a valid reason."""
    last = run_attempts[-1] if run_attempts else None
    if state.state == "complete":
        total = max((samples for attempt in run_attempts for _, samples in attempt.checkpoints), default=0)
        if total != world.likes[name].total:
            yield f"complete with S = {total}"
    elif state.state == "failed":
        if not state.reason or last.action != "stop":
            yield f"failed without a reason: {last}"
    elif state.state != "cancelled" or name not in world.cancelled:
        yield f"at the end it is {state}"


def _causes_match_events(world, name, state, run_attempts):
    """The recorded cause of each end matches an event of the attempt."""
    for attempt, following in zip(run_attempts, [*run_attempts[1:], None], strict=False):
        allowed = set().union(*(MAY_BE[event] for event in attempt.happened))
        if attempt.unseen:
            if not attempt.happened & {"limit"}:
                allowed |= {"node", "stopped"}
            else:
                allowed |= {"node", "stopped", "timeout"}
        if world.run(attempt.run).result.exists() and attempt is run_attempts[-1]:
            allowed |= {"complete"}
        if attempt.run in world.cancelled:
            allowed |= {"cancelled"}
        if _ended_in_outage(world, attempt):
            allowed |= {"storage"}  # an end that meets a full disk says so
        if "storage" in attempt.happened and following is not None:
            if following.life.job is not attempt.life.job:
                allowed |= {"node"}  # the job's comment is lost with the job
            elif "storage" in following.happened:
                allowed |= {"node"}  # the comment names one attempt: Slurm was silent when the following one began
        if any(later.start < attempt.ended for later in run_attempts if later.n > attempt.n):
            allowed |= {"stopped", "node"}  # the later attempt may have recorded the missing end
        if attempt.cause is not None and attempt.cause not in allowed:
            yield f"{attempt}, not one of {sorted(allowed)}"


def _ended_in_outage(world, attempt):
    """Whether storage failed when the end of an attempt was to be recorded."""
    return any(start < attempt.ended + RECORDING and attempt.ended < end for start, end in world.outages)


def _limits(world, name, state, run_attempts):
    """A run stops exactly when the number of failures that count reaches a limit."""
    since = []
    best = 0
    token = None
    for attempt in run_attempts:
        if attempt.life.script.folder.name != token:
            # a resubmission resets the limits
            since = []
            token = attempt.life.script.folder.name
        top = max((samples for _, samples in attempt.checkpoints), default=0)
        since = [] if top > best else [*since, attempt]
        best = max(best, top)
        failed = [earlier for earlier in since if earlier.happened & set(FAILED)]
        unseen = [earlier for earlier in since if earlier.unseen or earlier.happened & {"node", "agent", "task"}]
        ports = [earlier for earlier in since if "port" in earlier.happened]
        short = [earlier for earlier in since if "storage" in earlier.happened]
        if attempt.action == "stop":
            if attempt.cause in ("crash", "hang", "timeout") and len(failed) < LIMITS.failures:
                yield f"{attempt}: stopped after {failed}"
            if attempt.cause == "node" and len(unseen) < LIMITS.nodes:
                yield f"{attempt}: stopped after {unseen}"
            if attempt.cause == "port" and len(ports) < LIMITS.ports:
                yield f"{attempt}: stopped after {ports}"
            if attempt.cause == "storage" and short[-1].start - short[0].start < DAY / 2:
                yield f"{attempt}: gave up on storage after {short[-1].start - short[0].start:g} s"
            since = []
            failed = []
            unseen = []
        crashed = [earlier for earlier in failed if earlier.cause in ("crash", "hang", "timeout")]
        if (
            len(crashed) >= LIMITS.failures
            or len([earlier for earlier in unseen if earlier.cause == "node"]) >= LIMITS.nodes
        ):
            yield f"{attempt}: goes on after {since}"
        if len(since) > LIMITS.failures + LIMITS.nodes + LIMITS.ports + 100:
            yield f"{attempt}: {len(since)} attempts without a checkpoint"


def _writers(world, name, state, run_attempts):
    """Only the newest attempt saves, S grows, and two attempts overlap only briefly."""
    checkpoints = sorted(
        (moment, attempt.n, samples) for attempt in run_attempts for moment, samples in attempt.checkpoints
    )
    for (_, n, samples), (moment, later, more) in zip(checkpoints, checkpoints[1:], strict=False):
        if later < n or more <= samples:
            yield f"attempt {later} saved S = {more} at {moment:g}, after attempt {n} had S = {samples}"
    for older, newer in zip(run_attempts, run_attempts[1:], strict=False):
        if any(moment > newer.start + 1 for moment, _ in older.checkpoints):
            yield f"{older} saved after {newer} had begun"
        first_step = older.start + 2 * world.likes[name].startup  # at the latest; a straggler stops there
        if older.ended > max(newer.start, first_step) + TOGETHER:
            yield f"{older} and {newer} trained together for {older.ended - newer.start:g} s"
        if older.life is newer.life and older.ended > newer.start:
            yield f"{newer} started in the job in which {older} ran"


def _order(world, name, state, run_attempts):
    """Each attempt goes on exactly where the newest checkpoint was."""
    checkpoints = sorted((moment, samples) for attempt in run_attempts for moment, samples in attempt.checkpoints)
    for attempt in run_attempts:
        first = attempt.won.first
        if first is not None:
            newest = max((samples for moment, samples in checkpoints if moment <= attempt.won.trained), default=0)
            if first != newest:
                yield f"{attempt} started at S = {first}, and the newest checkpoint was {newest}"


def _ranks(world, name, state, run_attempts):
    """Of an attempt with a world size of the run each rank starts at most once, and all do if it trains."""
    for attempt in run_attempts:
        won = attempt.won
        if not won.world:
            continue
        usable = [count * attempt.life.script.ranks_per_node for count in attempt.life.usable]
        if won.world not in usable or len(set(won.ranks)) != len(won.ranks) or max(won.ranks) >= won.world:
            yield f"{attempt}: ranks {sorted(won.ranks)} of {won.world}"
        if won.first is not None and sorted(won.ranks) != list(range(won.world)):
            yield f"{attempt} trained with ranks {sorted(won.ranks)} of {won.world}"


def _idle(world, name, state, run_attempts):
    """No job holds nodes for long after the end of its ranks: an exit trap waits for Slurm and for storage.

    A job that is deserted does until its wall limit: it goes on without its first node, and has no task on another.
    """
    for attempt in run_attempts:
        idle = attempt.life.left - attempt.ended
        is_last = attempt.won is attempt.life.won_attempts[-1]
        if is_last and idle > LONGEST_IDLE and not attempt.life.deserted:
            yield f"{attempt}: its job held its nodes for {idle:g} s more"


def _unneeded_resubmissions(world):
    """A run needs no resubmission, with these exceptions.

    Slurm lost the job, never accepted it, or was unavailable for too long. The run's canary stopped for good.
    The node was unreachable at the wall limit, and Slurm had not yet detected it. A job that goes on without its first
    node was deserted. These two are known and not fixed: no code of the job runs then. Nor is the last one: preemption
    cancelled a job whose first node could not reach Slurm, where the owner cannot tell that from a cancel by a person.
    """
    taken = set()
    lives = {name: [] for name in world.likes}
    for life in world.lives:
        lives[life.path.name].append(life)
    for moment, names in world.orders:
        excused = any(start <= moment <= start + EXCUSED for start in world.excuses)
        for name in names if not excused else ():
            last = [life for life in lives[name] if life.born < moment][-1:]
            if (
                name in taken
                and (moment, name) not in world.behind
                and not (last and last[0].cut_off)
                and not (last and last[0].through > moment and _has_no_code(last[0]))
            ):
                yield name, f"had to be submitted again at {moment / DAY:.1f} d, after {last and last[0].events}"
        taken |= set(names)


def _has_no_code(life):
    """Whether the job ended when no code of it could requeue it."""
    return life.alone or life.deserted
