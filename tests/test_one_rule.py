"""Tests that one function decides what follows for a job, and that one place carries it out.

``flip/runs/next_step.py`` decides, with the classes of causes of ``restart_policy.py``. Whatever else does part of it
is listed here with its reason.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from flip.runs.errors import CAUSES

ROOT = Path(__file__).resolve().parents[1]
RULE = ("flip/runs/next_step.py", "flip/runs/restart_policy.py")
OTHER_CAUSES = ("node", "timeout", "cancelled", "port")
"""Causes that only the rule gives, besides those of processes (``CAUSES``)."""

#: Steps that differ from one that the rule has returned.
CHANGED_STEPS = {
    ("flip/runs/attempts.py", "record_step"): "an earlier call has recorded the same action; place of this one",
    ("jobs/host/job_restart.py", "later"): "the delay of a start whose files were away for ten minutes",
    ("jobs/host/job_restart.py", "_act"): "the delay that the owner had decided before it was killed",
}
#: Who restarts a job.
RESTARTS = {
    ("jobs/host/job_restart.py", "now", "requeue"): "of the owner, and of its guard",
    ("jobs/host/scheduler.py", "requeue", "restart"): "SlurmScheduler.requeue itself",
    ("jobs/host/requeue.py", "restart", "requeue"): "part of it",
    ("jobs/host/requeue.py", "restart", "submit_successor"): "part of it",
    ("jobs/host/agents/orphaned_task.py", "_restart", "requeue"): "a task whose owner and guard are gone",
    ("jobs/host/agents/orphaned_task.py", "_restart", "submit_successor"): "the same without requeues",
}
#: Files that name the command by which a job restarts, and those that submit a job.
REQUEUES = ("jobs/host/requeue.py", "jobs/slurm/fallback.sh")
SUBMITS = {
    "jobs/host/requeue.py": "successors",
    "jobs/slurm/backend.py": "submissions by a user",
    "jobs/slurm/site.py": "tests only whether a job would be accepted (--test-only)",
    "jobs/submission/dry_run.py": "the same",
}
#: Comparisons of causes outside of the rule: (file, function) -> what follows from them.
COMPARISONS = {
    ("flip/runs/attempts.py", "start_attempt"): "the first checkpoint of the next attempt comes early",
    ("flip/runs/attempts.py", "record_step"): "the reason names who has cancelled",
    ("flip/runs/bad_nodes.py", "failed_on"): "evidence of the rule: suspect nodes",
    ("flip/runs/bad_nodes.py", "failures"): "evidence of the rule: suspect nodes",
    ("flip/runs/lifecycle.py", "state_of"): "display: cancelled or failed",
    ("jobs/commands/explain.py", "_decision"): "display",
    ("jobs/host/agents/orphaned_task.py", "_restart"): "the next start must know that the limit was reached",
    ("jobs/host/job.py", "_restart_around_ranks"): "the next start must know that the limit was reached",
    ("jobs/host/job.py", "_win_next"): "a cancel is recorded in place of the restart that was decided",
    ("jobs/host/job_restart.py", "_act"): "the next start must know that the limit was reached",
    ("jobs/host/notify.py", "send_events"): "a user who has cancelled gets no event",
    ("jobs/reporting/faults.py", "_last_work"): "display",
    ("jobs/reporting/goodput.py", "_longer"): "display: a hint to ask for more hours",
    ("jobs/reporting/report.py", "_time"): "display",
    ("jobs/reporting/run_details.py", "_incidents"): "display",
    ("jobs/reporting/run_details.py", "_next"): "display: the advice",
    ("jobs/runtime/command_process.py", ""): "exit codes of programs, by their causes",
    ("jobs/runtime/command_process.py", "_train"): "what a rank records of its own end",
    ("jobs/runtime/command_process.py", "_wait_for_peers"): "what a rank records of its own end",
    ("jobs/runtime/rank_process.py", "main"): "what a rank prints of its own end",
    ("jobs/runtime/rank_process.py", "record_end"): "what a rank records of its own end",
    ("jobs/slurm/site_checks.py", "_crash"): "display: exit codes of ends",
}


def sources() -> dict[str, str]:
    """Path in the checkout -> its text, of all code of runs and jobs."""
    files = [*(ROOT / "flip" / "runs").rglob("*.py"), *(ROOT / "jobs").rglob("*.py"), *(ROOT / "jobs").rglob("*.sh")]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(files)}


SOURCES = sources()
CODE = {path: ast.parse(text) for path, text in SOURCES.items() if path.endswith(".py")}


def nodes_by_function(tree: ast.AST, function: str = "") -> Iterator[tuple[str, ast.AST]]:
    """(innermost function, node) for each node of a file."""
    for node in ast.iter_child_nodes(tree):
        yield function, node
        inside = node.name if isinstance(node, ast.FunctionDef) else function
        yield from nodes_by_function(node, inside)


def called(node: ast.AST) -> str:
    """The last name of what is called; empty if the node is no call."""
    if not isinstance(node, ast.Call):
        return ""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def strings(nodes) -> set[str]:
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def is_cause(node: ast.AST) -> bool:
    """Whether an expression is a cause: ``cause``, ``end.cause``, ``end["cause"]`` or ``end.get("cause")``."""
    if isinstance(node, ast.Subscript):
        return strings([node.slice]) == {"cause"}
    if called(node) == "get":
        return strings(node.args[:1]) == {"cause"}
    return getattr(node, "attr", getattr(node, "id", "")) == "cause"


def test_only_the_rule_builds_a_step():
    built = set()
    for path, tree in CODE.items():
        built |= {path for _, node in nodes_by_function(tree) if called(node) == "Step"}
    assert built == {"flip/runs/next_step.py"}


def test_steps_are_changed_only_in_places_that_are_listed():
    fields = {"do", "cause", "reason", "delay", "exclude", "nodes", "place"}
    changed = set()
    for path, tree in CODE.items():
        for function, node in nodes_by_function(tree):
            named = {keyword.arg for keyword in getattr(node, "keywords", [])}
            of = getattr(getattr(node, "func", None), "value", None)
            is_step = getattr(of, "id", "") in ("step", "recorded")
            if called(node) == "_replace" and is_step and named & fields and path not in RULE:
                changed.add((path, function))
    assert changed == CHANGED_STEPS.keys()


def test_only_listed_places_restart_a_job():
    restarts = set()
    for path, tree in CODE.items():
        for function, node in nodes_by_function(tree):
            name = called(node)
            of = getattr(getattr(node, "func", None), "value", None)
            if name in ("requeue", "submit_successor") or (name == "restart" and getattr(of, "id", "") == "requeue"):
                restarts.add((path, function, name))
    assert restarts == RESTARTS.keys()


def test_only_listed_files_call_scontrol_requeue_and_sbatch():
    requeues = set()
    submits = set()
    for path, tree in CODE.items():
        for _, node in nodes_by_function(tree):
            words = strings(getattr(node, "args", [])) if called(node) else set()
            words |= strings(node.elts) if isinstance(node, ast.List) else set()
            if {"scontrol", "requeue"} <= words:
                requeues.add(path)
            if "sbatch" in words:
                submits.add(path)
    for path in SOURCES.keys() - CODE.keys():
        lines = [line.partition("#")[0] for line in SOURCES[path].splitlines()]
        requeues |= {path for line in lines if re.search(r"\bscontrol requeue\b", line)}
        submits |= {path for line in lines if re.search(r"(^|[;&|(`]) *sbatch\b", line)}
    assert requeues == {*REQUEUES} and submits == SUBMITS.keys()


def test_causes_are_compared_only_in_the_rule_and_in_places_that_are_listed():
    compared = set()
    for path, tree in CODE.items():
        for function, node in nodes_by_function(tree):
            if path in RULE or not isinstance(node, ast.Compare):
                continue
            sides = [node.left, *node.comparators]
            words = strings(part for side in sides for part in ast.walk(side))
            constants = any(isinstance(side, ast.Name) and side.id.isupper() for side in sides)
            if any(map(is_cause, sides)) and (constants or words & {*CAUSES, *OTHER_CAUSES}):
                compared.add((path, function))
    assert compared == COMPARISONS.keys()


@pytest.mark.parametrize("listed", [CHANGED_STEPS, RESTARTS, SUBMITS, COMPARISONS])
def test_each_listed_place_has_a_reason(listed):
    assert all(listed.values())


def test_rule_asks_no_scheduler_and_reads_no_file():
    """It is a pure function: ``explain`` calls it, and tests call it with each combination."""
    for path in RULE:
        imported = {node.module for node in ast.walk(CODE[path]) if isinstance(node, ast.ImportFrom)}
        calls = {called(node) for node in ast.walk(CODE[path])}
        assert not [name for name in imported if name.startswith("jobs") or name == "flip.runs.rundir"]
        assert not calls & {"open", "exists", "time", "sleep", "read_record", "getenv"}
