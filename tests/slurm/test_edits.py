"""Tests of a sweep that is edited between submissions, on a real Slurm."""

import json

import pytest

from tests.harness.command_line import STEPS, SlurmCommandLine

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
SHORT = 160


@pytest.fixture
def desk(start_slurm, tmp_path, emoji):
    desk = SlurmCommandLine(start_slurm(nodes=3, gpus=0, cpus=2), tmp_path, emoji)
    desk.text = desk.text.replace(f"samples: {STEPS * 16}", f"samples: {SHORT}").split("runs:\n")[0]
    return desk


def edited(desk, **runs):
    """Replace the runs of the sweep by the given runs."""
    lines = [f"  {name}: {{stages.pretrain.{setting}}}\n" for name, setting in runs.items()]
    desk.text = desk.text.split("runs:\n")[0] + "runs:\n" + "".join(lines)
    return desk


def states(desk):
    return {name: row["state"] for name, row in desk.status().items()}


def test_submit_keeps_forks_restarts_and_prunes_runs_of_edited_sweep(desk):
    output = edited(desk, one="mask: 0.5", long="samples: 160000").submit("--dry-run", "--script")
    assert "#SBATCH" in output and "would start at" in output and not desk.runs.exists()
    desk.submit()
    desk.until_step("long", 7)
    # a changed configuration under a known name is refused; with `keep` it changes nothing
    edited(desk, one="mask: 0.25", long="samples: 160000")
    assert "--changed" in desk.submit(code=78)
    desk.until(lambda: states(desk)["one"] == "complete", "the end of one")
    desk.submit("--changed", "keep")
    assert states(desk) == {"one": "complete", "long": "running"}
    # a dropped run saves, ends and goes to the trash; the changed run starts anew next to the old run, and is watched
    output = edited(desk, one="mask: 0.25").submit("--prune", "--changed", "fork", "--watch", "--yes")
    assert "one-v2: complete" in output and states(desk) == {"one": "complete", "one-v2": "complete"}
    assert [path.name for path in desk.runs.glob(".trash/*/demo/*")] == ["long"]
    # with `restart` the changed run replaces its newest version
    edited(desk, one="mask: 0.75").submit("--changed", "restart", "--watch", "--yes")
    assert desk.run("one-v2").result.exists() and "mask: '0.75'" in desk.run("one-v2").config.read_text()
    assert states(desk) == {"one": "complete", "one-v2": "complete"}
    desk.until_idle()
    assert desk.processes() == []
    # the report and the doctor work afterwards
    desk.type("report", "demo")
    page = (desk.runs / "demo" / "report.html").read_text("utf-8")
    assert "one-v2" in page
    # Doctor exits with 0: all promises hold.
    assert json.loads(desk.type("doctor", "--cluster", desk.cluster, "--json"))
