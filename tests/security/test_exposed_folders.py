"""Tests that no code runs through a folder in which another user can rename, with real user ids.

Alice submits. Mallory is in her group, or has an entry in an access control list, or prepares files in a shared folder.
"""

import os
import shutil

import pytest

from flip.files import acl
from flip.files.acl import Entry
from flip.runs.rundir import RunDir, read_json, write_json
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import Job, JobResources
from tests.flip.files.test_acl import set_or_skip
from tests.harness.job_records import write_job
from tests.jobs.slurm.batch_stage import script
from tests.security.test_other_users import submitted, supervise
from tests.security.users import ROOT, TEAM

pytestmark = pytest.mark.long


@pytest.fixture
def project(users):
    """A project folder as administrators make it: of a group that may write, without the sticky bit."""
    folder = users.folder / "project"
    folder.mkdir()
    os.chown(folder, 0, TEAM)
    folder.chmod(0o2775)
    return folder


def test_group_member_cannot_exchange_code_of_new_runs(users, desk, project):
    """In the project folder a member can rename what Alice makes, so nothing starts there unless she trusts the group;
    with the sticky bit, as docs/cluster.md says, a member cannot."""
    alice = users.alice
    options = {"groups": [TEAM]}
    done = desk.submit(alice, project, **options)
    assert done.returncode == 77 and f"export FLIP_TRUST_GROUP={TEAM}" in done.stderr, done.stderr
    assert str(project) in done.stderr and not list(project.iterdir()) and not (alice.home / "ran").exists()
    done = desk.submit(alice, project, "--dry-run", **options)
    assert done.returncode == 0 and f"asked first: Members of the group gid {TEAM} can rename in" in done.stdout
    done = desk.submit(alice, project, FLIP_TRUST_GROUP=TEAM, **options)
    assert done.returncode == 0, done.stderr
    desk.until_complete(alice, project)
    sticky = project.parent / "sticky"
    sticky.mkdir()
    os.chown(sticky, 0, TEAM)
    sticky.chmod(0o3775)
    done = desk.submit(alice, sticky, **options)
    assert done.returncode == 0, done.stderr
    with users.mallory.acts(groups=[TEAM]), pytest.raises(PermissionError):
        (sticky / "demo").rename(sticky / "mine")
    desk.until_complete(alice, sticky)


def test_existing_runs_below_exposed_folder_continue_until_they_are_exchanged(users, project):
    """Their submission has accepted the folder above (``exposed``)."""
    sweep = project / "demo"
    alice = users.alice
    mallory = users.mallory
    with alice.acts(groups=[TEAM]):
        sweep.mkdir(mode=0o755)
        old = submitted(sweep, "old", "old", 0)
        write_json(old.path / "job.json", {**read_json(old.path / "job.json"), "exposed": [str(project)]})
        submitted(sweep, "new", "new", 1)
    log = supervise(alice, sweep)
    assert (alice.home / "old").exists() and not (alice.home / "new").exists(), log
    assert f"WARNING {project}: members of the group gid {TEAM} may write to it" in log
    assert f"new: a file of it is damaged; left alone: ValueError('{project} is not trusted" in log
    done = alice.python("jobs", "status", "demo", FLIP_RUNS=project)
    assert done.returncode == 0 and f"warning: {project}: members of the group" in done.stderr, done.stderr
    with mallory.acts(groups=[TEAM]):
        sweep.rename(project / "moved")
        sweep.mkdir(mode=0o755)
        submitted(sweep, "old", "executed", 0)
    done = alice.python("-m", "jobs.local.supervisor", sweep)
    assert done.returncode != 0, "she cannot take the lock of a supervisor in the folder of another user"
    assert not (alice.home / "executed").exists() and (project / "moved" / "old").exists()


def entries(user, permissions, mask=7):
    named = [Entry(acl.USER_OBJ, 7, acl.NO_ID), Entry(acl.USER, permissions, user), Entry(acl.GROUP_OBJ, 5, acl.NO_ID)]
    return [*named, Entry(acl.MASK, mask, acl.NO_ID), Entry(acl.OTHER, 5, acl.NO_ID)]


