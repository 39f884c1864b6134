"""Tests what follows for a job, with one table row per case, and against answers that were recorded before.

recorded_steps.jsonl holds the answers of the two functions that decided this before ``next_step``, for 276 of the
286,720 combinations in which all three agreed: each different answer at least once.
"""

import json
from pathlib import Path

import pytest

from flip.runs.next_step import (
    DONE,
    HERE,
    LEAVE,
    MAX_FAILED_STARTS,
    NEAR_WALL_LIMIT,
    REQUEUE,
    STOP,
    Allocation,
    Evidence,
    next_step,
    recorded_step,
)
from flip.runs.restart_policy import EndFacts

FULL = Allocation(nodes=4, usable=[4])
STOPPED_BY = {"cause": "stopped", "reason": "x", "rank": 0}
CAUSES = {
    "": [],
    "crash": [{"cause": "crash", "reason": "x", "rank": 0}],
    "gpu": [{"cause": "crash", "reason": "uncorrectable ECC error", "host": "n3", "rank": 1}],
    "port": [{"cause": "crash", "reason": "EADDRINUSE", "rank": 0}],
    "stopped-usr2": [{**STOPPED_BY, "signal": "SIGUSR2"}],
    "stopped-term": [{**STOPPED_BY, "signal": "SIGTERM"}],
}


def causes_of(name):
    if name in CAUSES:
        return CAUSES[name]
    return [{"cause": {"peer": "peer_lost"}.get(name, name), "reason": "x", "rank": 0}]


def h(*causes):
    """History rows; a trailing + marks an attempt with a new checkpoint."""
    return [{"cause": cause.rstrip("+"), "committed": cause.endswith("+")} for cause in causes]


def ended(cause, *history, code=70, state="RUNNING", **facts):
    """Evidence of an attempt that left a cause file, or only a state if the cause is empty."""
    return Evidence(EndFacts(code, state), causes_of(cause), h(*history), **facts)


TIMEOUT = ended("", code=143, state="TIMEOUT", progressed=True)
NODE_LOST = ended("", code=68)
TABLE = [
    # name, evidence, allocation, do, nodes
    ("complete", ended("", complete=True), FULL, DONE, 0),
    ("cancelled", ended("", cancelled=True), FULL, STOP, 0),
    ("third crash", ended("crash", "crash", "crash"), FULL, STOP, 0),
    ("Slurm has requeued it", ended("crash", state="PENDING"), FULL, LEAVE, 0),
    ("preempted", ended("stopped-usr2", code=75, progressed=True), FULL, REQUEUE, 0),
    ("wall limit", TIMEOUT, FULL, REQUEUE, 0),
    *((f"first {cause}", ended(cause), FULL, HERE, 4) for cause in ("crash", "hang", "port")),
    *((f"second {cause}", ended(cause, "crash"), FULL, REQUEUE, 0) for cause in ("crash", "hang", "port")),
    ("crash after a timeout", ended("crash", "timeout"), FULL, REQUEUE, 0),
    ("crash after a checkpoint", ended("crash", "crash", "crash+"), FULL, HERE, 4),
    ("crash of an attempt that saved", ended("crash", "crash", "crash", progressed=True), FULL, HERE, 4),
    ("other causes before are no failures", ended("hang", "storage", "stopped", "node"), FULL, HERE, 4),
    ("storage, soon", ended("storage", "storage", "storage"), FULL, HERE, 4),
    ("storage, later", ended("storage", "storage", "storage", "storage"), FULL, REQUEUE, 0),
    ("node lost, no spare", NODE_LOST, Allocation(3, [4]), REQUEUE, 0),
    ("node lost, a spare", NODE_LOST, Allocation(4, [4]), HERE, 4),
    ("node lost, two spares", ended("", "node", "node", code=68), Allocation(5, [4]), HERE, 4),
    ("node lost, a range", NODE_LOST, Allocation(7, [2, 4, 8]), HERE, 4),
    ("fewer nodes for 20 minutes", NODE_LOST, Allocation(7, [4, 8], 1199, 8), HERE, 4),
    ("fewer nodes for longer", NODE_LOST, Allocation(7, [4, 8], 1200, 8), REQUEUE, 0),
    ("fewer nodes, long queue", NODE_LOST, Allocation(7, [4, 8], 86400, 8, 43201), HERE, 4),
    ("fewer nodes, shorter queue", NODE_LOST, Allocation(7, [4, 8], 86400, 8, 43200), REQUEUE, 0),
    ("one of many nodes", NODE_LOST, Allocation(63, [63, 64], 38399, 64), HERE, 63),
    ("fewer nodes, no limit known", NODE_LOST, Allocation(7, [4, 8], None, 8), HERE, 4),
    ("all nodes of a smaller attempt", NODE_LOST, Allocation(7, [4, 8], 86400, 4), HERE, 4),
    ("node lost below the range", NODE_LOST, Allocation(1, [2, 4, 8]), REQUEUE, 0),
    ("broken GPU, a spare", ended("gpu"), Allocation(5, [4]), HERE, 4),
    ("broken GPU, no spare", ended("gpu"), Allocation(4, [4]), REQUEUE, 0),
    ("broken GPU of a node that left", ended("gpu"), Allocation(4, [4], held=("n1", "n2", "n4", "n5")), HERE, 4),
    ("broken GPU of a node that stays", ended("gpu"), Allocation(4, [4], held=("n1", "n2", "n3", "n4")), REQUEUE, 0),
    ("excluded before", ended("crash"), Allocation(5, [4], excluded=("n9",)), HERE, 4),
    ("too many excluded before", ended("crash"), Allocation(4, [4], excluded=("n9",)), REQUEUE, 0),
    ("suspect node", ended("crash", suspect=("n3", "other")), Allocation(4, [4]), REQUEUE, 0),
    ("no usable number of nodes", NODE_LOST, Allocation(4, []), REQUEUE, 0),
    ("nothing held", ended("crash"), Allocation(), REQUEUE, 0),
    ("no restart here", ended("crash"), FULL._replace(refusal="the run was asked to stop"), REQUEUE, 0),
    ("enough time", ended("crash"), Allocation(4, [4], NEAR_WALL_LIMIT), HERE, 4),
    ("wall limit near", ended("crash"), Allocation(4, [4], NEAR_WALL_LIMIT - 1), REQUEUE, 0),
    ("a start and a save take longer", ended("crash"), Allocation(4, [4], 700, seconds_needed=1200), REQUEUE, 0),
    ("a start and a save fit", ended("crash"), Allocation(4, [4], 1200, seconds_needed=1200), HERE, 4),
    ("a start after the wait", ended("storage"), Allocation(4, [4], 1229, seconds_needed=1200), REQUEUE, 0),
    ("another process has continued", ended("crash", superseded=True), FULL, LEAVE, 0),
    ("near after the wait", ended("storage", "storage"), Allocation(4, [4], NEAR_WALL_LIMIT + 59), REQUEUE, 0),
    ("permission is never restarted", ended("permission"), FULL, STOP, 0),
    ("a cause of no class", ended("gremlins"), FULL, HERE, 4),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0].replace(" ", "-"))
