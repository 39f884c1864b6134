"""Tests that another member of the group can neither write to a run nor redirect what its writers write.

Alice runs; Mallory shares her group. The runs root belongs to the group, as project folders do (mode 3775: setgid and
sticky), or has a default ACL that lets the group write. A copy without modes leaves folders of runs open to the group.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

from flip.files import acl
from flip.runs.rundir import RunDir
from tests.flip.files.test_acl import set_or_skip
from tests.security.users import ROOT, TEAM, tree

pytestmark = pytest.mark.long

PIDS = 3000
"""Number of future process ids for which Mallory prepares links."""

#: What an administrator sets with `setfacl -d -m g:lab:rwX`: every new file is open to the group, whatever the umask.
GROUP_ACL = [
    acl.Entry(acl.USER_OBJ, 7, acl.NO_ID),
    acl.Entry(acl.GROUP_OBJ, 7, acl.NO_ID),
    acl.Entry(acl.GROUP, 7, TEAM),
    acl.Entry(acl.MASK, 7, acl.NO_ID),
    acl.Entry(acl.OTHER, 5, acl.NO_ID),
]
#: (umask, whether the runs root has that default ACL)
SETTINGS = {"umask=002": (0o002, False), "umask=022": (0o022, False), "umask=077": (0o077, False), "acl": (0, True)}


def each_setting(representative):
    """Parameters ``umask`` and ``inherited`` of a test; all but one setting run in make test-all alone."""
    rows = [
        pytest.param(*values, id=name, marks=() if name == representative else pytest.mark.slow)
        for name, values in SETTINGS.items()
    ]
    return pytest.mark.parametrize(("umask", "inherited"), rows)


WRITABLE = """
import os, sys
for place, folders, names in os.walk(sys.argv[1]):
    for path in [place, *(os.path.join(place, name) for name in names)]:
        if not os.path.islink(path) and os.access(path, os.W_OK):
            print(path)
"""


@pytest.fixture
def root(users):
    """The runs root of the group, owned by an administrator."""
    folder = users.folder / "team"
    folder.mkdir()
    os.chown(folder, 0, TEAM)
    folder.chmod(0o3775)
    return folder


@pytest.fixture
def precious(users):
    """Create private files of Alice's, and check at the end that no attack has changed or added one."""
    private = users.alice.home / "private"
    with users.alice.acts():
        private.mkdir()
        for number in range(20):
            (private / str(number)).write_text("alice's")
    for folder in (users.alice.home, private):
        folder.chmod(0o711)
    before = tree(private)
    yield private
    assert tree(private) == before
    assert {path.read_text() for path in private.iterdir()} == {"alice's"}


def start_run(users, root, umask):
    """Create a run as ``submit`` does, and execute all its writers as Alice."""
    with users.alice.acts(umask, [TEAM]):
        (root / "demo").mkdir(mode=0o755)
        (root / "demo" / "run").mkdir(mode=0o755)
    return RunDir(root / "demo" / "run")


