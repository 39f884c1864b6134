"""Does prefetching keep 512 ranks busy? Simulates requests to storage with the real order and prefetch rule.

flip.data.order decides which chunk each lane reads and when it needs it, flip.data.prefetch when it is requested. Only
clocks are simulated: steps of a fixed length in lock-step, workers that decode up to AHEAD batches ahead, and requests
with a latency.

    blocking   a worker waits for each read (hypothetical)
    waiting    reads run in the background, a worker waits only for missing chunks (the loader)
    phase      own: of a lane among its worker's lanes (hypothetical); spread: among all L lanes (the loader)
    latency    constant; drawn: log-normal; slow: drawn, and ten seconds for one in a thousand; tail: drawn, and two to
               ten seconds for one in a hundred
    lead       seconds before a block by which all of it is requested; in the loader LOOKAHEAD_SECONDS, at most
               MAX_LOOKAHEAD of a block
    hedge      a second request after so many seconds without a response (data.hedge), not before the SHARE quantile of
               latency; the first response counts; 0: none (hypothetical). Its budget is never exhausted here

Latency does not grow with load here; real stalls are longer if many requests coincide. Waiting and storage are counted
from the second block on; the first block is loaded when it is needed (first_batch_s).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
from bisect import bisect_left
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.lib import results, synthetic
from benchmarks.lib.results import rounded
from flip.config.schema import Data
from flip.data.manifest.manifest import BLOCK, ChunkTable
from flip.data.order import SampleOrder
from flip.data.prefetch import LOOKAHEAD_SECONDS, MAX_LOOKAHEAD, chunks_due, phase
from flip.data.storage.retry import SHARE
from flip.data.worker_pool import SharedSlots

Q = 4
AHEAD = SharedSlots.COUNT - 1
"""Batches that a worker prepares at most while its rank waits for the next one. The batch of the step before is still
lent."""
HEDGE = Data.hedge
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Case:
    """One simulated run."""

    step: float
    """Seconds of a training step."""
    workers: int
    reads: str
    latency: str
    phase: str = "own"
    lead: float = 0.0
    hedge: float = 0.0


@dataclass(frozen=True)
class Fleet:
    """Parameters of all cases. ``decode``: a worker's seconds per sample; the rest describes latencies in seconds."""

    ranks: int
    steps: int
    count: int
    """Samples of a lane in a global batch, B/L."""
    decode: float = 0.001
    median: float = 0.2
    sigma: float = 0.5
    slow_share: float = 0.001
    slow: float = 10.0
    tail_share: float = 0.01
    tail: float = 2.0


class Needs(NamedTuple):
    """One entry per chunk of a lane's block; ``number`` is the index i of the rule."""

    lane: Ints
    block: Ints
    number: Ints
    position: Ints
    """Position in the lane of its first sample."""
    requests: Ints
    """Reads: two if the chunk crosses the end of a shard."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=512, help="W (default: %(default)s)")
    parser.add_argument("--lanes", type=int, default=4096, help="L, a multiple of W (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32_768, help="B, a multiple of L (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--step", type=float, nargs="+", default=[0.5, 0.05], help="seconds (default: 0.5 0.05)")
    parser.add_argument("--shards", type=int, default=synthetic.SHARDS, help="default: %(default)s")
    results.options(parser, "prefetch")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.ranks = 4
        chosen.lanes = 16
        chosen.batch = 512
        chosen.steps = 80
        chosen.shards = 300
    if chosen.lanes % chosen.ranks or chosen.batch % chosen.lanes:
        parser.error("W must divide L, and L must divide B")
    fleet = Fleet(chosen.ranks, chosen.steps, chosen.batch // chosen.lanes)
    table = synthetic.table(chosen.shards, chosen.seed)
    order = SampleOrder(chosen.seed, table.samples, table.chunk, Q, chosen.lanes)
    chosen_cases = cases(chosen.step, order.lanes // chosen.ranks)
    needs = plan(order, table, fleet)
    report = {
        "benchmark": "prefetch",
        "machine": results.machine(),
        "data": {"N": order.samples, "R": order.chunk, "Q": Q, "L": order.lanes, "B": chosen.batch},
        "fleet": asdict(fleet),
        "requests": int(needs.requests.sum()),
        "crossing_a_border": rounded(float((needs.requests > 1).mean())),
        "cases": [simulate(case, order, fleet, needs, chosen.seed) for case in chosen_cases],
    }
    results.publish(report, chosen)
    return 0


def cases(steps: list[float], most: int) -> list[Case]:
    """The loader's rule first, then variants without one of its parts. ``most``: lanes of a rank."""
    many = min(8, most)
    selected = []
    for step in steps:
        for latency in ("constant", "drawn", "slow", "tail"):
            selected.append(Case(step, many, "waiting", latency, "spread", LOOKAHEAD_SECONDS, HEDGE))
        for latency in ("slow", "tail"):
            selected += [
                Case(step, many, "waiting", latency, "spread", lead) for lead in (0.0, 2.0, 5.0, LOOKAHEAD_SECONDS)
            ]
            selected += [Case(step, many, "waiting", latency, "spread", lead, HEDGE) for lead in (0.0, 2.0)]
        for workers, how in ((1, "blocking"), (many, "blocking"), (many, "waiting")):
            selected += [Case(step, workers, how, latency) for latency in ("constant", "drawn", "slow")]
    return selected


