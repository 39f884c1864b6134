"""Tests on a Slurm that tracks processes and limits memory by cgroups (proctrack/cgroup, task/cgroup)."""

import os
import signal

import pytest

from flip.runs.errors import ConfigError
from flip.runs.rundir import RunDir, read_json, write_json
from jobs.common.job import Job, JobResources
from jobs.host import slurm_cli
from jobs.slurm.backend import SlurmBackend
from jobs.submitted_runs.clusters import states
from tests.harness.common import ROOT, wait_until
from tests.harness.slurm_scene import owner_and_guard, pids, profile
from tests.slurm.scenarios import AGAIN, SHORT

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture
def site(start_slurm):
    try:
        return start_slurm(nodes=2, gpus=0, cpus=2, cgroups=True)
    except ConfigError as error:
        pytest.skip(str(error))


MEMORY = {False: "200", True: "700"}
"""Of a job in MB. An agent has imported torch."""


def submit(folder, play, agents=False, **options):
    run = RunDir(folder / "runs" / "run")
    run.path.mkdir(parents=True)
    write_json(run.path / "play.json", play)
    run.config.write_text("schema: 1\n")
    send(run, agents, **options)
    return run


def send(run, agents=False, **options):
    job = Job(run, ROOT, JobResources(nodes=1, cpus=1, hours=0.5), module="tests.slurm.scripted")
    SlurmBackend(profile(peer_seconds=2, agents=agents, options=options)).submit([job])


def state(run):
    return states([run])[run.path]


def fields(run):
    record = read_json(run.path / "job.json")
    return slurm_cli.job_fields(slurm_cli.queue([record["name"]])[record["name"], 0].id)


def story(run):
    return lambda: (state(run), fields(run), [p.read_text() for p in run.path.glob("attempts/*/end.json")])


@pytest.mark.parametrize("agents", [False, True])
def test_rank_killed_for_memory(site, tmp_path, agents):
    """The kernel kills the rank at the memory limit of its job (--mem). A process that has left the rank's session ends
    with the step; without cgroups Slurm would not know it."""
    play = {"steps": SHORT, "attempts": {"1": {"memory": 400 + 500 * agents, "daemon": "7731.25"}}}
    run = submit(tmp_path, play, agents, mem=MEMORY[agents])
    wait_until(lambda: state(run).state == "complete", "its end", 120, story=story(run))
    end = read_json(run.attempt(1) / "end.json")
    assert run.newest_attempt() == 2 and (end["cause"], end["action"]) == ("crash", "requeue"), end
    assert "memory" in end["reason"], end
    assert fields(run)["Restarts"] == str(int(not agents)), "with agents the run goes on in its job"
    wait_until(lambda: not pids("sleep 7731.25"), "the end of its process")


def kill_owner(site, run):
    """SIGKILL to the owner, when the rank of the first attempt has started; returns the fields of the job."""
    wait_until(lambda: len(list(run.path.glob("signals/1.*.jsonl"))) == 1, "its rank", 60, story=story(run))
    job = fields(run)
    os.kill(owner_and_guard(site, job)[0], signal.SIGKILL)
    return job


def test_killed_owner(site, tmp_path):
    """Slurm kills the guard with the owner, before it can restart the job. The rank gets TERM and saves."""
    run = submit(tmp_path, AGAIN)
    job = kill_owner(site, run)
    wait_until(lambda: fields(run)["JobState"] == "FAILED", "its end", story=story(run))
    assert not owner_and_guard(site, job)
    shown = state(run)
    assert shown.state == "stopped" and "its batch script was killed before it could act" in shown.reason, shown
    assert run.causes(1)[0]["cause"] == "stopped"
    send(run)
    wait_until(lambda: state(run).state == "complete", "its second attempt", 120, story=story(run))


def test_killed_owner_with_agents(site, tmp_path):
    """Slurm kills guard and srun with the owner. The agent is in another step, and its task restarts the job."""
    run = submit(tmp_path, AGAIN, agents=True)
    kill_owner(site, run)
    wait_until(lambda: state(run).state == "complete", "its second attempt", 180, story=story(run))
    assert run.newest_attempt() == 2 and fields(run)["Restarts"] == "1"
    assert read_json(run.attempt(1) / "end.json")["cause"] == "stopped"
