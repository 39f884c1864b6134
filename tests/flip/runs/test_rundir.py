"""Tests the run directory: attempt numbers, atomic writes, causes, and removal of temporary files."""

import errno
import json
import multiprocessing
import os

import pytest

from flip.runs import rundir


@pytest.fixture
def run(tmp_path):
    return rundir.RunDir(tmp_path / "sweep" / "run")


def _win(path, out):
    out.put(rundir.RunDir(path).start_attempt({"host": "here"}))


def test_create_json_recognises_its_own_link(run, monkeypatch):
    """A client of NFS that repeats a request, because the first answer was lost, gets EEXIST for its own link."""
    link = os.link

    def repeated(source, target):
        link(source, target)
        link(source, target)

    run.path.mkdir(parents=True)
    monkeypatch.setattr(os, "link", repeated)
    assert rundir.create_json(run.cancel, {"who": "ann"}) and not rundir.create_json(run.cancel, {"who": "bob"})
    assert rundir.read_json(run.cancel) == {"who": "ann"} and [p.name for p in run.path.iterdir()] == [run.cancel.name]


def test_start_attempt_gives_each_number_to_a_single_racer(run):
    context = multiprocessing.get_context("forkserver")
    queue = context.Queue()
    racers = [context.Process(target=_win, args=(str(run.path), queue)) for _ in range(4)]
    for racer in racers:
        racer.start()
    won = sorted(queue.get(timeout=60) for _ in racers)
    for racer in racers:
        racer.join()
    assert won == [1, 2, 3, 4] and run.newest_attempt() == 4
    assert run.is_current_attempt(4) and not run.is_current_attempt(3)
    assert json.loads((run.attempt(2) / "start.json").read_text())["attempt"] == 2


def test_write_json_keeps_old_text_if_write_fails(tmp_path):
    path = tmp_path / "status.json"
    rundir.write_json(path, {"step": 1})
    with pytest.raises(ValueError):
        rundir.write_json(path, {"loss": float("nan")})
    assert rundir.read_json(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]


def test_write_cause_keeps_first_cause_of_each_rank(run):
    n = run.start_attempt({})
    assert run.write_cause(n, 1, "data", 65, "shard 3 is damaged")
    assert not run.write_cause(n, 1, "crash", 70, "later")
    run.write_cause(n, 0, "peer_lost", 70, "gone")
    assert [(c["rank"], c["cause"]) for c in run.causes(n)] == [(0, "peer_lost"), (1, "data")]
    assert sorted(p.name for p in run.attempt(n).iterdir()) == ["cause.0.json", "cause.1.json", "start.json"]


def test_read_json_names_damaged_file(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match="x.json"):
        rundir.read_json(tmp_path / "x.json")
    assert rundir.read_json(tmp_path / "none.json") is None


def test_start_attempt_removes_temporary_files_of_killed_writers(run):
    n = run.start_attempt({})
    left = [run.path / f"status.json.tmp.{16 * 'a'}", run.attempt(n) / f"cause.0.json.new.{16 * '7'}"]
    for path in left:
        path.write_text("{")
    rundir.write_json(run.status, {"step": 1})
    run.start_attempt({})
    assert not any(path.exists() for path in left) and rundir.read_json(run.status) == {"step": 1}


def test_start_attempt_spares_temporary_file_of_concurrent_cancel(run, monkeypatch):
    link = os.link

    def begins(*paths):
        run.start_attempt({})
        link(*paths)

    run.path.mkdir(parents=True)
    monkeypatch.setattr(os, "link", begins)
    assert rundir.create_json(run.cancel, {"who": "ann"}) and rundir.read_json(run.cancel) == {"who": "ann"}
    assert not list(run.path.glob("*.new.*"))


def test_exists_raises_error_if_storage_fails(tmp_path, monkeypatch):
    """A run must not count as not cancelled because its file system does not answer."""
    assert rundir.exists(tmp_path) and not rundir.exists(tmp_path / "x") and not rundir.exists(tmp_path / "x" / "y")

    def stale(path):
        raise OSError(errno.ESTALE, "Stale file handle", path)

    monkeypatch.setattr(os, "stat", stale)
    with pytest.raises(OSError, match="Stale"):
        rundir.exists(tmp_path)