def test_step_after_attempt(row):
    _, evidence, allocation, do, nodes = row
    step = next_step(evidence, allocation)
    assert (step.do, step.nodes) == (do, nodes), step
    assert step.reason and bool(step.place) == (do in (HERE, REQUEUE))


def test_steps_equal_those_of_the_functions_that_decided_before():
    rows = [json.loads(line) for line in Path(__file__).with_name("recorded_steps.jsonl").read_text().splitlines()]
    for row in rows:
        known = row["known"]
        evidence = Evidence(
            EndFacts(known["code"], known["state"]),
            causes_of(known["causes"]),
            h(*known["history"].split()),
            known["complete"],
            known["cancelled"],
            known["committed"],
            suspect=tuple(known["suspect"]),
        )
        step = next_step(evidence, Allocation(**row["allocation"]))
        answer = {name: getattr(step, name) for name in row["step"]}
        answer["exclude"] = list(step.exclude)
        assert answer == row["step"], row
    assert len(rows) > 200


@pytest.mark.parametrize("cause", ["crash", "hang", "port"])
def test_crash_loop_restarts_here_once_is_requeued_once_and_stops(cause):
    """Both kinds of restart count; ports have a higher limit and are requeued until then."""
    history = []
    steps = []
    while len(steps) < 20:
        step = next_step(ended(cause, *history), FULL)
        steps.append(step.do)
        if step.do == STOP:
            break
        history = [*history, step.cause]
    requeues = 8 if cause == "port" else 1
    assert steps == [HERE] + [REQUEUE] * requeues + [STOP]


CUT_OFF = [
    # state, facts, do, cause
    ("RUNNING", {}, REQUEUE, "node"),
    ("TIMEOUT", {}, REQUEUE, "timeout"),
    ("NODE_FAIL", {}, REQUEUE, "node"),
    ("PREEMPTED", {}, REQUEUE, "stopped"),
    ("FAILED", {}, REQUEUE, "node"),
    ("PENDING", {}, LEAVE, "node"),
    ("CANCELLED", {}, LEAVE, "node"),
    ("UNSEEN", {}, LEAVE, "node"),
    (None, {}, LEAVE, "node"),
    ("RUNNING", {"complete": True}, LEAVE, "complete"),
    ("TIMEOUT", {"cancelled": True}, LEAVE, "cancelled"),
]


@pytest.mark.parametrize(("state", "facts", "do", "cause"), CUT_OFF)
def test_step_when_owner_is_gone_or_job_ends_around_its_ranks(state, facts, do, cause):
    step = next_step(Evidence(EndFacts(None, state), is_over=False, **facts))
    assert (step.do, step.cause, step.delay) == (do, cause, 0.0)


@pytest.mark.parametrize(
    ("before", "state", "do", "delay"),
    [
        (0, "RUNNING", REQUEUE, 0.0),
        (3, "TIMEOUT", REQUEUE, 180.0),
        (MAX_FAILED_STARTS - 1, None, REQUEUE, 5940.0),
        (MAX_FAILED_STARTS, "RUNNING", LEAVE, 0.0),
        (0, "CANCELLED", LEAVE, 0.0),
    ],
)
def test_step_after_failed_start(before, state, do, delay):
    step = next_step(Evidence(EndFacts(None, state), failed_starts=before))
    assert (step.do, step.delay) == (do, delay)


def test_recorded_step_has_words_of_end_json():
    row = {"action": "nothing", "cause": "crash", "reason": "x", "delay": 0.0, "exclude": ["n3"]}
    step = recorded_step(row)
    assert (step.do, step.action, step.exclude) == (LEAVE, "nothing", ("n3",))
    assert recorded_step({**row, "action": "requeue"}).action == next_step(ended("crash"), FULL).action == "requeue"
