"""Tests of submitting and cancelling sweeps of several runs on a real Slurm."""

import time

import pytest

from flip.runs.rundir import create_json, read_json
from tests.harness.command_line import STEPS, SlurmCommandLine

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.kill]


@pytest.fixture
def desk(start_slurm, tmp_path, emoji):
    return SlurmCommandLine(start_slurm(nodes=4, gpus=0, cpus=2), tmp_path, emoji)


def test_array_job_completes_preempted_run_and_stops_crashing_run(desk):
    desk.submit()
    arrays = list((desk.runs / "demo" / ".slurm").iterdir())
    assert len(arrays) == 1 and len((arrays[0] / "runs").read_text().splitlines()) == 3
    desk.until_step("preempted", 7)
    node = desk.job("preempted").nodes
    desk.here.preempt(nodes=1, nodelist=node, seconds=3)
    ended = ("complete", "failed")
    desk.until(lambda: all(row["state"] in ended for row in desk.status().values()), "the end of all")
    rows = desk.status()
    assert {name: (row["state"], row["attempts"]) for name, row in rows.items()} == {
        "preempted": ("complete", 2),
        "crashing": ("failed", 3),
        "clean": ("complete", 1),
    }
    assert "3 failed attempts without a new checkpoint" in rows["crashing"]["reason"]
    assert "read the logs" in desk.type("status", "demo/crashing")
    assert "Traceback" in desk.type("logs", "demo/crashing", "--err")
    assert [row["step"] for row in (rows["preempted"], rows["clean"])] == [STEPS, STEPS]
    desk.until_idle()
    assert desk.processes() == []
    assert "--retry" in desk.submit()
    assert len(list((desk.runs / "demo" / ".slurm").iterdir())) == 1, "a second submit starts nothing"


def test_cancelled_runs_stay_stopped_until_retry(desk):
    desk.text = desk.text.replace(f"samples: {STEPS * 16}", "samples: 160000").replace("crashing", "by_hand")
    desk.submit("--only", "[pb]*")
    for name in ("preempted", "by_hand"):
        desk.until_step(name, 7)
    assert desk.type("cancel", "demo/preempted", "--yes", "--why", "wrong rate").strip() == "cancelled: preempted"
    desk.here.call("scancel", desk.job("by_hand").id)
    desk.until(lambda: all(row["state"] == "cancelled" for row in desk.status().values()), "both cancelled")
    assert desk.status()["preempted"]["reason"].endswith("wrong rate")
    desk.until_idle()
    time.sleep(10)  # longer than a requeue takes
    assert {name: (row["state"], row["attempts"]) for name, row in desk.status().items()} == {
        "preempted": ("cancelled", 1),
        "by_hand": ("cancelled", 1),
    }
    assert desk.here.call("squeue", "-h").strip() == "" and desk.processes() == []
    saved = {name: read_json(desk.run(name).attempt(1) / "end.json")["commits"] for name in ("preempted", "by_hand")}
    assert all(saved.values()), "both runs save before they exit"
    desk.submit("--only", "[pb]*", code=0)
    assert desk.job("by_hand").state != "PENDING", "submit does not restart a cancelled run without --retry"
    desk.submit("--only", "[pb]*", "--retry")
    for name in ("preempted", "by_hand"):
        desk.until_step(name, 1, attempt=2)
        assert read_json(desk.run(name).attempt(2) / "start.json")["resumes_from"] == saved[name]
    create_json(desk.run("by_hand").cancel, {"who": "ann", "why": "the signal came before anybody listened"})
    desk.until(lambda: desk.status()["by_hand"]["state"] == "cancelled", "a run that only saw cancel.json")
    for _ in range(2):  # the second cancel kills the job even if it is still saving
        desk.type("cancel", "demo/preempted", "--yes")
    desk.until(lambda: desk.status()["preempted"]["state"] == "cancelled", "its end")
    desk.until_idle()
    assert desk.processes() == []
