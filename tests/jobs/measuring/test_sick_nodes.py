"""Tests that a measurement of two nodes names what is wrong with one: its speed, its packages, its network, its disk.

A node is a process on this machine, which meets the other one in the folder of the run, as in a job.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flip.files.creation import run_folder
from flip.runs.rundir import RunDir, write_json
from jobs.measuring import node
from jobs.measuring.verdicts import BROKEN, SLOW, judge
from jobs.planning.measurement import read_measurement
from tests.harness.common import ROOT, free_port
from tests.harness.quota import Quota, compiler

pytestmark = pytest.mark.slow
CGROUP = Path("/sys/fs/cgroup/cpu")


class TwoNodes:
    """Two nodes that measure the rows ``only``."""

    def __init__(self, folder, only, minutes=4.0):
        self.run = RunDir(run_folder(run_folder(folder / "sweep") / "run"))
        request = {"minutes": minutes, "manifests": [], "only": only, "names": False, "share": 1.0, "gpus": 0}
        write_json(self.run.path / node.REQUEST, request)
        self.place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        self.place |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "PYTHONPATH": str(ROOT)}
        self.nodes = []

    def start(self, *before, **variables):
        """Start the next node, by the command ``before``."""
        command = [*before, sys.executable, "-m", "tests.jobs.measuring.one_node", str(self.run.path)]
        environment = os.environ | self.place | {"RANK": str(len(self.nodes))} | variables
        self.nodes.append(subprocess.Popen(command, cwd=ROOT, env=environment))
        return self.nodes[-1]

    def verdicts(self):
        """What each verdict is about -> the verdict, once both nodes have ended."""
        for process in self.nodes:
            process.wait(400)
        return {verdict.about: verdict for verdict in judge(read_measurement(str(self.run.path / node.RESULT)))}

    def end(self):
        for process in self.nodes:
            process.kill()
            process.wait()


@pytest.fixture
def nodes(tmp_path):
    started = []

    def start(*only, **options):
        started.append(TwoNodes(tmp_path, only, **options))
        return started[-1]

    yield start
    for each in started:
        each.end()


@pytest.fixture
def limited():
    """A command that starts another one with a tenth of a core."""
    group = CGROUP / f"flip-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "cpu.cfs_quota_us").write_text("10000")
    except OSError:
        pytest.skip("needs root and the cpu controller of cgroup version 1")
    yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    for pid in (group / "cgroup.procs").read_text().split():
        os.kill(int(pid), 9)
    time.sleep(0.5)
    group.rmdir()


def test_node_with_a_limit_of_its_cores_is_named(nodes, limited):
    pair = nodes("matmul")
    pair.start()
    pair.start(*limited)
    slow = pair.verdicts()["node 1"]
    assert slow.verdict == SLOW and "slower than its peers in products of matrices" in slow.because
    assert "a limit of its cgroup has stopped its processes" in slow.because and "Raise" in slow.then


def test_node_that_the_others_cannot_reach_is_named(nodes):
    """Its network has no route, not even to itself."""
    if subprocess.run(["unshare", "-n", "true"], check=False).returncode:
        pytest.skip("needs root for a network without routes")
    pair = nodes("link_network")
    pair.start()
    pair.start("unshare", "-n")
    broken = [each for each in pair.verdicts().values() if each.verdict == BROKEN]
    assert broken and all("GLOO_SOCKET_IFNAME" in each.then for each in broken)
    assert broken[0].about.startswith("collectives between nodes")


def test_packages_of_a_node_that_differ_are_named(nodes, tmp_path):
    other = tmp_path / "other" / "numpy-1.0.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.0.0\n")
    pair = nodes("copies")
    pair.start()
    pair.start(PYTHONPATH=f"{other.parent}:{ROOT}")
    differing = pair.verdicts()["packages of nodes"]
    assert differing.verdict == BROKEN and "node 1: numpy " in differing.because and "-> 1.0.0" in differing.because
    assert "same packages" in differing.then


def test_full_folder_of_runs_is_named(nodes, tmp_path):
    """Writes of the rows of the second node fail, as for a user whose quota is exceeded."""
    if compiler() is None:
        pytest.skip("no C compiler")
    quota = Quota(tmp_path / "quota")
    pair = nodes("disk", "save")
    quota.exceed(f"{pair.run.path}/.measure-")
    pair.start()
    pair.start(**quota.env)
    full = pair.verdicts()["space of the folder of runs, node 1"]
    assert full.verdict == BROKEN and "quota" in full.because and "FLIP_RUNS" in full.then


def test_node_that_dies_leaves_a_result_that_names_it(nodes):
    pair = nodes("copies", "disk", minutes=0.5)
    pair.start()
    died = pair.start()
    while not (pair.run.path / "rendezvous" / "1" / "start-1.json").exists():
        time.sleep(0.05)
    died.kill()
    lost = pair.verdicts()["nodes compared"]
    assert lost.verdict == BROKEN and "node 1 did not finish" in lost.because and "Slurm" in lost.then
