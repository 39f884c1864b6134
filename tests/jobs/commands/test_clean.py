"""``flip clean`` deletes only what runs no longer need: of this user, not active, old, and not behind a link."""

import json
import os
import shlex
import sys
import time
from types import SimpleNamespace

import pytest

from flip.files.ownership import user_name
from flip.runs.rundir import RunDir, write_json
from jobs.commands.clean import main
from jobs.common.completion import completer_of
from jobs.submission import cleanup
from jobs.submission.apply import lock, move_to_trash
from jobs.submission.snapshot import take
from tests.harness.common import NOBODY, make_run, no_access

root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
CODE = "0123456789abcdef"
OLD_CODE = "fedcba9876543210"


def age(path, days=30):
    """Make everything below a path, and its parent, look unchanged for this many days."""
    then = time.time() - days * cleanup.DAY
    for place, folders, names in os.walk(path):
        for name in [*folders, *names]:
            os.utime(os.path.join(place, name), (then, then), follow_symlinks=False)
    for place in (path, path.parent):
        os.utime(place, (then, then), follow_symlinks=False)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


class Desk:
    """A folder of runs, and ``flip clean`` in this process."""

    def __init__(self, folder, capsys):
        self.runs = folder / "runs"
        self.capsys = capsys
        self.runs.mkdir()

    def run(self, name="demo/base", causes=("complete",), code=CODE):
        """A run with an attempt of each cause, each with a log, and a checkpoint. ``complete`` writes the result."""
        run = make_run(self.runs / name)
        write_json(run.identity, {"code": code, "schema": 2})
        snapshot = str(run.path.parent / ".code" / code)
        write_json(
            run.path / "job.json", {"kind": "local", "folder": str(run.path), "snapshot": snapshot, "hooks": snapshot}
        )
        for cause in causes:
            n = run.start_attempt({"host": "here"})
            (run.open_logs(n) / "node0.out").write_text("x" * 1000)
            action = "requeue" if cause == "stopped" else "stop"
            end = {"action": action, "cause": cause, "reason": "", "committed": True, "delay": 0}
            write_json(run.attempt(n) / "end.json", {"attempt": n, **end})
        if causes[-1] == "complete":
            write_json(run.result, {"samples": 8})
        (run.checkpoints / "pretrain" / "8-1").mkdir(parents=True)
        (run.checkpoints / "pretrain" / "8-1" / "commit.json").write_text("{}")
        return run

    def trash(self, name="demo/base", days=30):
        """A run in the trash."""
        path = move_to_trash(self.run(name).path)
        age(path, days)
        return path

    def snapshot(self, digest, sweep="demo"):
        folder = self.runs / sweep / ".code" / digest
        (folder / "flip").mkdir(parents=True)
        (folder / "flip" / "rng.py").write_text("")
        return folder

    def __call__(self, *words, code=0):
        """The output of ``flip clean`` on standard output and standard error."""
        self.capsys.readouterr()
        assert main(list(words)) == code
        return "".join(self.capsys.readouterr())

    def listed(self, *words):
        """What ``--dry-run`` lists: (kind, path below the folder of runs); and what is left alone, with the reasons."""
        self.capsys.readouterr()
        assert main([*words, "--json", "--dry-run"]) == 0
        document = json.loads(self.capsys.readouterr().out)
        rows = [(row["kind"], os.path.relpath(row["path"], self.runs)) for row in document["folders"]]
        return rows, {os.path.relpath(path, self.runs): why for path, why in document["left_alone"].items()}


@pytest.fixture
def desk(tmp_path, capsys, monkeypatch):
    desk = Desk(tmp_path, capsys)
    monkeypatch.setenv("FLIP_RUNS", str(desk.runs))
    return desk


def test_clean_deletes_old_run_in_trash_and_its_empty_folders_and_nothing_else(desk):
    old = desk.trash()
    new = desk.trash("other/new", days=0)
    run = desk.run("demo/run", ["crash", "stopped", "complete"])
    age(run.path)
    before = files(run.path)
    output = desk("--yes")
    assert str(old) in output and "1 folder, " in output and "kB" in output and "30" in output
    assert not old.exists() and new.exists() and files(run.path) == before
    desk("--yes", "--older", "0")
    assert not new.exists() and files(desk.runs / ".trash") == [] and files(run.path) == before


def test_old_run_that_was_moved_to_the_trash_today_stays(desk):
    run = desk.run()
    age(run.path)
    move_to_trash(run.path)
    assert desk.listed()[0] == [] and len(desk.listed("--older", "0")[0]) == 1


