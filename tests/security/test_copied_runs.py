"""Tests that continuing a copy of another user's run executes nothing that came with the copy, with real user ids.

Bob prepares a stopped run; Alice copies its sweep folder with ``cp -r``, so that every file belongs to her, and
submits.
"""

import json
import py_compile
import shutil
import sys
from pathlib import Path

import pytest

from flip.runs.rundir import RunDir, read_json, write_json
from jobs.common.submitter import other_submitter
from jobs.submission.snapshot import digest_of
from tests.harness.common import wait_until

pytestmark = pytest.mark.long

EVIL = "open(__import__('os').environ['HOME'] + '/executed', 'w').close()\n"


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.fixture
def rank_desk(users, desk):
    """``desk`` with a stub that also imports the code of the run."""
    text = desk.stub.read_text()
    desk.stub.write_text(text.replace('pwd > "$HOME/ran"', f'pwd > "$HOME/ran"; {sys.executable} -c "import flip.rng"'))
    return desk


def stopped_run(desk, user, root):
    """Submit and complete a run, then let it look like one that was stopped in its first attempt."""
    done = desk.submit(user, root)
    assert done.returncode == 0, done.stderr
    desk.until_complete(user, root)
    run = RunDir(root / "demo" / "half")
    with user.acts():
        run.result.unlink()
        (run.attempt(1) / "end.json").unlink()
        shutil.rmtree(root / "demo" / ".supervisor")
        (run.path / "compiled").mkdir(mode=0o700)
        (run.path / "compiled" / "kernel.py").write_text(EVIL)
        (run.path / "compiled").chmod(0o755)
    return run


def replace_code(root, run, prepare, honest):
    """Change the code of a run. ``honest``: the snapshot is renamed to the digest of its new content."""
    code = root / "demo" / ".code" / read_json(run.identity)["code"]
    prepare(code)
    name = digest_of(code) if honest else code.name
    code.rename(code.with_name(name))
    write_json(run.identity, {**read_json(run.identity), "code": name})
    write_json(run.path / "job.json", {**read_json(run.path / "job.json"), "snapshot": str(code.with_name(name))})
    return name


def other_code(code):
    (code / "flip" / "older.py").write_text("")


def change_source(code):
    module = code / "flip" / "rng.py"
    module.chmod(0o644)
    module.write_text(module.read_text() + EVIL)
    module.chmod(0o444)


def plant_bytecode(code):
    """Bytecode that Python loads without a look at the source."""
    source = code.parent / "evil.py"
    source.write_text(EVIL)
    for cache in (code / "flip" / "__pycache__").glob("rng.*.pyc"):
        cache.unlink()
    target = code / "flip" / "__pycache__" / f"rng.{sys.implementation.cache_tag}.pyc"
    py_compile.compile(str(source), str(target), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    source.unlink()


def link_package(code):
    """A package in a hidden folder, which is no part of the digest, and a link that puts it on the module path."""
    package = code / ".x" / "json"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(EVIL)
    (code / "json").symlink_to(package.relative_to(code))


def copy(user, source, root):
    done = user.run("cp", "-r", source, root)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "kind", ["digest right", *map(slow, ["digest wrong", "bytecode", "no job.json", "no attempts"])]
)
def test_copy_of_other_users_run_continues_with_current_code(users, rank_desk, kind):
    alice = users.alice
    bob = users.bob
    desk = rank_desk
    theirs = users.shared / "bob"
    mine = users.shared / "alice"
    with bob.acts():
        theirs.mkdir()
    with alice.acts():
        mine.mkdir()
    run = stopped_run(desk, bob, theirs)
    (bob.home / "executed").unlink(missing_ok=True)
    with bob.acts():
        if kind == "bytecode":
            prepare = plant_bytecode
        else:
            prepare = change_source
        name = replace_code(theirs, run, prepare, honest=kind != "digest wrong")
        if kind in ("no job.json", "no attempts"):
            (run.path / "job.json").unlink()
        if kind == "no attempts":
            shutil.rmtree(run.attempts)
            write_json(run.identity, {**read_json(run.identity), "uid": None})
    copy(alice, theirs / "demo", mine)
    copied = RunDir(mine / "demo" / "half")
    with alice.acts():
        assert other_submitter(copied)
    planned = desk.submit(alice, mine, "--dry-run")
    assert planned.returncode == 0 and "half: a copy of a run of " in planned.stdout, planned.stdout + planned.stderr
    assert "it continues with the current code" in " ".join(planned.stdout.split())
    done = desk.submit(alice, mine)
    assert done.returncode == 0 and "it continues with the current code" in " ".join(done.stdout.split()), done.stderr
    desk.until_complete(alice, mine)
    assert not (alice.home / "executed").exists()
    ran = Path((alice.home / "ran").read_text().strip())
    assert ran == mine / "demo" / ".code" / read_json(copied.identity)["code"]
    assert (ran.name == name) == (kind in ("digest wrong", "bytecode")), "the same release: repaired"
    assert not copied.compiled.exists() and list(copied.path.glob("compiled.of-*"))
    record = read_json(copied.path / "job.json")
    assert record["uid"] == read_json(copied.identity)["uid"] == alice.uid and record["snapshot"] == str(ran)
    with alice.acts():
        assert not other_submitter(copied), "from now on it is her run"


