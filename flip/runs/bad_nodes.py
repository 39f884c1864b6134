"""Nodes that the next starts of a run exclude: two runs failed on them, or no rank could be started there.

A broken node may report no hardware error: runs crash or hang there with any message. One run that fails may have a
fault of its own, and so may one that fails on every node; two runs that fail on the same node are unlikely to.

On a node without the mount or the interpreter no rank starts, and none on a node whose slurmd is gone. The batch script
notices a missing mount or interpreter on the first node. For another node there is no cause file, and the ranks that
wait for it are killed, so the step's exit code says nothing; but srun prints on the first node how every task ended.
"""

import os
import re
from typing import List, Optional, Set, Tuple

from flip.runs.errors import STORAGE, UNSTARTED
from flip.runs.restart_policy import DAY
from flip.runs.rundir import RunDir, exists, read_record

NODE_SUSPECT_CAUSES = ("crash", "hang")  # that a node may be to blame for
RECENT = DAY  # seconds for which a failure counts: the node may be repaired by then
#: Exit codes before the module runs: no such file, not executable, no such command; errors of rank_entry.py.
UNSTARTED_CODES = (2, 126, 127, UNSTARTED)
#: A line of srun, one per node whose tasks ended alike.
SRUN_EXIT_LINE = re.compile(
    r"^srun: error: ([^\s:\[\],]+): tasks? [0-9,\-]+: Exited with exit code ([0-9]{1,3})$", re.MULTILINE
)
#: A line of srun for a node whose slurmd did not start the tasks: it cannot be reached, or it refuses. Then the reason.
SRUN_LAUNCH_LINE = re.compile(r"^srun: error: Task launch for \S+ failed on node ([^\s:\[\],]+): .+$", re.MULTILINE)
#: As ``SRUN_EXIT_LINE``, for ranks that the kernel killed at the memory limit of their cgroup.
SRUN_MEMORY_LINE = re.compile(r"^srun: error: ([^\s:\[\],]+): tasks? [0-9,\-]+: Out Of Memory$", re.MULTILINE)
TAIL_BYTES = 1 << 16  # of the log's end that are read


def find_suspect(run: RunDir, n: int, now: float) -> Tuple[str, str]:
    """The node on which attempt n and another run failed, and the name of that run; ("", "") if there is none.

    ``now``: seconds, as in end.json. Raises OSError if the sweep's folder cannot be read.
    """
    node = failed_on(run, n)
    if node and failures(run, now) <= {node}:
        for name in sorted(os.listdir(str(run.path.parent))):
            other = RunDir(run.path.parent / name)
            # of another user, perhaps: Path.is_dir raises PermissionError before Python 3.14
            started = name != run.name and os.path.isdir(str(other.path / "attempts"))
            if started and failures(other, now) == {node}:
                return node, name
    return "", ""


def failed_on(run: RunDir, n: int) -> Optional[str]:
    """The one node that the causes of attempt n name; None if they name none or several.

    A rank that was killed for memory is no fault of its node.
    """
    causes = [record for record in run.causes(n) if not record.get("out_of_memory")]
    named = {str(record["host"]) for record in causes if record["cause"] in NODE_SUSPECT_CAUSES and record.get("host")}
    if len(named) == 1:
        return named.pop()
    return None


def failures(run: RunDir, now: float) -> Set[Optional[str]]:
    """The nodes on which the run's attempts of the last day failed, with None for failures on an unknown node."""
    nodes: Set[Optional[str]] = set()
    try:
        for n in reversed(run.attempt_numbers()):
            end = read_record(run.attempt(n) / "end.json")
            if end is not None and now - end["time"] > RECENT:
                break
            if end is not None and end["cause"] in NODE_SUSPECT_CAUSES:
                nodes.add(failed_on(run, n))
    except (OSError, ValueError, KeyError, TypeError):  # just moved away, or damaged: no evidence
        nodes.add(None)
    return nodes


def unstartable_nodes(run: RunDir, n: int, total: int) -> List[str]:
    """Names of nodes that could not start a rank of attempt n, from its job's standard error, sorted.

    Empty if all ranks have started, as ``ready.json`` proves: then the codes have other reasons. Also empty if more
    than half of the ``total`` nodes are named: then a shared service fails, which comes back, and a job that excludes
    all nodes would never start again.
    """
    if exists(run.attempt(n) / "ready.json"):
        return []
    log = _end_of_log(run, n)
    unstarted = {name for name, code in SRUN_EXIT_LINE.findall(log) if int(code) in UNSTARTED_CODES}
    nodes = sorted(unstarted.union(SRUN_LAUNCH_LINE.findall(log)))
    if 2 * len(nodes) <= total:
        return nodes
    return []


def storage_failure(run: RunDir, n: int) -> str:
    """That a rank of attempt n ended with the code of storage, as a sentence; "" if srun prints none.

    On a full disk a rank can open no log and write no cause. The step's exit code is that of a peer which has waited
    for it, and the shared disk is no fault of its node.
    """
    lines = SRUN_EXIT_LINE.findall(_end_of_log(run, n))
    nodes = sorted({name for name, code in lines if int(code) == STORAGE})
    if not nodes:
        return ""
    return "a rank on %s could not write to the disk of the run" % ", ".join(nodes)


def out_of_memory_nodes(run: RunDir, n: int) -> List[str]:
    """Names of nodes on which the kernel killed a rank of attempt n at the memory limit of its cgroup, sorted.

    The job goes on until its script ends, so its state does not say it, and srun ends with 1. A node agent writes a
    cause: it outlives its ranks, and srun prints the line when the last agent has ended.
    """
    causes = [str(record.get("host")) for record in run.causes(n) if record.get("out_of_memory")]
    return sorted(set(causes + SRUN_MEMORY_LINE.findall(_end_of_log(run, n))))


def _end_of_log(run: RunDir, n: int) -> str:
    """The end of the standard error of attempt n's job; "" if it cannot be read: it is only a hint."""
    try:
        with open(str(run.logs / str(n) / "job.err"), "rb") as log:
            log.seek(max(0, log.seek(0, 2) - TAIL_BYTES))
            return log.read().decode("utf-8", "replace")
    except OSError:
        return ""
