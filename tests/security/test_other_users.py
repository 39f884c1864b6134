"""Tests that files of another user are never executed, overwrite no files of the caller and stop no command.

Mallory prepares files; Alice runs the real command. Each has a separate user id (``tests.security.users``). Every test
runs with fs.protected_symlinks 0 and 1: the code must not depend on the kernel's protection.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from flip.runs.rundir import RunDir, read_json, write_json
from jobs.host import sessions
from tests.harness.common import wait_until
from tests.harness.job_records import write_formats, write_job
from tests.jobs.outcomes import make
from tests.security.users import ROOT, TEAM, tree
from tests.synthetic import draw_image, encode

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("symlinks")]

PIDS = 1000
"""Number of future process ids for which Mallory prepares links."""


def prepare_links(folder: Path, name: str, target: Path) -> None:
    """Link the name itself, and every temporary name with a future process id, to Alice's file."""
    newest = int(Path("/proc/loadavg").read_text().split()[-1])
    for suffix in ["", *(f".tmp.{pid}" for pid in range(newest, newest + PIDS))]:
        (folder / f"{name}{suffix}").symlink_to(target)


@pytest.fixture
def precious(users):
    """Create a file of Alice's, and check at the end that no attack has changed it."""
    with users.alice.acts():
        file = users.alice.home / "precious"
        file.write_text("alice's")
    users.alice.home.chmod(0o711)
    yield file
    assert file.read_text() == "alice's" and file.stat().st_uid == users.alice.uid


@pytest.fixture
def mallory_run(users):
    """Create a complete run of Mallory's in a sweep to which every user may write."""
    with users.mallory.acts(umask=0):
        run = make(users.shared / "demo", "run")
        run.path.parent.chmod(0o777)
    return run


# -- 1: temporary names ------------------------------------------------------------------------------------------------


def test_report_writes_nothing_into_sweep_of_other_user(users, mallory_run, precious):
    sweep = mallory_run.path.parent
    with users.mallory.acts():
        prepare_links(sweep, "report.html", precious)
    before = tree(sweep)
    done = users.alice.python("jobs", "report", sweep)
    assert done.returncode == 0, done.stderr
    page = Path(done.stdout.rpartition("page: ")[2].strip())
    private = users.alice.home / ".cache" / "flip" / f"reports-{users.alice.uid}"
    assert page.is_relative_to(private) and "<html" in page.read_text() and private.stat().st_mode & 0o77 == 0
    assert tree(sweep) == before
    done = users.alice.python("jobs", "report", sweep, HOME=None)
    assert done.returncode == 78 and "export FLIP_CACHE=FOLDER" in done.stderr, done.stderr
    with users.alice.acts():
        (users.alice.home / "pages").mkdir()
    for arguments in (["--out", "pages/a.html"], ["--folder", "pages", "--out", "pages/b.html"]):
        done = users.alice.python("jobs", "report", sweep, *arguments)
        assert done.returncode == 0, done.stderr
    assert {"a.html", "b.html", "report.html", "results.csv"} <= {path.name for path in precious.parent.glob("pages/*")}
    assert tree(sweep) == before


def test_report_replaces_prepared_links_in_output_folder(users, mallory_run, precious):
    """``--folder`` names a folder to which Mallory can also write."""
    done = users.alice.python("jobs", "report", mallory_run.path.parent, "--folder", "made")
    names = [path.relative_to(users.alice.home / "made") for path in (users.alice.home / "made").rglob("*.*")]
    assert done.returncode == 0 and any(name.suffix == ".png" for name in names), done.stderr
    with users.mallory.acts(umask=0):
        for name in names:
            (users.shared / "pages" / name).parent.mkdir(parents=True, exist_ok=True)
            (users.shared / "pages" / name).symlink_to(precious)
    done = users.alice.python(
        "jobs",
        "report",
        mallory_run.path.parent,
        "--folder",
        users.shared / "pages",
        "--out",
        users.shared / "pages/a.html",
    )
    assert done.returncode == 0, done.stderr
    assert all((users.shared / "pages" / name).stat().st_uid == users.alice.uid for name in names)


def test_cancel_follows_no_prepared_link(users, mallory_run, precious):
    mallory_run.result.unlink()
    with users.mallory.acts(umask=0):
        prepare_links(mallory_run.path, "cancel.json", precious)
        (mallory_run.path / "cancel.json").unlink()
        mallory_run.path.chmod(0o777)
    done = users.alice.python("jobs", "cancel", mallory_run.path, "--yes")
    assert done.returncode == 0, done.stderr
    assert read_json(mallory_run.cancel)["who"] == f"uid {users.alice.uid}", "a user without an entry in /etc/passwd"


