"""``doctor``: the checks of a Slurm site, the profile that it writes, and its error messages."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flip.data import kernel
from flip.runs.checks import DEGRADED, FAILS, OK, UNKNOWN
from flip.runs.errors import ConfigError
from jobs.commands import doctor
from jobs.common.cluster_profile import ClusterProfile, load_profile
from jobs.planning import preflight, software_checks
from jobs.slurm import site as reading
from jobs.slurm import site_checks
from jobs.slurm.site import AgentsTrial, Node, Site
from tests.jobs.test_automation import check as check_document

ROOT = Path(__file__).resolve().parents[3]
CONFIG = {
    "ClusterName": "far", "SLURM_VERSION": "24.11.5", "PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE",
    "PreemptParameters": "send_user_signal", "KillWait": "30 sec", "MaxArraySize": "1001", "MaxJobCount": "10000",
    "MaxBatchRequeue": "5", "MinJobAge": "300 sec", "SlurmdTimeout": "300 sec", "ReturnToService": "1",
    "AuthInfo": "(null)", "OverTimeLimit": "0 min", "RequeueExit": "(null)", "RequeueExitHold": "(null)",
    "SelectType": "select/cons_tres", "SelectTypeParameters": "CR_CORE_MEMORY", "DefMemPerNode": "UNLIMITED",
}  # fmt: skip
PARTITION = {
    "PartitionName": "gpu", "Default": "YES", "PreemptMode": "REQUEUE", "GraceTime": "120", "MaxTime": "2-00:00:00",
    "OverTimeLimit": "NONE", "DefMemPerNode": "UNLIMITED",
}  # fmt: skip
EIGHT = Node(96, 1031000, 8, "h100", cores=96)
THREADS = EIGHT._replace(cpus=192)
PROFILE = ClusterProfile(
    "far", "slurm", partition="gpu", gpus_per_node=8, cpus_per_node=96, hours=24.0, host_python="py", agents=True
)
DELAY = {"SchedulerParameters": "bf_interval=2,requeue_delay=5", "AuthInfo": "cred_expire=1200"}
TREE = {"TopologyPlugin": "topology/tree"}
BLOCKS = {"TopologyPlugin": "topology/block", "SelectTypeParameters": "CR_CORE_MEMORY,CR_NO_DIST_TOPO_BLOCK"}
FORTY = {"MaxSubmitJobs": "40"}
NO_QOS = {"PreemptType": "preempt/qos"}


def site(config=(), partition=(), **fields):
    """A site that passes all checks, except for the given settings."""
    defaults = {
        "nodes": {EIGHT: 4},
        "errors": {"sbatch --test-only": ""},
        "python": "3.9.18",
        "filesystems": {"runs root": "lustre", "python": "nfs4"},
    }
    return Site({**CONFIG, **dict(config)}, {**PARTITION, **dict(partition)}, **{**defaults, **fields})


def judged(slurm_site, promise, profile=PROFILE):
    (match,) = [finding for finding in site_checks.check_site(slurm_site, profile) if promise in finding.name]
    return match


def test_check_site_passes_all_checks_on_good_site():
    tried = site(agents_trial=CONNECT)
    assert {(f.state, f.remedy) for f in site_checks.check_site(tried, PROFILE)} == {(OK, "")}


# fmt: off
SITES = [
    (site({"JobRequeue": "0"}), "starts again", OK, "ask for --requeue (JobRequeue=0 is for those that do not)"),
    (site({"JobSubmitPlugins": "lua"}), "starts again", OK, "plugin of the site may disable requeue"),
    (site(partition={"PreemptMode": "OFF"}), "starts again", OK, "no preemption"),
    (site({"PreemptType": "preempt/none"}), "warned before it is preempted", OK, "no preemption"),
    (site(partition={"PreemptMode": "CANCEL", "GraceTime": "0"}), "preempted run starts", DEGRADED, "within KillWait"),
    (site(partition={"PreemptMode": "CANCEL"}), "preempted run starts", DEGRADED, "within the grace"),
    (site(partition={"PreemptMode": "GANG,SUSPEND"}), "preempted run starts", DEGRADED, "frozen"),
    (site(NO_QOS), "preempted run starts", UNKNOWN, "--qos"),
    (site(NO_QOS, errors={"qos": "sacctmgr: no answer"}), "preempted run starts", UNKNOWN, "sacctmgr: no answer"),
    (site(NO_QOS, qos={"preempt": "cancel", "grace": "00:00:00"}), "preempted run starts", DEGRADED, "CANCEL"),
    (site(NO_QOS, qos={"preempt": "cluster", "grace": "00:02:00"}), "preempted run starts", OK, "GraceTime=120 s"),
    (site(partition={"GraceTime": "0"}), "before it is preempted", DEGRADED, "longer than 30 s"),
    (site({"PreemptParameters": "(null)"}), "before it is preempted", OK, "TERM at"),
    (site(NO_QOS), "before it is preempted", UNKNOWN, "QOS"),
    (site(partition={"MaxTime": "12:00:00"}), "before the time limit", FAILS, "set hours to 12"),
    (site(qos={"wall": "06:30:00"}), "before the time limit", FAILS, "set hours to 6.5"),
    (site(partition={"MaxTime": "UNLIMITED"}), "before the time limit", OK, "allows any"),
    (site({"MaxBatchRequeue": "1"}), "killed rank", DEGRADED, "scontrol release"),
    (site({"Prolog[0]": "/etc/slurm/prolog.sh"}), "failed prolog", DEGRADED, "nohold_on_prolog_fail"),
    (site({"Prolog": "/p", "SchedulerParameters": "a=1,nohold_on_prolog_fail"}), "failed prolog", OK, ""),
    (site({"Prolog": "(null)"}), "failed prolog", OK, ""),
    (site({"RequeueExit": "1,70-72"}), "killed rank", FAILS, "RequeueExit has 70, 71"),
    (site({"RequeueExitHold": "75"}), "killed rank", DEGRADED, "RequeueExitHold has 75"),
    (site({"SLURM_VERSION": "22.05.11"}), "a fault costs seconds", DEGRADED, "Slurm is 22.05.11, node agents"),
    (site({"KillWait": "5 sec"}), "a fault costs seconds", DEGRADED, "KillWait=5 s, less than 10 s"),
    (site({"TaskProlog": "/etc/task.sh"}), "a fault costs seconds", DEGRADED, "TaskProlog=/etc/task.sh would run once"),
    (site({"TaskProlog": "/etc/task.sh"}), "ranks import", OK, "TaskProlog=/etc/task.sh may export variables"),
    (site({"TaskProlog": "(null)"}), "ranks import", OK, "no TaskProlog"),
    (site({"JobAcctGatherParams": "UsePss,OverMemoryKill"}), "a fault costs seconds", DEGRADED, "OverMemoryKill"),
    (site({**TREE, "SLURM_VERSION": "26.05.0"}), "a fault costs seconds", DEGRADED, "topology/tree"),
    (site({**BLOCKS, "SLURM_VERSION": "26.05.0"}), "a fault costs seconds", OK, "agents: true"),
    (site({"SlurmdTimeout": "0 sec"}), "lost node", FAILS, "yourself"),
    (site({"ReturnToService": "0"}), "lost node", OK, "by hand"),
    (site({"MinJobAge": "5 sec"}), "outcome of", DEGRADED, "5 s"),
    (site({"KillWait": "5 sec"}), "outcome of", DEGRADED, "`flip cancel` has no such limit"),
    (site({"KillWait": "10 sec"}), "outcome of", OK, "KillWait=10 s"),
    (site({"MaxArraySize": "1"}), "number of runs", FAILS, "array_size to 1."),
    (site({"MaxArraySize": "(null)"}), "number of runs", UNKNOWN, "array_size"),
    (site(qos={"MaxSubmitJobsPerUser": "50"}), "number of runs", DEGRADED, "more than 50"),
    (site(qos={"GrpSubmitJobs": "70"}, association=FORTY), "number of runs", DEGRADED, "MaxSubmitJobs of the assoc"),
    (site(qos={"GrpSubmitJobs": "30"}, association=FORTY), "number of runs", DEGRADED, "GrpSubmitJobs of the QOS 30"),
    (site(association={"MaxSubmitJobs": "0"}), "number of runs", DEGRADED, "more than 0"),
    (site({"AuthInfo": "socket=/run/x,cred_expire=5"}), "starts soon", OK, "about 6 s"),
    (site({"AuthInfo": "cred_expire=1200"}), "starts soon", DEGRADED, "1201 s"),
    (site(), "starts soon", OK, "about 121 s"),
    (site({**DELAY, "SLURM_VERSION": "25.11.0"}), "starts soon", OK, "about 5 s"),
    (site({**DELAY, "SLURM_VERSION": "25.05.4"}), "starts soon", DEGRADED, "about 1201 s"),  # no requeue_delay
    (site({"SchedulerParameters": "requeue_delay=600", "SLURM_VERSION": "26.05.0"}), "starts soon", DEGRADED, "600 s"),
    (site({"SLURM_VERSION": "19.05.8"}), "release of", DEGRADED, "20.11"),
    (site(), "newer", OK, "has none (of --requeue=expedite, requeue_delay, srun --ignore-signals)"),
    (site({"SLURM_VERSION": "25.11.2"}), "newer", OK, "has --requeue=expedite, requeue_delay (of"),
    (site({"SLURM_VERSION": "26.05.1"}), "newer", OK, "requeue_delay, srun --ignore-signals (of"),
    (site({**TREE, "SLURM_VERSION": "25.11.2"}), "newer", OK, "has --requeue=expedite"),
    (site({**TREE, "SLURM_VERSION": "26.05.0"}), "newer", DEGRADED, "Rank 0 may then be on another node"),
    (site({**BLOCKS, "SLURM_VERSION": "26.05.0"}), "newer", OK, "srun --ignore-signals"),
    (site(python="3.5.2"), "has a Python", FAILS, "host_python"),
    (site(errors={"python": "py: No such file or directory"}), "has a Python", FAILS, "host_python"),
    (site(filesystems={"runs root": "ext4", "python": "ext4"}), "has a Python", UNKNOWN, "srun -N1 -p gpu py"),
    (site(filesystems={"runs root": "ext4", "python": "ext4"}), "be stored", UNKNOWN, "shared file system"),
    (site(errors={"runs root": "/x: Permission denied"}), "be stored", FAILS, "runs_root"),
    (site(unset=("WANDB_KEY",)), "environment", FAILS, "WANDB_KEY"),
    (site(errors={"sbatch --test-only": "sbatch: error: Invalid account"}), "accepted", FAILS, "Invalid account"),
    (site(errors={"sbatch --test-only": "sbatch did not answer for 15 s"}), "accepted", UNKNOWN, "15 s"),
    (site(errors={"submitit": "not installed"}), "from here", FAILS, "pip install"),
    (site(nodes={}), "nodes match", FAILS, "no node"),
    (site(nodes={Node(64, 500000, 4, ""): 2}), "nodes match", FAILS, "set it to 4"),
    (site(nodes={THREADS: 2}), "gets the cores", DEGRADED, "half the cores that its run asks for. Set threads_per"),
    (site(nodes={EIGHT._replace(cores=0): 2}), "gets the cores", UNKNOWN, "scontrol show node"),
    (site({"SelectType": "select/linear"}), "nodes", FAILS, "gpu:8"),
    (site({"DefMemPerCPU": "100"}), "memory", DEGRADED, "mem-per-cpu"),
    (site({"DefMemPerCPU": "100", "SelectTypeParameters": "CR_CORE"}), "memory", OK, "not counted"),
]
# fmt: on


@pytest.mark.parametrize("one, promise, verdict, words", SITES)
def test_check_site_reports_verdict_and_remedy(one, promise, verdict, words):
    finding = judged(one, promise)
    assert finding.state == verdict and words in f"{finding.text} {finding.remedy}", finding
    assert bool(finding.remedy) == (verdict != OK), "only a check that is not OK has a remedy or a consequence"


def test_check_site_judges_profile_options():
    profile_type = PROFILE.__class__
    linear = profile_type("far", "slurm", gpus_per_node=8, options={"gres": "gpu:8", "mem": "0"})
    assert judged(site({"SelectType": "select/linear"}), "nodes", linear).state == OK
    assert judged(site({"DefMemPerCPU": "100"}), "memory", linear).state == OK
    assert judged(site(), "preempted run starts", profile_type("far", options={"no-requeue": ""})).state == DEGRADED
    assert judged(site({"MaxArraySize": "2"}), "number of runs", profile_type("far", array_size=1)).state == DEGRADED
    short = profile_type("far", hours=0.05, signal_seconds=120)
    assert judged(site(), "before the time limit", short).state == DEGRADED
    assert judged(site(), "before the time limit", profile_type("far", signal_seconds=20)).state == DEGRADED


@pytest.mark.parametrize(
    "fields, verdict, words",
    [
        ({"threads_per_core": 2}, OK, "96 cores and 192 CPUs, so Slurm counts hardware threads, 2 for each core"),
        (
            {"cpus_per_node": 192},
            DEGRADED,
            "threads_per_core: 2 in the profile and cpus_per_node, which counts cores, to 96",
        ),
        ({"threads_per_core": 4}, DEGRADED, "a job gets twice the cores"),
        ({"options": {"hint": "nomultithread"}}, OK, "whole cores"),
        ({"options": {"hint": "nomultithread"}, "threads_per_core": 2}, DEGRADED, "Set threads_per_core: 1"),
    ],
)
def test_check_site_compares_threads_per_core_with_the_nodes(fields, verdict, words):
    row = judged(site(nodes={THREADS: 2}), "gets the cores", replace(PROFILE, **fields))
    assert row.state == verdict and words in f"{row.text} {row.remedy}"


def test_more_cores_than_the_threads_of_a_node_are_refused():
    row = judged(site(nodes={THREADS: 2}), "nodes match", replace(PROFILE, threads_per_core=2, cpus_per_node=192))
    assert row.state == FAILS and "192 CPUs (96 cores)" in row.text and "set it to 96" in row.remedy


@pytest.mark.parametrize(
    "trial, agents, verdict, words",
    [
        (None, True, UNKNOWN, "127.0.1.1 in Debian's /etc/hosts) flip doctor --try-agents looks"),
        (AgentsTrial(unable="busy"), True, UNKNOWN, "on all interfaces of its node if"),
        (
            AgentsTrial(store="10.0.0.1", coordinator="10.0.0.2"),
            True,
            OK,
            "10.0.0.1; the coordinator of node agents",
        ),
        (AgentsTrial(store="", coordinator="10.0.0.2"), True, DEGRADED, "the node's own name leads to loopback"),
        (AgentsTrial(store="10.0.0.1", coordinator=""), True, DEGRADED, "because no address is known that leads"),
        (AgentsTrial(store="10.0.0.1", coordinator=""), False, OK, "store at 10.0.0.1. gloo"),
    ],
)
def test_check_site_names_what_listens_on_all_interfaces(trial, agents, verdict, words):
    row = judged(site(agents_trial=trial), "ports of a run", replace(PROFILE, agents=agents))
    assert row.state == verdict and words in f"{row.text} {row.remedy}"
    assert ("closed to other machines (SECURITY.md, Ports)" in row.remedy) == (verdict != OK)


def test_ranks_of_the_only_node_listen_on_loopback():
    assert judged(site(nodes={EIGHT: 1}), "ports of a run").state == OK


def test_check_site_judges_node_agents_of_profile():
    without = replace(PROFILE, agents=False)
    assert judged(site(), "a fault costs seconds", without).remedy.startswith("Set agents: true")
    assert "requeues" in judged(site({"KillWait": "5 sec"}), "a fault costs seconds", without).remedy
    contained = replace(PROFILE, container="/images/flip.sqsh")
    finding = judged(site(), "a fault costs seconds", contained)
    assert finding.state == DEGRADED and "container" in finding.text and "Remove agents" in finding.remedy


CONNECT = AgentsTrial(["n1", "n2"], store="10.0.0.1", coordinator="10.0.0.1")
BLOCKED = AgentsTrial(["n1"], problem="n2: n1, port 11111: timed out", remedy="Ask for open ports.")
BUSY = AgentsTrial(unable="Requested nodes are busy")


@pytest.mark.parametrize(
    ("trial", "agents", "verdict", "read", "then"),
    [
        (CONNECT, True, OK, "agents: true; agents of n1, n2 connect", ""),
        (CONNECT, False, DEGRADED, "agents: false; agents of n1, n2 connect", "Set agents: true"),
        (BLOCKED, True, DEGRADED, "true, but n2: n1, port 11111: timed out", "Ask for open ports. Until then remove"),
        (BLOCKED, False, DEGRADED, "n2: n1, port 11111: timed out", "Ask for open ports. Slurm requeues"),
        (BUSY, True, UNKNOWN, "agents: true; could not be tried: Requested nodes are busy", "--try-agents SECONDS"),
        (BUSY, False, DEGRADED, "could not be tried: Requested nodes are busy", "Set agents: true"),
    ],
)
def test_check_site_judges_a_try_of_node_agents(trial, agents, verdict, read, then):
    finding = judged(site(agents_trial=trial), "a fault costs seconds", replace(PROFILE, agents=agents))
    assert finding.state == verdict and read in finding.text and then in finding.remedy


def test_connecting_agents_do_not_outweigh_the_configuration_of_slurm():
    slurm_site = site({"TaskProlog": "/etc/task.sh"}, agents_trial=CONNECT)
    finding = judged(slurm_site, "a fault costs seconds")
    assert finding.state == DEGRADED and "run once" in finding.text and "agents of n1, n2 connect" in finding.text
    slurm_site = site({"TaskProlog": "/etc/task.sh"}, agents_trial=BLOCKED)
    finding = judged(slurm_site, "a fault costs seconds")
    assert "run once for all ranks of a node; n2: n1, port 11111: timed out; agents of n1 connect" in finding.text
    finding = judged(site({"TaskProlog": "/etc/task.sh"}), "a fault costs seconds")
    assert "see whether they connect at all: flip doctor --try-agents" in finding.remedy


def test_check_site_judges_options_of_newer_releases():
    both = ClusterProfile("far", "slurm", options={"gres": "gpu:8", "gpus-per-node": "8"})
    for version, verdict in (("25.11.2", DEGRADED), ("26.05.0", FAILS)):
        finding = judged(site({"SLURM_VERSION": version}), "newer", both)
        assert finding.state == verdict and "remove one" in finding.remedy, finding


@pytest.mark.parametrize(("version", "known"), [("24.11.5", 0), ("25.11.1", 2), ("26.05.1", 3)])
def test_doctor_lists_newer_features_of_release(far, capsys, version, known):
    far("scontrol", far.text.replace("24.11.5", version))
    assert doctor.main(["--json"]) == 0
    (row,) = [row for row in json.loads(capsys.readouterr().out)["promises"] if "newer" in row["promise"]]
    assert row["verdict"] == OK
    has = row["read"].partition(" (of ")[0].removeprefix("this release has ")
    assert has == (", ".join(list(site_checks.NEWER)[:known]) or "none")


def test_parse_nodes_counts_usable_nodes_by_shape():
    nodes = reading.parse_nodes(
        "a1|96|1031000|gpu:h100:8(S:0-1),shard:16|idle|2:48:1\na1|96|1031000|gpu:h100:8(S:0-1),shard:16|idle|2:48:1\n"
        "a2|96|1031000|gpu:h100:8|mixed|2:48:1\na3|96|1031000|gpu:h100:8|drained*\nb1|64|250000|gpu:4|allocated\n"
        + "".join(f"c{i}|32|120000|(null)|idle\n" for i in range(9))
    )
    assert nodes == {EIGHT: 2, Node(64, 250000, 4, ""): 1, Node(32, 120000, 0, ""): 9}
    odd = reading.parse_nodes("d|64|9|gpu:4090:8(S:0-1)|idle\ne|64|9|gpu:a100:4(S:0),gpu:v100:2(S:1),gpuram:5|idle")
    assert odd == {Node(64, 9, 8, "4090"): 1, Node(64, 9, 6, "a100+v100"): 1}
    assert site(nodes=nodes).common_node == EIGHT and EIGHT.memory_gb == 1081


@pytest.mark.parametrize(
    "config, partition, fields",
    [
        ({}, {}, {"hours": 48.0, "signal_seconds": 120, "array_size": 1000, "gpu": "h100", "options": {}}),
        ({}, {}, {"agents": True}),
        ({"KillWait": "5 sec"}, {}, {"agents": False}),
        ({"MaxArraySize": "1"}, {"MaxTime": "UNLIMITED"}, {"hours": 24.0, "array_size": 1}),
        ({}, {"MaxTime": "00:04:00"}, {"hours": 0.06, "signal_seconds": 54}),
        ({"DefMemPerCPU": "100"}, {}, {"options": {"mem-per-cpu": "10739M"}}),
        ({"SelectType": "select/linear"}, {}, {"options": {"gres": "gpu:8"}}),
    ],
)
def test_doctor_profile_loads_and_passes_site_checks(tmp_path, config, partition, fields):
    slurm_site = site(config, partition)
    profile = doctor.draft(ClusterProfile(kind="slurm", account="007", runs_root="/data/runs"), slurm_site)
    doctor.write(tmp_path / "mine.yaml", doctor.profile_yaml(profile, slurm_site))
    loaded = load_profile(str(tmp_path / "mine.yaml"))
    assert {key: getattr(loaded, key) for key in fields} == fields
    assert (loaded.kind, loaded.partition, loaded.account, loaded.runs_root) == ("slurm", "gpu", "007", "/data/runs")
    assert (loaded.gpus_per_node, loaded.cpus_per_node, loaded.memory_gb) == (8, 96, 1081.0)
    for promise in ("nodes", "memory", "time limit"):
        check = judged(slurm_site, promise, loaded)
        assert check.state == OK or "signal_seconds" in check.remedy


def test_doctor_profile_counts_cores_where_slurm_counts_threads(tmp_path):
    slurm_site = site({"DefMemPerCPU": "100"}, nodes={THREADS: 4})
    profile = doctor.draft(ClusterProfile(kind="slurm"), slurm_site)
    doctor.write(tmp_path / "mine.yaml", doctor.profile_yaml(profile, slurm_site))
    loaded = load_profile(str(tmp_path / "mine.yaml"))
    assert (loaded.cpus_per_node, loaded.threads_per_core) == (96, 2)
    assert loaded.options == {"mem-per-cpu": "5369M"}, "Slurm counts memory per thread, too"
    assert judged(slurm_site, "gets the cores", loaded).state == OK


def test_doctor_profile_preserves_fields_unrelated_to_site(tmp_path):
    fields = {"modules": ["cuda/12.4"], "env": ["PROXY"], "peer_seconds": 7, "peak_tflops": 989.0, "parallel": 4}
    fields["setup"] = ["if [ -e /é ]; then\n  echo 'a: #b'\nfi || exit 78", "export " + "A=b " * 300]
    slurm_site = site()
    doctor.write(
        tmp_path / "mine.yaml",
        doctor.profile_yaml(doctor.draft(ClusterProfile(kind="slurm", **fields), slurm_site), slurm_site),
    )
    loaded = load_profile(str(tmp_path / "mine.yaml"))
    assert {key: getattr(loaded, key) for key in fields} == fields


def test_doctor_keeps_existing_profile_if_new_one_cannot_be_loaded(tmp_path):
    (tmp_path / "mine.yaml").write_text("kind: slurm\n")
    with pytest.raises(ConfigError, match="mine.yaml"):
        doctor.write(tmp_path / "mine.yaml", "setup: [")
    assert (tmp_path / "mine.yaml").read_text() == "kind: slurm\n" and len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def far(commands, tmp_path, monkeypatch):
    """Stub commands of a Slurm cluster with the partitions cpu and gpu."""
    rows = ["PartitionName=cpu Default=NO", " ".join(f"{key}={value}" for key, value in PARTITION.items())]
    config = "\n".join(f"{key:24}= {value}" for key, value in CONFIG.items())
    show_gpu = f'[ "$*" = "-a -o show partition gpu" ] && echo "{rows[1]}"'
    show_all = f'[ "$*" = "-a -o show partition" ] && printf "%s\\n" "{rows[0]}" "{rows[1]}"'
    commands.text = f"[ $2 = config ] && cat <<'X'\n{config}\nX\n{show_gpu}\n{show_all}\n[ \"$5\" != none ]"
    commands("scontrol", commands.text)
    commands("sinfo", "echo 'a1|96|1031000|gpu:h100:8|idle|2:48:1'")
    commands("squeue", "exit 1")
    commands("scancel", "")
    commands("srun", "")
    commands("sbatch", "[ $1 = --test-only ]")
    monkeypatch.setenv("FLIP_RUNS", str(tmp_path / "runs"))
    return commands


def test_doctor_writes_profile_and_overwrites_only_with_force(far, tmp_path, capsys):
    target = tmp_path / "new.yaml"
    assert doctor.main(["--write", str(target), "--account", "vision"]) == 0
    out = capsys.readouterr().out
    assert "Slurm cluster far, partition gpu" in out and f"written: {target}" in out
    assert load_profile(str(target)).account == "vision"
    sbatch_calls = [call for call in far.calls() if call.startswith("sbatch")]
    assert len(sbatch_calls) == 1 and "--test-only --partition=gpu --account=vision" in sbatch_calls[0]
    assert "--gpus-per-node=8" in sbatch_calls[0] and "--time=2880" in sbatch_calls[0]
    before = target.read_bytes()
    assert doctor.main(["--write", str(target)]) == 78
    assert "--force" in capsys.readouterr().err and target.read_bytes() == before
    assert doctor.main(["--write", str(target), "--force"]) == 0 and target.read_bytes() != before
    # The command leaves no other files.
    assert not (tmp_path / "runs").exists()
    assert not list(tmp_path.glob(".probe*"))


@pytest.mark.parametrize(
    ("config", "agents", "reason"),
    [
        ("", True, "restart a run in its job after a fault"),
        ("KillWait = 5 sec", False, "KillWait=5 s, less than 10 s"),
        ("TaskProlog = /etc/task.sh", False, "TaskProlog=/etc/task.sh would run once for all ranks of a node"),
        ("SLURM_VERSION = 22.05.11", False, "Slurm is 22.05.11, node agents need 23.02"),
    ],
)
def test_new_profile_has_node_agents_unless_the_site_speaks_against_them(far, tmp_path, config, agents, reason):
    far("scontrol", far.text.replace("\nX\n", f"\n{config}\nX\n", 1))
    assert doctor.main(["--write", str(tmp_path / "new.yaml")]) == 0
    assert load_profile(str(tmp_path / "new.yaml")).agents == agents
    (line,) = [row for row in (tmp_path / "new.yaml").read_text().splitlines() if row.startswith("agents:")]
    assert reason in line.partition("#")[2]


def test_profile_that_does_not_name_agents_has_none(tmp_path):
    (tmp_path / "old.yaml").write_text("kind: slurm\n")
    assert not load_profile(str(tmp_path / "old.yaml")).agents


def trial_commands(far, *answers):
    """Stand-ins for a site with two nodes, whose tasks print these answers."""
    far("sinfo", "printf '%s\\n' 'a1|96|1031000|gpu:h100:8|idle|2:48:1' 'a2|96|1031000|gpu:h100:8|idle|2:48:1'")
    hosts = "[ $2 != hostnames ] || { printf 'a1\\na2\\n'; exit 0; }"
    far("scontrol", f"{hosts}\n{far.text}")
    lines = [json.dumps({"nodes": "a[1-2]", "kind": "", "problem": "", **each}) for each in answers]
    far("srun", "\n".join(f"echo 'result of a node agent: {line}'" for line in lines))


def test_doctor_tries_node_agents_on_request_and_leaves_nothing(far, tmp_path, capsys):
    trial_commands(far, {"node": "a1"}, {"node": "a2"})
    target = tmp_path / "new.yaml"
    assert doctor.main(["--try-agents", "7", "--write", str(target)]) == 0
    out = capsys.readouterr().out
    assert "agents: true; agents of a1, a2 connect" in out
    assert "a job on 2 nodes tries node agents; it waits at most 7 s" in out
    (call,) = [call for call in far.calls() if call.startswith("srun")]
    assert "--nodes=2" in call and "--immediate=7" in call
    assert load_profile(str(target)).agents
    assert not (tmp_path / "runs").exists() and not list(tmp_path.glob(".try-agents*"))


def test_agents_that_do_not_connect_are_off_in_the_written_profile(far, tmp_path, capsys):
    problem = {"node": "a2", "kind": "network", "problem": "a1, port 11111: timed out"}
    trial_commands(far, {"node": "a1"}, problem)
    target = tmp_path / "new.yaml"
    assert doctor.main(["--try-agents", "--write", str(target), "--json"]) == 0
    row = {row["promise"]: row for row in json.loads(capsys.readouterr().out)["promises"]}
    row = row["a fault costs seconds, not a requeue"]
    assert row["read"] == "a2: a1, port 11111: timed out; agents of a1 connect"
    assert "open TCP ports" in row["then"]
    assert "agents: false             # a2: a1, port 11111: timed out" in target.read_text()
    given = tmp_path / "given.yaml"
    given.write_text("kind: slurm\nagents: true\n")
    assert doctor.main(["--cluster", str(given), "--try-agents", "--write", str(target), "--force"]) == 0
    assert not load_profile(str(target)).agents


def test_refused_job_and_container_are_not_tried(far, tmp_path, capsys):
    far("sbatch", "echo 'sbatch: error: Invalid account' >&2; exit 1")
    assert doctor.main(["--try-agents"]) == 78
    assert "agents: true; could not be tried: sbatch: error: Invalid account" in capsys.readouterr().out
    far("sbatch", "")
    (tmp_path / "image.yaml").write_text("kind: slurm\ncontainer: /images/flip.sqsh\n")
    assert doctor.main(["--try-agents", "--cluster", str(tmp_path / "image.yaml")]) == 0
    assert "the ranks run in a container; could not be tried" in capsys.readouterr().out
    assert not [call for call in far.calls() if call.startswith("srun")]


def test_doctor_shows_refusal_of_job_submit_plugin(far, capsys):
    """The plugin prints the reason before Slurm prints an unspecified error."""
    own = "sbatch: error: Site policy: give an account."
    last = "allocation failure: Unspecified error"
    far("sbatch", f"echo '{own}' >&2; echo '{last}' >&2; exit 1")
    assert doctor.main([]) == 78
    assert f"{own}; {last}" in " ".join(capsys.readouterr().out.split())


def test_doctor_reads_limits_of_association_and_qos(far, capsys):
    text = far.text.replace("ClusterName", "AccountingStorageType = accounting_storage/slurmdbd\nClusterName", 1)
    far("scontrol", text)
    far(
        "sacctmgr",
        """case $* in *user*) printf '%s\\n' 'acc|root|normal|7|' 'acc|acc|low|40|99';;
    *name=low*) echo 'cluster|00:00:00||30||';; *) exit 1;; esac""",
    )
    assert doctor.main(["--json"]) == 0
    check = {row["promise"]: row for row in json.loads(capsys.readouterr().out)["promises"]}[
        "a sweep may have any number of runs"
    ]
    assert check["verdict"] == DEGRADED and "MaxSubmitJobsPerUser of the QOS 30" in check["read"]
    assert doctor.main(["--json", "--account", "root", "--qos", "none"]) == 0
    out = capsys.readouterr().out
    assert "MaxSubmitJobs of the association 7" in out
    assert json.loads(out)["next"][0].endswith(" doctor --account=root --qos=none --write NAME")


def test_doctor_json_lists_failed_checks_of_unsuitable_profile(far, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("kind: slurm\nhours: 100\nenv: [FLIP_NO_SUCH_NAME]\noptions: {qos: x}\n")
    assert doctor.main(["--cluster", str(tmp_path / "mine.yaml"), "--json"]) == 78
    report = json.loads(capsys.readouterr().out)
    assert (report["cluster"], report["partition"], report["written"]) == ("far", "gpu", None)
    words = shlex.split(report["next"][0])
    assert words[-5:] == ["submit", "quickstart", "--cluster", str(tmp_path / "mine.yaml"), "--dry-run"]
    check_document("doctor", report)
    wrong = {row["promise"] for row in report["promises"] if row["verdict"] == FAILS}
    assert wrong == {"a run is warned before the time limit", "the environment of jobs is defined"}


@pytest.mark.parametrize(
    "words, said",
    [
        (["--partition", "none"], "no such partition"),
        (["--cluster", "local"], "not a profile of a Slurm cluster"),
        (["--cluster", "nowhere"], "no such cluster profile"),
    ],
)
def test_doctor_reports_wrong_arguments_on_single_line(far, words, said, capsys):
    assert doctor.main(words) == 78
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1


def test_doctor_takes_the_strictest_limits_of_several_partitions(far, tmp_path, capsys):
    """Slurm starts a job in any of them, so the profile and the checks must hold in each."""
    spot = "PartitionName=spot PreemptMode=CANCEL GraceTime=30 MaxTime=04:00:00"
    far("scontrol", f'[ "$*" = "-a -o show partition spot" ] && echo "{spot}" && exit\n{far.text}')
    target = tmp_path / "both.yaml"
    doctor.main(["--partition", "gpu,spot", "--write", str(target)])
    printed = " ".join(capsys.readouterr().out.split())
    assert "Slurm cluster far, partition gpu,spot" in printed
    assert "PreemptMode=CANCEL" in printed
    written = load_profile(str(target))
    assert (written.partition, written.hours) == ("gpu,spot", 4.0)
    assert any(call.startswith("sinfo") and "-p gpu,spot" in call for call in far.calls())
    assert doctor.main(["--partition", "gpu,none"]) == 78
    assert "no such partition" in capsys.readouterr().err


@pytest.mark.parametrize("limits", [("UNLIMITED", "2-00:00:00"), ("2-00:00:00", "UNLIMITED")])
def test_unlimited_partition_beside_a_limited_one_has_its_limit(limits):
    rows = [{"PartitionName": name, "MaxTime": limit} for name, limit in zip("ab", limits, strict=True)]
    assert reading.strictest(rows, CONFIG)["MaxTime"] == "2-00:00:00"


def test_doctor_reports_missing_commands_controller_or_default_partition(far, tmp_path, monkeypatch, capsys):
    far("scontrol", "[ $2 = config ] && exit 0; echo 'PartitionName=cpu Default=NO'")
    assert doctor.main([]) == 78 and "Name one of: cpu" in capsys.readouterr().err
    far("scontrol", "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert doctor.main([]) == 69
    assert capsys.readouterr().err.startswith("Slurm does not answer (found: 'scontrol: Unable to contact")
    far("scontrol", "echo 'scontrol: error: Unable to contact slurm controller' >&2; exit 1")
    assert doctor.main([]) == 69 and "'scontrol: error: Unable" in capsys.readouterr().err
    assert preflight.SCHEDULER.look(ClusterProfile(kind="slurm"), True, True)[0].state == UNKNOWN
    far("scontrol", "[ $2 = config ] && exit 0; exec sleep 60")
    monkeypatch.setattr(reading, "DEADLINE", 0.2)
    assert doctor.main(["--partition", "gpu"]) == 69 and "does not answer" in capsys.readouterr().err
    (tmp_path / "srun").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="not on this machine.*srun"):
        reading.check_ready(ClusterProfile(kind="slurm"))
    assert doctor.main([]) == 78 and "srun" in capsys.readouterr().err


def test_check_ready_refuses_python_failing_in_job_environment(far, tmp_path, monkeypatch):
    """A Python of an environment module needs LD_LIBRARY_PATH. Without the check, every node reports the error."""
    lacks = "error while loading shared libraries: libpython3.11.so.1.0: cannot open shared object file"
    needs = f'[ "$LD_LIBRARY_PATH" = /apps/lib ] || {{ echo "python: {lacks}" >&2; exit 127; }}'
    far("modpython", f'{needs}\nexec {sys.executable} "$@"')
    far("oldpython", "echo 'it is Python 3.4' >&2; exit 1")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/apps/lib")
    own = str(tmp_path / "modpython")
    fields = {"kind": "slurm", "name": "mine", "modules": ["python/3.11"]}
    for python, host, message in (
        (own, "", lacks),
        ("python3", own, lacks),
        ("python3", "oldpython", "it is Python 3.4"),
    ):
        with pytest.raises(ConfigError) as caught:
            reading.check_ready(ClusterProfile(python=python, host_python=host, **fields))
        assert caught.value.where == str(tmp_path / (host or python)) and message in str(caught.value)
        assert "mine" in caught.value.remedy and "host_python: /usr/bin/python3" in caught.value.remedy
    for more in ({"env": ["LD_LIBRARY_PATH"]}, {"host_python": sys.executable}, {"host_python": "/only/on/nodes"}):
        assert reading.check_ready(ClusterProfile(python=own, **fields, **more)).startswith("the cluster far answers")


def test_doctor_help_shows_examples_and_imports_only_cli_module():
    line = [sys.executable, "-X", "importtime", str(ROOT / "jobs"), "doctor", "--help"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "examples:" in done.stdout
    own = {name for name in imported if name.startswith(("flip", "jobs"))}
    assert own <= {
        "flip",
        "flip.version",
        "flip.runs",
        "flip.files",
        "flip.files.acl",
        "flip.files.ownership",
        "flip.files.python_path",
        "jobs",
        "jobs.commands",
        "jobs.commands.doctor",
        "jobs.common",
        "jobs.common.cli",
        "jobs.common.paths",
    }


@pytest.mark.slurm
def test_doctor_reads_and_judges_real_slurm_cluster(tmp_path, tmp_path_factory):
    """The cluster accepts the written profile. A partition that cancels preempted jobs is reported as degraded."""
    from tests.slurm_site import require
    from tools.sandbox.cluster import SandboxCluster

    require()
    cluster = SandboxCluster(tmp_path_factory.mktemp("s"), nodes=2, grace=9)  # sockets need a short path

    def call(*argv):
        line = [sys.executable, ROOT / "jobs", "doctor", "--json", *argv]
        environ = {**os.environ, **cluster.env(), "FLIP_RUNS": str(tmp_path / "runs")}
        done = subprocess.run(line, env=environ, capture_output=True, text=True)
        return done.returncode, {row["promise"]: row for row in json.loads(done.stdout)["promises"]}

    cluster.start()
    try:
        code, checks = call("--write", str(tmp_path / "mine.yaml"))
        assert code == 0, checks
        assert checks["a preempted run starts again"]["read"].startswith("preempt/partition_prio, PreemptMode=REQUEUE")
        assert "GraceTime=9 s, KillWait=5 s, USR2" in checks["a run is warned before it is preempted"]["read"]
        profile = load_profile(str(tmp_path / "mine.yaml"))
        assert (profile.partition, profile.gpus_per_node, profile.cpus_per_node, profile.hours) == ("low", 8, 16, 24.0)
        assert profile.options == {"mem-per-cpu": "4000M"} and profile.memory_gb == 67.0
        text = (tmp_path / "mine.yaml").read_text().replace("gpus_per_node: 8", "gpus_per_node: 9")
        (tmp_path / "more.yaml").write_text(text)
        code, checks = call("--cluster", str(tmp_path / "more.yaml"))
        assert code == 78 and "not available" in checks["a job is accepted"]["read"]
        cluster.call("scontrol", "update", "PartitionName=low", "PreemptMode=CANCEL", "GraceTime=0")
        code, checks = call()
        assert code == 0 and checks["a preempted run starts again"]["verdict"] == DEGRADED
    finally:
        cluster.stop()


def test_doctor_names_what_decodes_images(monkeypatch):
    row = software_checks.check_decoders(ClusterProfile())
    if kernel.why_unavailable():
        assert row.state == "degraded"
    else:
        assert row.state == "ok" and f"visible-jpeg {kernel.visible_jpeg.version()}" in row.text
    assert "simplejpeg" in row.text
    assert software_checks.check_decoders(ClusterProfile(container="/image.sqsh")).state == "unknown"
    monkeypatch.setattr(kernel, "visible_jpeg", None)
    row = software_checks.check_decoders(ClusterProfile())
    assert row.state == "degraded" and "not installed" in row.text