def run_writers(users, run, umask):
    done = users.alice.python(
        "-m", "tests.security.run_writers", run.path, ROOT, umask=umask, groups=[TEAM], cwd=users.alice.home
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def writable_by(user, folder):
    """Paths that a member of the group can write to."""
    done = user.python("-c", WRITABLE, folder, groups=[TEAM])
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@each_setting("acl")
def test_nothing_of_a_run_is_writable_by_others(users, root, umask, inherited):
    if inherited:
        set_or_skip(root, acl.DEFAULT, GROUP_ACL)
    run = start_run(users, root, umask)
    errors = run_writers(users, run, umask)
    assert not any(errors.values()), errors
    assert len(list(run.path.rglob("*"))) > 20
    assert writable_by(users.mallory, root / "demo") == []
    if umask == 0o077:
        private = [
            path for path in (run.attempts, run.logs, run.metrics, run.checkpoints) if path.stat().st_mode & 0o077
        ]
        assert not private, "chmod has opened what umask 077 closed"


def open_to_group(run, inherited):
    """Leave the run as a copy without modes under umask 002: all folders but its own have mode 2775.

    ``inherited``: or as under a default ACL that the group may write.
    """
    for name in ("attempts", "logs", "metrics", "checkpoints", "checkpoints/pretrain", "eval", "traces", "witness"):
        (run.path / name).mkdir(exist_ok=True)
    for name in ("cache", "cache/model", "pins", "trackers"):
        (run.path / name).mkdir(exist_ok=True)
    (run.path.parent / ".supervisor").mkdir(exist_ok=True)
    for path in (*run.path.rglob("*"), run.path.parent / ".supervisor"):
        if not path.is_dir():
            continue
        path.chmod(0o2775)
        for kind in (acl.ACCESS, acl.DEFAULT) if inherited else ():
            acl.write_acl(path, kind, GROUP_ACL)


def prepare_links(run, n, private: Path) -> None:
    """As Mallory: link each name that attempt ``n`` will write to a private file of Alice's, all in the same group."""
    victims = (private / str(number) for number in range(20))
    newest = int(Path("/proc/loadavg").read_text().split()[-1])

    def link(path, folder_mode=0o777):
        if not path.parent.exists():
            path.parent.mkdir(mode=folder_mode)
            path.parent.chmod(folder_mode)
        path.symlink_to(next(victims))

    for name in ("node0.out", "node0.err", "node1.out", "node1.err", "collectives.0.json", "follow-wandb.log"):
        link(run.logs / str(n) / name)
    link(run.metrics / f"{n}.jsonl")
    link(run.path / "witness" / f"{n}.0.jsonl")
    link(run.checkpoints / "pretrain" / f"64-{n}" / "shard-00001-model-00001-of-00001.safetensors")
    link(run.path.parent / ".supervisor" / "lock")
    link(run.path / "trackers" / "wandb.lock")
    link(run.eval / "pretrain-64" / "job.json")
    name = "images-*.safetensors"
    victim = next(victims)
    for cached in (run.path / "cache" / "model").glob(name):
        for pid in range(newest, newest + PIDS):
            cached.with_name(f"{cached.name}.tmp.{pid}").symlink_to(victim)
    victim = next(victims)
    for pid in range(newest, newest + PIDS):
        (run.traces / f"tmp.{pid}.{n}-1.json.gz").symlink_to(victim)


@each_setting("umask=002")
def test_prepared_links_reach_no_private_file(users, root, precious, umask, inherited):
    """Each writer refuses with the path, or replaces the link; the folders are closed from then on."""
    if inherited:
        set_or_skip(root, acl.DEFAULT, GROUP_ACL)
    run = start_run(users, root, umask)
    run_writers(users, run, umask)
    open_to_group(run, inherited)
    for path in (run.path, *run.path.rglob("*"), run.path.parent / ".supervisor"):
        os.chown(path, users.alice.uid, TEAM, follow_symlinks=False)
    (run.path.parent / ".supervisor" / "lock").unlink()
    (run.path / "trackers" / "wandb.lock").unlink()
    shutil.rmtree(run.eval / "pretrain-64")
    run.path.chmod(0o755)
    run.path.parent.chmod(0o755)
    with users.mallory.acts(0, [TEAM]):
        prepare_links(run, 2, precious)
    errors = run_writers(users, run, umask)
    refused = {
        "rank log": "logs/2", "metrics": "metrics/2.jsonl", "samples": "witness/2.0.jsonl",
        "score": "eval/pretrain-64", "predictions": "eval/pretrain-64",
        "node log": "node1.out", "lock of supervisor": ".supervisor/lock", "lock of follower": "trackers/wandb.lock",
    }  # fmt: skip
    for writer, path in refused.items():
        error = errors.pop(writer)
        assert path in error, (writer, error)
        assert "another user may have prepared it" in error, (writer, error)
    error = errors.pop("checkpoint")  # a second try may have removed the prepared folder
    assert not error or "checkpoints/pretrain/64-2" in error, error
    assert not any(errors.values()), errors
    foreign = [path for path in run.path.rglob("*") if path.lstat().st_uid == users.mallory.uid]
    open_ = [path for path in writable_by(users.mallory, run.path.parent) if Path(path) not in foreign]
    assert not [path for path in open_ if Path(path).is_dir()], open_


@pytest.mark.slow
@pytest.mark.parametrize(("umask", "inherited"), SETTINGS.values(), ids=SETTINGS)
def test_trained_run_is_not_writable_by_others(users, desk, root, umask, inherited):
    """A real local run: supervisor, rank process, TensorBoard, export."""
    if inherited:
        set_or_skip(root, acl.DEFAULT, GROUP_ACL)
    desk.site.write_text("kind: local\n")
    options = {"groups": [TEAM], "umask": umask, "timeout": 300.0}
    done = desk.submit(users.alice, root, "compute.device=cpu", "--watch", **options)
    assert done.returncode == 0, done.stderr + done.stdout
    done = users.alice.python("jobs", "export", "demo/half", FLIP_RUNS=root, **options)
    assert done.returncode == 0, done.stderr
    run = RunDir(root / "demo" / "half")
    written = [run.result, run.logs / "1" / "node0.out", run.metrics / "1.jsonl", run.tensorboard, run.export]
    assert all(path.exists() for path in written) and list(run.tensorboard.glob("events*"))
    outputs = f"{run.export}/"  # an export follows the umask: the user may name any place for it
    assert [path for path in writable_by(users.mallory, root / "demo") if not path.startswith(outputs)] == []
