"""``python -m tests.cuda_stub.measure OUT``: rehearses the rows of `flip doctor --measure` for GPUs on the stub.

The rows are those of a node with two GPUs, each in processes of its own. One of the steps is compiled, the others are
not, and their batches are small. Faults are skipped: ``ZEROS``.
"""

import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

from flip.files import python_path
from flip.runs.rundir import write_json
from jobs.measuring import command, machine, page
from jobs.measuring.rows import RowPlan, local_rows
from jobs.planning.measurement import Machine

GPUS = 2
BATCH = 4
COMPILED = "step_b16_0.5"
MINUTES = 60.0
ZEROS = "ranks on the stub have weights of 0, which the trainer refuses: the CPU form runs in the tests"


def rows() -> list[RowPlan]:
    return [small(row) for row in local_rows("cuda", GPUS, 2, (), 0.02)]


def small(row: RowPlan) -> RowPlan:
    """The row with less work, and the time that a busy machine needs."""
    options = dict(row.options)
    if row.function == "fault":
        return replace(row, skipped=ZEROS)
    if row.function == "step":
        options |= {"batch": BATCH, "compiled": row.name == COMPILED}
    elif row.function == "trace":
        options |= {"batch": BATCH, "compiled": False}
    elif row.function == "losses":
        options |= {"size": "tiny", "batch": BATCH, "steps": 2}
    elif row.function == "saves":
        options |= {"megabytes": 20}
    return replace(row, options=options, limit=600)


def main(folder: Path) -> None:
    facts = Machine(gpu="NVIDIA H100 80GB HBM3", gpus=GPUS, driver="580.0", cores=2, processor="a processor")
    own = partial(python_path.variables, inherited=os.environ["PYTHONPATH"])  # it finds the project's packages
    with mock.patch.object(machine.python_path, "variables", own):
        measured = replace(machine.measure(rows(), facts, folder, MINUTES), rehearsal=True)
    write_json(folder / command.FILE, measured.as_dict())
    command.write_pages(folder, page.blocks(measured), page.TITLE, "report")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
