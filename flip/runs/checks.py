"""What is checked before ranks work: ``Check``, the row of every check, and ``Rule``, a member of a list of checks.

A check runs at the first stage that can run it, and each stage has lists of rules:

| stage | where | lists in |
|---|---|---|
| ``SUBMIT`` | the host of ``flip submit`` | ``flip/config/validate.py``, ``jobs/planning/preflight.py`` |
| ``CLUSTER`` | the same host, if the cluster answers; also ``flip doctor`` | ``jobs/slurm/site_checks.py`` |
| ``NODE`` | a node, before ranks start there | ``jobs/runtime/health.py``, ``network_check.py`` |
| ``RANK`` | a rank process, before it works | ``jobs/runtime/rank_process.py``, ``flip/common/gpu_software.py`` |

``jobs/check_list.py`` joins them, and ``make docs`` prints them. Standard library, Python >= 3.6.
"""

from typing import Any, Callable, Dict, Iterable, Iterator, Mapping, NamedTuple, Sequence, Tuple, Union

OK = "ok"
DEGRADED = "degraded"
"""It works, with a consequence that the user should know."""
FAILS = "fails"
FAILS_FOR_ALL = "fails for all nodes"
"""What all nodes share fails, in a way that cannot be the fault of the node that meets it first: a full disk."""
UNKNOWN = "unknown"
"""It could not be checked here. A later stage may check it."""

SUBMIT = "submit"
CLUSTER = "cluster"
NODE = "node"
RANK = "rank"


class Check(NamedTuple):
    """The row of a check."""

    state: str
    """OK, DEGRADED, FAILS, FAILS_FOR_ALL or UNKNOWN."""
    text: str
    """What was measured or read, or why it is unknown."""
    remedy: str = ""
    """The remedy or the consequence, as a sentence."""
    name: str = ""
    """What was checked. ``run_rules`` gives a row without a name that of its rule."""
    rates: Tuple[Tuple[str, float], ...] = ()
    """Measured speeds, which are compared between nodes: (device or link, operations or bytes per second)."""

    def as_json(self) -> Dict[str, Any]:
        """For another process, which calls ``check_of``."""
        return {"name": self.name, "state": self.state, "text": self.text, "rates": dict(self.rates)}


#: What the function of a rule returns. None: it holds, and has nothing to report.
Rows = Union[Check, Iterable[Check], None]


class Rule(NamedTuple):
    """A check of a list."""

    name: str
    look: Callable[..., Rows]
    """Takes the subject of its list and returns rows. Raises FlipError if nothing may start."""
    question: str = ""
    """The question that it answers, if the name does not say it."""


def run_rules(rules: Sequence[Rule], *subject: Any) -> Iterator[Check]:
    """The rows of all rules, in their order. The first that raises a FlipError ends it."""
    for rule in rules:
        yield from rows_of(rule, *subject)


def require(rules: Sequence[Rule], *subject: Any) -> None:
    """Run all rules and drop their rows. The first rule that does not hold raises its FlipError."""
    for _ in run_rules(rules, *subject):
        pass


def rows_of(rule: Rule, *subject: Any) -> Iterator[Check]:
    """The rows of a rule, with names. Raises FlipError if nothing may start."""
    rows = rule.look(*subject)
    if rows is None:
        return
    if isinstance(rows, Check):
        rows = [rows]
    for row in rows:
        yield row._replace(name=row.name or rule.name)


def check_of(message: Mapping[str, Any]) -> Check:
    """The row of ``Check.as_json``. Raises ValueError if a process of this run did not write it."""
    texts = [message.get(key) for key in ("state", "text", "name")]
    rates = message.get("rates", {})
    if not all(isinstance(text, str) for text in texts) or not isinstance(rates, dict):
        raise ValueError("not the result of a check: %r" % (message,))
    state, text, name = map(str, texts)
    return Check(state, text, name=name, rates=tuple((str(key), float(rate)) for key, rate in rates.items()))