def test_dry_run_and_refused_question_delete_nothing(desk, monkeypatch):
    old = desk.trash()
    before = files(desk.runs)
    assert str(old) in desk("--dry-run")
    assert "Add --yes." in desk(code=78)
    assert "Add --yes." in desk("--json", code=78)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    questions = []
    monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or "n")
    desk()
    assert files(desk.runs) == before and "Delete 1 folder, " in questions[0]
    monkeypatch.setattr("builtins.input", lambda question: "y")
    desk()
    assert not old.exists() and "nothing to delete" in desk("--yes")


def test_json_document_has_sizes_ages_and_deletions(desk, capsys):
    old = desk.trash()
    total = sum(path.stat().st_size for path in old.rglob("*") if path.is_file())
    assert main(["--older", "29", "--root", str(desk.runs), "--dry-run", "--json"]) == 0
    (following,) = json.loads(capsys.readouterr().out)["next"]
    words = shlex.split(following)
    assert main([*words[words.index("clean") + 1 :], "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    (row,) = document["folders"]
    assert document["next"] == []
    assert (row["path"], row["kind"], row["sweep"], row["bytes"]) == (str(old), "trash", "demo", total)
    assert row["deleted"] is True and 29.9 < row["days"] < 30.1 and not old.exists()


def test_names_of_sweeps_and_patterns_select(desk):
    for name in ("demo/base", "scale-a/base", "scale-b/base"):
        desk.trash(name)

    def sweeps(*words):
        return [path.split("/")[2] for _, path in desk.listed(*words)[0]]

    assert sweeps() == ["demo", "scale-a", "scale-b"]
    assert sweeps("scale-*") == ["scale-a", "scale-b"] and sweeps("demo/") == ["demo"]
    output = desk("demi", code=78)
    assert "no such sweep" in output and "demo" in output
    assert completer_of("target", is_option=False) is not None


def test_contradictory_options_exit_with_2(desk):
    with pytest.raises(SystemExit) as stopped:
        main(["--dry-run", "--yes"])
    assert stopped.value.code == 2


@pytest.mark.parametrize("days", ["-1", "nan", "inf"])
def test_days_out_of_bounds_are_refused(desk, days):
    assert "--older: must be" in desk(f"--older={days}", code=78)


def test_logs_of_newest_and_of_newest_failed_attempt_stay(desk):
    run = desk.run("demo/base", ["crash", "hang", "stopped", "stopped", "complete"])
    age(run.path)
    assert desk.listed("--logs")[0] == [("logs", f"demo/base/logs/{n}") for n in (1, 3, 4)]
    desk("--logs", "--yes")
    assert sorted(path.name for path in run.logs.iterdir()) == ["2", "5", "latest"]
    assert run.attempt_numbers() == [1, 2, 3, 4, 5] and (run.checkpoints / "pretrain" / "8-1" / "commit.json").exists()


def test_logs_stay_if_end_of_attempt_cannot_be_read(desk):
    run = desk.run("demo/base", ["stopped", "stopped", "complete"])
    (run.attempt(1) / "end.json").write_text("{")
    age(run.path)
    folders, spared = desk.listed("--logs")
    assert folders == [] and "end.json" in spared["demo/base/logs"]


def test_compiled_code_of_complete_runs_and_of_copies_is_deleted(desk):
    complete = desk.run("demo/complete")
    stopped = desk.run("demo/stopped", ["stopped"])
    for run in (complete, stopped):
        for name in ("compiled", "compiled.of-bob-1764000000", "compiled.of-mine"):
            (run.path / name).mkdir()
            (run.path / name / "kernel.py").write_text("x")
        age(run.path)
    copied = "compiled.of-bob-1764000000"
    expected = [("compiled", f"demo/{name}") for name in (f"complete/{copied}", "complete/compiled")]
    assert desk.listed("--compiled")[0] == [*expected, ("compiled", f"demo/stopped/{copied}")]
    desk("--compiled", "--yes")
    assert not complete.compiled.exists() and stopped.compiled.exists()
    assert (complete.path / "compiled.of-mine").exists(), "a name that the toolkit does not make"


def test_compiled_code_of_run_with_damaged_result_stays(desk):
    run = desk.run("demo/base", ["stopped", "crash"])
    run.compiled.mkdir()
    run.result.write_text("{")
    age(run.path)
    folders, spared = desk.listed("--compiled")
    assert folders == [] and "base is failed" in spared["demo/base/compiled"]


def test_snapshot_is_deleted_only_if_no_run_evaluation_or_trash_names_it(desk):
    digests = [f"{n:016x}" for n in range(5)]
    used, hooks, evaluated, trashed, unused = [desk.snapshot(digest) for digest in digests]
    run = desk.run("demo/base", code=used.name)
    record = json.loads((run.path / "job.json").read_text())
    write_json(run.path / "job.json", {**record, "hooks": f"/before/the/move/{hooks.name}"})
    desk.run("demo/.evaluate/base-1", code=evaluated.name)
    move_to_trash(desk.run("demo/gone", code=trashed.name).path)
    (desk.runs / "demo" / ".code" / "notes").mkdir()
    age(desk.runs / "demo")
    assert desk.listed("--code")[0] == [("code", f"demo/.code/{unused.name}")]
    desk("--code", "--yes")
    assert sorted(os.listdir(desk.runs / "demo" / ".code")) == sorted([*digests[:4], "notes"])


def test_snapshots_stay_if_a_run_cannot_be_read_or_is_active(desk):
    desk.snapshot(OLD_CODE)
    run = desk.run()
    age(desk.runs / "demo")
    linked = desk.runs / "demo" / "linked"
    linked.symlink_to(desk.runs / "unmounted")
    folders, spared = desk.listed("--code")
    assert folders == [] and "cannot be read" in spared["demo/.code"]
    linked.unlink()
    text = run.identity.read_text()
    run.identity.write_text("{")
    folders, spared = desk.listed("--code")
    assert folders == [] and "cannot be read" in spared["demo/.code"]
    run.identity.write_text(text)
    assert len(desk.listed("--code")[0]) == 1


def test_snapshot_in_use_again_is_not_old(tmp_path):
    repository = tmp_path / "repository"
    into = tmp_path / ".code"
    (repository / "flip").mkdir(parents=True)
    (repository / "flip" / "rng.py").write_text("")
    first = take(repository, into).path
    age(first)
    assert take(repository, into).path == first and time.time() - first.stat().st_mtime < cleanup.DAY


@pytest.mark.long
def test_nothing_of_active_run_is_deleted(field, capsys, monkeypatch):
    """A run under the real supervisor: no kind lists anything of it, until it has ended."""
    runs = field.sweep.parent
    monkeypatch.setenv("FLIP_RUNS", str(runs))
    run = field.run(total=10_000)
    (run.logs / "0").mkdir(parents=True)
    (run.path / "compiled.of-bob-1764000000").mkdir()
    (field.sweep / ".code" / OLD_CODE).mkdir(parents=True)
    write_json(run.identity, {"code": CODE, "schema": 2})
    field.submit(run)
    field.until_moving(run, 1)
    desk = SimpleNamespace(runs=runs, capsys=capsys)
    folders, spared = Desk.listed(desk, "--all", "--older", "0")
    assert folders == [] and "run is running" in spared["sweep/run/logs/0"], spared
    assert "supervisor" in spared["sweep/.code"] and "sweep/run/compiled.of-bob-1764000000" in spared
    write_json(run.cancel, {"who": "me", "why": "test"})
    field.until_state(run, "cancelled")
    field.until(lambda: not field.left())
    assert sorted(kind for kind, _ in Desk.listed(desk, "--all", "--older", "0")[0]) == ["code", "compiled", "logs"]


def test_nothing_of_run_in_unknown_state_is_deleted(desk, commands):
    commands("squeue", "exit 1")
    commands("sacct", "exit 1")
    run = desk.run("demo/base", ["stopped", "stopped"])
    record = {**json.loads((run.path / "job.json").read_text()), "kind": "slurm", "name": "flip-demo-ab", "index": 0}
    write_json(run.path / "job.json", {**record, "job": "1", "token": "ab"})
    desk.snapshot(OLD_CODE)
    (run.path / "compiled.of-bob-1764000000").mkdir()
    age(desk.runs)
    folders, spared = desk.listed("--all")
    assert folders == []
    assert sorted(spared) == [
        f"demo/.code/{OLD_CODE}",
        "demo/base/compiled.of-bob-1764000000",
        "demo/base/logs/1",
    ]
    path = move_to_trash(run.path)
    age(path)
    folders, in_trash = desk.listed()
    assert folders == [] and list(in_trash) == [str(path.relative_to(desk.runs))]
    for reason in [*spared.values(), *in_trash.values()]:
        assert "base is unknown: Slurm does not answer" in reason


def test_run_that_started_after_the_listing_stays(desk, monkeypatch):
    run = desk.run("demo/base", ["stopped", "stopped"])
    age(run.path)
    listing = cleanup.listing([desk.runs], [], ["logs"], 1)
    assert len(listing.folders) == 1
    (run.logs / "1" / "node0.out").write_text("new")
    assert cleanup.delete(listing.folders, 1, lambda folder: None) == [] and (run.logs / "1").exists()


def test_sweep_that_is_being_submitted_is_refused_and_others_are_cleaned(desk):
    first = desk.run("demo/base", ["stopped"] * 2)
    second = desk.run("other/base", ["stopped"] * 2)
    for run in (first, second):
        age(run.path)
    with lock(first.path.parent):
        output = desk("--logs", "--yes", code=78)
    assert "another command is at work on this sweep (process " in output
    assert (first.logs / "1").exists() and not (second.logs / "1").exists()


def test_links_are_not_followed(desk, tmp_path):
    """Links prepared at each level below the folder of runs lead to folders that must stay."""
    stays = make_run(tmp_path / "elsewhere" / "demo" / "base")
    (stays.path / "logs" / "1").mkdir(parents=True)
    old = desk.trash()
    (old / "link").symlink_to(stays.path)  # inside: the link itself is deleted
    sweep = old.parent
    stamp = old.parent.parent
    (sweep / "linked").symlink_to(stays.path)
    (stamp / "linked").symlink_to(stays.path.parent)
    (stamp.parent / "20200101-000000").symlink_to(stays.path.parent.parent)
    (desk.run("demo/run", ["stopped"]).logs / "0").symlink_to(stays.path)
    (desk.run("demo/copy", ["stopped"]).path / "compiled.of-x-1").symlink_to(stays.path)
    run = desk.run("demo/other", ["stopped", "stopped"])
    run.logs.rename(tmp_path / "elsewhere" / "logs")
    run.logs.symlink_to(tmp_path / "elsewhere" / "logs")
    (desk.runs / "linked").symlink_to(stays.path.parent)
    age(desk.runs)
    age(tmp_path / "elsewhere")
    before = files(tmp_path / "elsewhere")
    folders, spared = desk.listed("--all")
    assert folders == [("trash", str(old.relative_to(desk.runs)))]
    assert all("symbolic link" in spared[path] for path in ("linked", "demo/run/logs/0", "demo/copy/compiled.of-x-1"))
    desk("--all", "--yes", "--older", "0")
    assert files(tmp_path / "elsewhere") == before and not old.exists() and (sweep / "linked").is_symlink()


def test_linked_trash_is_not_followed(desk, tmp_path):
    old = desk.trash()
    (desk.runs / ".trash").rename(tmp_path / "elsewhere")
    (desk.runs / ".trash").symlink_to(tmp_path / "elsewhere")
    assert desk.listed("--older", "0") == ([], {})
    assert (tmp_path / "elsewhere" / old.relative_to(desk.runs / ".trash")).exists()


def test_folder_that_cannot_be_read_is_no_error(desk):
    age(desk.run("demo/base", ["stopped", "stopped"]).path)
    with no_access(desk.runs):
        assert desk.listed("--all") == ([], {})


@root
def test_folders_of_another_user_stay(desk):
    first, second, third = (desk.trash(f"demo/{name}") for name in ("first", "second", "third"))
    os.chown(first, NOBODY, NOBODY)
    os.chown(second / "checkpoints", NOBODY, NOBODY)
    run = desk.run("others/base", ["stopped", "stopped"])
    os.chown(run.path.parent, NOBODY, NOBODY)
    age(desk.runs)
    folders, spared = desk.listed("--all")
    assert [path.split("/")[-1] for _, path in folders] == ["third"]
    assert len(spared) == 2 and all(user_name(NOBODY) in reason for reason in spared.values())
    desk("--all", "--yes")
    assert first.exists() and (second / "config.yaml").exists() and (run.logs / "1").exists() and not third.exists()


def test_error_of_one_folder_is_reported_after_the_others_are_deleted(desk, monkeypatch):
    first = desk.trash("demo/first")
    second = desk.trash("demo/second")
    delete = cleanup.deletion.delete_folder_below

    def fail(top, names, emptied):
        if names[-1] == "first":
            raise OSError(5, "Input/output error", str(first))
        delete(top, names, emptied)

    monkeypatch.setattr(cleanup.deletion, "delete_folder_below", fail)
    output = desk("--yes", code=69)
    assert "Input/output error" in output and "deleted: 1 of 2 folders" in output and not second.exists()
    assert RunDir(first).config.exists()
