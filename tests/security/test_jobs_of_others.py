"""Tests that a job obeys no record that a member of the group has put into the run, with real user ids.

Alice's run directory has mode 2775, as a copy without modes or a run of an older release. Mallory is in its group.
"""

import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from flip.files.creation import RefusedPath
from flip.runs.rundir import RunDir, read_json, write_json
from jobs.slurm import backend
from tests.harness.failed_start import BASH, script
from tests.security.users import ROOT, TEAM

pytestmark = pytest.mark.long
HOOKS = ROOT / "jobs" / "host" / "batch_hooks.py"


@pytest.fixture
def run(users):
    """A run of Alice in the queue of Slurm."""
    sweep = users.shared / "demo"
    run = RunDir(sweep / "run")
    with users.alice.acts():
        sweep.mkdir()
        run.path.mkdir()
        run.config.write_text("schema: 1\n")
        write_json(run.identity, {"schema": 1})
        write_json(run.path / "job.json", {"kind": "slurm", "token": "0123abcd", "after": 0, "world": 1})
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


def hook(users, *arguments):
    return users.alice.run(sys.executable, "-I", HOOKS, *arguments, timeout=120)


def test_begin_obeys_no_job_record_of_group_member(users, run):
    replace_job(users, run)
    begun = hook(users, "begin", run.path, "--token", "0123abcd")
    assert begun.returncode == 77 and begun.stdout == "", begun.stderr
    assert f"job.json: not used, because another user may have prepared it: it belongs to uid {users.mallory.uid}" in (
        begun.stderr
    )
    assert "Submit the run again" in begun.stderr
    ended = hook(users, "end", run.path, "--attempt", 1, "--code", 78)
    assert ended.returncode != 0 and not (users.alice.home / "executed").exists()
    assert run.path.stat().st_mode & 0o022 == 0, "closed before job.json is read"


def test_end_obeys_no_job_record_of_group_member(users, run):
    """The folder was opened after the start of the attempt."""
    begun = hook(users, "begin", run.path, "--token", "0123abcd")
    assert begun.returncode == 0 and begun.stdout == "1\n", begun.stderr
    open_to_group(run)
    replace_job(users, run)
    ended = hook(users, "end", run.path, "--attempt", 1, "--code", 78)
    assert ended.returncode == 0 and not (users.alice.home / "executed").exists(), ended.stderr
    end = read_json(run.attempt(1) / "end.json")
    assert (end["action"], end["cause"]) == ("stop", "permission") and "job.json: not used" in end["reason"], end


def test_crash_is_not_restarted_with_job_record_of_group_member(users, run):
    assert hook(users, "begin", run.path, "--token", "0123abcd").stdout == "1\n"
    open_to_group(run)
    replace_job(users, run)
    ended = hook(users, "end", run.path, "--attempt", 1, "--code", 70)
    assert read_json(run.attempt(1) / "end.json")["action"] == "stop", ended.stderr


def test_begin_stops_at_once_at_prepared_folder(users, run):
    """Waiting does not change the owner of a folder: no retry for ten minutes, and no requeue."""
    with users.mallory.acts(groups=[TEAM]):
        run.logs.mkdir()
    begun = hook(users, "begin", run.path, "--token", "0123abcd")
    assert begun.returncode == 77 and begun.stdout == "", begun.stderr
    end = read_json(run.attempt(1) / "end.json")
    assert (end["action"], end["cause"]) == ("stop", "permission") and str(run.logs) in end["reason"], end


def test_canary_releases_no_jobs_that_group_member_names(users, run):
    replace_job(users, run)
    with users.mallory.acts(groups=[TEAM]):
        record = read_json(run.path / "job.json")
        write_json(run.path / "job.json", {**record, "canary": {"steps": 1, "releases": ["mine.1"]}})
        (run.path / "result.json").write_text("{}")
    released = hook(users, "release", run.path)
    assert released.returncode == 77, released.stderr


def test_cancel_settles_no_jobs_that_group_member_names(users, run):
    replace_job(users, run)
    with users.alice.acts():
        backend._settle(run)
    with users.mallory.acts(groups=[TEAM]):
        record = read_json(run.path / "job.json")
        write_json(run.path / "job.json", {**record, "canary": {"steps": 1, "releases": ["mine.1"]}})
    with users.alice.acts(), pytest.raises(RefusedPath, match="job.json"):
        backend._settle(run)