def test_access_control_list_that_lets_other_user_write_is_refused(users, desk):
    """The mode of the folder is the same in both cases."""
    alice = users.alice
    mallory = users.mallory
    with alice.acts():
        (users.shared / "demo").mkdir(mode=0o755)
        set_or_skip(users.shared / "demo", acl.ACCESS, entries(mallory.uid, 7))
    mode = (users.shared / "demo").stat().st_mode
    with mallory.acts():
        (users.shared / "demo" / ".code").mkdir()
        (users.shared / "demo" / ".code").rmdir()
    done = desk.submit(alice, users.shared)
    assert done.returncode == 77, done.stderr
    assert f"its access control list lets uid {mallory.uid} write to it" in done.stderr
    with alice.acts():
        acl.write_acl(users.shared / "demo", acl.ACCESS, entries(mallory.uid, 5))
    assert (users.shared / "demo").stat().st_mode == mode and mode & 0o020
    done = desk.submit(alice, users.shared)
    assert done.returncode == 0, done.stderr
    desk.until_complete(alice, users.shared)


def test_record_of_trusted_groups_of_other_user_is_ignored(users, desk, project):
    """XDG_CONFIG_HOME may lead to a folder that others may write to."""
    alice = users.alice
    mallory = users.mallory
    config = users.shared / "config"
    with mallory.acts():
        (config / "flip").mkdir(parents=True)
        write_json(config / "flip" / "trusted_groups.json", {"groups": [TEAM]})
    options = {"groups": [TEAM], "XDG_CONFIG_HOME": config}
    done = desk.submit(alice, project, "--dry-run", **options)
    assert done.returncode == 0 and "asked first: Members of the group" in done.stdout, done.stderr
    done = desk.submit(alice, project, **options)
    assert done.returncode == 77 and not list(project.iterdir()), done.stderr
    for path in (config, config / "flip", config / "flip" / "trusted_groups.json"):
        os.chown(path, alice.uid, alice.uid)
    done = desk.submit(alice, project, "--dry-run", **options)
    assert done.returncode == 0 and "asked first" not in done.stdout, done.stderr


def test_batch_script_executes_no_code_that_other_user_exchanged(users, monkeypatch):
    """The folder of a package was open to her for a while. Slurm starts the script long after the submission."""
    alice = users.alice
    mallory = users.mallory
    code = users.shared / "code"
    sweep = users.shared / "demo"
    with alice.acts():
        for name in ("flip", "jobs"):
            shutil.copytree(ROOT / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
        run = RunDir(sweep / "run")
        run.path.mkdir(parents=True)
        (sweep / "script").mkdir()
        (sweep / "script" / "runs").write_text(f"{run.path}\n")
        write_job(run, token="script", snapshot=str(code))
    job = Job(run, code, JobResources())
    text = script(ClusterProfile(name="x", kind="slurm"), job, 2, sweep / "script", monkeypatch)
    (sweep / "script.sh").write_text(text)
    slurm = {"SLURM_JOB_ID": 58, "SLURM_ARRAY_JOB_ID": 57, "SLURM_ARRAY_TASK_ID": 0, "SLURM_JOB_NAME": "demo"}
    slurm |= {"SLURM_JOB_PARTITION": "gpu", "SLURMD_NODENAME": "n7", "PATH": f"{users.folder}/bin:{os.defpath}"}
    (users.folder / "bin").mkdir()
    show = "case $2 in job) echo 'JobState=RUNNING Restarts=0 Partition=gpu';; hostnames) echo $3;; esac"
    for name, line in {"scontrol": show, "srun": "exit 0", "sinfo": "printf 'n7|idle\\n'"}.items():
        (users.folder / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (users.folder / "bin" / name).chmod(0o755)
    (code / "flip").chmod(0o777)
    with mallory.acts():
        (code / "flip" / "__init__.py").rename(code / "flip" / "moved.py")
        (code / "flip" / "__init__.py").write_text("import os; open(os.environ['HOME'] + '/executed', 'w')\n")
    (code / "flip").chmod(0o755)
    done = alice.run("bash", sweep / "script.sh", **slurm)
    logs = "".join(path.read_text() for path in (sweep / "script").glob("*.err"))
    assert done.returncode == 77 and f"{code}/flip/__init__.py: it belongs to uid {mallory.uid}: not executed" in logs
    assert not (alice.home / "executed").exists() and not run.attempts.exists()
    (code / "flip" / "moved.py").rename(code / "flip" / "__init__.py")
    alice.run("bash", sweep / "script.sh", **slurm)
    assert run.attempts.exists(), "trusted again, it starts an attempt"
