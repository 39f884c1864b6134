"""Moving runs to another disk, as docs/cluster.md describes it: they continue from their commits with the same bits."""

import shutil

import pytest

from flip.runs import commit
from flip.runs.rundir import read_json
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
    newest = commit.commits(run)[-1]
    run.result.unlink()
    shutil.rmtree(newest.path)
    (run.attempt(1) / "end.json").unlink()
    desk.address = read_json(run.checkpoints / "url.json")["url"]
    return desk


def is_copy(desk):
    """Whether ``status`` says that the run is a copy."""
    return "copied or moved to this folder, and not submitted since" in desk.call("status", "demo", "--json")


def submit(desk):
    """Submit again; the run must continue at S = 32 and end with the weights of the run that was never moved."""
    output = desk.type("submit", "--watch", runs=RUNS)
    assert "base: complete" in output
    run = desk.run("base")
    assert run.attempt_numbers() == [1, 2] and read_json(run.attempt(2) / "start.json")["resumes_from"] == 32
    actual = weights(run, 48)
    assert desk.expected and actual.keys() == desk.expected.keys()
    assert all((actual[name] == tensor).all() for name, tensor in desk.expected.items())
    return read_json(run.checkpoints / "url.json")["url"] == desk.address


def test_run_moved_alone_continues_with_its_remote_checkpoints(desk):
    """``mv`` of one run into the folder of the same sweep on another disk: its parent can be listed."""
    (desk.folder / "disk" / "demo").mkdir(parents=True)
    old = desk.run("base").path
    old.rename(desk.folder / "disk" / "demo" / "base")
    desk.runs = desk.folder / "disk"
    assert not is_copy(desk)
    assert submit(desk) and not old.exists()


@pytest.mark.slow
@pytest.mark.parametrize("placeholder", [True, False])
def test_moved_sweep_counts_as_moved_only_with_empty_folder_in_old_place(desk, placeholder):
    (desk.folder / "disk").mkdir()
    (desk.runs / "demo").rename(desk.folder / "disk" / "demo")
    if placeholder:
        (desk.runs / "demo").mkdir()
    desk.runs = desk.folder / "disk"
    assert is_copy(desk) != placeholder
    assert submit(desk) == placeholder


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
