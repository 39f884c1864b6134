"""Tests the list of all checks before ranks work, and the rows that its rules give."""

import importlib
from pathlib import Path

import pytest

from flip.runs.checks import CLUSTER, NODE, OK, RANK, SUBMIT, UNKNOWN, Check, Rule, require, run_rules
from flip.runs.errors import ConfigError
from jobs import check_list
from lab.documentation.checks import checks_page

ROOT = Path(__file__).resolve().parents[2]


def rules_of(module):
    """The rules that a module defines, in lists or alone."""
    values = vars(importlib.import_module(module)).values()
    groups = [value for value in values if isinstance(value, tuple) and value and isinstance(value[0], Rule)]
    alone = [value for value in values if isinstance(value, Rule)]
    return [*alone, *(rule for group in groups for rule in group)]


def test_list_has_every_rule_of_the_code_and_every_stage():
    listed = [rule for lists in check_list.stages().values() for rules in lists.values() for rule in rules]
    assert list(check_list.stages()) == [SUBMIT, CLUSTER, NODE, RANK]
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in ("flip", "jobs", "tools", "lab")
        for path in (ROOT / package).rglob("*.py")
        if " Rule(" in path.read_text(encoding="utf-8") or "(Rule(" in path.read_text(encoding="utf-8")
    ]
    assert len(modules) >= 9, modules
    for module in modules:
        missing = [rule.name for rule in rules_of(module) if rule not in listed]
        assert not missing, f"{module}: jobs/check_list.py lacks {missing}"
    for rule in listed:
        assert f"| {rule.name} |" in checks_page()


def test_rules_of_a_list_have_different_names():
    for lists in check_list.stages().values():
        for rules in lists.values():
            assert len({rule.name for rule in rules}) == len(rules)


def test_rows_get_the_name_of_their_rule_and_the_first_error_ends_a_list():
    """A workload contributes its own rules to those that it takes from a list."""
    seen = []

    def refuse(subject):
        raise ConfigError("it cannot start", value=subject)

    rules = [
        Rule("single", lambda subject: Check(OK, subject)),
        Rule("several", lambda subject: [Check(OK, "a"), Check(UNKNOWN, "b", name="own")]),
        Rule("refused", refuse),
        Rule("later", lambda subject: seen.append(subject) or []),
    ]
    assert [(row.name, row.text) for row in run_rules(rules[:2], "x")] == [
        ("single", "x"), ("several", "a"), ("own", "b"),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="cannot start"):
        require(rules, "x")
    assert not seen
