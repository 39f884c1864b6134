"""Tests on a Slurm that binds tasks to CPUs (task/affinity): ranks of an agent share the CPUs of its task."""

import os

import pytest

from flip.runs.rundir import RunDir, write_json
from jobs.common.job import Job, JobResources
from jobs.slurm.backend import SlurmBackend
from jobs.submitted_runs.clusters import states
from tests.harness.common import ROOT, wait_until
from tests.harness.slurm_scene import SlurmScene, profile
from tests.slurm.scenarios import SHORT

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs"),
]
AFFINITY = ["TaskPlugin=task/affinity"]


@pytest.mark.parametrize("agents", [False, True], ids=["srun", "agents"])
def test_each_rank_is_bound_to_a_cpu_of_its_own(start_slurm, tmp_path, agents):
    start_slurm(nodes=1, gpus=0, cpus=2, settings=AFFINITY)
    run = RunDir(tmp_path / "runs" / "run")
    run.path.mkdir(parents=True)
    write_json(run.path / "play.json", {"steps": SHORT})
    shape = JobResources(nodes=1, processes=2, cpus=1, hours=0.5)
    SlurmBackend(profile(agents=agents)).submit([Job(run, ROOT, shape, module="tests.slurm.scripted")])
    wait_until(lambda: states([run])[run.path].state == "complete", "its end", 120)
    ranks = SlurmScene.signals(run, 1)
    cpus = [ranks[rank][0]["cpus"] for rank in ("0", "1")]
    assert [len(own) for own in cpus] == [1, 1] and cpus[0] != cpus[1]