def plan(order: SampleOrder, table: ChunkTable, fleet: Fleet, group: int = 64) -> Needs:
    """All chunks of all lanes, with the block after the last step."""
    blocks = int(fleet.steps * fleet.count) // order.block_samples + 2
    shard = np.searchsorted(table.first, np.arange(table.chunks) * order.chunk, side="right")
    last = np.minimum(np.arange(1, table.chunks + 1) * order.chunk, order.samples) - 1
    crosses = np.searchsorted(table.first, last, side="right") > shard
    rows = []
    for low in range(0, order.lanes, group):
        lanes = range(low, min(low + group, order.lanes))
        ids, _ = order.blocks(lanes, range(blocks))
        for k in range(blocks):
            for lane in lanes:
                chunks, at = np.unique(ids[k, lane - low] // order.chunk, return_index=True)
                for i in range(len(chunks)):
                    rows.append((lane, k, i, k * order.block_samples + at[i], 1 + crosses[chunks[i]]))
    return Needs(*np.array(rows, dtype=np.int64).T)


def begins(order: SampleOrder, fleet: Fleet, needs: Needs, case: Case) -> Ints:
    """Per chunk, the step in which it is requested, by the real rule."""
    share = order.lanes // fleet.ranks // case.workers
    own = [(lane % share + 1) / share for lane in range(order.lanes)]
    if case.phase == "own":
        phases = own
    else:
        phases = [phase(lane) for lane in range(order.lanes)]
    span = order.block_samples - int(min(case.lead / case.step * fleet.count, MAX_LOOKAHEAD * order.block_samples))
    moments = {at: _moments(order.block_samples, span, at) for at in set(phases)}
    table = np.array([moments[at] for at in phases])
    position = (needs.block - 1) * order.block_samples + table[needs.lane, needs.number]
    position = np.where(needs.block == 0, 0, position)  # the first blocks are asked for at once
    return np.maximum(0, position) // fleet.count


def _moments(all_samples: int, span: int, at: float) -> list[int]:
    """Positions in the current block at which chunks 0, 1, ... of the next one are due."""
    return [bisect_left(range(all_samples), i + 1, key=lambda n: chunks_due(n, span, Q, at)) for i in range(Q)]


def latencies(fleet: Fleet, case: Case, needs: Needs, seed: int) -> tuple[Floats, int]:
    """Seconds per chunk, and the number of hedged requests; a chunk's two reads run one after the other.

    Draws depend only on the seed, so that all cases have the same latencies.
    """
    rng = np.random.default_rng(seed)

    def draw_seconds() -> Floats:
        drawn = fleet.median * np.exp(fleet.sigma * rng.standard_normal(len(needs.lane)))
        chance = rng.random(len(drawn))
        length = rng.random(len(drawn))
        if case.latency == "constant":
            return np.full(len(drawn), fleet.median)
        if case.latency == "tail":
            return np.where(chance < fleet.tail_share, fleet.tail + length * (fleet.slow - fleet.tail), drawn)
        return np.where((chance < fleet.slow_share) & (case.latency == "slow"), fleet.slow, drawn)

    total = np.zeros(len(needs.lane))
    more = 0
    for number in (1, 2):
        seconds = draw_seconds()
        again = draw_seconds()
        delay = max(case.hedge, float(np.quantile(seconds, 1 - SHARE)))
        late = (seconds > delay) & (case.hedge > 0)
        seconds = np.where(late, np.minimum(seconds, delay + again), seconds)
        asked = needs.requests >= number
        total += np.where(asked, seconds, 0)
        more += int((late & asked).sum())
    return total, more


def simulate(case: Case, order: SampleOrder, fleet: Fleet, needs: Needs, seed: int) -> dict[str, Any]:
    """One case: waiting of the trainer, and load of storage."""
    share = order.lanes // fleet.ranks // case.workers
    worker = needs.lane // share
    begin = begins(order, fleet, needs, case)
    seconds, hedged = latencies(fleet, case, needs, seed)
    use = needs.position // fleet.count
    inside = begin < fleet.steps
    clock = _Clock(case, fleet, share * fleet.count * fleet.decode)
    asked = np.full(len(begin), np.nan)
    starting = _grouped(begin, fleet.steps)
    needed = _grouped(use, fleet.steps)
    for step in range(fleet.steps):
        now = clock.begin(step)
        mine = starting[step]
        if case.reads == "blocking":
            asked[mine] = now[worker[mine]] + _before(worker[mine], seconds[mine])
            waits = np.bincount(worker[mine], seconds[mine], len(now))
            clock.done(step, now + clock.work + waits)
        else:
            asked[mine] = now[worker[mine]]
            done = now + clock.work
            np.maximum.at(done, worker[needed[step]], (asked + seconds)[needed[step]])
            clock.done(step, done)
    settled = min(order.block_samples // fleet.count, fleet.steps - 1)
    return asdict(case) | clock.report(settled) | _storage(clock, asked, seconds, needs, inside, hedged, settled)


class _Clock:
    """When each worker starts and ends each batch, and when each step starts; all ranks start it together."""

    def __init__(self, case: Case, fleet: Fleet, work: float) -> None:
        self.case = case
        self.fleet = fleet
        self.work = work
        self.taken = np.zeros((fleet.steps, fleet.ranks))
        self.ready = np.zeros((fleet.steps, fleet.ranks))
        self.start = np.zeros(fleet.steps)
        self._done = np.zeros(fleet.ranks * case.workers)

    def begin(self, step: int) -> Floats:
        """A worker starts a batch when the previous one is done and the step AHEAD before has ended: its rank then
        requests this batch. At the start all slots are free."""
        if step < SharedSlots.COUNT:
            return self._done
        return np.maximum(self._done, self.start[step - AHEAD] + self.case.step)

    def done(self, step: int, when: Floats) -> None:
        """Workers are done: a rank takes its batch when all of its workers are, the step starts when all ranks have
        one."""
        self._done = when
        self.ready[step] = when.reshape(self.fleet.ranks, -1).max(axis=1)
        free = 0.0
        if step:
            free = self.start[step - 1] + self.case.step
        self.taken[step] = np.maximum(self.ready[step], free)
        self.start[step] = self.taken[step].max()

    def report(self, settled: int) -> dict[str, Any]:
        """Waiting and skew of the steps after the first block."""
        stalls = (np.diff(self.start)[settled:] - self.case.step).round(9).clip(0) + 0.0
        behind = self.taken[settled + 1 :].max(axis=1) - np.median(self.taken[settled + 1 :], axis=1)
        return {
            "first_batch_s": rounded(float(self.start[0])),
            "stalled_share": rounded(float(stalls.sum() / (self.start[-1] - self.start[settled]))),
            "stalled_steps": int((stalls > 0).sum()),
            "longest_stall_s": rounded(float(stalls.max())),
            "skew_p50_s": rounded(float(np.percentile(behind, 50))),
            "skew_max_s": rounded(float(behind.max())),
        }


def _storage(
    clock: _Clock,
    asked: Floats,
    seconds: Floats,
    needs: Needs,
    inside: NDArray[np.bool_],
    hedged: int,
    settled: int,
) -> dict[str, Any]:
    """Requests per second and bytes in flight, from the end of the first block to the start of the last step."""
    low = clock.start[settled]
    high = clock.start[-1]
    times = asked[inside]
    takes = seconds[inside]
    weights = needs.requests[inside]
    spans = max(1, int(high - low))
    rate = np.histogram(times, bins=spans, range=(low, low + spans), weights=weights)[0]
    fine = np.histogram(times, bins=spans * 10, range=(low, low + spans), weights=weights)[0]
    order = np.argsort(times)
    ends = np.sort(times + takes)
    grid = np.linspace(low, high, 10 * spans)
    flying = np.searchsorted(times[order], grid, side="right") - np.searchsorted(ends, grid, side="right")
    bytes_each = synthetic.CHUNK * synthetic.SAMPLE_BLOCKS * BLOCK
    return {
        "per_s_mean": rounded(float(rate.mean())),
        "per_s_p50": rounded(float(np.percentile(rate, 50))),
        "per_s_p99": rounded(float(np.percentile(rate, 99))),
        "per_s_max": int(rate.max()),
        "per_100ms_max": int(fine.max()),
        "flight_p50_gb": rounded(float(np.percentile(flying, 50)) * bytes_each / 1e9),
        "flight_max_gb": rounded(float(flying.max()) * bytes_each / 1e9),
        "hedged": hedged,
    }


def _grouped(part: Ints, steps: int) -> list[Ints]:
    """For each step, the indices of its entries."""
    order = np.argsort(part, kind="stable")
    borders = np.searchsorted(part[order], np.arange(steps + 1))
    return [order[low:high] for low, high in zip(borders[:-1], borders[1:], strict=True)]


def _before(worker: Ints, seconds: Floats) -> Floats:
    """The sum over earlier entries of the same worker."""
    order = np.argsort(worker, kind="stable")
    total = np.cumsum(seconds[order]) - seconds[order]
    first = np.searchsorted(worker[order], worker[order])
    sums = np.empty(len(worker))
    sums[order] = total - total[first] if len(total) else total
    return sums


if __name__ == "__main__":
    sys.exit(main())
