"""Tests that all rows of `flip doctor --measure` for GPUs run, on a stub of CUDA, up to a page that says what it is."""

import os
import subprocess

import pytest

from flip.runs.errors import ConfigError
from jobs.common.cluster_profile import ClusterProfile
from jobs.measuring.page import REHEARSAL
from jobs.measuring.rows import FAULTS, ONE_NODE, local_rows
from jobs.planning import assumptions
from jobs.planning.measurement import MEASURED, SKIPPED, read_measurement
from tests.cuda_stub import build, measure
from tests.cuda_stub.test_cuda_stub import LIMIT, pytestmark  # noqa: F401
from tests.harness.common import ROOT

AMPERE = 80
"""A compute capability without cuDNN's attention, which plans on a real device."""
PRETENDED = 8
"""GPUs of the stub."""


@pytest.mark.timeout(3 * LIMIT + 60)
def test_rows_of_gpus_pass_through_to_a_page_of_a_rehearsal(tmp_path):
    environment = build.prepare(AMPERE)
    python = environment.pop("STUB_PYTHON")
    command = [python, "-m", "tests.cuda_stub.measure", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3 * LIMIT)
    assert done.returncode == 0, done.stderr[-4000:]
    measured = read_measurement(str(tmp_path / "measured.json"))
    failed = {row.name: (row.status, row.detail) for row in measured.rows if row.status not in (MEASURED, SKIPPED)}
    assert failed == {}
    assert [row.name for row in measured.rows] == [row.name for row in local_rows("cuda", measure.GPUS, 2, ())]
    skipped = {"link_network": ONE_NODE, **{f"fault_{kind}": measure.ZEROS for kind in FAULTS}}
    assert {row.name: row.detail for row in measured.rows if row.status == SKIPPED} == skipped
    on_gpus = [row for row in measured.rows if row.values.get("device") == "cuda"]
    assert len(on_gpus) == 12, "products, copies, six steps, a trace, collectives, a save, losses"
    assert measured.row("link_node").values["ranks"] == PRETENDED
    assert os.path.getsize(tmp_path / "report.html") and REHEARSAL in (tmp_path / "report.md").read_text()
    with pytest.raises(ConfigError, match="a rehearsal measures nothing"):
        assumptions.measurement_of(ClusterProfile("a", measured=str(tmp_path / "measured.json")))
