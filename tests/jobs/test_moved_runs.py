"""Moving runs to another disk, as docs/cluster_events.md describes it: they continue from their checkpoints with the
same bits. Under a new path they get a new remote folder, and read the checkpoints in the old one."""

import json
import shutil

import pytest

from flip.runs import checkpoint_folder
from flip.runs.rundir import read_json
from jobs.common.text import size
from tests.harness.command_line import JobsCommandLine
from tests.jobs.commands.test_debug import weights

pytestmark = pytest.mark.long
RUNS = "runs:\n  base: {}\n"


@pytest.fixture
def desk(tmp_path, data):
    """A command line whose run ``base`` was stopped at S = 32 of 48, and its weights at 48 as ``desk.expected``."""
    desk = JobsCommandLine(tmp_path, data)
    desk.head = desk.head.replace("keep: 9", f"keep: 9, url: {tmp_path}/bucket")
    desk.type("submit", "--watch", runs=RUNS)
    run = desk.run("base")
    desk.expected = weights(run, 48)
    newest = checkpoint_folder.checkpoints(run)[-1]
    run.result.unlink()
    shutil.rmtree(newest.path)
    (run.attempt(1) / "end.json").unlink()
    desk.address = read_json(run.checkpoints / "url.json")["url"]
    return desk


def is_copy(desk):
    """Whether ``status`` says that the run is a copy."""
    return "copied or moved to this folder, and not submitted since" in desk.call("status", "demo", "--json")


def inherited(desk):
    """What ``explain`` says of remote folders whose checkpoints the run only reads."""
    return json.loads(desk.call("explain", "demo/base", "--json"))["inherited"]


def submit(desk, *options):
    """Submit again; the run must continue at S = 32 and end with the weights of the run that was never moved.

    Returns whether it has the same remote folder.
    """
    output = desk.type("submit", "--watch", *options, runs=RUNS)
    assert "base: complete" in output
    run = desk.run("base")
    assert run.attempt_numbers() == [1, 2] and read_json(run.attempt(2) / "start.json")["resumes_from"] == 32
    actual = weights(run, 48)
    assert desk.expected and actual.keys() == desk.expected.keys()
    assert all((actual[name] == tensor).all() for name, tensor in desk.expected.items())
    return read_json(run.checkpoints / "url.json")["url"] == desk.address


def move_alone(desk):
    (desk.folder / "disk" / "demo").mkdir(parents=True)
    desk.run("base").path.rename(desk.folder / "disk" / "demo" / "base")
    desk.runs = desk.folder / "disk"


def test_run_moved_alone_continues_from_its_remote_checkpoints(desk):
    """``mv`` of one run into the folder of the same sweep on another disk: its parent can be listed."""
    old = desk.run("base").path
    move_alone(desk)
    assert not is_copy(desk)
    assert not submit(desk) and not old.exists()
    (folder,) = inherited(desk)
    assert folder["address"] == desk.address and folder["can_be_taken"]
    assert f"{desk.address}, written before this run directory was copied, renamed" in desk.call("explain", "demo/base")


def test_plan_names_the_old_remote_folder_until_it_is_taken_over(desk):
    move_alone(desk)
    entries = checkpoint_folder.checkpoints(desk.run("base"))
    total = sum(facts["bytes"] for entry in entries for facts in entry.record["files"].values())
    assert inherited(desk) == [{"address": desk.address, "commits": len(entries), "bytes": total, "can_be_taken": True}]
    plan = " ".join(desk.type("submit", "--dry-run", runs=RUNS).split())
    assert f"checkpoints ({size(total)}) in {desk.address}, written" in plan and "submit it with --take-over" in plan
    plan = " ".join(desk.type("submit", "--dry-run", "--take-over", runs=RUNS).split())
    assert "asked first: This lets base delete inherited checkpoints" in plan and "it takes them over" in plan
    desk.type("submit", "--take-over", runs=RUNS, code=78)
    assert inherited(desk), "without an answer nothing is taken over"
    assert not submit(desk, "--take-over", "--yes")
    assert inherited(desk) == []


@pytest.mark.slow
@pytest.mark.parametrize("placeholder", [True, False])
def test_moved_sweep_counts_as_moved_only_with_empty_folder_in_old_place(desk, placeholder):
    (desk.folder / "disk").mkdir()
    (desk.runs / "demo").rename(desk.folder / "disk" / "demo")
    if placeholder:
        (desk.runs / "demo").mkdir()
    desk.runs = desk.folder / "disk"
    assert is_copy(desk) != placeholder
    assert not submit(desk)


@pytest.mark.slow
def test_link_in_place_of_moved_root_changes_nothing(desk):
    desk.runs.rename(desk.folder / "disk")
    desk.runs.symlink_to(desk.folder / "disk")
    assert not is_copy(desk)
    assert submit(desk)


@pytest.mark.slow
def test_link_in_place_of_moved_sweep_is_refused(desk):
    (desk.folder / "disk").mkdir()
    (desk.runs / "demo").rename(desk.folder / "disk" / "demo")
    (desk.runs / "demo").symlink_to(desk.folder / "disk" / "demo")
    assert "symbolic link" in desk.type("submit", runs=RUNS, code=77)
