"""How many nodes a job has, and on how many of them its run can go on."""

import os
from typing import Any, Mapping, NamedTuple, Sequence


class JobNodes(NamedTuple):
    """The nodes of this start of a job."""

    total: int
    usable: Sequence[int]
    """Numbers of nodes with which the run can go on, ascending: one, or those of its range. Others are spares."""
    ranks_per_node: int

    @property
    def most(self) -> int:
        return self.usable[-1]

    @property
    def is_elastic(self) -> bool:
        """Whether the job goes on without a lost node (--no-kill): it has spare nodes, or a range."""
        return len(self.usable) > 1 or self.total > self.most


def nodes_of_job(record: Mapping[str, Any]) -> JobNodes:
    """``record``: job.json of the run."""
    total = int(os.environ.get("SLURM_JOB_NUM_NODES") or 1)
    usable = [nodes for nodes in record["usable"] if nodes <= total] or [total]
    return JobNodes(total, usable, record["shape"]["processes"])
