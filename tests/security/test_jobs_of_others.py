"""Tests that a job obeys no record that a member of the group has put into the run, with real user ids.

Alice's run directory has mode 2775, as a copy without modes. Mallory is in its group.
"""

import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from flip.files.creation import RefusedPath
from flip.runs.rundir import RunDir, read_json, write_json
from jobs.slurm import backend
from tests.harness.common import wait_until
from tests.harness.job_records import write_job
from tests.security.users import ROOT, TEAM

pytestmark = pytest.mark.long
OWNER = ROOT / "jobs" / "host" / "job.py"
TOKEN = "0123abcd"
#: Plays the step of the ranks: waits until the test has seen it, if it is to, and ends with a code.
SCRIPT = """[ "$1" = step ] || exit 64
if [ -n "${WAIT:-}" ]; then
  touch "$WAIT/running"
  until [ -e "$WAIT/go" ]; do sleep 0.05; done
fi
exit "$CODE"
"""
#: In place of each command of Slurm: it records its call.
RECORDER = """#!/bin/sh
echo "$0 $*" >> {folder}/calls
"""


@pytest.fixture
def run(users):
    """A run of Alice in the queue of Slurm."""
    sweep = users.shared / "demo"
    run = RunDir(sweep / "run")
    with users.alice.acts():
        sweep.mkdir()
        run.path.mkdir()
        run.config.write_text("schema: 1\n")
        write_json(run.identity, {"schema": 2})
        write_job(run, token=TOKEN, world=1)
    open_to_group(run)
    return run


def open_to_group(run):
    os.chown(run.path, -1, TEAM)
    run.path.chmod(0o2775)


def replace_job(users, run):
    """Mallory replaces job.json by one with the same token and a command of hers."""
    path = run.path / "job.json"
    command = ["touch", str(users.alice.home / "executed")]
    with users.mallory.acts(groups=[TEAM]):
        write_json(path, {**read_json(path), "notify": command})
    assert path.stat().st_uid == users.mallory.uid


@pytest.fixture
def job(users, run):
    """``job(code, meanwhile, **environment)`` is a start of Alice's job by its real owner, whose step of ranks ends
    with this code. ``meanwhile()`` is called while the step runs."""
    folder = users.folder / "job"
    folder.mkdir(mode=0o755)
    folder.chmod(0o777)
    (folder / "script").write_text(SCRIPT)
    for name in ("scontrol", "squeue", "scancel", "sinfo", "sbatch"):
        (folder / name).write_text(RECORDER.format(folder=folder))
        (folder / name).chmod(0o755)

    def start(code=0, meanwhile=None, **environment):
        command = (sys.executable, "-I", OWNER, run.path, "--token", TOKEN, "--script", folder / "script")
        given = {"PATH": f"{folder}:{os.defpath}", "FLIP_RUN": run.path, "CODE": code, **environment}
        if meanwhile is None:
            return users.alice.run(*command, timeout=120, **given)
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(users.alice.run, *command, timeout=120, **given, WAIT=folder)
            wait_until(lambda: (folder / "running").exists() or done.done(), "the step")
            meanwhile()
            (folder / "go").touch()
            return done.result()

    start.folder = folder
    return start


def calls(job):
    """The calls of Slurm's commands."""
    path = job.folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_begin_obeys_no_job_record_of_group_member(users, run, job):
    replace_job(users, run)
    begun = job()
    assert begun.returncode == 77 and not run.attempts.exists(), begun.stderr
    assert "job.json: not used, because another user may have prepared it" in begun.stderr
    assert f": it belongs to uid {users.mallory.uid}" in begun.stderr
    assert "Submit the run again" in begun.stderr and not (users.alice.home / "executed").exists()
    assert run.path.stat().st_mode & 0o022 == 0, "closed before job.json is read"


