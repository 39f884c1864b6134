"""Nodes of a step whose ranks never became ours: without the mount, or without the interpreter.

The first node's lack is seen by the batch script itself. Of another one there is no cause file, and the ranks that wait
for it are killed, so that the step's own exit code tells nothing; but srun says on the first node how every task ended.
Standard library, Python >= 3.6: the exit trap on the host uses it.
"""

import re

if False:  # names for annotations only: Python 3.6 runs this file too
    from typing import List  # noqa: F401

#: Exit codes before the worker: no such file, not to be run, no such command; jobs/host/rank_entry.py's own, of files
#: and folders.
CODES = (2, 126, 127, 69)
#: srun's words, one line per node that its tasks ended on alike.
SAID = re.compile(r"^srun: error: ([^\s:\[\],]+): tasks? [0-9,\-]+: Exited with exit code ([0-9]{1,3})$", re.MULTILINE)
#: Bytes of the log's end that are looked at.
LAST = 1 << 16


def nodes(path, among):
    # type: (str, int) -> List[str]
    """Names from a job's standard error, sorted. None of them where more than half of ``among`` nodes are named: then
    it is what they share, which comes back, and a job that left out all nodes would never start again.
    """
    try:
        with open(path, "rb") as log:
            log.seek(max(0, log.seek(0, 2) - LAST))
            text = log.read().decode("utf-8", "replace")
    except OSError:  # what it would say is a hint only
        return []
    found = sorted({name for name, code in SAID.findall(text) if int(code) in CODES})
    return found if 2 * len(found) <= among else []
