"""Nodes on which two runs of a sweep fail and neither fails elsewhere: left out, as those with broken hardware are.

Not every broken node says so: a bad link or card may show as a hang, or as a crash in other words. One run that fails
may have a fault of its own, and so may one that fails on every node; two that agree on one node hardly have.
Standard library, Python >= 3.6: the exit trap on the host uses it.
"""

import os

from flip.runs.rundir import RunDir, read_record
from jobs.host.restart_policy import DAY

if False:  # names for annotations only: Python 3.6 runs this file too
    from typing import Iterator, Optional, Set, Tuple  # noqa: F401

#: Ends that a node may be to blame for.
BLAMED = ("crash", "hang")
#: Seconds for which a failure counts: a node that is looked after by then is a new one.
RECENT = DAY


def suspect(run, n, now):
    # type: (RunDir, int, float) -> Tuple[str, str]
    """The node on which attempt n failed and another run did as well, and that run's name; ("", "") where none is.

    ``now``: seconds, as in end.json. Raises OSError where the sweep's folder cannot be read.
    """
    node = failed_on(run, n)
    if node and failures(run, now) <= {node}:
        for other in _neighbours(run):
            if failures(other, now) == {node}:
                return node, other.name
    return "", ""


def failed_on(run, n):
    # type: (RunDir, int) -> Optional[str]
    """The one node that the causes of attempt n name; None where they name none, or several."""
    named = {str(record["host"]) for record in run.causes(n) if record["cause"] in BLAMED and record.get("host")}
    return named.pop() if len(named) == 1 else None


def failures(run, now):
    # type: (RunDir, float) -> Set[Optional[str]]
    """The nodes on which the run's attempts of the last day failed; None among them: it cannot be told which."""
    found = set()  # type: Set[Optional[str]]
    try:
        for n in reversed(run.attempt_numbers()):
            end = read_record(run.attempt(n) / "end.json")
            if end is not None and now - end["time"] > RECENT:
                break
            if end is not None and end["cause"] in BLAMED:
                found.add(failed_on(run, n))
    except (OSError, ValueError, KeyError, TypeError):  # moved away just now, or damaged: it accuses nobody
        found.add(None)
    return found


def _neighbours(run):
    # type: (RunDir) -> Iterator[RunDir]
    """The other runs of its sweep that have begun."""
    for name in sorted(os.listdir(str(run.path.parent))):
        path = run.path.parent / name
        if name != run.name and (path / "attempts").is_dir():
            yield RunDir(path)