def test_begin_refuses_link_in_place_of_job_record(users, run):
    """It leads to a job.json of Alice, of another run."""
    other = run.path.parent / "other.json"
    with users.alice.acts():
        write_json(other, read_json(run.path / "job.json"))
    with users.mallory.acts(groups=[TEAM]):
        (run.path / "job.json").rename(run.path / "moved")
        (run.path / "job.json").symlink_to(other)
    begun = hook(users, "begin", run.path, "--token", "0123abcd")
    assert begun.returncode == 77 and "it is a symbolic link" in begun.stderr, begun.stderr


@pytest.mark.parametrize("name", ["config.yaml", "identity.json", "task.json"])
def test_begin_refuses_configuration_of_group_member(users, run, name):
    """Ranks read and write, with the rights and credentials of Alice, what these files name."""
    with users.mallory.acts(groups=[TEAM]):
        if (run.path / name).exists():
            (run.path / name).rename(run.path / "moved")
        (run.path / name).write_text("{}\n")
    begun = hook(users, "begin", run.path, "--token", "0123abcd")
    assert begun.returncode == 77 and f"{name}: not used" in begun.stderr, begun.stderr
    assert not run.attempts.exists()


def test_begin_refuses_configuration_that_group_member_wrote_in_place(users, run):
    """Its owner is Alice, its content Mallory's."""
    run.config.chmod(0o664)
    os.chown(run.config, -1, TEAM)
    with users.mallory.acts(groups=[TEAM]):
        run.config.write_text("schema: 1\ncheckpoint: {url: s3://mallory/x}\n")
    begun = hook(users, "begin", run.path, "--token", "0123abcd")
    assert begun.returncode == 77 and "config.yaml: not used" in begun.stderr, begun.stderr
    assert "may write to it" in begun.stderr and not run.attempts.exists()


def test_run_of_older_release_with_open_folders_starts_and_is_closed(users, run):
    begun = hook(users, "begin", run.path, "--token", "0123abcd")
    assert begun.returncode == 0, begun.stderr
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


def test_command_lines_of_successor_show_no_variable_to_other_users(users):
    """A job that Slurm does not requeue submits its successor. The real processes wait until Mallory has read them."""
    alice = users.alice
    folder = users.folder / "bin"
    folder.mkdir(mode=0o755)
    folder.chmod(0o777)
    (folder / "record").write_text(f'#!/bin/sh\nexec {shutil.which("env")} > "{folder}/environment"\n')
    requeue = "requeue) echo 'presently disabled' >&2; exit 1;;"
    show = "show) echo 'JobState=RUNNING Restarts=0 Partition=gpu';;"
    (folder / "scontrol").write_text(f"#!/bin/sh\ncase $1 in {requeue} {show} esac\n")
    for name in ("squeue", "sinfo"):
        (folder / name).write_text("#!/bin/sh\n")
    (folder / "env").write_text(WAIT.format(folder=folder, program=shutil.which("env")))
    (folder / "sbatch").write_text(WAIT.format(folder=folder, program=folder / "record"))
    for path in folder.iterdir():
        path.chmod(0o755)
    (folder / "script").write_text(script(BASH))
    slurm = {"SLURM_JOB_ID": 58, "SLURM_JOB_NAME": "demo.1", "SLURM_JOB_PARTITION": "gpu", "SLURMD_NODENAME": "n7"}
    given = {"AWS_SECRET_ACCESS_KEY": "hunter2hunter2", "delay": "a value", "PATH": f"{folder}:{os.defpath}"}
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(alice.run, "bash", folder / "script", **slurm, **given)
        seen = users.mallory.run(sys.executable, "-c", READ, folder / "waiting").stdout
        (folder / "go").touch()
        done = job.result()
    assert "sbatch" in seen, done.stderr
    assert given["AWS_SECRET_ACCESS_KEY"] not in seen
    environment = (folder / "environment").read_text().splitlines()
    for name, value in given.items():
        assert f"{name}={value}" in environment, "the successor gets it"
    assert not [line for line in environment if line.startswith(("SLURM", "PYTHONPATH", "FLIP_SNAPSHOT"))]
