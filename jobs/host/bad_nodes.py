"""Nodes that a run's next starts leave out: two runs failed on them (``suspect``), or no rank started (``unstarted``).

Not every broken node says so: a bad link or card may show as a hang, or as a crash in other words. One run that fails
may have a fault of its own, and so may one that fails on every node; two that agree on one node hardly have.

On a node without the mount or the interpreter no rank starts. If it is the first node, the batch script sees it. For
another node there is no cause file, and the ranks that wait for it are killed, so that the step's exit code tells
nothing; but srun writes on the first node how every task ended.

Standard library, Python >= 3.6: the exit trap on the host uses it.
"""

import os
import re
from typing import Iterator, List, Optional, Set, Tuple

from flip.runs.rundir import RunDir, read_record
from jobs.host.restart_policy import DAY

#: Ends that a node may be to blame for.
NODE_SUSPECT_CAUSES = ("crash", "hang")
#: Seconds for which a failure counts: a node that is looked after by then is a new one.
RECENT = DAY


def find_suspect(run: RunDir, n: int, now: float) -> Tuple[str, str]:
    """The node on which attempt n failed and another run did as well, and that run's name; ("", "") where none is.

    ``now``: seconds, as in end.json. Raises OSError where the sweep's folder cannot be read.
    """
    node = failed_on(run, n)
    if node and failures(run, now) <= {node}:
        for other in _neighbours(run):
            if failures(other, now) == {node}:
                return node, other.name
    return "", ""


def failed_on(run: RunDir, n: int) -> Optional[str]:
    """The one node that the causes of attempt n name; None where they name none, or several."""
    named = {
        str(record["host"]) for record in run.causes(n) if record["cause"] in NODE_SUSPECT_CAUSES and record.get("host")
    }
    return named.pop() if len(named) == 1 else None


def failures(run: RunDir, now: float) -> Set[Optional[str]]:
    """The nodes on which the run's attempts of the last day failed; None among them: it cannot be told which."""
    found: Set[Optional[str]] = set()
    try:
        for n in reversed(run.attempt_numbers()):
            end = read_record(run.attempt(n) / "end.json")
            if end is not None and now - end["time"] > RECENT:
                break
            if end is not None and end["cause"] in NODE_SUSPECT_CAUSES:
                found.add(failed_on(run, n))
    except (OSError, ValueError, KeyError, TypeError):  # moved away just now, or damaged: it accuses nobody
        found.add(None)
    return found


def _neighbours(run: RunDir) -> Iterator[RunDir]:
    """The other runs of its sweep that have begun."""
    for name in sorted(os.listdir(str(run.path.parent))):
        path = run.path.parent / name
        if name != run.name and (path / "attempts").is_dir():
            yield RunDir(path)


#: Exit codes before the worker: no such file, not to be run, no such command; jobs/host/rank_entry.py's own, of files
#: and folders.
UNSTARTED_CODES = (2, 126, 127, 69)
#: A line of srun, one per node that its tasks ended on alike.
SRUN_EXIT_LINE = re.compile(
    r"^srun: error: ([^\s:\[\],]+): tasks? [0-9,\-]+: Exited with exit code ([0-9]{1,3})$", re.MULTILINE
)
#: Bytes of the log's end that are looked at.
TAIL_BYTES = 1 << 16


def unstartable_nodes(path: str, among: int) -> List[str]:
    """Names from a job's standard error, sorted. None of them where more than half of ``among`` nodes are named: then
    it is what they share, which comes back, and a job that left out all nodes would never start again.
    """
    try:
        with open(path, "rb") as log:
            log.seek(max(0, log.seek(0, 2) - TAIL_BYTES))
            text = log.read().decode("utf-8", "replace")
    except OSError:  # what it would say is a hint only
        return []
    found = sorted({name for name, code in SRUN_EXIT_LINE.findall(text) if int(code) in UNSTARTED_CODES})
    return found if 2 * len(found) <= among else []