# -- 2, 3, 8: code that is executed ------------------------------------------------------------------------------------

SITECUSTOMIZE = "import os; open(os.environ['HOME'] + '/executed', 'w').close()"


def test_submit_refuses_sweep_folder_or_code_of_other_user(users, desk):
    take = "import sys, pathlib; from jobs.submission import snapshot; "
    take += "print(snapshot.take(*map(pathlib.Path, sys.argv[1:])).path)"
    root = users.shared
    with users.mallory.acts():
        (root / "demo").mkdir()
        (root / "demo").chmod(0o777)
    code = Path(users.mallory.python("-c", take, ROOT, root / "demo" / ".code").stdout.strip())
    with users.mallory.acts():
        code.chmod(0o755)
        (code / "sitecustomize.py").write_text(SITECUSTOMIZE)
    done = desk.submit(users.alice, root)
    assert done.returncode == 77 and f"it belongs to uid {users.mallory.uid}" in done.stderr, done.stderr
    os.chown(root / "demo", users.alice.uid, users.alice.uid)  # created by Alice, writable for all, closed later
    (root / "demo").chmod(0o755)
    done = desk.submit(users.alice, root)
    assert done.returncode == 77 and str(root / "demo" / ".code") in done.stderr, done.stderr
    assert "is not trusted" in done.stderr and not (users.alice.home / "ran").exists()
    os.chown(root / "demo" / ".code", users.alice.uid, users.alice.uid)
    done = desk.submit(users.alice, root)
    assert done.returncode == 77 and str(code) in done.stderr and "is not trusted" in done.stderr, done.stderr
    assert not (users.alice.home / "executed").exists() and not (users.alice.home / "ran").exists()
    done = desk.submit(users.alice, users.alice.home / "runs")
    assert done.returncode == 0, done.stderr
    desk.until_complete(users.alice, users.alice.home / "runs")


def test_submit_uses_no_code_from_outside_sweep(users, desk):
    """The record of a copied run may name any folder as its code."""
    first = users.shared / "first"
    second = users.shared / "second"
    with users.alice.acts():
        first.mkdir(), second.mkdir()
    assert desk.submit(users.alice, first).returncode == 0
    desk.until_complete(users.alice, first)
    with users.mallory.acts():
        shutil.copytree(first, users.mallory.home / "copy", symlinks=True)
        run = RunDir(users.mallory.home / "copy" / "demo" / "half")
        run.result.unlink()
        (run.attempt(1) / "end.json").unlink()
        write_json(run.path / "job.json", {"kind": "local", "after": 0})  # no field shows who submitted it
        identity = {key: value for key, value in read_json(run.identity).items() if key != "uid"}
        write_json(run.identity, {**identity, "code": "../../../x"})
        (users.shared / "x").mkdir()
    users.mallory.home.chmod(0o755)
    copied = users.alice.run("cp", "-r", run.path.parent, second)
    done = desk.submit(users.alice, second)
    assert copied.returncode == done.returncode == 0, copied.stderr + done.stderr
    assert (second / "demo" / ".code" / "../../../x").is_dir()
    desk.until_complete(users.alice, second)
    ran = Path((users.alice.home / "ran").read_text().strip())
    assert ran.parent == second / "demo" / ".code" and ran.name == read_json(second / "demo/half/identity.json")["code"]


def submitted(folder: Path, name: str, marker: str, order: int) -> RunDir:
    """Submit a run whose ranks create a marker file in HOME and complete."""
    run = RunDir(folder / name)
    run.path.mkdir()
    program = run.path / "program"
    program.write_text(f'#!/bin/sh\ntouch "$HOME/{marker}"\necho \'{{}}\' > "$3/result.json"\n')
    program.chmod(0o755)
    run.config.write_text("schema: 1\n")
    run.config.chmod(0o644)  # as a submission leaves it, whatever the umask
    job = {"kind": "local", "order": order, "python": str(program), "module": "x", "world": 1, "env": {}}
    write_job(run, token=None, snapshot=str(write_formats(run.path)), **job)
    return run


