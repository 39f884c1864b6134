"""Tests of the tasks that try node agents: real processes over TCP, without Slurm."""

import json
import os
import subprocess
import sys

import pytest

from jobs.host.agents import contact, probe
from jobs.host.agents.channel import CONTACT, new_key, publish
from tests.harness.common import ROOT, free_port

PROBE = ROOT / "jobs" / "host" / "agents" / "probe.py"


def start(folder, index, seconds=20, **environ):
    """Start the task of node n1 or n2 of a step of two nodes, whose first one is reached at 127.0.0.1."""
    own = {
        "SLURM_NNODES": "2", "SLURM_NODEID": str(index), "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "n[1-2].invalid", "SLURMD_NODENAME": f"n{index + 1}", "MASTER_ADDR": "127.0.0.1",
    }  # fmt: skip
    line = [sys.executable, "-I", PROBE, folder, str(seconds)]
    return subprocess.Popen(line, env={**os.environ, **own, **environ}, stdout=subprocess.PIPE, text=True)


def result(task):
    """The object that a task has printed."""
    output = task.communicate(timeout=60)[0]
    assert task.returncode == 0 and output.startswith(probe.MARK)
    return json.loads(output.removeprefix(probe.MARK))


def test_agents_of_two_nodes_connect(tmp_path):
    tasks = [start(tmp_path, index) for index in range(2)]
    results = [result(task) for task in tasks]
    assert [each["node"] for each in results] == ["n1", "n2"]
    for each in results:
        assert (each["problem"], each["kind"], each["nodes"]) == ("", "", "n[1-2].invalid")
    assert (results[0]["store"], results[0]["coordinator"]) == ("", ""), "loopback, and no route to n2: all interfaces"
    assert "store" not in results[1]


def test_node_that_does_not_see_the_folder_says_so(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    tasks = [start(tmp_path / name, index, seconds=3) for index, name in enumerate("ab")]
    first, second = [result(task) for task in tasks]
    assert first["problem"] == ""
    assert (second["kind"], second["problem"]) == (probe.FOLDER, contact.UNPUBLISHED)


@pytest.mark.parametrize(
    ("published", "master", "kind"),
    [("127.0.0.1", "127.0.0.1", probe.NETWORK), ("", "n1.invalid", probe.NAME)],
)
def test_node_that_does_not_reach_the_first_node_names_the_kind(tmp_path, published, master, kind):
    port = free_port()
    publish(tmp_path / CONTACT, published, port, new_key())
    answer = result(start(tmp_path, 1, seconds=1, MASTER_ADDR=master))
    assert answer["kind"] == kind and f"{master}, port {port}: " in answer["problem"]


def test_agent_with_another_key_does_not_connect(tmp_path):
    """The port may belong to the coordinator of another job."""
    (tmp_path / "a").mkdir()
    first = start(tmp_path / "a", 0, seconds=4)
    path = tmp_path / "a" / CONTACT
    while not path.exists():
        assert first.poll() is None
    host, port, _ = contact.read_contact(path)
    publish(tmp_path / CONTACT, host, port, new_key())
    answer = result(start(tmp_path, 1, seconds=1))
    assert answer["kind"] == probe.NETWORK and "not signed" in answer["problem"]
    assert result(first)["problem"] == ""


def test_first_node_without_a_place_to_publish_says_so(tmp_path):
    answer = result(start(tmp_path / "missing", 0, seconds=1))
    assert answer["kind"] == probe.LISTEN and "missing" in answer["problem"]
