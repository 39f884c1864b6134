"""``python -m tests.jobs.measuring.one_node RUN``: the work of the process of one node, without Slurm."""

import sys

from flip.runs.rundir import RunDir
from jobs.measuring import node

if __name__ == "__main__":
    print(*node.measure_node(RunDir(sys.argv[1]), 1, False))
