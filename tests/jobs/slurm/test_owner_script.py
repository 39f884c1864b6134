"""Tests of the batch script whose owner is jobs/host/job.py: its text against golden files, and in a real bash.

Stand-ins replace Slurm and job.py.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from flip.files.ownership import REFUSED
from flip.runs.rundir import RunDir
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import JobResources
from jobs.slurm import batch_script
from tests.harness.common import wait_until
from tests.jobs.slurm import golden_scripts
from tests.jobs.slurm.batch_stage import JOB, OWNER_CODE, ignored_signals, script

ELASTIC = JobResources(4, 8, 8, 12, 23.9, least_nodes=2, spares=1, usable=(2, 4))
STOP = {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
#: A stand-in for srun, or for a follower: it records how it was started.
RECORD = """echo "pid=$$ agents=$FLIP_AGENTS proxy=$PROXY $*" >> {folder}/{name}
cat /proc/$$/status > {folder}/{name}.status"""


@pytest.mark.parametrize(
    "name, fields, changes",
    [
        ("plain", {"partition": "gpu"}, {}),
        ("agents", {"partition": "gpu", "agents": True}, {}),
        ("elastic", {"partition": "gpu", "agents": True, "options": {"exclude": "n[07-08]"}}, {"resources": ELASTIC}),
        ("tracked", {"container": "/img/torch.sif", "container_runtime": "apptainer"}, {"trackers": ["wandb"]}),
        (
            "apptainer",
            {
                "container": "/img/torch 2.sif", "container_runtime": "apptainer", "python": "python3.12",
                "host_python": "/usr/bin/python3", "modules": ["cuda/12.8"], "setup": ["ulimit -n 65536"],
                "options": {"gres": "gpu:h100:8"}, "master_addr": "10.0.0.1",
            },
            {},
        ),
        (
            "pyxis",
            {"container": "nvcr.io#nvidia/pytorch:25.09-py3", "container_mounts": ["/data", "/scratch/cache:/cache"]},
            {"trackers": ["wandb"]},
        ),
    ],
)  # fmt: skip
def test_script_matches_golden_file(name, fields, changes):
    profile = ClusterProfile(name=name, kind="slurm", **{"python": "/opt/py/bin/python", **fields})
    text = script(profile, replace(JOB, **changes))
    program = batch_script.ownership_program()
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert text.count(program) == 1
    text = text.replace(program, "(flip/files/acl.py and flip/files/ownership.py)\n")
    golden_scripts.compare(name, text)


def test_start_becomes_owner_with_ignored_signals(owned):
    """Its process is the one that Slurm signals. It handles signals from its first line on; until then none ends it."""
    owned.write({"trackers": ["wandb", "mlflow"], "env": {"A": "b c"}}, agents=True, peer_seconds=15)
    bash = owned.start(FLIP_ATTEMPT="9", FLIP_AGENTS="inherited")
    assert bash.wait(60) == OWNER_CODE
    started = owned.started()
    options = ["--token", "77aa77aa", "--peer-seconds", "15", "--agents", "--tracker", "wandb", "--tracker", "mlflow"]
    assert started["arguments"] == [str(owned.run.path), *options, "--script", str(owned.script)]
    assert started["pid"] == bash.pid
    assert ignored_signals(started["status"]) >= STOP
    assert started["umask"] & 0o022 == 0o022
    assert not {"FLIP_ATTEMPT", "FLIP_AGENTS"} & started["environ"].keys()
    expected = {"FLIP_RUN": str(owned.run.path), "FLIP_SNAPSHOT": str(owned.code), "A": "b c", "PYTHONUNBUFFERED": "1"}
    assert expected.items() <= started["environ"].items()
    assert (owned.folder / "57_1.out").read_text() == "the owner\n", "its output is in the log of the submission"
    assert not owned.commands.calls()


def test_start_has_neither_agents_nor_followers_unless_profile_has(owned):
    owned.write({"trackers": ["wandb"]}, container="/img/torch.sif", host_python=sys.executable)
    assert owned.start().wait(60) == OWNER_CODE
    options = ["--token", "77aa77aa", "--peer-seconds", "120", "--script", str(owned.script)]
    assert owned.started()["arguments"][1:] == options, "pyxis opens the image only for srun"


def test_start_warns_of_exposed_code_in_log_of_submission(owned, tmp_path):
    """Code in a folder in which others may rename it, which the submission accepted; without that it is refused."""
    place = tmp_path / "shared"
    place.mkdir()
    owned.code.rename(place / "code")
    owned.code = place / "code"
    place.chmod(0o777)
    owned.write({"exposed": [str(place)]})
    assert owned.start().wait(60) == OWNER_CODE
    assert f"warning: {place}" in (owned.folder / "57_1.err").read_text()
    owned.write()
    assert owned.start().wait(60) == REFUSED
    assert not owned.commands.calls()


def test_start_refuses_code_of_others(owned):
    owned.owner.chmod(0o666)
    assert owned.start().wait(60) == REFUSED
    assert owned.started() is None and not owned.commands.calls(), "a decision: no requeue"
    assert "job.py" in (owned.folder / "57_1.err").read_text()


def break_start(owned, what, tmp_path):
    """Take something away from this node."""
    if what == "folder":
        shutil.rmtree(owned.folder)
    elif what == "runs":
        (owned.folder / "runs").unlink()
    elif what == "code":
        shutil.rmtree(owned.code)
    elif what == "owner":
        owned.owner.unlink()
    elif what == "interpreter":
        owned.write(host_python="/nowhere/python")
    elif what == "rights":
        owned.write(host_python=str(tmp_path))
    elif what == "interpreter after the check":
        leaving = tmp_path / "leaving"
        leaving.write_text(f'#!/bin/sh\nrm "$0"; exec {sys.executable} "$@"\n')
        leaving.chmod(0o755)
        owned.write(host_python=str(leaving))


@pytest.mark.parametrize(
    "what, code",
    [
        ("folder", 1),
        ("runs", 2),
        ("code", 2),
        ("owner", 2),
        ("interpreter", 127),
        ("rights", 126),
        ("interpreter after the check", 127),
    ],
)
def test_start_on_broken_node_requeues_job_and_excludes_node(owned, tmp_path, what, code):
    """Such a node would be idle again at once, and Slurm would send it the next array element."""
    break_start(owned, what, tmp_path)
    assert owned.start().wait(60) == code
    assert owned.commands.calls() == [
        "scontrol show job 57_1",
        "scontrol show hostnames n7",
        "sinfo -h -N -p gpu -o %N|%T",
        f"scontrol update JobId=57_1 Comment=away:1:0:0:{code}:n7",
        "scontrol requeue 57_1",
        "scontrol update JobId=57_1 ExcNodeList=n7",
    ]
    assert owned.started() is None and owned.run.newest_attempt() == 0


@pytest.mark.parametrize("code, requeued", [(1, True), (2, True), (137, True), (70, False), (78, False), (0, False)])
def test_owner_without_its_modules_leaves_the_decision_to_the_script(owned, code, requeued):
    assert owned.start("elsewhere", str(code)).wait(60) == code
    assert ("scontrol requeue 57_1" in owned.commands.calls()) == requeued
    assert (f"scontrol update JobId=57_1 Comment=away:1:0:0:{code}:n7" in owned.commands.calls()) == requeued


@pytest.mark.parametrize("what, code", [("sweep", 78), ("root", 1), ("code", 2)])
def test_job_ends_if_sweep_was_deleted_but_not_if_it_is_out_of_reach(owned, tmp_path, what, code):
    """A node that does not mount the runs root has an empty folder in its place, with another inode."""
    root = tmp_path / "runs"
    root.mkdir()
    owned.run.path.parent.rename(root / "demo")
    folder = root / "demo" / ".slurm" / "77aa77aa"
    owned.write({"run": RunDir(root / "demo" / "run with space")}, folder)
    if what == "code":
        owned.owner.unlink()
    else:
        shutil.rmtree(root / "demo")
    if what == "root":
        root.rename(tmp_path / "mounted elsewhere")
        root.mkdir()
    assert owned.start().wait(60) == code
    assert ("scontrol requeue 57_1" in owned.commands.calls()) == (code != 78)


RESOURCES = JobResources(nodes=4, processes=3, cpus=2, least_nodes=2, usable=(2, 4))
AGENTS = "--nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=6 --wait=0 --no-kill"
RANKS = "--nodes=2 --ntasks=6 --cpus-per-task=2 --distribution=block:block --wait=120"


@pytest.mark.parametrize("kind, agents, options", [("agents", "1", AGENTS), ("ranks", "", RANKS)])
def test_step_becomes_srun_of_its_kind_on_the_given_number_of_nodes(owned, tmp_path, kind, agents, options):
    owned.write({"resources": RESOURCES}, agents=True)
    owned.commands("srun", RECORD.format(folder=tmp_path, name="step") + "; exit 65")
    step = owned.start("step", kind, "2")
    assert step.wait(60) == 65
    words = (tmp_path / "step").read_text()
    assert words.startswith(f"pid={step.pid} agents={agents} proxy= {options} --unbuffered ")
    assert words.endswith(" jobs.worker\n") and "--output=all --error=all --kill-on-bad-exit=0 --export=ALL" in words
    assert words.count("--wait") == 1 and words.count("--cpus-per-task") == 1


def test_step_without_its_module_ends_before_srun(owned):
    owned.write(modules=["nosuch/1.0"])
    assert owned.start("step", "ranks", "1").wait(60) == 70
    assert not owned.commands.calls()


def test_setup_lines_may_change_the_shell_and_call_srun(owned, tmp_path):
    """A file that a setup line sources sees the arguments of the shell: conda's `activate` reads them."""
    (tmp_path / "activate").write_text(f'echo "$#" > {tmp_path}/count\n')
    stage_data = "srun --kill-on-bad-exit=1 --export=ALL true"
    lines = [f". {tmp_path}/activate", stage_data, "set -eu", "set -- other words", "export PROXY=p", "IFS=,"]
    owned.write(setup=lines)
    owned.commands("srun", RECORD.format(folder=tmp_path, name="step"))
    assert owned.start("step", "ranks", "1").wait(60) == 0
    assert (tmp_path / "count").read_text() == "0\n"
    first, second = (tmp_path / "step").read_text().splitlines()
    assert first.endswith(" --kill-on-bad-exit=1 --export=ALL true")
    assert " proxy=p --nodes=1 --ntasks=1 --cpus-per-task=1 " in second


