"""``flip rm`` moves ended runs of this user to the trash, and deletes only those of their checkpoints in object
storage."""

import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from flip.checkpoint.remote import RemoteCheckpoint
from flip.checkpoint.remote_folder import RemoteFolder
from flip.config import merge
from flip.files.deletion import COMMIT_FILE
from flip.runs import checkpoint_folder
from flip.runs.rundir import RunDir, read_json, write_json, write_text
from jobs.commands import clean, rm
from jobs.submission import removal
from jobs.submission.apply import lock
from tests.jobs.commands import test_clean

Desk = test_clean.Desk
SHARD = "shard-00001-model-00001-of-00001.safetensors"


@pytest.fixture
def desk(tmp_path, capsys, monkeypatch):
    desk = Desk(tmp_path, capsys)
    monkeypatch.setenv("FLIP_RUNS", str(desk.runs))
    return desk


def call(capsys, *words, code=0):
    capsys.readouterr()
    assert rm.main(list(words)) == code
    return "".join(capsys.readouterr())


def test_rm_moves_runs_to_trash_and_clean_deletes_them(desk, capsys):
    run = desk.run()
    other = desk.run("demo/other")
    (run.path / "big").write_bytes(b"x" * 84_000)
    shown = call(capsys, "demo/base", "--yes")
    assert re.search(r"demo/base +8\d\.\d kB", shown)
    assert not run.path.exists() and other.path.exists()
    ((trashed,),) = [list(Path(desk.runs).glob(".trash/*/demo/base"))]
    assert f"restore it with: mv {trashed} {run.path}" in shown and "clean demo --older 0" in shown
    assert clean.main(["demo", "--older", "0", "--yes"]) == 0
    assert not trashed.exists() and other.path.exists()


def test_rm_asks_and_dry_run_moves_nothing(desk, capsys, monkeypatch):
    run = desk.run()
    document = json.loads(call(capsys, "demo", "--dry-run", "--json"))
    (row,) = document["runs"]
    assert row["run"] == "base" and row["bytes"] > 1000 and row["trash"] is None and not document["next"]
    assert "Add --yes." in call(capsys, "demo", code=78)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    questions = []
    monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or "n")
    call(capsys, "demo")
    assert len(questions) == 1 and "Move 1 run, " in questions[0] and " kB, to the trash?" in questions[0]
    assert run.path.exists() and not (desk.runs / ".trash").exists()


def test_active_run_pinned_run_and_link_stay(desk, capsys, monkeypatch):
    pinned = desk.run("demo/pinned")
    holder = desk.run("demo/holder", ["stopped"])
    checkpoint_folder.pin(pinned, holder, "pretrain", 8)
    linked = desk.run("far/run")
    os.symlink(linked.path, desk.runs / "demo" / "link")
    active = desk.run("demo/active")
    (active.result).unlink()
    states = removal.clusters.states

    def with_active(runs):
        known = states(runs)
        return {path: s._replace(state="running") if path.name == "active" else s for path, s in known.items()}

    monkeypatch.setattr(removal.clusters, "states", with_active)
    document = json.loads(call(capsys, "demo/pinned", "demo/link", "demo/active", "--yes", "--json"))
    assert document["runs"] == []
    left = {Path(path).name: why for path, why in document["left_alone"].items()}
    assert str(holder.path) in left["pinned"]
    assert "symbolic link" in left["link"]
    assert "it is running" in left["active"]
    assert pinned.path.exists() and linked.path.exists() and active.path.exists()


def test_run_of_busy_sweep_stays(desk, capsys):
    run = desk.run()
    with lock(run.path.parent):
        assert f"process {os.getpid()}" in call(capsys, "demo", "--yes", code=78)
    assert run.path.exists()


def remote_run(desk, name, bucket):
    """A complete run with a checkpoint whose files are below ``bucket``, as an attempt writes it."""
    run = desk.run(name)
    write_text(run.config, merge.dump(merge.merge([("test", {"checkpoint": {"url": str(bucket)}})])))
    folder = RemoteFolder(run, str(bucket), removal._POLICY, run.start_attempt({}))
    folder.claim()
    path = checkpoint_folder.folder(run, "pretrain", 16, run.newest_attempt())
    path.mkdir(parents=True)
    store = RemoteCheckpoint(folder.checkpoint_url(path), removal._POLICY)
    store.put(SHARD, b"x" * 5000)
    store.put("notes.txt", b"of a person")
    files = {SHARD: {"bytes": 5000, "sha256": "0" * 64}}
    record = {"stage": "pretrain", "samples": 16, "attempt": run.newest_attempt(), "files": files}
    record |= {"url": store.url, "writer": folder.id, "format": 1}
    write_json(path / COMMIT_FILE, record)
    store.put(COMMIT_FILE, json.dumps(record).encode())
    write_json(run.attempt(run.newest_attempt()) / "end.json", read_json(run.attempt(1) / "end.json"))
    return run, Path(store.url.removeprefix("file://"))


def test_remote_checkpoint_is_deleted_with_commit_file_first(desk, capsys, tmp_path, monkeypatch):
    run, place = remote_run(desk, "demo/far", tmp_path / "bucket")
    deleted = []
    delete = RemoteCheckpoint.delete
    monkeypatch.setattr(RemoteCheckpoint, "delete", lambda self, name: deleted.append(name) or delete(self, name))
    shown = call(capsys, "demo/far", "--yes")
    assert "5 kB" in shown and deleted == [COMMIT_FILE, SHARD]
    assert [path.name for path in place.iterdir()] == ["notes.txt"], "only files of the checkpoint are deleted"
    assert not run.path.exists()


def test_remote_checkpoint_of_another_run_directory_is_not_deleted(desk, capsys, tmp_path):
    """A record of the run names the address: it is compared with the computed one, and never a target itself."""
    victim, place = remote_run(desk, "demo/victim", tmp_path / "bucket")
    run, _ = remote_run(desk, "demo/prepared", tmp_path / "bucket")
    (entry,) = checkpoint_folder.checkpoints(RunDir(victim.path))
    copied = run.checkpoints / "pretrain" / entry.path.name
    write_json(copied / COMMIT_FILE, entry.record)
    shown = call(capsys, "demo/prepared", "--yes", code=77)
    assert "its files are at" in shown and run.path.exists()
    assert {path.name for path in place.iterdir()} == {SHARD, COMMIT_FILE, "notes.txt"}