def supervise(user, sweep: Path, **environment) -> str:
    """Run a supervisor until it exits by itself, and return its log."""
    arguments = ["-c", 'exec "$0" -m jobs.local.supervisor "$1" > "$HOME/log" 2>&1', sys.executable, sweep]
    done = user.run("sh", *arguments, PYTHONPATH=ROOT, **environment)
    log = user.home / "log"
    assert done.returncode == 0, log.read_text()
    wait_until(lambda: " ends\n" in log.read_text(), "the supervisor's end")
    return log.read_text()


def test_supervisor_starts_no_run_of_other_user(users):
    sweep = users.shared / "demo"
    alice = users.alice
    mallory = users.mallory
    with alice.acts():
        sweep.mkdir()
        sweep.chmod(0o777)  # temporarily writable for all
        submitted(sweep, "mine", "mine", 9)
        half = submitted(sweep, "half-mine", "executed", 1)
        half.path.chmod(0o777)
    with mallory.acts():
        submitted(sweep, "hers", "executed", 0)
        submitted(users.shared, "elsewhere", "executed", 2)
        (sweep / "link").symlink_to(users.shared / "elsewhere")
        (half.path / "job.json").rename(half.path / "moved")
        shutil.copy(half.path / "moved", half.path / "job.json")
    sweep.chmod(0o755), half.path.chmod(0o755)
    log = supervise(alice, sweep)
    assert (alice.home / "mine").exists() and not (alice.home / "executed").exists(), log
    for name, reason in (("hers", "it belongs to"), ("link", "it is a symbolic")):
        assert f"{sweep / name} is not trusted: {reason}" in log, log
    assert f"{half.path / 'job.json'}: not used, because another user may have prepared it: it belongs to" in log, log


def test_supervisor_starts_runs_in_group_folder_only_if_group_is_trusted(users):
    sweep = users.shared / "demo"
    alice = users.alice
    with alice.acts(umask=0o002, groups=[TEAM]):
        sweep.mkdir()
        os.chown(sweep, -1, TEAM)
        submitted(sweep, "mine", "mine", 0)
    assert f"members of the group gid {TEAM} may write to it" in supervise(alice, sweep)
    assert not (alice.home / "mine").exists()
    os.chown(sweep / "mine", -1, TEAM)
    os.chown(sweep / "mine" / "job.json", -1, TEAM)
    log = supervise(alice, sweep, FLIP_TRUST_GROUP=TEAM)
    assert (alice.home / "mine").exists(), log


def test_supervisor_executes_no_interpreter_that_other_user_can_change(users):
    """Each is named by an own job.json: a program of hers, a link of hers to a trusted program, an open folder."""
    sweep = users.shared / "demo"
    alice = users.alice
    mallory = users.mallory
    tools = users.shared / "tools"
    opened = alice.home / "opened"
    with mallory.acts():
        tools.mkdir()
        (tools / "python").write_text('#!/bin/sh\ntouch "$HOME/executed"\n')
        (tools / "python").chmod(0o755)
        (tools / "link").symlink_to("/bin/true")
    with alice.acts():
        sweep.mkdir()
        opened.mkdir()
        for order, name in enumerate(("mine", "hers", "link", "open")):
            submitted(sweep, name, name, order)
        (sweep / "open" / "program").rename(opened / "program")
        opened.chmod(0o777)
        for name, python in (("hers", tools / "python"), ("link", tools / "link"), ("open", opened / "program")):
            path = sweep / name / "job.json"
            write_json(path, {**read_json(path), "python": str(python), "exposed": []})
    log = supervise(alice, sweep)
    assert (alice.home / "mine").exists() and not (alice.home / "executed").exists(), log
    assert not (alice.home / "open").exists(), log
    for name in ("hers", "link", "open"):
        assert RunDir(sweep / name).newest_attempt() == 0, log
    assert f"its interpreter is not trusted: {tools / 'python'}: it belongs to uid {mallory.uid}" in log, log
    assert f"{tools} is not trusted: it belongs to" in log and f"{opened} is not trusted: every user" in log, log


# -- 4: the cache of chunks --------------------------------------------------------------------------------------------

FILL = """
import sys, types
from flip.data.chunk_reader import ChunkCache
cache = ChunkCache(sys.argv[1], 100)
for j in range(8):
    cache.put(types.SimpleNamespace(digest="d"), j, [b"x" * 40])
print(cache.failures)
"""


