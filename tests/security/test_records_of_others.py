"""Tests of records, texts and folders that another user wrote, with real user ids: commands of Alice neither stop her
processes, nor delete her files, nor read private ones, nor print what a terminal or a shell would execute.
"""

import socket
import sys

import pytest
import torch

from flip.evaluation.encoding.features import FeatureCache
from flip.runs.rundir import RunDir, write_json
from jobs.commands.tensorboard import RunLinks
from jobs.host import sessions
from tests.jobs.commands.test_clean import age
from tests.jobs.commands.test_tensorboard import events
from tests.jobs.outcomes import make
from tests.security.test_other_users import submitted, supervise
from tests.security.users import ROOT, tree

pytestmark = pytest.mark.long


def test_supervisor_stops_no_process_that_other_user_recorded(users):
    """Folders of attempts are open to the group. A dead supervisor has left an attempt."""
    alice = users.alice
    mallory = users.mallory
    processes = {}
    sleeps = {"other": "setsid sleep 600", "same attempt of another run": "FLIP_RUN=/else setsid sleep 600"}
    for name, command in sleeps.items():
        done = alice.run("sh", "-c", f"{command} > /dev/null 2>&1 & echo $!", FLIP_ATTEMPT=1)
        processes[name] = (int(done.stdout), sessions.start_time(int(done.stdout)))
    orphan = alice.run("setsid", "sh", "-c", "sleep 600 > /dev/null 2>&1 & echo $$ $!")  # its leader has ended
    leader, child = map(int, orphan.stdout.split())
    processes["in the session of a dead leader"] = (child, sessions.start_time(child))
    sweep = users.shared / "demo"
    with alice.acts():
        sweep.mkdir()
        run = submitted(sweep, "run", "ran", 0)
        run.start_attempt({"host": socket.gethostname(), "world": 1})
        run.attempt(1).chmod(0o777)
    with mallory.acts():
        rows = [{"rank": rank, "pid": pid, "start": start} for rank, (pid, start) in enumerate(processes.values())]
        write_json(run.attempt(1) / "pids.json", [*rows, {"rank": 9, "pid": leader, "start": "1"}])
    log = supervise(alice, sweep)
    assert "adopting attempt 1" in log and (alice.home / "ran").exists(), log
    for name, (pid, start) in processes.items():
        assert sessions.alive(pid, start), name


def test_clean_deletes_nothing_of_other_user_and_follows_no_link(users):
    alice = users.alice
    mallory = users.mallory
    runs = users.shared / "runs"
    private = alice.home / "private"
    trash = runs / ".trash"
    with alice.acts():
        for folder in (trash / "20200101-000000" / "demo" / "old", private / "demo" / "run", runs / "demo" / "run"):
            folder.mkdir(parents=True)
            (folder / "config.yaml").write_text("schema: 1\n")
        (runs / "demo" / "run" / "logs").mkdir()
        for name in ("1", "2"):
            (runs / "demo" / "run" / "logs" / name).mkdir()
    for folder in (trash, trash / "20200101-000000", runs, runs / "demo" / "run", runs / "demo" / "run" / "logs"):
        folder.chmod(0o777)
    with mallory.acts(umask=0):
        (trash / "20200102-000000" / "demo" / "hers").mkdir(parents=True)
        (trash / "20200103-000000").symlink_to(private)
        (trash / "20200101-000000" / "linked").symlink_to(private / "demo")
        (runs / "demo" / "run" / "compiled.of-x-1").symlink_to(private)
        (runs / "demo" / "run" / "logs" / "0").symlink_to(private)
        (runs / "linked").symlink_to(private)
        (runs / "hers").mkdir()
    age(users.shared)
    age(private)
    before = tree(private)
    done = alice.python("jobs", "clean", "--all", "--yes", FLIP_RUNS=runs)
    assert done.returncode == 0, done.stderr
    assert tree(private) == before and (trash / "20200102-000000" / "demo" / "hers").exists(), done.stdout
    assert not (trash / "20200101-000000" / "demo").exists(), done.stdout + done.stderr
    assert (trash / "20200101-000000" / "linked").is_symlink() and (runs / "linked").is_symlink()


ESCAPES = "\x1b]0;owned\x07\x1b[2J"
END = {"action": "stop", "cause": "crash", "code": 70, "delay": 0, "exclude": []}


