"""A start of a job that fails before its attempt, restarted by the batch script's functions or by their twin in Python.

``script(BASH, ...)`` and ``script(PYTHON, ...)`` are batch scripts that differ only in that.
"""

import re
import shlex
import sys

from jobs.slurm import batch_script
from tests.harness.common import ROOT

BASH = "bash"
PYTHON = "python"
STATUS = 127
"""The exit code of the start: its node has no Python."""
PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from jobs.host import batch_hooks
sys.exit(batch_hooks.restart_later({status}, attempt={attempt}, leave_node=True))
"""
#: Calls that change something; the others are queries, which one of both may repeat.
CHANGE = re.compile("scontrol (update|requeue) |sbatch ")


def script(variant, options=(), before=(), attempt=None):
    """The text of a batch script. ``options``: of sbatch. ``before``: lines before the start fails. ``attempt``: whose
    end could not be written; None: it has not started."""
    words = []
    if attempt:
        words = [f"export FLIP_ATTEMPT={attempt} code=70"]
    if variant == BASH:
        words += [f"(exit {STATUS}) || requeue_elsewhere"]
    else:
        program = PROGRAM.format(root=str(ROOT), status=STATUS, attempt=attempt)
        words += [f"{sys.executable} -c {shlex.quote(program)}; exit $?"]
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options), "sweep=/nowhere root=", batch_script.OWN_JOB]
    lines += [
        "trap '' TERM USR1 USR2",
        *before,
        "export FLIP_SNAPSHOT=/nowhere PYTHONPATH=/nowhere  # not for successors",
    ]
    return "\n".join([*lines, *batch_script.functions("batch_functions.sh"), *words, ""])


def changes(calls):
    """Of recorded calls those that change something, in order."""
    return [call for call in calls if CHANGE.match(call)]


def queries(calls):
    """The others, each once."""
    return {call for call in calls if not CHANGE.match(call)}
