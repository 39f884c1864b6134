"""The two tables of docs/restarts.md that ``next_step`` fills in: cases, and places of the next attempt.

``python -m lab.documentation.restart_tables`` writes them again. A test fails if the page differs.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from flip.runs.next_step import HERE, MAX_FAILED_STARTS, REQUEUE, Allocation, Evidence, Step, next_step
from flip.runs.restart_policy import NODE_LOST, STOP_REQUESTED, UNKNOWN, EndFacts
from flip.runs.rundir import write_text
from jobs.common.paths import REPOSITORY
from jobs.host.job import NO_ANSWER, REQUEUE_DELAY
from lab.documentation.markdown import table

PAGE = REPOSITORY / "docs" / "restarts.md"
BEGIN = "<!-- printed by lab/documentation/restart_tables.py: {} -->\n\n"
END = "<!-- end -->"

OWNER = "owner"
GUARD = "guard"
OWNER_OR_GUARD = "owner; guard if the owner hangs, too"
TASK = "task"
NEXT_START = "next start"
SCRIPT = "script"

HELD = Allocation(nodes=2, usable=[2], seconds_left=4 * 3600.0, nodes_after_requeue=2)
"""The two nodes of a job with agents, four hours before its wall limit."""
SPARE_LEFT = HELD
"""Two of three nodes, of which the run uses two."""
NONE_SPARE = HELD._replace(nodes=1)
ASKED = Allocation(refusal="the run was asked to stop")
WITHOUT_AGENTS = Allocation(refusal="srun starts the ranks")
UNANSWERED = Allocation(refusal=NO_ANSWER)


class RestartCase(NamedTuple):
    """An event, as a user of Slurm would describe it, and what is known of it."""

    event: str
    decided_by: str
    """The process that decides; empty: none does."""
    evidence: Evidence | None = None
    allocation: Allocation = Allocation()
    delay: float | None = None
    """Seconds in place of those of the step."""
    otherwise: str = ""
    """What follows in words, where a decision does not say it."""
    avoids: str = ""
    """The node that the next start avoids although the step does not exclude it: its start has failed there."""

    @property
    def step(self) -> Step | None:
        """What ``next_step`` decides; None if no process decides."""
        if self.evidence is None:
            return None
        step = next_step(self.evidence, self.allocation)
        if self.delay is not None:
            step = step._replace(delay=self.delay)
        return step


def cause(name: str, reason: str, **more: Any) -> dict[str, Any]:
    """The record that rank 0 leaves."""
    return {"cause": name, "reason": reason, "rank": 0, **more}


def ended(code: int | None, state: str | None, causes: Sequence[dict[str, Any]] = (), **known: Any) -> Evidence:
    """An attempt has ended. ``known``: other fields of ``Evidence``, or of ``EndFacts``."""
    facts = {name: known.pop(name) for name in list(known) if name in EndFacts._fields}
    return Evidence(EndFacts(code, state, **facts), causes, **known)


def cut_off(state: str | None) -> Evidence:
    """The ranks may still run, or their end was not seen."""
    return Evidence(EndFacts(None, state), is_over=False)


def failed_start(before: int) -> Evidence:
    """A start that could not read or write its run, after so many in a row."""
    return Evidence(EndFacts(None, "RUNNING"), failed_starts=before)


def after(*causes: str) -> list[dict[str, Any]]:
    """Earlier ends without a new checkpoint."""
    return [{"cause": name, "committed": False} for name in causes]


SAVED_AT_USR2 = [cause("stopped", "signal SIGUSR2", signal="SIGUSR2")]
SAVED_AT_TERM = [cause("stopped", "signal SIGTERM", signal="SIGTERM")]
BROKEN_GPU = [cause("crash", "uncorrectable ECC error", host="n2")]
UNHEALTHY = {"n2": "gpu: no answer"}
STORAGE = [cause("storage", "[Errno 5] Input/output error")]
OF_STOP = {"progressed": True}
AT_LIMIT = {"limit_reason": "the wall limit of 4 h passed, and nothing new was kept"}

CASES = (
    RestartCase("preempted, with GraceTime; ranks saved", OWNER, ended(75, "RUNNING", SAVED_AT_USR2, **OF_STOP), ASKED),
    RestartCase("the same, TERM in place of USR2", OWNER, ended(75, "RUNNING", SAVED_AT_TERM, **OF_STOP), ASKED),
    RestartCase("preempted, no grace; ranks saved in KillWait", OWNER, ended(75, "PENDING", SAVED_AT_TERM), ASKED),
    RestartCase("preempted, no grace; all killed before the save", NEXT_START, ended(None, STOP_REQUESTED)),
    RestartCase("PreemptMode=CANCEL, no grace", OWNER, cut_off("PREEMPTED")),
    RestartCase("wall limit; saved at USR2", OWNER, ended(75, "RUNNING", SAVED_AT_USR2, **AT_LIMIT, **OF_STOP), ASKED),
    RestartCase("wall limit; nothing new saved", OWNER, ended(75, "RUNNING", SAVED_AT_USR2, **AT_LIMIT), ASKED),
    RestartCase(
        "the same, third time in a row", OWNER,
        ended(75, "RUNNING", SAVED_AT_USR2, **AT_LIMIT, history=after("timeout", "timeout")), ASKED,
    ),
    RestartCase("wall limit; ranks run on after TERM", OWNER, cut_off("TIMEOUT")),
    RestartCase("`scancel`", OWNER, ended(75, "CANCELLED", SAVED_AT_TERM), ASKED),
    RestartCase("`scancel`; all killed before the save", "", otherwise="`stopped`: submit again"),
    RestartCase("`flip cancel`", OWNER, ended(75, "RUNNING", SAVED_AT_USR2, cancelled=True), ASKED),
    RestartCase("`scontrol requeue` by a person", OWNER, ended(75, "PENDING", SAVED_AT_TERM), ASKED),
    RestartCase("`kill -9` of the owner", GUARD, cut_off("FAILED")),
    RestartCase("the same, before its attempt began", GUARD, failed_start(0), avoids="n1"),
    RestartCase("`kill -9` of the guard", "", otherwise="nothing ends: the owner forks another guard within 5 s"),
    RestartCase("`kill -9` of owner and guard, with agents", TASK, cut_off("FAILED")),
    RestartCase("`kill -9` of owner and guard, no agents", "", otherwise="`stopped`: submit again"),
    RestartCase("`kill -9` of an agent", OWNER, ended(NODE_LOST, "RUNNING"), HELD),
    RestartCase("`kill -9` of a rank, with agents", OWNER, ended(137, "RUNNING"), HELD),
    RestartCase("the same, second time", OWNER, ended(137, "RUNNING", history=after("crash")), HELD),
    RestartCase("the same, third time", OWNER, ended(137, "RUNNING", history=after("crash", "crash")), HELD),
    RestartCase("`kill -9` of a rank, no agents", OWNER, ended(137, "RUNNING"), WITHOUT_AGENTS),
    RestartCase("out of memory (`--mem`)", OWNER, ended(137, "RUNNING", out_of_memory=["n2"]), HELD),
    RestartCase("node lost, with a spare", OWNER, ended(NODE_LOST, "RUNNING"), SPARE_LEFT),
    RestartCase("node lost, spares used up", OWNER, ended(NODE_LOST, "RUNNING"), NONE_SPARE),
    RestartCase("node lost, neither spares nor a range", OWNER, ended(1, "PENDING", SAVED_AT_TERM)),
    RestartCase("the same, Requeue=0", OWNER, ended(1, "NODE_FAIL", SAVED_AT_TERM)),
    RestartCase("first node lost, with spares or a range", TASK, cut_off("NODE_FAIL")),
    RestartCase("first node of several lost, Requeue=0, with agents", TASK, cut_off("NODE_FAIL")),
    RestartCase("first node lost, otherwise", NEXT_START, ended(None, UNKNOWN)),
    RestartCase("a node fails its check, no spare", OWNER, ended(NODE_LOST, "RUNNING", unhealthy=UNHEALTHY), HELD),
    RestartCase("a GPU is broken, with a spare", OWNER, ended(70, "RUNNING", BROKEN_GPU), HELD._replace(nodes=3)),
    RestartCase("a GPU is broken, no spare", OWNER, ended(70, "RUNNING", BROKEN_GPU), HELD),
    RestartCase("a read or a save fails", OWNER, ended(69, "RUNNING", STORAGE), HELD),
    RestartCase("the same, fourth time", OWNER, ended(69, "RUNNING", STORAGE, history=after(*["storage"] * 3)), HELD),
    RestartCase("run directory away at the start, for 10 min", OWNER, failed_start(0), delay=REQUEUE_DELAY),
    RestartCase("run directory away at the end, for 10 min", OWNER, failed_start(0), delay=REQUEUE_DELAY),
    RestartCase(
        "storage hangs (D state) for less than `monitor.hang_minutes`", "",
        otherwise="nothing ends: ranks and owner wait",
    ),
    RestartCase("storage hangs (D state), until the wall limit", OWNER_OR_GUARD, cut_off("TIMEOUT")),
    RestartCase("slurmctld down for more than 10 min, after a crash", OWNER, ended(1, None), UNANSWERED),
    RestartCase("slurmctld down for more than 10 min, after TERM", OWNER, ended(75, None, SAVED_AT_TERM), UNANSWERED),
    RestartCase("preempted, with GraceTime, Requeue=0", OWNER, ended(75, "RUNNING", SAVED_AT_USR2, **OF_STOP), ASKED),
    RestartCase("node without mount, code or interpreter", SCRIPT, failed_start(0), avoids="n1"),
    RestartCase("the same, third start in a row", SCRIPT, failed_start(2), avoids="n1"),
    RestartCase(
        "the same, start 101 in a row", SCRIPT, failed_start(MAX_FAILED_STARTS),
        otherwise="the job ends: submit again",
    ),
    RestartCase("crash, 500 s before the wall limit", OWNER, ended(1, "RUNNING"), HELD._replace(seconds_left=500.0)),
    RestartCase(
        "crash, 700 s before it; a start and a save take 1,260 s", OWNER, ended(1, "RUNNING"),
        HELD._replace(seconds_left=700.0, seconds_needed=1260.0),
    ),
)  # fmt: skip

FAILURES = {
    "crash": ended(1, "RUNNING"),
    "hang": ended(71, "RUNNING", [cause("hang", "no step for 20 min")]),
    "port": ended(70, "RUNNING", [cause("crash", "EADDRINUSE")]),
    "storage": ended(69, "RUNNING", STORAGE),
    "node": ended(NODE_LOST, "RUNNING"),
    "stopped": ended(75, "RUNNING", SAVED_AT_USR2),
    "timeout": ended(143, "TIMEOUT"),
}
"""Cause -> an end with this cause."""


def cases() -> str:
    """The table of cases."""
    rows = []
    for case in CASES:
        step = case.step
        if step is None:
            rows.append((case.event, case.decided_by or "-", "-", case.otherwise, "-"))
        else:
            why = step.reason if case.decided_by == NEXT_START else _why(step)
            rows.append((case.event, case.decided_by, step.cause, _what_follows(case, step), why))
    return table(("event", "decided by", "cause", "what follows", "why"), rows)


def places() -> str:
    """The table of places: what follows from each cause, by the number of ends since the last checkpoint."""
    counts = (1, 2, 3, 4, 10)
    rows = []
    for name, evidence in FAILURES.items():
        cells = [_place(evidence._replace(history=after(*[name] * (count - 1))), HELD) for count in counts]
        near = HELD._replace(seconds_left=599.0)
        others = [_place(evidence, allocation) for allocation in (NONE_SPARE, near, WITHOUT_AGENTS)]
        rows.append((name, *cells, *others))
    ends = [f"end {count}" for count in counts]
    return table(("cause", *ends, "too few nodes", "599 s left", "no agents"), rows)


def _place(evidence: Evidence, allocation: Allocation) -> str:
    step = next_step(evidence, allocation)
    return step.do + _after(step)


def _after(step: Step) -> str:
    if not step.delay:
        return ""
    return f", {step.delay:g} s"


def _what_follows(case: RestartCase, step: Step) -> str:
    if case.otherwise:
        return case.otherwise
    follows = step.do
    if case.decided_by == NEXT_START and step.do == REQUEUE:
        follows = "it goes on"
    if step.do == HERE:
        follows = f"here, {step.nodes} nodes"
    nodes = [case.avoids] if case.avoids else step.exclude
    without = "".join(f", without {node}" for node in nodes)
    return follows + _after(step) + without


def _why(step: Step) -> str:
    """The reason, and why the next attempt starts elsewhere if the cause does not say it."""
    is_plain = step.do == HERE or not step.place or step.cause in ("stopped", "timeout")
    if is_plain:
        return step.reason
    return f"{step.reason}; {step.place}"


TABLES = {"cases": cases, "places": places}


def with_tables(page: str) -> str:
    """The text of the page with the tables of this code. Raises ValueError if a comment is missing."""
    for name, text_of in TABLES.items():
        start = page.index(BEGIN.format(name)) + len(BEGIN.format(name))
        end = page.index(END, start)
        page = f"{page[:start]}{text_of()}\n{page[end:]}"
    return page


def main(arguments: Iterable[str] = ()) -> int:
    write_text(PAGE, with_tables(PAGE.read_text(encoding="utf-8")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
