"""Tests of ordinary use of a shared runs root by members of a group, with real user ids.

Alice and Bob share a group. The runs root belongs to it and has the setgid and the sticky bit (docs/cluster.md).
"""

import os
import shutil

import pytest

from flip.config import merge
from flip.runs.errors import CAUSES
from flip.runs.rundir import RunDir, write_json
from tests.harness.evaluation_place import add_checkpoint
from tests.jobs.outcomes import make
from tests.security.users import TEAM, tree

pytestmark = pytest.mark.long


@pytest.fixture
def root(users):
    """Create the runs root of the group as docs/cluster.md says: mode 3775, owned by an administrator."""
    folder = users.folder / "team"
    folder.mkdir()
    os.chown(folder, 0, TEAM)
    folder.chmod(0o3775)
    return folder


@pytest.mark.parametrize("umask", [0o002, 0o022], ids=["umask=002", "umask=022"])
def test_group_member_reads_runs_of_colleague_without_writing(users, root, umask):
    alice = users.alice
    bob = users.bob
    with alice.acts(umask, [TEAM]):
        make(root / "demo", "complete")
        run = make(root / "demo", "failed", steps=50, complete=False, end={
            "action": "stop", "cause": "crash", "reason": "three crashes", "code": 70, "delay": 0, "exclude": [],
        })  # fmt: skip
        (run.logs / "1").mkdir(parents=True)
        (run.logs / "1" / "node0.out").write_text("step 50\n")
    before = tree(root)
    options = {"FLIP_RUNS": root, "groups": [TEAM], "umask": umask}
    expected = {
        "status demo --watch": "complete", "status --goodput": "demo", "report": "page: ",
        "explain demo/failed": "three crashes", "logs demo/failed": "step 50",
    }  # fmt: skip
    for command, text in expected.items():
        done = bob.python("jobs", *command.split(), **options)
        assert done.returncode == (CAUSES["crash"] if "--watch" in command else 0), (command, done.stderr)
        assert text in done.stdout, (command, done.stdout)
    assert tree(root) == before


def test_group_members_submit_sweeps_in_shared_runs_root(users, desk, root):
    """Each member starts, restarts and deletes their own runs; a restart of another member's sweep is refused."""
    text = desk.sweep.read_text()
    for user, name, umask in ((users.alice, "alices", 0o022), (users.bob, "bobs", 0o002)):
        options = {"groups": [TEAM], "umask": umask}
        desk.sweep = desk.place / f"{name}.yaml"
        desk.sweep.write_text(text)
        done = desk.submit(user, root, **options)
        assert done.returncode == 0, done.stderr
        desk.until_complete(user, root, name)
        done = desk.submit(user, root, "seed=1", "--changed", "restart", **options)
        assert done.returncode == 0, done.stderr
        assert list(root.glob(f".trash/*/{name}/half"))
        desk.until_complete(user, root, name)
    done = desk.submit(users.alice, root, "--changed", "restart", **options)
    assert done.returncode == 77 and "bobs" in done.stderr, done.stderr


def test_group_member_evaluates_and_exports_copy_of_run(users, data, root):
    place = users.folder / "data"
    bob = users.bob
    options = {"groups": [TEAM], "umask": 0o002}
    shutil.copytree(data, place)
    run = RunDir(root / "demo" / "run")
    settings = [
        "model.size=tiny", "stages=[{name: pretrain, samples: 64, batch: 8}]", f"data.manifest={place}",
        f"data.tokenizer={place}/tokenizer.json", "compute.threads=1", "compute.device=cpu", "compute.precision=fp32",
        "compute.attention=sdpa", f"evaluate.sets=[{{name: own, manifest: {place}, classes: {place}/classes.json}}]",
    ]  # fmt: skip
    config = merge.merge([], settings)
    run.path.mkdir(parents=True)
    run.config.write_text(merge.dump(config))
    write_json(run.identity, {"hash": "", "schema": 2, "config": {}})
    add_checkpoint(run, config, 64, 1)
    for path in (run.path.parent, *run.path.parent.rglob("*")):
        os.chown(path, users.alice.uid, TEAM)
        path.chmod(0o2775 if path.is_dir() else 0o664)
    for path in (place, *place.rglob("*")):
        path.chmod(0o755)
    before = tree(run.path.parent)
    done = bob.run("cp", "-r", run.path.parent, root / "copy", **options)
    assert done.returncode == 0, done.stderr
    done = bob.python("jobs", "export", "copy/run", FLIP_RUNS=root, **options)
    assert done.returncode == 0 and (root / "copy/run/export/pretrain-64/export.json").exists(), done.stderr
    for refused in ("demo/run", "copy/run"):
        done = bob.python("jobs", "evaluate", refused, FLIP_RUNS=root, **options)
        assert done.returncode == 77 and "chmod -R go-w" in done.stderr, done.stderr
    bob.run("chmod", "-R", "go-w", root / "copy")
    done = bob.python("jobs", "evaluate", "copy/run", "--json", FLIP_RUNS=root, timeout=120, **options)
    assert done.returncode == 0, done.stderr + done.stdout
    assert list((root / "copy" / "run" / "eval" / "pretrain-64").glob("*.json"))
    assert tree(run.path.parent) == before
