"""Tests where the next attempt starts, with one table row per case."""

import pytest

from flip.runs.restart_place import HERE, LEAVE, NEAR_WALL_LIMIT, REQUEUE, Allocation, where
from flip.runs.restart_policy import Decision, EndFacts, Limits, decide

FULL = Allocation(nodes=4, usable=[4])


def h(*causes):
    """History rows; a trailing + marks an attempt with a new commit."""
    return [{"cause": cause.rstrip("+"), "committed": cause.endswith("+")} for cause in causes]


def after(cause, delay=0.0, exclude=(), action="requeue"):
    return Decision(action, cause, f"why {cause}", delay, tuple(exclude))


TABLE = [
    # name, decision, committed, history, allocation, place, nodes
    ("complete", after("complete", action="done"), True, h(), FULL, LEAVE, 0),
    ("cancelled", after("cancelled", action="stop"), False, h(), FULL, LEAVE, 0),
    ("third crash", after("crash", action="stop"), False, h("crash", "crash"), FULL, LEAVE, 0),
    ("Slurm has requeued it", after("crash", action="nothing"), False, h(), FULL, LEAVE, 0),
    ("preempted", after("stopped"), True, h(), FULL, REQUEUE, 0),
    ("wall limit", after("timeout"), True, h(), FULL, REQUEUE, 0),
    *((f"first {cause}", after(cause), False, h(), FULL, HERE, 4) for cause in ("crash", "hang", "port")),
    *((f"second {cause}", after(cause), False, h("crash"), FULL, REQUEUE, 0) for cause in ("crash", "hang", "port")),
    ("crash after a timeout", after("crash"), False, h("timeout"), FULL, REQUEUE, 0),
    ("crash after a commit", after("crash"), False, h("crash", "crash+"), FULL, HERE, 4),
    ("crash of an attempt that committed", after("crash"), True, h("crash", "crash"), FULL, HERE, 4),
    ("other causes before are no failures", after("hang"), False, h("storage", "stopped", "node"), FULL, HERE, 4),
    ("storage, soon", after("storage", 120), False, h("storage", "storage"), FULL, HERE, 4),
    ("storage, later", after("storage", 121), False, h(), FULL, REQUEUE, 0),
    ("node lost, no spare", after("node"), False, h(), Allocation(3, [4]), REQUEUE, 0),
    ("node lost, a spare", after("node"), False, h(), Allocation(4, [4]), HERE, 4),
    ("node lost, two spares", after("node"), False, h("node", "node"), Allocation(5, [4]), HERE, 4),
    ("node lost, a range", after("node"), False, h(), Allocation(7, [2, 4, 8]), HERE, 4),
    ("fewer nodes for 20 minutes", after("node"), False, h(), Allocation(7, [4, 8], 1199, 8), HERE, 4),
    ("fewer nodes for longer", after("node"), False, h(), Allocation(7, [4, 8], 1200, 8), REQUEUE, 0),
    ("fewer nodes, long queue", after("node"), False, h(), Allocation(7, [4, 8], 86400, 8, 43201), HERE, 4),
    ("fewer nodes, shorter queue", after("node"), False, h(), Allocation(7, [4, 8], 86400, 8, 43200), REQUEUE, 0),
    ("one of many nodes", after("node"), False, h(), Allocation(63, [63, 64], 38399, 64), HERE, 63),
    ("fewer nodes, no limit known", after("node"), False, h(), Allocation(7, [4, 8], None, 8), HERE, 4),
    ("all nodes of a smaller attempt", after("node"), False, h(), Allocation(7, [4, 8], 86400, 4), HERE, 4),
    ("node lost below the range", after("node"), False, h(), Allocation(1, [2, 4, 8]), REQUEUE, 0),
    ("broken GPU, a spare", after("crash", exclude=["n3"]), False, h(), Allocation(4, [4]), HERE, 4),
    ("broken GPU, no spare", after("crash", exclude=["n3"]), False, h(), Allocation(3, [4]), REQUEUE, 0),
    ("no usable number of nodes", after("node"), False, h(), Allocation(4, []), REQUEUE, 0),
    ("enough time", after("crash"), False, h(), Allocation(4, [4], NEAR_WALL_LIMIT), HERE, 4),
    ("wall limit near", after("crash"), False, h(), Allocation(4, [4], NEAR_WALL_LIMIT - 1), REQUEUE, 0),
    ("near after the wait", after("storage", 60), False, h(), Allocation(4, [4], NEAR_WALL_LIMIT + 59), REQUEUE, 0),
    ("permission is never restarted", after("permission", action="stop"), False, h(), FULL, LEAVE, 0),
    ("a cause of no class", after("gremlins"), False, h(), FULL, REQUEUE, 0),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0].replace(" ", "-"))
def test_place_of_next_attempt(row):
    _, decision, committed, history, allocation, place, nodes = row
    answer = where(decision, committed, history, allocation)
    assert (answer.place, answer.nodes) == (place, nodes), answer.reason
    assert answer.reason


@pytest.mark.parametrize("cause", ["crash", "hang", "port"])
def test_crash_loop_restarts_here_once_is_requeued_once_and_stops(cause):
    """``decide`` counts both kinds of restart; ports have a higher limit and are requeued until then."""
    record = {"cause": "crash" if cause == "port" else cause, "reason": "EADDRINUSE" if cause == "port" else "x"}
    history = []
    places = []
    while len(places) < 20:
        decision = decide([record], EndFacts(70, "RUNNING"), history, Limits(), False, False, False)
        places.append(where(decision, False, history, FULL).place)
        if places[-1] == LEAVE:
            break
        history = [*history, {"cause": decision.cause, "committed": False}]
    requeues = 8 if cause == "port" else 1
    assert places == [HERE] + [REQUEUE] * requeues + [LEAVE]