def test_texts_of_other_user_are_printed_without_control_characters_and_commands(users):
    sweep = users.shared / "demo"
    alice = users.alice
    mallory = users.mallory
    with mallory.acts():
        run = make(sweep, "failed", steps=50, complete=False, end={**END, "reason": f"{ESCAPES}=cmd()"})
        command = ["jobs/submit.py", "--sweep", "a.yaml", "--only", "$(touch ~/executed)"]
        write_json(run.path / "job.json", {"kind": "local", "after": 0, "command": command})
        write_json(run.path / "status.json", {"attempt": 1, "phase": ESCAPES, "time": 1.0, "reason": ESCAPES})
        for name in ("node0.out", "node0.err"):
            (run.open_logs(1) / name).write_text(f"{ESCAPES}last words\n")
        other = make(sweep, "cancelled", steps=50, complete=False)
        write_json(other.cancel, {"who": f"{ESCAPES}root", "why": f"{ESCAPES}=1+1", "time": 1.0})
    for words in (
        ["status", sweep], ["status", sweep, "--json"], ["status", sweep, "--goodput"], ["report", sweep],
        ["explain", run.path], ["explain", other.path], ["logs", run.path],
    ):  # fmt: skip
        done = alice.python("jobs", words[0], *words[1:])
        assert done.returncode in (0, 69) and "Traceback" not in done.stderr, (words, done.stderr)
        for shown in (done.stdout, done.stderr):
            assert "\x1b" not in shown and "\x07" not in shown and "executed" not in shown, (words, shown)
    shown = alice.python("jobs", "explain", run.path)
    assert "=cmd()" in shown.stdout, "the reason is shown"


def test_address_in_record_of_other_user_is_not_followed(users):
    """It names a private folder of Alice's; a library call and a command that read it are refused with the remedy."""
    alice = users.alice
    mallory = users.mallory
    with alice.acts():
        (alice.home / "private").mkdir()
    with mallory.acts():
        run = make(users.shared / "demo", "run")
        folder = run.checkpoints / "pretrain" / "64-1"
        folder.mkdir(parents=True)
        record = {"stage": "pretrain", "samples": 64, "attempt": 1, "files": {}, "url": f"file://{alice.home}/private"}
        write_json(folder / "commit.json", record)
    for words in (["-c", "import sys, flip; flip.load(sys.argv[1])", run.path], ["jobs", "export", run.path]):
        done = alice.python(*words, timeout=120)
        assert "names an address, and its record is not trusted: it belongs to uid" in done.stderr, done.stderr
        assert done.returncode == (1 if words[0] == "-c" else 77), done.stderr
    assert not (run.path / "export").exists()


def test_data_folder_of_other_user_is_not_on_module_path(users, data):
    """Her modules have the names of standard and installed ones. Commands start processes of their own there."""
    alice = users.alice
    mallory = users.mallory
    place = users.shared / "data"
    shards = {file.name: file.read_bytes() for file in data.glob("*.tar")}
    with mallory.acts():
        place.mkdir()
        for name in ("json", "multiprocessing", "numpy", "random", "sitecustomize", "tensorboard", "flip", "jobs"):
            text = "import os; open(os.environ['HOME'] + '/executed', 'w')\n"
            (place / f"{name}.py").write_text(text)
        for name, content in shards.items():
            (place / name).write_bytes(content)
    control = alice.run(sys.executable, "-c", "import json", cwd=place)
    assert (alice.home / "executed").exists(), control.stderr
    (alice.home / "executed").unlink()
    flip = alice.home / "flip"  # as pip writes it
    with alice.acts():
        start = "if __name__ == '__main__':\n    from jobs.__main__ import main\n    sys.exit(main())\n"
        flip.write_text(f"import sys\nsys.path.insert(1, {str(ROOT)!r})\n{start}")
    with alice.acts():
        make(alice.home / "runs" / "demo", "run").tensorboard.mkdir()
    for words in (
        ["status", "demo"], ["shards", "index", "*.tar", "--out", alice.home / "manifest", "--workers", 2],
        ["shards", "verify", alice.home / "manifest", "--workers", 2], ["tensorboard", "demo", "--", "--version_tb"],
    ):  # fmt: skip
        done = alice.run(sys.executable, flip, *words, cwd=place, timeout=120, FLIP_RUNS=alice.home / "runs")
        assert done.returncode == 0 and not (alice.home / "executed").exists(), (words, done.stderr)
    assert (alice.home / "manifest").exists()


def test_tensorboard_shows_no_private_events_through_link_of_other_user(users):
    """Links to Alice's folder and file, a file that names her files to a plugin, and events that Mallory may show."""
    for module in ("compat.proto.event_pb2", "summary.writer.event_file_writer"):
        pytest.importorskip(f"tensorboard.{module}")  # as root: Alice cannot read all folders of the packages
    alice = users.alice
    mallory = users.mallory
    with alice.acts():
        private = make(alice.home / "runs" / "secret", "run")
        events(private, 1.0, "private/loss")
        (hidden,) = private.tensorboard.iterdir()
    with mallory.acts():
        linked = make(users.shared / "demo", "linked")
        linked.tensorboard.symlink_to(private.tensorboard)
        single = make(users.shared / "demo", "single")
        events(single, 1.0, "shown/loss")
        (single.tensorboard / "events.out.tfevents.9").symlink_to(hidden)
        (single.tensorboard / "projector_config.pbtxt").write_text(f'embeddings {{ metadata_path: "{hidden}" }}\n')
    done = alice.python("jobs", "tensorboard", users.shared / "demo", "--", "--inspect", timeout=120)
    assert "shown/loss" in done.stdout and "private" not in done.stdout + done.stderr, (done.stdout, done.stderr)
    with alice.acts():
        (alice.home / "folder").mkdir()
        with RunLinks(alice.home / "folder") as links:
            assert links.add([linked, single]) == ["demo/linked", "demo/single"]
            (shown,) = (alice.home / "folder").rglob("*tfevents*")
            assert shown.is_file() and links.add([linked, single]) == []
        assert not list((alice.home / "folder").rglob("*.pbtxt"))


