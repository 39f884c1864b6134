"""The page with every check before ranks work, from ``jobs.check_list``."""

from flip.runs.checks import CLUSTER, NODE, RANK, SUBMIT
from jobs import check_list
from lab.documentation.markdown import table

_HEAD = """# Checks before a start

A check runs at the first stage that can run it. It is ok, degraded, fails, or unknown: then a later stage asks.
"""
_STAGES = {
    SUBMIT: "On the host of `flip submit`, which needs no cluster",
    CLUSTER: "On the same host, where the cluster answers",
    NODE: "On a node with an agent, before its ranks start",
    RANK: "In a rank process, before it works",
}


def checks_page() -> str:
    """The page."""
    parts = [_HEAD]
    for stage, lists in check_list.stages().items():
        rows = [(rule.name, subject, rule.question) for subject, rules in lists.items() for rule in rules]
        parts += [f"## {_STAGES[stage]}\n", table(("check", "concerns", "asks"), rows)]
    return "\n".join(parts)