@pytest.mark.parametrize("code", [78, 70])
def test_end_obeys_no_job_record_of_group_member(users, run, job, code):
    """The folder was opened after the start of the attempt. A crash is not restarted with such a record."""

    def meanwhile():
        open_to_group(run)
        replace_job(users, run)

    ended = job(code, meanwhile)
    assert ended.returncode == code and not (users.alice.home / "executed").exists(), ended.stderr
    end = read_json(run.attempt(1) / "end.json")
    assert (end["action"], end["cause"]) == ("stop", "permission") and "job.json: not used" in end["reason"], end


def test_begin_stops_at_once_at_prepared_folder(users, run, job):
    """Waiting does not change the owner of a folder: no retry for ten minutes, and no requeue."""
    with users.mallory.acts(groups=[TEAM]):
        run.logs.mkdir()
    begun = job(SLURM_JOB_ID=58)
    assert begun.returncode == 77 and not [call for call in calls(job) if "requeue" in call], begun.stderr
    end = read_json(run.attempt(1) / "end.json")
    assert (end["action"], end["cause"]) == ("stop", "permission") and str(run.logs) in end["reason"], end


def prepare_canary(users, run):
    """Mallory replaces job.json by one that names jobs of hers, and lets the run look complete."""
    replace_job(users, run)
    with users.mallory.acts(groups=[TEAM]):
        record = read_json(run.path / "job.json")
        write_json(run.path / "job.json", {**record, "canary": {"steps": 1, "releases": ["mine.1"]}})
        (run.path / "result.json").write_text("{}")


def test_canary_releases_no_jobs_that_group_member_names(users, run, job):
    prepare_canary(users, run)
    released = job()
    assert released.returncode == 77 and calls(job) == [], released.stderr


def test_end_releases_no_jobs_that_group_member_names(users, run, job):
    def meanwhile():
        open_to_group(run)
        prepare_canary(users, run)

    ended = job(0, meanwhile)
    assert "job.json: not used" in (run.logs / "1" / "job.err").read_text(), ended.stderr
    assert calls(job) == []


def test_cancel_settles_no_jobs_that_group_member_names(users, run):
    replace_job(users, run)
    with users.alice.acts():
        backend._settle(run)
    with users.mallory.acts(groups=[TEAM]):
        record = read_json(run.path / "job.json")
        write_json(run.path / "job.json", {**record, "canary": {"steps": 1, "releases": ["mine.1"]}})
    with users.alice.acts(), pytest.raises(RefusedPath, match="job.json"):
        backend._settle(run)


def test_begin_refuses_link_in_place_of_job_record(users, run, job):
    """It leads to a job.json of Alice, of another run."""
    other = run.path.parent / "other.json"
    with users.alice.acts():
        write_json(other, read_json(run.path / "job.json"))
    with users.mallory.acts(groups=[TEAM]):
        (run.path / "job.json").rename(run.path / "moved")
        (run.path / "job.json").symlink_to(other)
    begun = job()
    assert begun.returncode == 77 and "it is a symbolic link" in begun.stderr, begun.stderr


@pytest.mark.parametrize("name", ["config.yaml", "identity.json", "task.json"])
def test_begin_refuses_configuration_of_group_member(users, run, job, name):
    """Ranks read and write, with the rights and credentials of Alice, what these files name."""
    with users.mallory.acts(groups=[TEAM]):
        if (run.path / name).exists():
            (run.path / name).rename(run.path / "moved")
        (run.path / name).write_text("{}\n")
    begun = job()
    assert begun.returncode == 77 and f"{name}: not used" in begun.stderr, begun.stderr
    assert not run.attempts.exists()


def test_begin_refuses_configuration_that_group_member_wrote_in_place(users, run, job):
    """Its owner is Alice, its content Mallory's."""
    run.config.chmod(0o664)
    os.chown(run.config, -1, TEAM)
    with users.mallory.acts(groups=[TEAM]):
        run.config.write_text("schema: 1\ncheckpoint: {url: s3://mallory/x}\n")
    begun = job()
    assert begun.returncode == 77 and "config.yaml: not used" in begun.stderr, begun.stderr
    assert "may write to it" in begun.stderr and not run.attempts.exists()