def test_link_in_copied_snapshot_of_the_same_release_is_refused(users, rank_desk):
    """Its digest is that of the current code, and all of it belongs to Alice."""
    alice = users.alice
    bob = users.bob
    desk = rank_desk
    theirs = users.shared / "bob"
    mine = users.shared / "alice"
    with bob.acts():
        theirs.mkdir()
    with alice.acts():
        mine.mkdir()
    run = stopped_run(desk, bob, theirs)
    (bob.home / "executed").unlink(missing_ok=True)
    with bob.acts():
        link_package(theirs / "demo" / ".code" / read_json(run.identity)["code"])
    copy(alice, theirs / "demo", mine)
    done = desk.submit(alice, mine)
    assert not (alice.home / "executed").exists() and not (alice.home / "ran").exists()
    assert done.returncode == 78 and "/json: " in done.stderr and "not of the code" in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", ["copy", "move"])
def test_own_run_continues_with_its_code_after_copy_or_move(users, rank_desk, how):
    alice = users.alice
    desk = rank_desk
    first = users.shared / "first"
    second = users.shared / "second"
    with alice.acts():
        first.mkdir(), second.mkdir()
    run = stopped_run(desk, alice, first)
    with alice.acts():
        name = replace_code(first, run, other_code, honest=True)
    if how == "copy":
        copy(alice, first / "demo", second)
    else:
        (first / "demo").rename(second / "demo")
    done = desk.submit(alice, second)
    assert done.returncode == 0 and "current code" not in done.stdout, done.stderr
    desk.until_complete(alice, second)
    assert (alice.home / "ran").read_text().strip() == str(second / "demo" / ".code" / name)
    assert (second / "demo" / "half" / "compiled" / "kernel.py").exists()


@pytest.mark.slow
def test_own_run_whose_code_other_user_has_changed_is_refused(users, desk):
    """She wrote to a file while it was open to her: owner and mode show nothing afterwards."""
    alice = users.alice
    root = users.shared / "root"
    with alice.acts():
        root.mkdir()
    run = stopped_run(desk, alice, root)
    with alice.acts():
        name = replace_code(root, run, other_code, honest=True)
    code = root / "demo" / ".code" / name
    (code / "flip" / "rng.py").chmod(0o666)
    with users.mallory.acts():
        module = code / "flip" / "rng.py"
        module.write_text(module.read_text() + EVIL)
    (code / "flip" / "rng.py").chmod(0o444)
    before = read_json(run.path / "job.json")
    done = desk.submit(alice, root)
    assert done.returncode == 77 and f"{code}: " in done.stderr and f"mv {code} " in done.stderr, done.stderr
    assert read_json(run.path / "job.json") == before and not (alice.home / "executed").exists()
    with alice.acts():
        code.rename(root / "changed")
    assert desk.submit(alice, root).returncode == 0
    desk.until_complete(alice, root)
    assert not (alice.home / "executed").exists()


@pytest.mark.slow
def test_supervisor_does_not_start_copied_job_record(users, desk):
    """A submission starts a supervisor of the whole sweep folder, in which other copied runs lie."""
    alice = users.alice
    bob = users.bob
    theirs = users.shared / "bob"
    mine = users.shared / "alice"
    with bob.acts():
        theirs.mkdir()
    with alice.acts():
        mine.mkdir()
    run = stopped_run(desk, bob, theirs)
    evil = users.shared / "evil"
    evil.write_text('#!/bin/sh\ntouch "$HOME/executed"\n')
    evil.chmod(0o755)
    with bob.acts():
        shutil.copytree(run.path, theirs / "demo" / "other")
        shutil.copytree(run.path, theirs / "demo" / "third")
        record = {**read_json(run.path / "job.json"), "python": str(evil), "order": 0}
        code = mine / "demo" / ".code" / read_json(run.identity)["code"]
        prepared = {**record, "folder": str(mine / "demo" / "third"), "snapshot": str(code)}
        write_json(theirs / "demo" / "third" / "job.json", prepared)  # only the uid shows that it is a copy
        del record["folder"], record["uid"]  # a partial record
        write_json(theirs / "demo" / "other" / "job.json", record)
    copy(alice, theirs / "demo", mine)
    done = desk.submit(alice, mine)
    assert done.returncode == 0, done.stderr
    desk.until_complete(alice, mine, "demo/half")
    assert not (alice.home / "executed").exists()

    def is_stopped():
        state = alice.python("jobs", "status", mine / "demo" / "other", "--json")
        return json.loads(state.stdout)[0]["state"] == "stopped"

    wait_until(is_stopped, "the end of the supervisor, which started no attempt of it")
    assert RunDir(mine / "demo" / "other").newest_attempt() == run.newest_attempt()
