"""Tests of a user's exceeded quota (EDQUOT) on a real Slurm."""

import pytest

from flip.runs.rundir import read_json
from tests.harness.command_line import STEPS, SlurmCommandLine
from tests.harness.common import metric_lines
from tests.harness.quota import VARIABLES, Quota, compiler

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.kill]
RUNS = ("saves", "metrics", "everything")


@pytest.fixture
def quota(tmp_path, monkeypatch):
    if compiler() is None:
        pytest.skip("no C compiler")
    quota = Quota(tmp_path / "quota")
    for name, value in quota.env.items():
        monkeypatch.setenv(name, value)
    return quota


def test_exceeded_quota(start_slurm, tmp_path, emoji, quota):
    """Writes of checkpoints, of metrics, and of all files of a run, also its causes and its end.json, fail for a while.

    EDQUOT is injected by a library in the batch script and its processes (`tests.harness.quota`): most machines have no
    file system with quotas.
    """
    desk = SlurmCommandLine(start_slurm(nodes=4, gpus=0, cpus=2), tmp_path, emoji)
    profile = desk.cluster.read_text()
    desk.cluster.write_text(profile.replace("[SLURM_CONF]", f"[SLURM_CONF, {', '.join(VARIABLES)}]"))
    head = desk.text.partition("runs:\n")[0]
    desk.text = head + "runs:\n" + "".join(f"  {name}: {{}}\n" for name in RUNS)
    desk.submit()
    for name in RUNS:
        desk.until_step(name, 7)
    folder = desk.run("saves").path.parent
    quota.exceed(f"{folder}/saves/checkpoints", f"{folder}/metrics/metrics", f"{folder}/everything")
    for name in ("saves", "metrics"):
        end = desk.run(name).attempt(1) / "end.json"
        desk.until(end.exists, f"the end of {name}")
    everything = desk.run("everything")
    refused = f"{everything.attempt(1)}/end.json"
    desk.until(lambda: any(refused in path for path in quota.refused()), "a refused end.json")
    assert any(f"{everything.attempt(1)}/cause." in path for path in quota.refused()), quota.refused()
    assert not everything.causes(1) and not (everything.attempt(1) / "end.json").exists()
    quota.restore()
    desk.until(lambda: all(row["state"] == "complete" for row in desk.status().values()), "the end of all")
    for name in RUNS:
        run = desk.run(name)
        end = read_json(run.attempt(1) / "end.json")
        assert (end["cause"], end["code"], end["action"], end["delay"]) == ("storage", 69, "requeue", 30.0), end
        assert run.newest_attempt() == 2 and read_json(run.attempt(2) / "start.json")["resumes_from"] > 0
        assert [line["step"] for line in metric_lines(run)] == list(range(1, STEPS + 1)), name
    desk.until_idle()
    assert desk.processes() == []
