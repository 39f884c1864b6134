"""What a run's ranks have counted together: over all of them, and over the attempts whose commits are known."""

from __future__ import annotations

import resource

import torch

from flip.data.loader import Loader
from flip.distributed.parallel import World
from flip.runs.commit import Commit


class Tally:
    """One rank's counts in this attempt. ``source``: the commit that it went on from."""

    def __init__(self, world: World, loader: Loader, source: Commit | None) -> None:
        self._world, self._loader = world, loader
        self._record = source.record if source else {"replaced": 0, "peak_memory": 0}
        self.replaced = 0
        """Samples of this rank that others stood in for."""

    def replaced_everywhere(self) -> int:
        """Collective."""
        count = torch.tensor([self.replaced])
        torch.distributed.all_reduce(count, group=self._world.control)
        return int(self._record["replaced"]) + int(count)

    def storage_everywhere(self) -> dict[str, float]:
        """What the readers of all ranks did in this attempt. Collective."""
        counts = self._loader.counters().flat()
        sums = torch.tensor(list(counts.values()), dtype=torch.float64)
        torch.distributed.all_reduce(sums, group=self._world.control)
        return dict(zip(counts, sums.tolist(), strict=True))

    def peak_memory(self) -> int:
        """Bytes of this process at most, in this attempt or those before."""
        return max(int(self._record["peak_memory"]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
