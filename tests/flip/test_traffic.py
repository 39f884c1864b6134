"""Tests the model of the collectives of a step against the counts of a traced step, and its time estimates."""

import json
from collections import Counter
from pathlib import Path

import pytest

from flip.config.schema import Compute
from flip.traffic import CALL, NETWORK_HOP, NVLINK_HOP, PAYLOAD, Collective, Links, exposed_seconds, step_phases
from tests.flip.distributed.rehearsal import CASES
from tests.flip.test_flops import sized

GOLDEN = json.loads((Path(__file__).parent / "distributed" / "rehearsal.json").read_text(encoding="utf-8"))
H100 = Links(8, 3600, 400)


def phases(size="H/14", ranks=512, local=128, **compute):
    return step_phases(sized(size), Compute(precision="bf16", **compute), local, ranks)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_step_phases_match_counts_and_bytes_of_traced_step(case):
    compute = case.config().compute
    calls = Counter()
    gigabytes = Counter()
    for phase in step_phases(sized(case.size), compute, case.local, case.ranks):
        for collective in phase.collectives:
            kind = f"{collective.kind}s of {collective.ranks}"
            calls[kind] += phase.times * collective.calls
            gigabytes[kind] += phase.times * collective.bytes / 1e9
    counts = {kind: [calls[kind], pytest.approx(gigabytes[kind], abs=0.0051)] for kind in sorted(calls)}
    assert counts == GOLDEN[str(case)]["collectives"]


@pytest.mark.parametrize("compute", [{}, {"accumulate": 4}, {"recompute": "block"}, {"accumulate": 2, "reshard": "no"}])
def test_step_phases_shares_sum_to_1(compute):
    assert sum(phase.times * phase.share for phase in phases(**compute)) == pytest.approx(1)


def test_collective_seconds_follow_ring_model():
    """A ring moves all bytes except the rank's own over the slowest link. Each hop adds its latency."""
    inside = Collective("gather", 8, 1, 2, 8_000_000)
    assert inside.seconds(H100) == pytest.approx(7e6 / (450e9 * PAYLOAD) + 2 * (CALL + 7 * NVLINK_HOP))
    across = Collective("scatter", 16, 1, 1, 16_000_000)  # two nodes: eight adapters of 50 GB/s are slower than NVLink
    transfer = 15e6 / (400e9 * PAYLOAD)
    assert across.seconds(H100) == pytest.approx(transfer + CALL + 14 * NVLINK_HOP + NETWORK_HOP)
    copies = Collective("reduction", 64, 8, 1, 64_000_000)  # one rank per node: its own adapter, both directions
    transfer = 2 * 63e6 / (50e9 * PAYLOAD)
    assert copies.seconds(H100) == pytest.approx(transfer + CALL + 2 * 63 * NETWORK_HOP)
    assert copies.nodes(H100) == 64 and across.nodes(H100) == 2 and inside.nodes(H100) == 1


def test_exposed_seconds_shrink_with_longer_computation():
    step = phases(replicate=64, reshard="no")
    slow, fast = (exposed_seconds(step, seconds, H100) for seconds in (0.001, 1.0))
    everything = sum(phase.times * collective.seconds(H100) for phase in step for collective in phase.collectives)
    assert 0 < fast < 0.2 * everything < slow < 1.1 * everything
    # The first gather, the last sums and the reductions of the loss remain.
    assert exposed_seconds(step, 1.0, H100) == exposed_seconds(step, 2.0, H100)
    assert exposed_seconds(phases(ranks=1), 1.0, H100) == 0


def test_exposed_seconds_shrink_without_resharding_and_with_replicas():
    sharded, unresharded, copies = (
        exposed_seconds(phases(**compute), 0.18, H100)
        for compute in ({}, {"reshard": "no"}, {"reshard": "no", "replicate": 64})
    )
    assert sharded > unresharded > copies
