"""Questions that one mechanism should answer, and the places that answer them.

A place that does not exist is not counted, so its row stays here when the place goes. A place that replaces others is
added by the change that makes it. A question without any place is an error: its answer has moved.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.counts.code import Module, requirements, texts
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
    "What is a check before a start, and what is its row?": (
        "flip/config/validate.py",
        "jobs/planning/preflight.py:Check",
        "jobs/planning/environment_checks.py:check_container",
        "jobs/planning/memory_fit.py:check",
        "jobs/planning/step_time.py:input_warning",
        "jobs/slurm/site_checks.py:CheckResult",
        "jobs/runtime/health.py:checks",
        "jobs/runtime/network_check.py:finding",
        "jobs/runtime/rank_process.py:_check_snapshot",
    ),
    "Which types may the fields of a file have?": (
        "flip/config/schema.py:option",
        "flip/runs/records.py:FieldType",
        "flip/config/json_schema.py:field",
        "jobs/common/documents.py:field",
        "jobs/common/cluster_profile.py:_check",
    ),
    "How much memory may this host use?": (
        "text: /proc/self/cgroup",
        "text: SC_PHYS_PAGES",
    ),
    "What do the test images add to an interval?": (
        "tools/studies/arms_stats.py:bootstrap",
        "tools/studies/scaling_stats.py:_binomial_variance",
    ),
    "What do the headers of a parquet file say?": (
        "flip/data/manifest/parquet.py:_struct",
        "flip/data/manifest/parquet.py:_check",
    ),
    "Who audits packages, completes words, and lists commands?": (
        "tools/commands/audit.py:pip_audit_report",
        "jobs/common/completion.py:command",
        "tools/documentation/commands.py:parser_of",
        "requirements-dev: argcomplete",
        "requirements-dev: pip-audit",
        "requirements-dev: sphinx-argparse",
    ),
}
"""Question -> places that answer it. A place is

- a file or folder, or FILE:SYMBOL for a class or function in it;
- ``text: TEXT``: each function that has this text;
- ``ROW: NAME``: a name in another row, such as an option;
- ``requirements-dev: NAME``: a distribution in requirements-dev.txt.
"""


def rows(modules: Sequence[Module], root: Path, others: Sequence[Row]) -> list[Row]:
    """A row per question. ``others``: the rows counted before. Raises LookupError for a question without an answer."""
    named = {row.name: row.names for row in others}
    named["requirements-dev"] = tuple(requirements(root / "requirements-dev.txt"))
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
    """The place if it exists; of a text all functions that have it."""
    kind, separator, name = place.partition(": ")
    if kind == "text":
        yield from _functions_with(name, modules, root)
    elif separator:
        if name in named[kind]:
            yield place
    elif (root / place.partition(":")[0]).exists() and _has_symbol(place, modules, root):
        yield place


def _has_symbol(place: str, modules: Sequence[Module], root: Path) -> bool:
    file, _, symbol = place.partition(":")
    if not symbol:
        return True
    (tree,) = (module.tree for module in modules if module.path == root / file)
    return any(getattr(node, "name", "") == symbol for node in ast.walk(tree))


def _functions_with(text: str, modules: Sequence[Module], root: Path) -> Iterator[str]:
    """FILE:FUNCTION of each function at the top of a module that has exactly this text."""
    for module in modules:
        for node in module.tree.body:
            if text in texts(node):
                yield f"{module.path.relative_to(root).as_posix()}:{getattr(node, 'name', '')}"
