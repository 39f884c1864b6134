"""Tests on a real Slurm that neighbouring ranks of a node get cores of one socket."""

import shutil
import subprocess
from dataclasses import replace

import pytest

from jobs.common.job import JobResources
from jobs.slurm.batch_script import placement
from tests.jobs.slurm.batch_stage import JOB

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
TOPOLOGY = (
    "NodeName=DEFAULT Sockets=2 CoresPerSocket=8 ThreadsPerCore=1",
    "TaskPlugin=task/affinity",
    "SlurmdParameters=config_overrides",
)
RANKS = 8
ACCEPT = "int sched_setaffinity(int process, unsigned long size, const void *mask) { return 0; }"
"""Lets Slurm bind tasks to CPUs that this machine does not have."""


def sockets_of_ranks(slurm, *options):
    """The socket of each rank's two cores, of 16: Slurm exports the masks that it computes, in the order of ranks."""
    command = ["srun", "-p", "low", "-N1", f"-n{RANKS}", *options, "sh", "-c", "echo $SLURM_CPU_BIND_LIST"]
    (line,) = set(slurm.call(*command).split())
    masks = [int(mask, 16) for mask in line.split(",")]
    assert sum(masks) == 0xFFFF and len(masks) == RANKS
    return [int(mask > 0xFF) for mask in masks]


@pytest.fixture
def sixteen_cores(tmp_path, monkeypatch):
    """Variables of a Slurm whose nodes pretend two sockets of eight cores."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    library = tmp_path / "accept.so"
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input=ACCEPT, text=True, check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("HWLOC_SYNTHETIC", "pack:2 core:8 pu:1")


def test_neighbouring_ranks_get_cores_of_one_socket(sixteen_cores, start_slurm):
    """The first four GPUs of a node are attached to its first socket."""
    slurm = start_slurm(nodes=1, gpus=0, cpus=16, settings=TOPOLOGY)
    job = replace(JOB, resources=JobResources(1, RANKS, 0, 2, 1.0))
    options = placement(job)
    assert sockets_of_ranks(slurm, *options) == [0] * 4 + [1] * 4
    without = [word for word in options if not word.startswith("--distribution")]
    assert sockets_of_ranks(slurm, *without) == [0, 1] * 4, "Slurm's default"
