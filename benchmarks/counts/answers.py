"""Questions that one mechanism should answer, and the places that answer them.

A place that does not exist is not counted, so its row stays here when the place goes. A place that replaces others is
added by the change that makes it. A question without any place is an error: its answer has moved.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.counts.code import Module, texts
from benchmarks.counts.rows import Row, listed

QUESTIONS: dict[str, tuple[str, ...]] = {
    "Which speed has a core?": (
        "profile fields: core_samples",
        "profile fields: core_speeds",
        "profile fields: measured",
        "options: flip shards bench --write",
        "options: flip doctor --measure",
    ),
    "Which package measures a machine?": (
        "jobs/measuring",
        "jobs/measurer.py",
        "jobs/common/measurement.py",
        "tools/measuring",
    ),
    "Which form has the row of a check before a start?": (
        "flip/config/validate.py:validate -> list[str]",
        "jobs/planning/preflight.py:Check",
        "jobs/planning/environment_checks.py:check_variables -> list[tuple[str, str, bool]]",
        "jobs/planning/memory_fit.py:check -> list[tuple[str, str, bool]]",
        "jobs/planning/step_time.py:input_warning -> str",
        "jobs/slurm/site_checks.py:CheckResult",
        "jobs/runtime/health.py:check_memory -> Finding",
        "jobs/runtime/network_check.py:finding -> dict[str, Any]",
        "jobs/runtime/rank_process.py:_check_snapshot -> None",
        "flip/runs/checks.py:Check",
    ),
    "Which types may the fields of a file have?": (
        "flip/config/schema.py:option",
        "flip/common/option.py:option",
        "flip/runs/records.py:FieldType",
        "flip/config/json_schema.py:field",
        "jobs/common/documents.py:field",
        "text: must lie in 0 .. 1e15",
    ),
    "How much memory may this host use?": (
        "text: /proc/self/cgroup",
        "text: SC_PHYS_PAGES",
    ),
    "What do the test images add to an interval?": (
        "lab/studies/engine/intervals.py",
        "lab/studies/arms_stats.py:bootstrap",
        "lab/studies/scaling_stats.py:_binomial_variance",
    ),
    "What do the headers of a parquet file say?": (
        "flip/data/manifest/parquet.py:_struct",
        "flip/data/parquet/thrift.py",
    ),
    "Which own code audits packages, completes words, and lists commands?": (
        "lab/audit.py:pip_audit_report",
        "jobs/common/completion.py:command",
        "lab/documentation/commands.py:parser_of",
    ),
}
"""Question -> places that answer it. A place is

- a file or folder, FILE:SYMBOL for a class or function in it, or FILE:SYMBOL -> TYPE for a function that returns this;
- ``text: TEXT``: each module that has this text;
- ``ROW: NAME``: a name in another row, such as an option.
"""


def rows(modules: Sequence[Module], root: Path, others: Sequence[Row]) -> list[Row]:
    """A row per question. ``others``: the rows counted before. Raises LookupError for a question without an answer."""
    named = {row.name: row.names for row in others}
    return [answered(question, places, modules, root, named) for question, places in QUESTIONS.items()]


def answered(
    question: str, places: Sequence[str], modules: Sequence[Module], root: Path, named: Mapping[str, Collection[str]]
) -> Row:
    """The row of one question. Raises LookupError if none of its places exists."""
    present = [each for place in places for each in existing(place, modules, root, named)]
    if not present:
        raise LookupError(f"{question} None of its places exists: name the new one in {__file__}.")
    return listed(question, present)


def existing(place: str, modules: Sequence[Module], root: Path, named: Mapping[str, Collection[str]]) -> Iterator[str]:
    """The place if it exists; of a text all modules that have it."""
    kind, separator, name = place.partition(": ")
    if kind == "text":
        yield from (module.path.relative_to(root).as_posix() for module in modules if name in texts(module.tree))
    elif separator:
        if name in named[kind]:
            yield place
    elif (root / place.partition(":")[0]).exists() and _has_symbol(place, modules, root):
        yield place


def _has_symbol(place: str, modules: Sequence[Module], root: Path) -> bool:
    file, _, symbol = place.partition(":")
    if not symbol:
        return True
    name, arrow, returned = symbol.partition(" -> ")
    (tree,) = (module.tree for module in modules if module.path == root / file)
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return not arrow or _returns(node) == returned
    return False


def _returns(node: ast.ClassDef | ast.FunctionDef) -> str:
    annotation = getattr(node, "returns", None)
    return ast.unparse(annotation) if annotation else ""
