"""Tests of several nodes: how they meet, how their measurements become one, and which node is named."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest

from flip.common.shutdown import StopFlag
from flip.files.creation import run_folder
from flip.runs.errors import ConfigError
from flip.runs.rundir import RunDir, write_json
from jobs.common.cluster_profile import ClusterProfile
from jobs.measuring import cluster, node
from jobs.measuring.limited import MeasurementStopped
from jobs.measuring.rendezvous import Rendezvous
from jobs.measuring.verdicts import BROKEN, SLOW, WORKS, judge
from jobs.planning.measurement import FAILED, MeasuredRow, read_measurement
from tests.jobs.measuring.test_verdicts import DISK, gpu, row
from tests.jobs.planning.test_measurement import example


def together(folder, work):
    """Run ``work`` for two nodes at once; returns both results."""
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(work, Rendezvous(folder, number, 2)) for number in range(2)]
        return [future.result(timeout=60) for future in futures]


def test_nodes_exchange_values_in_their_order(tmp_path):
    folder = tmp_path / "rendezvous"
    assert together(folder, lambda rendezvous: rendezvous.exchange("a", rendezvous.node, 30)) == [[0, 1], [0, 1]]
    assert together(tmp_path / "files", lambda rendezvous: rendezvous.visible_milliseconds(30) > 0) == [True, True]


def test_locks_of_other_nodes_are_tried(tmp_path, monkeypatch):
    assert together(tmp_path / "good", lambda rendezvous: rendezvous.locks_exclude(30)) == [True, True]
    monkeypatch.setattr("jobs.measuring.rendezvous.fcntl.flock", lambda *_: None)  # as a mount without shared locks
    assert together(tmp_path / "bad", lambda rendezvous: rendezvous.locks_exclude(30)) == [False, False]


def test_missing_node_is_a_timeout_and_a_stop_ends_the_wait(tmp_path):
    with pytest.raises(TimeoutError, match="does not see the same folder"):
        Rendezvous(tmp_path / "a", 0, 2).exchange("start", None, 0.05)
    with pytest.raises(MeasurementStopped):
        Rendezvous(tmp_path / "b", 0, 2, stopped=lambda: True).exchange("start", None, 30)


def node_example(bf16, write, **fields):
    rows = [row("matmul", devices=[gpu(0, bf16)]), row("disk", **(DISK | {"write_megabytes_per_second": write}))]
    return example(*rows, **fields)


ENVIRONMENT = {"python": "3.12.1", "packages": {"torch": "2.13.0"}}


def test_slow_node_is_named_with_its_largest_difference():
    nodes = [node_example(650.0, 900.0), node_example(648.0, 880.0), node_example(500.0, 700.0)]
    measured = node.merged([replace(each, nodes=1) for each in nodes], [ENVIRONMENT] * 3)
    assert measured.nodes == 3
    slow = [verdict for verdict in judge(measured) if verdict.about.startswith("node")]
    assert [(each.about, each.verdict) for each in slow] == [("node 2", SLOW)]
    assert "23 % slower than its peers in row matmul (bf16): 500, peers 648" in slow[0].because


def test_slow_node_that_others_use_is_told_from_a_broken_one():
    nodes = [node_example(650.0, 900.0), node_example(300.0, 900.0, load=40.0)]
    (slow,) = [each for each in judge(node.merged(nodes, [ENVIRONMENT] * 2)) if each.about.startswith("node")]
    assert "other processes used 40 of its cores" in slow.because and "nothing else runs on it" in slow.then
    nodes[1] = replace(nodes[1], load=5.0)  # a twentieth of the cores does not halve the speed
    (slow,) = [each for each in judge(node.merged(nodes, [ENVIRONMENT] * 2)) if each.about.startswith("node")]
    assert "other processes" not in slow.because and "exclude it" in slow.then


def test_single_sizes_of_collectives_name_no_node():
    def link(gbytes):
        entry = {"kind": "all-gather", "bytes": 16384, "gbytes": gbytes}
        return example(row("link_node", device="cpu", gbps=10.0, rows=[entry]))

    assert node.slow_nodes([link(0.002), link(0.016)]) == []
    slow = node.slow_nodes([example(row("link_node", device="cpu", gbps=each)) for each in (10.0, 5.0)])
    assert [(each["node"], each["number"]) for each in slow] == [(1, "gbps")]


def test_equal_nodes_have_no_verdict_of_peers():
    measured = node.merged([node_example(650.0, 900.0)] * 2, [ENVIRONMENT] * 2)
    assert {verdict.verdict for verdict in judge(measured)} == {WORKS}


def test_packages_that_differ_between_nodes_are_named():
    other = ENVIRONMENT | {"packages": {"torch": "2.14.0"}}
    measured = node.merged([node_example(650.0, 900.0)] * 2, [ENVIRONMENT, other])
    first = judge(measured)[0]
    assert first.verdict == BROKEN and "node 1: torch 2.13.0 -> 2.14.0" in first.because


def test_verdicts_name_hosts_if_the_measurement_has_their_names():
    slow = [replace(node_example(650.0, 900.0), names=["a1"]), replace(node_example(65.0, 900.0), names=["a2"])]
    other = ENVIRONMENT | {"packages": {"torch": "2.14.0"}}
    verdicts = judge(node.merged(slow, [ENVIRONMENT, other]))
    assert any("a2: torch 2.13.0 -> 2.14.0" in verdict.because for verdict in verdicts)
    assert [verdict.about for verdict in verdicts if "slower than its peers" in verdict.because] == ["a2"]


def test_lost_node_is_named_by_its_host_if_names_are_asked_for(tmp_path):
    rendezvous = Rendezvous(tmp_path / "a", 0, 2, names=lambda: ["a1", "a2"])
    measured = node._gathered(rendezvous, node_example(650.0, 900.0), [ENVIRONMENT] * 2, 0.05)
    assert judge(measured)[0].because.startswith("a2 did not finish") and measured.names == ["a1", "a2"]


@pytest.mark.parametrize("names, expected", [(True, "a2 did not finish"), (False, "node 1 did not finish")])
def test_error_of_a_row_between_nodes_names_hosts_on_request_only(tmp_path, monkeypatch, names, expected):
    run = RunDir(run_folder(run_folder(tmp_path / "sweep") / "run"))
    rendezvous = Rendezvous(tmp_path / "a", 0, 2)
    Rendezvous(tmp_path / "a", 1, 2).leave("start", {"earlier": [], "environment": ENVIRONMENT, "host": "a2"})
    monkeypatch.setattr(node, "RENDEZVOUS_SECONDS", 0.05)
    request = {"minutes": 0.0, "manifests": [], "only": ["nodes"], "names": names, "share": 1.0, "gpus": 0}
    monkeypatch.setattr(node, "_gathered", lambda rendezvous, own, *rest: own)
    (failed,) = node._measure(run, request, rendezvous, bool).rows
    assert failed.status == FAILED and failed.detail.startswith(expected)


def test_node_that_does_not_start_is_named_as_slurm_does(tmp_path, monkeypatch, commands):
    commands("scontrol", "[ \"$*\" = 'show hostnames a[1-2]' ] && printf 'a1\\na2\\n'")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "a[1-2]")
    rendezvous = Rendezvous(tmp_path / "a", 0, 2, names=node._scheduled_names)
    with pytest.raises(TimeoutError, match="^a2 did not finish"):
        rendezvous.exchange("start", None, 0.05)


def test_failure_on_another_node_is_a_verdict_of_its_own():
    second = node_example(650.0, 900.0)
    failed = MeasuredRow("disk", "files", FAILED, {}, "Input/output error")
    second = replace(second, rows=(second.rows[0], failed))
    first = judge(node.merged([node_example(650.0, 900.0), second], [ENVIRONMENT] * 2))[0]
    assert (first.about, first.verdict, first.because) == ("files, node 1", BROKEN, "Input/output error")


@pytest.mark.parametrize(
    ("values", "verdict", "because"),
    [
        ({"visible_milliseconds": 40.0, "locks_exclude": True}, WORKS, "visible after 40 ms"),
        ({"visible_milliseconds": 9000.0, "locks_exclude": True}, SLOW, "visible after 9e+03 ms"),
        ({"visible_milliseconds": 40.0, "locks_exclude": False}, BROKEN, "two attempts"),
    ],
)
def test_shared_folder_is_judged(values, verdict, because):
    (judged,) = judge(example(row("nodes", nodes=2, **values)))
    assert judged.verdict == verdict and because in judged.because


def test_job_that_cannot_end_in_time_is_refused():
    profile = ClusterProfile("far", "slurm", hours=0.2)
    with pytest.raises(ConfigError, match="time limit is too short"):
        cluster.check(profile, 2, 30.0)


def test_job_has_no_agents_and_one_process_a_node(tmp_path, monkeypatch):
    submitted = []

    class Recorder:
        def __init__(self, profile):
            self.profile = profile

        def submit(self, jobs):
            submitted.append((self.profile, *jobs))
            raise ConfigError("sbatch refused the job")

    monkeypatch.setattr(cluster, "open_backend", Recorder)
    monkeypatch.setattr(cluster, "take", lambda *_: SimpleNamespace(path=tmp_path / "code"))
    profile = ClusterProfile("far", "slurm", runs_root=str(tmp_path), gpus_per_node=8, cpus_per_node=96, agents=True)
    with pytest.raises(ConfigError, match="sbatch refused"):
        cluster.measure(profile, 2, 10.0, "", None, False, 1.0)
    ((used, job),) = submitted
    assert not used.agents and (job.resources.nodes, job.resources.processes, job.resources.gpus) == (2, 1, 8)
    assert (job.module, job.resources.cpus) == ("jobs.measuring.node", 96)


def test_faults_in_jobs_are_rows_of_the_result(tmp_path, monkeypatch):
    plans = []

    def run_row(plan, root, end, shared):
        plans.append(plan)
        return row(plan.name, next_step_seconds=130.0, steps=200, nodes=2, different_tensors=[])

    monkeypatch.setattr(cluster.machine, "run_row", run_row)
    monkeypatch.setattr(cluster.site, "read", lambda profile: None)
    monkeypatch.setattr(cluster.site_checks, "requeue_delay", lambda site: (121, "cred_expire=120"))
    profile = ClusterProfile("far", "slurm", gpus_per_node=8)
    measured = cluster.with_faults(example(), profile, tmp_path, 60.0, None)
    assert [plan.name for plan in plans] == ["fault_agent", "fault_preemption"]
    assert all(plan.options["device"] == "cuda" and plan.options["profile"]["agents"] for plan in plans)
    judged = {each.about: each for each in judge(measured)}
    assert "Slurm waits" not in judged["row fault_agent"].because
    assert "cred_expire" in judged["row fault_preemption"].because
    assert list(tmp_path.iterdir()) == [], "the folder that the rows share is deleted"
    some = cluster.with_faults(example(), profile, tmp_path, 60.0, ["fault_preemption", "disk"])
    assert [each.name for each in some.rows] == ["fault_preemption"]


def test_preempted_measurement_continues_with_the_rows_that_are_missing(tmp_path, monkeypatch):
    run = RunDir(run_folder(run_folder(tmp_path / "sweep") / "run"))
    request = {"minutes": 4.0, "manifests": [], "only": ["matmul", "disk"], "names": False, "share": 1.0, "gpus": 0}
    write_json(run.path / node.REQUEST, request)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(node.machine, "gpu_names", list)
    values = {"matmul": {"devices": [gpu(0, 650.0)]}, "disk": DISK}
    started = []

    def run_row(plan, *_):
        started.append(plan.name)
        if started == ["matmul", "disk"]:
            raise MeasurementStopped
        return row(plan.name, **values[plan.name])

    monkeypatch.setattr(node.machine, "run_row", run_row)
    flag = StopFlag()
    flag.set("asked to stop by USR2", "USR2")
    assert node.measure_node(run, 1, flag) == ("stopped", "asked to stop by USR2")
    assert node.measure_node(run, 2, StopFlag()) == ("complete", "")
    assert started == ["matmul", "disk", "disk"], "a measured row is not run again"
    assert [each.name for each in read_measurement(str(run.path / node.RESULT)).rows] == ["matmul", "disk"]


def test_node_that_dies_before_the_network_is_measured_leaves_the_other_rows(tmp_path, monkeypatch):
    run = RunDir(run_folder(run_folder(tmp_path / "sweep") / "run"))
    monkeypatch.setattr(node, "RENDEZVOUS_SECONDS", 0.05)
    monkeypatch.setattr(node.machine, "run_row", None)  # there is nobody to talk to
    rows = node._between_nodes(run, Rendezvous(tmp_path / "a", 0, 2), set(), {}, "cpu", 1e12, None, bool)
    assert [(each.name, each.status) for each in rows] == [("nodes", FAILED), ("link_network", FAILED)]
    assert all("node 1 did not finish" in each.detail for each in rows)


def test_node_that_never_answers_leaves_the_rows_of_the_first_one(tmp_path):
    own = replace(node_example(650.0, 900.0), nodes=1)
    measured = node._gathered(Rendezvous(tmp_path / "a", 0, 2), own, [ENVIRONMENT] * 2, 0.05)
    lost, *others = judge(measured)
    assert (lost.about, lost.verdict) == ("nodes compared", BROKEN) and "node 1 did not finish" in lost.because
    assert "sinfo" in lost.then and measured.nodes == 2 and {each.verdict for each in others} == {WORKS}


def test_question_states_the_cost():
    profile = ClusterProfile("far", "slurm", partition="gpu", gpus_per_node=8)
    words = "2 nodes of partition gpu, then up to 4 small ones, for up to 10 minutes, 3.7 GPU-hours at most"
    assert words in cluster.question(profile, 2, 10)
    assert "1.1 node-hours" in cluster.question(ClusterProfile("far", "slurm"), 8, 10)


def test_node_without_the_gpus_of_its_job_is_named_once():
    assert node._missing_gpus(8, 8) == [] and node._missing_gpus(0, 0) == []
    rows = node._missing_gpus(8, 0)
    alone = replace(node_example(650.0, 900.0), rows=tuple(rows))
    judged = judge(node.merged([alone, alone], [ENVIRONMENT] * 2))
    assert [(each.about, each.verdict) for each in judged] == [("GPUs of a node", BROKEN)]
    assert "asks for 8 GPUs" in judged[0].because and "gpus_per_node" in judged[0].then
    second = node.merged([node_example(650.0, 900.0), alone], [ENVIRONMENT] * 2)
    assert judge(second)[0].about == "GPUs of a node, node 1"