@pytest.mark.parametrize("prepared", ["nothing", "link", "folder"])
def test_chunk_cache_neither_uses_nor_deletes_prepared_folder(users, precious, prepared):
    folder = users.shared / f"flip-chunks-{users.alice.uid}"
    with users.mallory.acts(umask=0):
        if prepared == "link":
            folder.symlink_to(precious.parent)
        if prepared == "folder":
            folder.mkdir()
            (folder / "d").symlink_to(precious.parent)
    before = tree(users.shared)
    done = users.alice.python("-c", FILL, users.shared)
    assert done.returncode == 0, done.stderr
    if prepared == "nothing":
        assert folder.stat().st_mode & 0o777 == 0o700 and done.stdout == "0\n"
        assert sum(path.stat().st_size for path in folder.glob("d/*")) <= 100
    else:
        assert done.stdout == "8\n" and tree(users.shared) == before
    assert [path.name for path in precious.parent.iterdir()] == ["precious"]


# -- 7: processes and jobs ---------------------------------------------------------------------------------------------


def test_cancel_kills_no_process_named_in_record_of_other_user(users, mallory_run):
    started = users.alice.run("sh", "-c", "setsid sleep 600 > /dev/null 2>&1 & echo $!")
    pid = int(started.stdout)
    start_time = sessions.start_time(pid)
    with users.mallory.acts(umask=0):
        mallory_run.result.unlink()
        (mallory_run.attempt(1) / "end.json").unlink()
        write_json(mallory_run.path / "job.json", {"kind": "local"})
        write_json(mallory_run.attempt(1) / "pids.json", [{"rank": 0, "pid": pid, "start": start_time}])
        mallory_run.path.chmod(0o777)
    listed = users.alice.python("jobs", "status", mallory_run.path, "--json")
    assert json.loads(listed.stdout)[0]["state"] == "stopped", "the process is no rank of the run"
    done = users.alice.python("jobs", "cancel", mallory_run.path, "--yes")
    assert done.returncode == 0 and mallory_run.cancel.exists(), done.stderr
    assert sessions.alive(pid, start_time)


