"""Tests that `flip doctor --measure --nodes 2` measures two nodes of a real Slurm in one job that is requeued."""

import json
import threading
import time

import pytest

from flip.runs.rundir import RunDir
from jobs.commands import doctor
from jobs.host import slurm_cli
from jobs.measuring.rows import NO_GPU
from jobs.measuring.verdicts import BROKEN, judge
from jobs.planning.measurement import MEASURED, read_measurement

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def requeue_once(root, seconds=120):
    """Requeue the measuring job once a node has written a row."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for path in root.glob(".measure/*/nodes/0.json"):
            record = json.loads((path.parents[1] / "job.json").read_text())
            rows = slurm_cli.queue([record["name"]])
            slurm_cli.call("scontrol", "requeue", rows[record["name"], record["index"]].id)
            return
        time.sleep(0.2)


@pytest.mark.timeout(900)
def test_job_on_two_nodes_continues_after_requeue(start_slurm, tmp_path, monkeypatch, capsys):
    cluster = start_slurm()
    root = tmp_path / "runs"
    for name in ("RUNS", "CACHE"):
        monkeypatch.setenv(f"FLIP_{name}", str(tmp_path / name.lower()))
    profile = tmp_path / "cpus.yaml"  # its GPUs are none that a driver shows
    profile.write_text(cluster.profile.read_text().replace("gpus_per_node: 8", "gpus_per_node: 0"))
    preemption = threading.Thread(target=requeue_once, args=(root,))
    preemption.start()
    words = ["--measure", "--cluster", str(profile), "--nodes", "2", "--yes", "--out", str(tmp_path / "out")]
    code = doctor.main([*words, "--only", "nodes", "link_network", "disk", "matmul", "save"])
    preemption.join()
    output = capsys.readouterr()
    assert code == 0, output.out + output.err
    measured = read_measurement(str(tmp_path / "out" / "measured.json"))
    (run,) = [RunDir(path.parent) for path in root.glob(".measure/*/measured.json")]
    assert measured.nodes == 2 and run.newest_attempt() == 2
    names = {row.name for row in measured.rows}
    assert names == {"nodes", "link_network", "matmul", "disk", "save", "peers"}
    assert measured.row("nodes").values["locks_exclude"] is True
    assert (measured.row("link_network").values["ranks"], measured.row("link_network").values["nodes"]) == (2, 2)
    assert "folder of runs, between nodes" in output.out and "on 2 nodes" in output.out


@pytest.mark.timeout(1500)
def test_whole_measurement_of_two_nodes_ends_in_its_ten_minutes(start_slurm, tmp_path, monkeypatch, capsys):
    """All rows, faults included: those for which no time is left would be skipped with that reason."""
    cluster = start_slurm()
    for name in ("RUNS", "CACHE"):
        monkeypatch.setenv(f"FLIP_{name}", str(tmp_path / name.lower()))
    profile = tmp_path / "cpus.yaml"  # its GPUs are none that a driver shows
    profile.write_text(cluster.profile.read_text().replace("gpus_per_node: 8", "gpus_per_node: 0"))
    words = ["--measure", "--cluster", str(profile), "--nodes", "2", "--yes", "--out", str(tmp_path / "out")]
    code = doctor.main(words)
    output = capsys.readouterr()
    measured = read_measurement(str(tmp_path / "out" / "measured.json"))
    seconds = {row.name: row.seconds for row in measured.rows}
    assert code == 0, (seconds, output.out, output.err)
    missing = {row.name: row.detail for row in measured.rows if row.status != MEASURED}
    assert set(missing.values()) == {NO_GPU}, (seconds, missing)
    assert {"nodes", "link_network", "peers", "fault_rank", "fault_agent", "fault_preemption"} <= seconds.keys()
    assert measured.nodes == 2


@pytest.mark.timeout(900)
def test_broken_link_and_missing_gpus_are_named(start_slurm, tmp_path, monkeypatch, capsys):
    """Gloo gets an interface that does not exist; the GPUs of the profile are none that a driver shows."""
    cluster = start_slurm()
    for name in ("RUNS", "CACHE"):
        monkeypatch.setenv(f"FLIP_{name}", str(tmp_path / name.lower()))
    profile = tmp_path / "broken.yaml"
    profile.write_text(cluster.profile.read_text() + 'setup: ["export GLOO_SOCKET_IFNAME=no-such-link"]\n')
    words = ["--measure", "--cluster", str(profile), "--nodes", "2", "--yes", "--out", str(tmp_path / "out")]
    code = doctor.main([*words, "--minutes", "6", "--only", "link_network", "matmul"])
    output = capsys.readouterr().out
    assert code == 78
    measured = read_measurement(str(tmp_path / "out" / "measured.json"))
    verdicts = {verdict.about: verdict for verdict in judge(measured)}
    assert verdicts["collectives between nodes"].verdict == BROKEN, output
    assert "GLOO_SOCKET_IFNAME" in verdicts["collectives between nodes"].then
    assert "asks for 8 GPUs of a node, and its driver shows 0" in verdicts["GPUs of a node"].because