def test_run_with_open_folders_starts_and_is_closed(users, run, job):
    begun = job(78)
    assert begun.returncode == 78 and run.newest_attempt() == 1, begun.stderr
    assert run.path.stat().st_mode & 0o022 == 0


def test_status_and_explain_show_run_of_other_user(users, run):
    """Bob's commands display job.json of Mallory in the run of Alice."""
    replace_job(users, run)
    with users.mallory.acts(groups=[TEAM]):
        write_json(run.path / "job.json", {**read_json(run.path / "job.json"), "kind": "local"})
    for command in ("status", "explain"):
        shown = users.bob.python("jobs", command, run.path)
        assert shown.returncode == 0 and "stopped" in shown.stdout, shown.stdout + shown.stderr


def test_submit_refuses_configuration_of_group_member(users, desk):
    """A run that continues keeps the stored values of the settings that its sweep does not name."""
    alice = users.alice
    assert desk.submit(alice, users.shared).returncode == 0
    desk.until_complete(alice, users.shared)
    run = RunDir(users.shared / "demo" / "half")
    before = (run.path / "job.json").read_bytes()
    run.result.unlink()
    (alice.home / "ran").unlink()
    open_to_group(run)
    with users.mallory.acts(groups=[TEAM]):
        run.config.rename(run.path / "moved")
        run.config.write_bytes((run.path / "moved").read_bytes())
    done = desk.submit(alice, users.shared)
    assert done.returncode == 77 and f"{run.config}: not used" in done.stderr, done.stdout + done.stderr
    assert (run.path / "job.json").read_bytes() == before and not (alice.home / "ran").exists()
    assert run.path.stat().st_mode & 0o022 == 0


WAIT = """#!/bin/sh
touch {folder}/waiting
until [ -e {folder}/go ]; do sleep 0.05; done
exec {program} "$@"
"""
READ = """
import pathlib, sys, time
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.05)
for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
        print(path.read_bytes().decode(errors="replace").replace(chr(0), " "))
    except OSError:
        pass
"""


def test_command_lines_of_successor_show_no_variable_to_other_users(users, run, job):
    """A job that Slurm does not requeue submits its successor. The real processes wait until Mallory has read them."""
    folder = job.folder
    (folder / "record").write_text(f'#!/bin/sh\nexec {shutil.which("env")} > "{folder}/environment"\n')
    requeue = "requeue) echo 'presently disabled' >&2; exit 1;;"
    show = "show) echo 'JobState=RUNNING Restarts=0 Partition=gpu';;"
    (folder / "scontrol").write_text(f"#!/bin/sh\ncase $1 in {requeue} {show} esac\n")
    (folder / "sbatch").write_text(WAIT.format(folder=folder, program=folder / "record"))
    (folder / "record").chmod(0o755)
    slurm = {"SLURM_JOB_ID": 58, "SLURM_JOB_NAME": "demo.1", "SLURM_JOB_PARTITION": "gpu", "SLURMD_NODENAME": "n7"}
    given = {"AWS_SECRET_ACCESS_KEY": "hunter2hunter2", "delay": "a value"}
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(job, 75, **slurm, **given)
        seen = users.mallory.run(sys.executable, "-c", READ, folder / "waiting").stdout
        (folder / "go").touch()
        done = started.result()
    assert done.returncode == 75 and "sbatch" in seen, done.stderr
    assert given["AWS_SECRET_ACCESS_KEY"] not in seen
    environment = (folder / "environment").read_text().splitlines()
    for name, value in given.items():
        assert f"{name}={value}" in environment, "the successor gets it"
    assert not [line for line in environment if line.startswith(("SLURM", "FLIP_RUN", "FLIP_ATTEMPT"))]
