"""Tests on a real Slurm of the rows that cause faults in jobs: a killed agent of a node, and a preemption."""

from dataclasses import replace

import pytest

from jobs.common.cluster_profile import load_profile
from jobs.measuring import cluster
from jobs.measuring.verdicts import WORKS, judge
from jobs.planning.measurement import MEASURED
from jobs.reporting.faults import PARTS
from tests.jobs.planning.test_measurement import example

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.mark.timeout(1200)
def test_killed_agent_and_preemption_on_two_nodes(start_slurm, tmp_path, monkeypatch):
    site = start_slurm()
    for name in ("RUNS", "CACHE"):
        monkeypatch.setenv(f"FLIP_{name}", str(tmp_path / name.lower()))
    path = tmp_path / "cpus.yaml"  # its GPUs are none that a driver shows
    path.write_text(site.profile.read_text().replace("gpus_per_node: 8", "gpus_per_node: 0"))
    (tmp_path / "runs").mkdir()
    before = example()
    before = replace(before, nodes=2, machine=replace(before.machine, gpus=0, gpu=""))
    measured = cluster.with_faults(before, load_profile(str(path)), tmp_path / "runs", 800, None)
    agent, preemption = measured.rows
    assert agent.status == preemption.status == MEASURED, (agent.detail, preemption.detail)
    assert (agent.values["cause"], agent.values["attempts"]) == ("node", 2)
    assert (preemption.values["cause"], preemption.values["attempts"]) == ("stopped", 2)
    assert preemption.values["requeue_seconds"] == 6 and "cred_expire" in preemption.values["setting"]
    for row in (agent, preemption):
        # The end of a killed agent has all parts, too.
        assert {f"{part}_seconds" for part in PARTS} <= row.values.keys()
        assert (row.values["scheduler"], row.values["nodes"], row.values["ranks"]) == ("slurm", 2, 2)
    assert {verdict.verdict for verdict in judge(measured) if "bit for bit" in verdict.because} == {WORKS}