@pytest.mark.parametrize("level", ["root", "sweep", "run"])
def test_tensorboard_follows_no_link_of_other_user_on_the_way_to_private_run(users, level):
    """Alice's own run is trusted, so its folder would be shown, but Mallory chose the name that leads to it."""
    for module in ("compat.proto.event_pb2", "summary.writer.event_file_writer"):
        pytest.importorskip(f"tensorboard.{module}")  # as root: Alice cannot read all folders of the packages
    alice = users.alice
    runs = users.shared / "runs"
    with alice.acts():
        private = make(alice.home / "runs" / "demo", "run")
        events(private, 1.0, "private/loss")
        for link, target in (("of-root", alice.home / "runs"), ("of-sweep", private.path.parent)):
            (alice.home / link).symlink_to(target)
    link, target = {
        "root": (runs, alice.home / "runs"),
        "sweep": (runs / "demo", private.path.parent),
        "run": (runs / "demo" / "run", private.path),
    }[level]
    with users.mallory.acts():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)
    for words in ([runs / "demo"], ["demo", "--root", runs]):
        done = alice.python("jobs", "tensorboard", *words, "--", "--inspect", timeout=120)
        assert "private/loss" not in done.stdout + done.stderr, done.stdout
        assert f"{link}: it is a link that belongs to uid {users.mallory.uid}; the runs behind it" in done.stdout
    for words in ([alice.home / "of-sweep"], ["demo", "--root", alice.home / "of-root"]):
        done = alice.python("jobs", "tensorboard", *words, "--", "--inspect", timeout=120)
        assert "private/loss" in done.stdout and "left out" not in done.stdout, "a link of her own"


def test_tensorboard_follows_no_link_in_folder_that_other_user_may_write_to(users):
    """Mallory can exchange it, and the folder of a run there, while TensorBoard shows them."""
    alice = users.alice
    place = users.shared / "team"
    with alice.acts():
        private = make(alice.home / "runs" / "secret", "run")
        (alice.home / "folder").mkdir()
        private.tensorboard.mkdir()
        (private.tensorboard / "events.out.tfevents.1").write_text("private")
        place.mkdir()
        (place / "linked").symlink_to(private.path.parent)
        run = make(place / "demo", "run")
        run.tensorboard.mkdir()
        (run.tensorboard / "events.out.tfevents.1").write_text("shown")
    place.chmod(0o777)
    with RunLinks(alice.home / "folder") as links:
        with alice.acts():
            assert links.add([RunDir(place / "linked" / "run"), run]) == ["demo/run"]
        with users.mallory.acts():
            (place / "demo").rename(place / "moved")
            (place / "demo").symlink_to(private.path.parent)
        with alice.acts():
            (shown,) = (alice.home / "folder").rglob("*tfevents*")
            assert shown.read_text() == "shown" and links.add([run]) == []


def test_feature_cache_of_other_user_is_not_used(users):
    """Both evaluate the same model with one cache folder; Mallory has prepared features, and a link to her folder."""
    alice = users.alice
    mallory = users.mallory
    cache = users.shared / "cache"
    with mallory.acts(umask=0):
        cache.mkdir()
        (cache / "model").mkdir(mode=0o777)
    put = "from tests.security.test_records_of_others import put_features; import sys; put_features(*sys.argv[1:])"
    get = "from tests.security.test_records_of_others import got_features; import sys; got_features(*sys.argv[1:])"
    done = mallory.python("-c", put, cache, 1)
    assert done.returncode == 0, done.stderr
    assert alice.python("-c", get, cache).stdout.strip() == "None", "Mallory's are not used"
    assert alice.python("-c", put, cache, 2).returncode == 0
    assert alice.python("-c", get, cache).stdout.strip() == "2.0", "her own"
    own = cache / f"flip-features-{alice.uid}"
    assert own.stat().st_mode & 0o77 == 0
    cache.chmod(0o777)
    own.rename(users.folder / "aside")
    with mallory.acts(umask=0):
        own.symlink_to(cache / f"flip-features-{mallory.uid}")
    done = alice.python("-c", get, cache)
    assert done.stdout.strip() == "None" and "computed again" in done.stderr, done.stderr


def put_features(folder, value):
    cache = FeatureCache(folder, "model")
    cache.put(cache.path("images", 1), {"features": torch.full((2, 3), float(value))})


def got_features(folder):
    cache = FeatureCache(folder, "model")
    tensors = cache.get(cache.path("images", 1))
    print(tensors and tensors["features"][0, 0].item())
