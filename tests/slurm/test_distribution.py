"""Tests on a real Slurm that neighbouring ranks of a node get cores of one socket."""

import shutil
import subprocess
from dataclasses import replace

import pytest

from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import JobResources
from jobs.slurm.batch_script import placement
from jobs.slurm.site import parse_nodes
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
def pretended_nodes(tmp_path, monkeypatch):
    """``pretended_nodes(TEXT)`` sets variables of a Slurm whose nodes pretend these sockets, cores and threads."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    library = tmp_path / "accept.so"
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input=ACCEPT, text=True, check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    return lambda text: monkeypatch.setenv("HWLOC_SYNTHETIC", text)


def test_neighbouring_ranks_get_cores_of_one_socket(pretended_nodes, start_slurm):
    """The first four GPUs of a node are attached to its first socket."""
    pretended_nodes("pack:2 core:8 pu:1")
    slurm = start_slurm(nodes=1, gpus=0, cpus=16, settings=TOPOLOGY)
    job = replace(JOB, resources=JobResources(1, RANKS, 0, 2, 1.0))
    options = placement(ClusterProfile(), job)
    assert sockets_of_ranks(slurm, *options) == [0] * 4 + [1] * 4
    without = [word for word in options if not word.startswith("--distribution")]
    assert sockets_of_ranks(slurm, *without) == [0, 1] * 4, "Slurm's default"


def test_ranks_get_their_cores_where_slurm_hands_out_threads(pretended_nodes, start_slurm):
    """Two ranks of two cores on a node of four cores with two threads each."""
    pretended_nodes("pack:1 core:4 pu:2")
    layout = "NodeName=DEFAULT Sockets=1 CoresPerSocket=4 ThreadsPerCore=2"
    slurm = start_slurm(nodes=1, gpus=0, cpus=8, settings=(layout, *TOPOLOGY[1:]))
    rows = slurm.call("sinfo", "-h", "-N", "-p", "low", "-o", "%N|%c|%m|%G|%T|%z")
    (node,) = parse_nodes(rows)
    assert (node.cpus, node.cores, node.threads_per_core) == (8, 4, 2)
    job = replace(JOB, resources=JobResources(1, 2, 0, 2, 1.0))
    shares = []
    for threads in (1, 2):
        options = placement(ClusterProfile(threads_per_core=threads), job)
        command = ["srun", "-p", "low", "-N1", "-n2", *options, "sh", "-c", "echo $SLURM_CPU_BIND_LIST"]
        (line,) = set(slurm.call(*command).split())
        shares.append([int(mask, 16).bit_count() for mask in line.split(",")])
    assert shares == [[2, 2], [4, 4]], "hardware threads of each rank: one core without the field, two with it"
