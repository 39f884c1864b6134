"""Tests of the try of node agents on a site, with stand-ins for Slurm. tests/slurm/test_site.py uses a real one."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest

from jobs.common.cluster_profile import ClusterProfile
from jobs.host.agents import probe
from jobs.slurm import agents_trial
from jobs.slurm.agents_trial import REMEDIES, TASK, judge
from tests.harness.common import ROOT, wait_until

PROFILE = ClusterProfile("far", "slurm", partition="gpu", gpus_per_node=8, host_python="py")
PROLOG = "slurmstepd-n2: error: TaskProlog failed status=3\nsrun: error: n2: task 1: Exited with exit code 3"


def answer(node, kind="", problem=""):
    return {"node": node, "nodes": "n[1-2]", "kind": kind, "problem": problem}


def test_nodes_whose_agents_were_accepted_are_named():
    trial = judge(["n1", "n2"], [answer("n2"), answer("n1")], "")
    assert (trial.nodes, trial.problem, trial.unable) == (["n1", "n2"], "", "")


def test_addresses_of_the_first_node_are_read():
    first = answer("n1") | {"store": "", "coordinator": "10.0.0.1"}
    trial = judge(["n1", "n2"], [answer("n2"), first], "")
    assert (trial.store, trial.coordinator) == ("", "10.0.0.1")
    lost = judge(["n1", "n2"], [answer("n2")], "")
    assert (lost.store, lost.coordinator) == (None, None), "not known"


@pytest.mark.parametrize("kind", [probe.FOLDER, probe.NAME, probe.NETWORK])
def test_problem_names_node_and_remedy(kind):
    trial = judge(["n1", "n2"], [answer("n1"), answer("n2", kind, "n1, port 11111: no")], "")
    assert trial.nodes == ["n1"]
    assert trial.problem == "n2: n1, port 11111: no"
    assert trial.remedy == REMEDIES[kind]


def test_node_without_answer_has_the_messages_of_its_task():
    trial = judge(["n1", "n2"], [answer("n1")], f"srun: error: n7: task 4: Killed\n{PROLOG}")
    assert trial.problem == f"n2: {PROLOG}".replace("\n", "; ")
    assert trial.remedy == REMEDIES[TASK]


def test_problem_of_the_first_node_hides_its_consequences():
    unpublished = answer("n2", probe.FOLDER, "it has not published its port")
    trial = judge(["n1", "n2"], [answer("n1", probe.LISTEN, "no free port"), unpublished], "")
    assert (trial.problem, trial.nodes) == ("n1: no free port", [])
    assert "n2" not in judge(["n1", "n2"], [unpublished], "srun: error: n1: task 0: Killed").problem


def lines(*answers):
    return "\n".join(f"echo '{probe.MARK}{json.dumps(each)}'" for each in answers)


def tried(tmp_path, profile=PROFILE, **fields):
    profile = dataclasses.replace(profile, **fields)
    return agents_trial.try_agents(profile, 2, tmp_path / "code", tmp_path / "folder", 30)


def test_step_asks_for_no_gpus_and_for_what_selects_nodes(commands, tmp_path):
    """Output of a TaskProlog, also before the mark, does not disturb."""
    commands("scontrol", "printf 'n1\\nn2\\n'")
    commands("srun", f"echo hello; printf 'module loaded '\n{lines(answer('n1'), answer('n2'))}")
    commands("scancel", "")
    options = {"constraint": "ib", "gres": "gpu:8", "exclude": "n9", "mem-per-cpu": "9G", "exclusive": ""}
    trial = tried(tmp_path, account="vision", qos="low", options=options)
    assert (trial.nodes, trial.problem) == (["n1", "n2"], "")
    calls = {call.partition(" ")[0]: call for call in commands.calls()}
    name = calls["scancel"].partition("--name=")[2]
    words = [
        *("srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--mem=512M", "--time=2"),
        *("--immediate=30", f"--job-name={name}", "--chdir=/", "--wait=0", "--kill-on-bad-exit=0", "--export=ALL"),
        *("--partition=gpu", "--account=vision", "--qos=low", "--constraint=ib", "--exclude=n9"),
        *("py", "-I", "-B", f"{tmp_path}/code/jobs/host/agents/probe.py", f"{tmp_path}/folder", "60.0"),
    ]
    assert calls["srun"].split(" ") == words


def test_step_has_the_environment_of_jobs(commands, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_PARTITION", "other")
    monkeypatch.setenv("PROXY", "p")
    commands("scontrol", "echo n1")
    commands("srun", f"env > {tmp_path}/env\n{lines(answer('n1'))}")
    commands("scancel", "")
    assert tried(tmp_path, env=["PROXY"], master_addr="10.0.0.1").nodes == ["n1"]
    environ = (tmp_path / "env").read_text().splitlines()
    assert "PROXY=p" in environ and "MASTER_ADDR=10.0.0.1" in environ
    assert not any(line.startswith("SLURM_PARTITION") for line in environ)


def test_refused_step_says_nothing_about_agents(commands, tmp_path):
    refusal = "srun: error: Unable to allocate resources: Requested nodes are busy"
    commands("srun", f"echo 'srun: job 8 queued and waiting for resources' >&2; echo '{refusal}' >&2; exit 1")
    commands("scancel", "exit 1")
    trial = tried(tmp_path)
    assert (trial.unable, trial.problem, trial.nodes) == (refusal, "", ())
    commands("srun", "exit 3")
    assert tried(tmp_path).unable == "srun ended with 3"


def test_tasks_that_all_fail_are_a_problem(commands, tmp_path):
    text = "srun: error: n[1-2]: tasks 0-1: Exited with exit code 2"
    commands(
        "srun", f"echo 'slurmstepd: error: execve(): py: No such file or directory' >&2; echo '{text}' >&2; exit 2"
    )
    commands("scancel", "")
    trial = tried(tmp_path)
    assert trial.problem.startswith("all nodes: slurmstepd: error: execve(): py: No such file")
    assert trial.remedy == REMEDIES[TASK]


def test_silent_srun_is_ended(commands, monkeypatch, tmp_path):
    monkeypatch.setattr(agents_trial, "LIMIT_MINUTES", 0)
    monkeypatch.setattr(agents_trial, "START_SECONDS", -29.5)
    commands("srun", "trap 'echo ended >&2; exit 143' TERM; while :; do sleep 0.05; done")
    commands("scancel", "")
    monkeypatch.setattr("tests.harness.slurm_command_lines.check", lambda words: None)  # of another wall limit
    assert tried(tmp_path).unable == "ended"


INTERRUPTED = """
import sys
from pathlib import Path
from jobs.common.cluster_profile import ClusterProfile
from jobs.slurm import agents_trial
agents_trial.try_agents(ClusterProfile(kind="slurm", host_python="py"), 2, Path("code"), Path("folder"), 600)
"""


def test_interrupted_try_ends_srun_and_cancels_its_job(commands, tmp_path):
    commands("srun", f"trap 'touch {tmp_path}/ended; exit 143' TERM; touch {tmp_path}/up; while :; do sleep 0.05; done")
    commands("scancel", "")
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED], cwd=ROOT, stderr=subprocess.PIPE)
    wait_until((tmp_path / "up").exists, "srun")
    process.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in process.communicate(timeout=30)[1]
    assert (tmp_path / "ended").exists()
    assert commands.calls()[-1].startswith("scancel --user=")


def test_missing_srun_is_no_problem_of_agents(commands, tmp_path, monkeypatch):
    commands("scancel", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tried(tmp_path).unable == f"srun: {os.strerror(2)}"
