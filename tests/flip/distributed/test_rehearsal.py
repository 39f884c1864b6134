"""Tests traced steps of large runs, without GPUs: traffic, memory and graphs match the golden file.

A commit that changes these numbers must give the reason.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flip import model_costs
from flip.distributed import parallel
from tests.flip.distributed.rehearsal import CASES, PARTS
from tests.harness.common import ROOT

GOLDEN = Path(__file__).with_name("rehearsal.json")
"""FLIP_GOLDEN=write updates this file."""


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


EXPENSIVE = [str(CASES[3]), f"memory of {CASES[2]}", "graphs of steps, accumulate 4, padding attend"]
SLOWEST = [f"memory of {case}" for case in (CASES[0], CASES[1], CASES[3])]
"""EXPENSIVE and SLOWEST take 25 and 70 s of processor time, all other parts together 42 s.
`make test` traces the memory of two steps, in which weights are gathered once per step, and once per pass."""


@pytest.mark.parametrize("parts", [
    pytest.param([name for name in PARTS if name not in EXPENSIVE + SLOWEST], marks=pytest.mark.long, id="others"),
    pytest.param(EXPENSIVE, marks=pytest.mark.long, id="expensive"),
    pytest.param(SLOWEST, marks=pytest.mark.slow, id="slowest"),
])  # fmt: skip
def test_rehearsal_of_large_runs_matches_golden_file(golden, parts):
    """Traces the steps again and compares collectives, memory peaks, kernels and graphs with the file."""
    command = [sys.executable, "-m", "tests.flip.distributed.rehearsal", *parts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    if os.environ.get("FLIP_GOLDEN") == "write":
        golden.update(seen)
        lines = json.dumps({name: golden[name] for name in PARTS if name in golden}, indent=1)
        GOLDEN.write_text(lines + "\n", encoding="utf-8")
    assert seen == {name: golden[name] for name in parts}


def test_golden_file_lists_every_part(golden):
    assert list(golden) == list(PARTS)


def test_golden_traffic_stays_within_limits(golden):
    """For H/14 a step gathers 59 units of weights once, 58 of them in bf16, and the text features."""
    accumulating, nodes = (golden[str(case)]["collectives"] for case in CASES[:2])
    assert accumulating["gathers of 8"][0] <= 60
    between = {kind: gigabytes for kind, (_, gigabytes) in nodes.items() if not kind.endswith(" of 8")}
    assert between["reductions of 64"] <= 0.5, "gradients"
    assert sum(between.values()) <= 0.5 + 0.54, "all traffic that leaves a node"
    assert between["gathers of 512"] + between["scatters of 512"] <= 0.54, "features"
    assert golden["loss of 128 pairs on 512 ranks, tile 65536"] <= 120


def test_auto_resolves_to_replica_per_node_without_resharding(golden):
    resolved = [(golden[str(case)]["replicate"], golden[str(case)]["reshard"]) for case in CASES]
    assert resolved == [(max(1, case.ranks // 8), "yes" if case.reshard == "yes" else "no") for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_planned_memory_matches_traced_peak(golden, case):
    config = case.config()
    seen = golden[f"memory of {case}"]
    plan = model_costs.stage_memory(config, config.stages[0])
    assert plan["total"] / 1e9 == pytest.approx(seen["passes"], rel=0.06)
    # The AdamW step needs only weights, moments and gradients, which ``device_memory`` includes.
    held = (plan["weights"] + plan["moments"]) / 3 * 4
    assert seen["optimiser"] <= 1.02 * (held + plan["batch"]) / 1e9


def test_stage_compiles_graphs_in_its_first_step_only(golden):
    """Six steps; the last three are unmasked, so their images have other shapes. A graph break would fail the trace."""
    for name, graphs in golden.items():
        if name.startswith("graphs"):
            assert graphs[0] > 0, name
            assert graphs[1:3] == [0, 0], name
            assert graphs[4:] == [0, 0], name
            assert sum(graphs) < parallel.RECOMPILE_LIMIT, name
