"""Checks of a program before it starts, and what its plan says."""

import json

import pytest
import yaml

from jobs.common.cluster_profile import ClusterProfile, node
from jobs.workloads.loading import requested_runs
from jobs.workloads.workload import Place
from tests.harness.command_sweep import CommandSweep


@pytest.fixture
def sweep(tmp_path):
    return CommandSweep(tmp_path)


def plan(sweep, *arguments, code=0):
    """The output of a dry run."""
    (sweep.folder / "demo.yaml").write_text(yaml.safe_dump(sweep.table, sort_keys=False))
    return sweep.type("submit", "demo.yaml", "--dry-run", *arguments, code=code)


def other_run(sweep, folder, path="other/run"):
    """A run of another sweep that saves into ``folder``."""
    place = sweep.runs / path
    place.mkdir(parents=True)
    record = {"argv": ["true"], "parameters": {"name": "x"}, "code": "c", "world": 1, "resume": {"folder": folder}}
    (place / "command.json").write_text(json.dumps(record))


def test_folder_of_a_run_of_another_sweep_is_refused(sweep, tmp_path):
    sweep.table["resume"]["folder"] = f"{tmp_path}/data/x"
    assert "no other run" in plan(sweep)
    other_run(sweep, f"{tmp_path}/data/./{{name}}")
    text = plan(sweep, code=78)
    assert "the run other/run saves into it already" in text and " rm other/run" in text
    sweep.table["resume"]["folder"] = f"{tmp_path}/data/y"
    assert "no other run" in plan(sweep)
    sweep.table["resume"]["folder"] = "{run}/out"
    plan(sweep)


def test_fork_does_not_save_into_the_folder_of_its_original(sweep, tmp_path):
    sweep.table["resume"]["folder"] = f"{tmp_path}/data"
    other_run(sweep, f"{tmp_path}/data", "demo/demo")
    (sweep.runs / "demo" / "demo" / "identity.json").write_text('{"hash": "another", "schema": 2, "config": {}}')
    assert "the fork would save into the folder of its original" in plan(sweep, "--changed", "fork", code=78)


def test_plan_does_not_invent_the_size_of_checkpoints(sweep):
    text = plan(sweep)
    assert "a program's checkpoints have a size that only it knows" in text and " 0 B" not in text


def test_tracker_follows_a_program(sweep):
    sweep.table["monitor"] = {"wandb": "me/baselines"}
    path = sweep.folder / "demo.yaml"
    path.write_text(yaml.safe_dump(sweep.table, sort_keys=False))
    (request,) = requested_runs(path).runs
    profile = ClusterProfile()
    work = request.workload_at(Place(sweep.runs / "demo", ["demo"], profile, node(profile)))
    assert work.trackers == ["wandb"] and work.record()["monitor"] == {"wandb": "me/baselines"}
    del sweep.table["monitor"]["wandb"]
    sweep.table["monitor"]["wandbb"] = "x"
    assert "Did you mean monitor.wandb" in plan(sweep, code=78)
