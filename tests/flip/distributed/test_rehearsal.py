"""The traffic of large runs, without their GPUs: counts that change only with a reason in the commit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.common import ROOT

GOLDEN = Path(__file__).with_name("rehearsal.json")
"""Rewritten with FLIP_GOLDEN=write."""


@pytest.fixture(scope="module")
def counts():
    command = [sys.executable, "-m", "tests.flip.distributed.rehearsal"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.long
def test_traffic_and_kernels_of_large_runs(counts):
    if os.environ.get("FLIP_GOLDEN") == "write":
        GOLDEN.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    assert counts == json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.mark.long
def test_limits(counts):
    """H/14: 61 units of weights, 58 of them in bf16, are gathered once per step, and a gather of features."""
    kept, freed = (
        counts[f"H/14 mask 0.5, 8 ranks, accumulate 4{more}"]["gathers of 8"] for more in ("", ", resharded")
    )
    assert kept[0] == 62 and kept[1] < 2 and freed[0] > 500 and freed[1] > 17
    nodes = counts["H/14 mask 0.5, 512 ranks, 64 nodes"]
    between = {kind: gigabytes for kind, (_, gigabytes) in nodes.items() if not kind.endswith(" of 8")}
    assert between["reductions of 64"] <= 0.5, "gradients"
    assert between["gathers of 512"] + between["scatters of 512"] <= 0.54, "features"
    assert counts["loss of 128 pairs on 512 ranks, tile 65536"] <= 120