def test_cancel_signals_no_own_job_named_in_record_of_other_user(users, mallory_run):
    """Slurm's commands are replaced by scripts that record their calls."""
    commands = users.folder / "bin"
    calls = users.folder / "calls"
    commands.mkdir()
    calls.touch()
    calls.chmod(0o666)
    answers = {"squeue": "echo 'demo.0123abcd|0|57_0|RUNNING|n1|None|N/A'", "scontrol": "echo 'ClusterName = far'"}
    for name in ("squeue", "scontrol", "scancel", "sbatch", "srun"):
        (commands / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {calls}\n{answers.get(name, "")}\n')
        (commands / name).chmod(0o755)
    with users.mallory.acts(umask=0):
        mallory_run.result.unlink()
        job = {"kind": "slurm", "name": "demo.0123abcd", "token": "0123abcd", "index": 0, "site": "far"}
        write_json(mallory_run.path / "job.json", {**job, "uid": users.alice.uid, "after": 0})
        mallory_run.path.chmod(0o777)
    done = users.alice.python("jobs", "cancel", mallory_run.path, "--yes", PATH=f"{commands}:{os.defpath}")
    assert done.returncode == 0, done.stderr
    (signalled,) = [line for line in calls.read_text().splitlines() if line.startswith("scancel")]
    assert f"--user={users.mallory.uid}" in signalled.split() and signalled.split()[-1] == "57_0"


# -- 16: folders for temporary files -----------------------------------------------------------------------------------

START = """
import os, sys, tempfile
from flip.distributed.parallel import set_compile_caches
from flip.runs.rundir import RunDir
from flip.runs.temporary_folders import delete_left
for tempfile.tempdir in sys.argv[2:]:
    set_compile_caches()
    delete_left(RunDir(sys.argv[1]), 1)
    print(tempfile.tempdir, os.environ.pop("TORCHINDUCTOR_CACHE_DIR"), os.environ.pop("TRITON_CACHE_DIR"))
"""


def test_rank_process_ignores_prepared_temporary_folders(users, precious):
    """The names that a rank uses are taken by a link to a folder of Alice's and by a folder writable for all."""
    with users.alice.acts():
        record = precious.parent / "keep" / "flip.json"
        record.parent.mkdir()
        write_json(record, {"run": str(users.shared / "run"), "attempt": 1})
    with users.mallory.acts(umask=0):
        for place in (users.folder / "tmp", users.shared):
            (place / "pymp-hers").symlink_to(record.parent)
        (users.folder / "tmp" / f"flip-compile-{users.alice.uid}").symlink_to(precious.parent)
        (users.shared / f"flip-compile-{users.alice.uid}" / "inductor").mkdir(parents=True)
    done = users.alice.python("-c", START, users.shared / "run", users.folder / "tmp", users.shared)
    assert done.returncode == 0, done.stderr
    lines = [list(map(Path, line.split())) for line in done.stdout.splitlines()]
    assert len(lines) == 2
    for _, *caches in lines:
        for cache in caches:
            folder = cache.parents[2]
            assert folder.parent == users.folder / "tmp" and folder.name.startswith("pymp-"), "multiprocessing's folder"
            assert not folder.exists(), "it ends with its process"
    assert record.exists()


# -- 9: records --------------------------------------------------------------------------------------------------------

FIFOS = [
    "config.yaml", "identity.json", "status.json", "result.json", "job.json", "cancel.json", "attempts/1/start.json",
    "attempts/1/end.json", "attempts/1/cause.0.json", "attempts/1/pids.json", "metrics/1.jsonl", "eval/pretrain-8.json",
    "logs/1/node0.out", "logs/1/node0.err",
]  # fmt: skip
WRONG = '{"attempt": "x", "samples": {}, "kind": [], "cause": 1, "order": {}, "action": [], "who": 7, "time": "x"}'


def test_status_report_and_explain_survive_records_of_other_user(users):
    """Records are FIFOs without a writer or hold values of wrong types; the valid run keeps its row."""
    sweep = users.shared / "demo"
    with users.mallory.acts():
        make(sweep, "sound")
        for number, record in enumerate(FIFOS):
            run = make(sweep, f"fifo-{number}")
            (run.path / record).parent.mkdir(parents=True, exist_ok=True)
            (run.path / record).unlink(missing_ok=True)
            os.mkfifo(run.path / record, 0o666)
        run = make(sweep, "wrong")
        for record in FIFOS[1:-2]:
            (run.path / record).write_text(WRONG)
        (sweep / ".supervisor").mkdir()
        for name in ("lock", "settings.json", "pid.json"):
            os.mkfifo(sweep / ".supervisor" / name, 0o666)
        os.mkfifo(sweep / "sweep.json", 0o666)
    names = {path.name for path in sweep.iterdir() if path.name not in (".supervisor", "sweep.json")}
    before = tree(sweep)
    for arguments in (["status"], ["status", "--goodput"], ["report"]):
        done = users.alice.python("jobs", arguments[0], sweep, *arguments[1:], "--json")
        assert done.returncode == 0 and "Traceback" not in done.stderr, (arguments, done.stderr)
        if "--goodput" not in arguments:
            rows = {row["run"]: row for row in json.loads(done.stdout)}
            assert rows.keys() == names and rows["sound"]["state"] == "complete"
    for name in ("fifo-9", "wrong"):
        done = users.alice.python("jobs", "explain", sweep / name)
        assert "Traceback" not in done.stderr, (name, done.stderr)
    done = users.alice.python("jobs", "logs", sweep / "fifo-12")
    assert done.returncode == 65 and "node0.out: is not a regular file" in done.stderr, done.stderr
    assert tree(sweep) == before


# -- files of a source of shards ---------------------------------------------------------------------------------------


def test_make_packs_no_private_file_that_another_user_linked(users, precious):
    """Shards are read by all, so a link in a shared folder would publish what only Alice can read."""
    images = users.shared / "pictures"
    with users.mallory.acts(umask=0):
        images.mkdir()
        for name in ("cat.png", "dog.png"):
            (images / name).write_bytes(encode(draw_image(0, 16)))
        (images / "cat.txt").write_text("a cat")
        (images / "dog.txt").symlink_to(precious)
        (images / "home").symlink_to(users.alice.home)
        (images / "t.csv").write_text(f"path,text\ncat.png,a cat\n{precious},a secret\ndog.txt,another\n")
    with users.alice.acts():
        (users.alice.home / "photo.png").write_bytes(encode(draw_image(1, 16)))
    for source in (images, images / "t.csv"):
        command = ["jobs", "shards", "make", source, "--min-complete", "0", "--json"]
        ended = users.alice.python(*command, "--out", users.alice.home / source.name)
        report = json.loads(ended.stdout)
        assert ended.returncode == 0 and report["samples"] == 1 and report["refused"] == 2, ended.stderr
        assert all("outside of the source" in entry["reason"] for entry in report["refused_rows"])
        assert b"alice's" not in (users.alice.home / source.name / "00000.tar").read_bytes()