def test_setup_line_may_end_the_step(owned):
    owned.write(setup=["false || exit 78"])
    assert owned.start("step", "agents", "1").wait(60) == 78
    assert not owned.commands.calls()


def test_signals_during_setup_neither_end_the_step_nor_are_ignored_by_srun(owned, tmp_path):
    owned.write(setup=[f"touch {tmp_path}/up; until [ -e {tmp_path}/go ]; do sleep 0.02; done"])
    owned.commands("srun", RECORD.format(folder=tmp_path, name="step"))
    step = owned.start("step", "ranks", "1")
    wait_until((tmp_path / "up").exists, "the setup lines", 60)
    for number in STOP:
        step.send_signal(number)
    (tmp_path / "go").touch()
    assert step.wait(60) == 0
    assert not ignored_signals((tmp_path / "step.status").read_text()) & STOP


def test_follower_waits_for_setup_lines_and_has_their_environment(owned, tmp_path):
    (owned.run.logs / "3").mkdir(parents=True)
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\n" + RECORD.format(folder=tmp_path, name="follower") + "\necho sent\n")
    program.chmod(0o755)
    setup = [f"until [ -e {tmp_path}/go ]; do sleep 0.02; done", "export PROXY='p\nq'", "f() { :; }; export -f f"]
    owned.write({"trackers": ["wandb"]}, agents=True, python=str(program), setup=setup)
    owned.commands("srun", f"until [ -s {tmp_path}/follower ]; do sleep 0.02; done")
    variables = {"FLIP_RUN": str(owned.run.path), "FLIP_ATTEMPT": "3"}
    step = owned.start("step", "agents", "1", **variables)
    follower = owned.start("follow", "wandb", str(step.pid), **variables)
    time.sleep(0.7)
    assert not (tmp_path / "follower").exists() and follower.poll() is None
    (tmp_path / "go").touch()
    assert step.wait(60) == 0 and follower.wait(60) == 0
    words = f"-m jobs.follow {owned.run.path} --attempt 3 --job --tracker wandb\n"
    assert (tmp_path / "follower").read_text() == f"pid={follower.pid} agents= proxy=p\nq {words}"
    assert (owned.run.logs / "3" / "follow-wandb.log").read_text() == "sent\n"
    assert not ignored_signals((tmp_path / "follower.status").read_text()) & STOP


def test_follower_of_step_that_has_ended_starts_nevertheless(owned, tmp_path):
    """Its attempt may have left metrics."""
    (owned.run.logs / "3").mkdir(parents=True)
    owned.write({"trackers": ["wandb"]}, python="echo")
    follower = owned.start("follow", "wandb", "4194999", FLIP_RUN=str(owned.run.path), FLIP_ATTEMPT="3")
    assert follower.wait(60) == 0
    assert "--tracker wandb" in (owned.run.logs / "3" / "follow-wandb.log").read_text()


def test_follower_that_waits_for_setup_lines_ends_by_signal_of_owner(owned):
    (owned.run.logs / "3").mkdir(parents=True)
    owned.write({"trackers": ["wandb"]}, python="/nowhere/python")
    variables = {"FLIP_RUN": str(owned.run.path), "FLIP_ATTEMPT": "3"}
    follower = owned.start("follow", "wandb", str(os.getpid()), **variables)
    wait_until((owned.run.logs / "3" / "follow-wandb.log").exists, "its log", 60)
    follower.send_signal(signal.SIGUSR1)
    assert follower.wait(60) == 0
