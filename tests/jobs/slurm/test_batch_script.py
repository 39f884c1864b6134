"""Tests of the batch script: its text against golden files, its protocol in a real bash with stand-ins for Slurm."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from flip.runs.errors import ConfigError
from flip.runs.job_kind import EVALUATE
from flip.runs.rundir import RunDir, read_json, write_json
from jobs.common.cluster_profile import ClusterProfile, load_profile
from jobs.common.job import Job, JobResources
from jobs.slurm import batch_script
from jobs.slurm.site import rejection
from tests.jobs.host.agents.task import TASK
from tests.jobs.slurm.batch_stage import JOB, ROOT, script
from tests.slurm_site import require_shellcheck

GOLDEN = Path(__file__).with_name("golden")


@pytest.mark.parametrize(
    "name, fields",
    [
        ("canary", {"partition": "gpu"}),
        ("plain", {"partition": "gpu", "python": "/opt/py/bin/python"}),
        (
            "pyxis",
            {
                "account": "lab", "qos": "preemptible", "container": "nvcr.io#nvidia/pytorch:25.09-py3",
                "container_mounts": ["/data", "/scratch/cache:/root/.cache"], "parallel": 4,
                "options": {"exclusive": "", "constraint": "h100"},
            },
        ),
        ("agents", {"partition": "gpu", "agents": True}),
        ("tracked", {"container": "/img/torch.sif", "container_runtime": "apptainer"}),
        (
            "apptainer",
            {
                "container": "/img/torch 2.sif", "container_runtime": "apptainer", "python": "python3.12",
                "host_python": "/usr/bin/python3", "modules": ["cuda/12.8"], "setup": ["ulimit -n 65536"],
                "options": {"gres": "gpu:h100:8"}, "master_addr": "10.0.0.1",
            },
        ),
    ],
)  # fmt: skip
def test_script_matches_golden_file(name, fields, monkeypatch):
    job = replace(JOB, **{"canary": {"canary": 50}, "tracked": {"trackers": ["wandb"]}}.get(name, {}))
    text = script(
        ClusterProfile(name=name, kind="slurm", **{"python": "/opt/py/bin/python", **fields}),
        job,
        monkeypatch=monkeypatch,
    )
    program = batch_script.ownership_program()
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert text.count(program) == 1
    text = text.replace(program, "(flip/files/acl.py and flip/files/ownership.py)\n")
    path = GOLDEN / f"sbatch-{name}.sh"
    if os.environ.get("FLIP_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text(), "FLIP_GOLDEN=write updates the file; review the diff"


def test_script_of_evaluation_differs_from_training_by_its_places_and_module(monkeypatch):
    profile = ClusterProfile(
        name="a", kind="slurm", container="/img/torch.sif", container_runtime="apptainer", python="/py"
    )
    place = "/runs/demo/.evaluate"
    evaluation = replace(JOB, run=RunDir(f"{place}/a-1126-0000"), kind=EVALUATE)
    train = script(profile, monkeypatch=monkeypatch)
    text = script(profile, evaluation, folder=f"{place}/.slurm/0123abcd", monkeypatch=monkeypatch)
    assert "sweep=/runs/demo root=" in text, "what is looked for on the node is the folder of the sweep"
    assert "--bind /runs/demo:/runs/demo " in text, "its code lies in the folder of the sweep"
    text = text.replace(f"{place}/.slurm", "/runs/demo/.slurm").replace("jobs.evaluator", "jobs.worker")
    assert text == train


@pytest.mark.parametrize(
    "hours, minutes", [(8.3, 498), (16.6, 996), (23.9, 1434), (1 / 3, 20), (0.501, 31), (24.0, 1440), (1e-9, 1)]
)
def test_time_limit_is_not_rounded_up_by_floating_point_noise(hours, minutes, commands, tmp_path):
    """8.3 * 60 is 498.00000000000006. Rounded up, it would exceed a site limit of exactly 498 minutes."""
    parameters = batch_script.parameters(
        ClusterProfile(kind="slurm"), replace(JOB, resources=JobResources(hours=hours)), tmp_path, "demo.0123abcd"
    )
    assert parameters["time"] == minutes
    commands("sbatch", "")
    rejection(ClusterProfile(kind="slurm", hours=hours))
    assert f"--time={minutes} " in commands.calls()[-1], "doctor requests the same limit as submit"


@pytest.mark.parametrize("options, requeue", [({}, True), ({"no-requeue": ""}, False)])
def test_script_requests_requeue_unless_profile_forbids_it(options, requeue, monkeypatch):
    """submitit sorts the options, and sbatch takes the last of both."""
    text = script(ClusterProfile(kind="slurm", options=options), monkeypatch=monkeypatch)
    assert ("#SBATCH --requeue\n" in text) == requeue and ("#SBATCH --no-requeue\n" in text) == (not requeue)


def test_script_records_crash_and_requeues_job(stage):
    stage.commands("srun", "echo $FLIP_RUN $FLIP_ATTEMPT $*; exit 137")
    bash = stage.start()
    assert bash.wait(60) == 137
    end = stage.end()
    assert (end["code"], end["state"], end["cause"], end["action"]) == (137, "RUNNING", "crash", "requeue")
    assert "scontrol requeue 57_1" in stage.commands.calls()
    output = (stage.run.logs / "1" / "job.out").read_text().splitlines()
    assert output[0].startswith(f"{stage.run.path} 1 ") and output[0].endswith("jobs/host/rank_entry.py jobs.worker")
    assert json.loads(output[1])["action"] == "requeue" and output[2] == "57_1: requeued"
    assert (stage.run.logs / "latest").resolve() == (stage.run.logs / "1").resolve()


def test_job_of_complete_run_ends_well_although_its_srun_was_killed(stage):
    """It outlived its ranks: jobs/host/lost_step.py. The record keeps the code."""
    stage.commands("srun", 'echo "{}" > "$FLIP_RUN/result.json"; kill -9 $$')
    assert stage.start().wait(60) == 0
    assert (stage.end()["code"], stage.end()["cause"]) == (137, "complete")


@pytest.mark.long
@pytest.mark.parametrize("project", ["masking", ""])
def test_script_runs_metrics_follower_alongside_ranks(stage, project, monkeypatch):
    """The script waits for the follower after it records the end. Without a project the follower exits by itself,
    and the run is not affected."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    stage.run.config.write_text(f"monitor: {{wandb: '{project}'}}")
    profile = ClusterProfile(name="x", kind="slurm", python=sys.executable)
    job = Job(stage.run, ROOT, JobResources(), {}, trackers=["wandb"])
    stage.script.write_text(script(profile, job, 2, stage.folder, monkeypatch))
    work = "from tests.jobs.tracking.run_files import *; from flip.runs.rundir import RunDir; import sys"
    work += "; run = RunDir(sys.argv[1]); log(run, 1, (1, 2)); save(run, 1, 2); complete(run, 2)"
    stage.commands("srun", f'{sys.executable} -c "{work}" "$FLIP_RUN"')
    assert stage.start().wait(120) == 0 and stage.end()["cause"] == "complete"
    output = (stage.run.logs / "1" / "follow-wandb.log").read_text()
    state = read_json(stage.run.path / "trackers" / "wandb.json") or {}
    assert (state.get("step") == 2) if project else ("no project for this run" in output and not state), output


def test_script_with_agents_starts_one_per_node_and_falls_back_to_ranks(stage, monkeypatch):
    """The stand-in for srun is an agent that reaches no coordinator, and then the ranks. The profile sets -e and -u."""
    profile = ClusterProfile(name="x", kind="slurm", agents=True, setup=["set -eu"])
    job = Job(stage.run, ROOT, JobResources(nodes=2, processes=4, cpus=3))
    stage.script.write_text(script(profile, job, 2, stage.folder, monkeypatch))
    contact = stage.run.attempt(1) / "coordinator.json"
    copy = f'cp -p "{contact}" "{stage.folder}/contact"; exit 74'
    stage.commands("srun", f'echo "agents=$FLIP_AGENTS $*"; [ -z "$FLIP_AGENTS" ] || {{ {copy}; }}; exit 65')
    assert stage.start(SLURM_NTASKS="8", SLURM_JOB_NUM_NODES="2").wait(60) == 65
    output = (stage.run.logs / "1" / "job.out").read_text().splitlines()
    assert output[0].startswith("agents=1 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=12 --wait=0 --unbuffered ")
    assert output[1].startswith("agents= --cpus-per-task=3 --distribution=block:block --wait=120 --unbuffered ")
    for line in output[:2]:
        assert line.endswith("jobs/host/rank_entry.py jobs.worker") and line.count("--cpus-per-task") == 1
    assert "no node agents: srun starts the ranks" in (stage.run.logs / "1" / "job.err").read_text()
    assert stage.end()["cause"] == "data"
    copied = stage.folder / "contact"
    assert copied.stat().st_mode & 0o777 == 0o600 and len(read_json(copied)["key"]) == 64
    assert not contact.exists(), "srun has started the ranks"


@pytest.mark.long
def test_code_of_agents_counts_in_place_of_that_of_srun(stage, monkeypatch):
    """srun ends with the highest code of its tasks: 137 of one that was killed, without which the run has gone on.

    The stand-in for srun starts a real agent, whose rank ends with 65, and ends as if a second task had been killed.
    """
    profile = ClusterProfile(name="x", kind="slurm", agents=True)
    stage.script.write_text(script(profile, Job(stage.run, ROOT, JobResources()), 2, stage.folder, monkeypatch))
    (stage.run.path / "end.0").write_text("65")
    task = " ".join(f"{name}={value}" for name, value in TASK.items())
    entry = f"{sys.executable} -I {ROOT}/jobs/host/rank_entry.py tests.jobs.runtime.agent_rank"
    stage.commands("srun", f"env {task} {entry}; echo task $?; exit 137")
    assert stage.start(SLURM_NTASKS="1", SLURM_JOB_NUM_NODES="1").wait(60) == 65
    assert "task 65" in (stage.run.logs / "1" / "job.out").read_text()
    assert (stage.end()["code"], stage.end()["cause"]) == (65, "data")


@pytest.mark.parametrize("proof", ["logs/1/node0.out", "attempts/1/end.json"])
def test_ranks_start_once_if_one_of_several_agents_finds_no_coordinator(stage, proof, monkeypatch):
    """srun ends with the highest code of its tasks: 74 of the agent of a spare node, after 70 of the others.

    The first attempt has a log or, if too many nodes are not healthy, only an end.
    """
    profile = ClusterProfile(name="x", kind="slurm", agents=True)
    stage.script.write_text(script(profile, Job(stage.run, ROOT, JobResources()), 2, stage.folder, monkeypatch))
    end = {"attempt": 1, "action": "stop", "cause": "crash", "reason": "", "committed": False, "delay": 0}
    (stage.folder / "proof").write_text(json.dumps(end))
    work = f'cp "{stage.folder}/proof" "$FLIP_RUN/{proof}"'
    stage.commands("srun", f'echo "agents=$FLIP_AGENTS"; [ -z "$FLIP_AGENTS" ] || {work}; exit 74')
    started = stage.start(SLURM_NTASKS="2", SLURM_JOB_NUM_NODES="2", FLIP_AGENTS="inherited", FLIP_ATTEMPT="9")
    assert started.wait(60) == 74
    output = (stage.run.logs / "1" / "job.out").read_text().splitlines()
    assert [line for line in output if line.startswith("agents=")] == ["agents=1"]
    assert stage.end()["cause"] == "crash"


@pytest.mark.long
def test_follower_of_run_with_agents_follows_later_attempts_of_its_job(stage, monkeypatch):
    """The stand-in for srun is an agent's step: its first attempt ends, and the coordinator starts another."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    stage.run.config.write_text("monitor: {wandb: masking}")
    profile = ClusterProfile(name="x", kind="slurm", python=sys.executable, agents=True)
    job = Job(stage.run, ROOT, JobResources(), {}, trackers=["wandb"])
    stage.script.write_text(script(profile, job, 2, stage.folder, monkeypatch))
    lines = [
        "import sys, time; from pathlib import Path",
        "from tests.jobs.tracking.run_files import *; from flip.runs.rundir import RunDir, write_json",
        "run = RunDir(sys.argv[1]); log(run, 1, (1, 2)); save(run, 1, 2)",
        "while not list((run.path / 'trackers').glob('wandb/*')): time.sleep(0.1)",  # it follows
        "write_json(run.attempt(1) / 'end.json', {'attempt': 1, 'action': 'requeue', 'cause': 'crash', 'reason': '',",
        "    'committed': True, 'delay': 0.0, 'exclude': [], 'time': time.time()})",
        "start = json.loads((run.attempt(1) / 'start.json').read_text())",
        "run.start_attempt({key: start[key] for key in ('job', 'restarts') if key in start})",
        "log(run, 2, (3, 4)); save(run, 2, 4); complete(run, 4)",
    ]
    (stage.folder / "work.py").write_text("import json\n" + "\n".join(lines))
    stage.commands("srun", f'PYTHONPATH={ROOT} {sys.executable} "{stage.folder}/work.py" "$FLIP_RUN"')
    assert stage.start(SLURM_NTASKS="1", SLURM_JOB_NUM_NODES="1").wait(240) == 0
    output = (stage.run.logs / "1" / "follow-wandb.log").read_text()
    assert (read_json(stage.run.path / "trackers" / "wandb.json") or {}).get("step") == 4, output
    assert stage.run.newest_attempt() == 2


def test_host_hooks_run_from_newly_submitted_code(stage, tmp_path, monkeypatch):
    """A continued run keeps its older code, whose batch_hooks.py may have other options."""
    old = tmp_path / "old"
    (old / "jobs" / "host").mkdir(parents=True)
    for name in ("host/batch_hooks.py", "host/rank_entry.py"):
        (old / "jobs" / name).write_text("import argparse\nargparse.ArgumentParser().parse_args()\n")
    job = Job(stage.run, old, JobResources(), {}, host_snapshot=ROOT)
    stage.script.write_text(script(ClusterProfile(name="x", kind="slurm"), job, 2, stage.folder, monkeypatch))
    stage.commands("srun", "echo $PYTHONPATH $FLIP_SNAPSHOT $*; exit 75")
    assert stage.start().wait(60) == 75
    assert (stage.end()["cause"], stage.end()["action"]) == ("stopped", "requeue")
    assert "scontrol requeue 57_1" in stage.commands.calls()
    output = (stage.run.logs / "1" / "job.out").read_text().splitlines()[0]
    assert output.startswith(f"{old} {old} ") and output.endswith(f"{ROOT}/jobs/host/rank_entry.py jobs.worker")


DISABLED = """case $1 in
    show) printf 'JobId=58\\n JobState=RUNNING Restarts=0\\n';;
    write) cat {script};;
    requeue) echo "57_1: Requested operation is presently disabled." >&2; exit 1;; esac"""
"""scontrol for a job with Requeue=0."""


@pytest.mark.long
@pytest.mark.parametrize("refused", [False, True])
def test_script_submits_successor_job_if_requeue_is_disabled(stage, tmp_path, refused):
    stage.commands("srun", "export SLURM_RESTART_COUNT=7; exit 137")
    stage.commands("scontrol", DISABLED.format(script=stage.script))
    stage.commands("squeue", "")
    sbatch = "echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1"
    stage.commands("sbatch", sbatch if refused else f"cat > {tmp_path}/given; env > {tmp_path}/env; echo 99")
    assert stage.start(SLURM_JOB_NAME="my sweep.77aa77aa").wait(60) == 137
    assert "sbatch --parsable --dependency=afterany:57_1 --array=1" in stage.commands.calls()
    assert sum(call.startswith(("sbatch", "scontrol requeue")) for call in stage.commands.calls()) == 2
    end = stage.end()
    assert (end["cause"], end["action"]) == ("crash", "requeue")
    if refused:
        refusal = "a new job was refused (sbatch: sbatch: error: QOSMaxSubmitJobPerUserLimit)"
        assert end["reason"].startswith(f"requeue is disabled here, and {refusal}; killed by signal 9")
        return
    assert (tmp_path / "given").read_text() == stage.script.read_text()
    env = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line)
    assert env["FLIP_FOLLOWS"] == "1" and not {"FLIP_RUN", "FLIP_SNAPSHOT", "SLURM_JOB_ID"} & env.keys()
    for restarts, attempt in (("", 2), ("", 2), ("1", 3)):  # successor, second successor, requeued first job
        restart_env = {}
        if restarts:
            restart_env = {"SLURM_RESTART_COUNT": restarts}
        stage.start(SLURM_ARRAY_JOB_ID="99", SLURM_JOB_ID="99", FLIP_FOLLOWS="1", **restart_env).wait(60)
        assert stage.run.newest_attempt() == attempt


def test_broken_node_submits_successor_job_if_requeue_is_disabled(stage, tmp_path):
    shutil.rmtree(stage.folder)
    stage.commands("scontrol", DISABLED.format(script=stage.script))
    stage.commands("squeue", "")
    stage.commands("sbatch", f"cat > {tmp_path}/given; env > {tmp_path}/env")
    assert stage.start(SLURMD_NODENAME="n7", FLIP_FOLLOWS="5").wait(60) == 1
    options = "--parsable --dependency=afterany:57_1 --array=1 --exclude=n7 --comment=away:1:-1:0:1:n7"
    assert [call for call in stage.commands.calls() if "requeue" in call or "sbatch" in call] == [
        "scontrol requeue 57_1",
        f"sbatch {options}",
    ]
    assert (tmp_path / "given").read_text() == stage.script.read_text()
    left = (tmp_path / "env").read_text()
    assert "SLURM_JOB_ID" not in left and "FLIP_FOLLOWS" not in left, "it follows no attempt"


@pytest.mark.parametrize("sent, heard", [("USR1", "USR2"), ("USR2", "USR2"), ("TERM", "USR1")])
def test_shell_forwards_signals_to_ranks(stage, tmp_path, sent, heard):
    """scancel --batch sends signals to the shell alone. srun inherits no ignored signal and passes USR1 and USR2 on;
    on TERM it would kill the ranks, so the shell sends USR1."""
    traps = "".join(f"trap 'echo {name} >> {tmp_path}/heard' {name}; " for name in ("TERM", "USR1", "USR2"))
    stage.commands("srun", f"{traps} touch {tmp_path}/up; until [ -s {tmp_path}/heard ]; do sleep 0.05; done; exit 75")
    bash = stage.start()
    while not (tmp_path / "up").exists():
        time.sleep(0.01)
    bash.send_signal(getattr(signal, f"SIG{sent}"))
    assert bash.wait(60) == 75 and stage.end()["code"] == 75
    assert (tmp_path / "heard").read_text().split() == [heard]


def test_shell_preserves_exit_code_of_step_killed_by_signal(stage, tmp_path):
    stage.commands("srun", "kill -9 $$")
    assert stage.start().wait(60) == 137 and stage.end()["code"] == 137


@pytest.mark.parametrize("what", ["complete", "cancelled", "replaced", "failed"])
def test_script_starts_no_attempt_of_ended_or_replaced_run(stage, what):
    stage.commands("srun", "exit 0")
    if what == "complete":
        write_json(stage.run.result, {})
    elif what == "cancelled":
        write_json(stage.run.cancel, {"who": "me", "why": "a mistake"})
    elif what == "replaced":
        write_json(stage.run.path / "job.json", {"token": "99bb99bb", "after": 0})
    else:
        n = stage.run.start_attempt({})
        stage.run.write_cause(n, 0, "config", 78, "a key is unknown")
    before = stage.run.newest_attempt()
    bash = stage.start()
    bash.wait(60)
    assert (bash.returncode, stage.run.newest_attempt()) == (78 if what == "failed" else 0, before)
    assert f"{stage.run.path}: not started: " in (stage.folder / "57_1.err").read_text()
    assert not [call for call in stage.commands.calls() if call.startswith(("srun", "scontrol requeue"))]


def test_script_requeues_job_if_module_is_missing(stage, monkeypatch):
    job = Job(stage.run, ROOT, JobResources())
    profile = ClusterProfile(name="x", kind="slurm", modules=["nosuch/1.0"])
    stage.script.write_text(script(profile, job, 2, stage.folder, monkeypatch))
    assert stage.start().wait(60) == 70
    assert (stage.end()["cause"], stage.end()["action"]) == ("crash", "requeue")


@pytest.mark.parametrize(("given", "used"), [(5, 4), (4, 4), (3, 2), (2, 2)])
def test_script_uses_most_nodes_of_range_whose_ranks_divide_the_lanes(stage, monkeypatch, given, used):
    resources = JobResources(4, 3, 0, 1, 1.0, least_nodes=2, usable=(2, 4))
    job = Job(stage.run, ROOT, resources)
    text = script(ClusterProfile(name="x", kind="slurm"), job, 2, stage.folder, monkeypatch)
    assert "#SBATCH --nodes=2-4\n" in text and "#SBATCH --ntasks-per-node=3\n" in text
    stage.script.write_text(text)
    stage.commands("srun", "exit 70")
    assert stage.start(SLURM_JOB_NUM_NODES=str(given), SLURM_NTASKS=str(3 * given)).wait(60) == 70
    (call,) = [call for call in stage.commands.calls() if call.startswith("srun")]
    assert f" --nodes={used} --ntasks={3 * used} " in call
    assert read_json(stage.run.attempt(1) / "start.json")["world"] == str(3 * used)
    assert stage.end()["cause"] == "crash"


def test_script_of_run_with_spare_starts_agents_on_all_nodes():
    job = replace(JOB, resources=JobResources(2, 3, 0, 1, 1.0, spares=1, usable=(2,)))
    lines = script(ClusterProfile(name="x", kind="slurm", agents=True), job).splitlines()
    assert "#SBATCH --no-kill" in lines and "#SBATCH --nodes=3" in lines
    assert any(line.startswith("for nodes in 2; do") for line in lines)
    (agents,) = [line for line in lines if "FLIP_AGENTS=1 start_step" in line]
    all_nodes = '--nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1'
    assert f"start_step {all_nodes} --cpus-per-task=3 --wait=0 --no-kill " in agents
    (ranks,) = [line for line in lines if line.strip().startswith("start_step --cpus-per-task=1")]
    assert "--wait=120" in ranks and '(exec srun "${size[@]}" "$@")' in "".join(lines)
    (command,) = [line for line in lines if line.startswith("srun ")]
    assert "--wait" not in command


def test_script_excludes_node_that_starts_no_rank(stage):
    """Such a node need not be the first of the job. The ranks that wait for it are killed, so their exit codes say
    nothing about the cause."""
    stage.commands("srun", "echo 'srun: error: n2: tasks 4-7: Exited with exit code 127' >&2; exit 137")
    assert stage.start(SLURM_JOB_NUM_NODES="4").wait(60) == 137
    assert (stage.end()["cause"], stage.end()["action"], stage.end()["exclude"]) == ("node", "requeue", ["n2"])
    assert "scontrol update JobId=57_1 ExcNodeList=n2" in stage.commands.calls()


@pytest.mark.parametrize(
    "before, comment, after",
    [
        ("(null)", "(null)", "n7"),
        ("node07,node08", "(null)", "node07,node08,n7"),
        ("n3", "away:1:-1:0:127:n3", "n7"),
        ("node07,n3,n4", "away:2:-1:0:127:n3", "node07,n4,n7"),
        ("n3,n33", "away:2:-1:0:127:n3", "n33,n7"),
    ],
)
def test_broken_node_replaces_previous_broken_node_in_excluded_nodes(stage, before, comment, after):
    """Excluded nodes of the profile and nodes with broken hardware stay excluded.

    The comment names the broken node that requeued the job last; only the last such node is excluded.
    """
    job = f"printf '   ReqNodeList=(null) ExcNodeList={before}\\n   Comment={comment} \\n'"
    stage.commands("scontrol", f"case $2 in job) {job};; hostnames) echo $3 | tr , '\\n';; esac")
    shutil.rmtree(stage.folder)
    assert stage.start(SLURMD_NODENAME="n7").wait(60) == 1
    (update,) = [call for call in stage.commands.calls() if "ExcNodeList=" in call]
    assert update.rpartition(" ")[2] == f"ExcNodeList={after}"


@pytest.mark.parametrize(
    "nodes, before, excludes",
    [
        ("n7|idle", "(null)", False),
        ("n7|idle n8|idle", "(null)", True),
        ("n7|mixed n8|drained n9|down*", "(null)", False),
        ("n7|idle n8|idle", "n8", False),
        ("n7|idle n7|idle n8|allocated n8|allocated", "n9", True),
    ],
)
def test_broken_node_is_excluded_only_if_another_node_works(stage, nodes, before, excludes):
    job = f"   ReqNodeList=(null) ExcNodeList={before}"
    stage.commands("scontrol", f"case $2 in hostnames) echo $3 | tr , '\\n';; job) echo '{job}';; esac")
    stage.commands("sinfo", f"echo '{nodes}' | tr ' ' '\\n'")
    shutil.rmtree(stage.folder)
    assert stage.start(SLURMD_NODENAME="n7", SLURM_JOB_PARTITION="small").wait(60) == 1
    excluded = f"scontrol update JobId=57_1 ExcNodeList={'' if before == '(null)' else before + ','}n7"
    assert (excluded in stage.commands.calls()) == excludes and "scontrol requeue 57_1" in stage.commands.calls()
    assert "sinfo -h -N -p small -o %N|%T" in stage.commands.calls()


@pytest.mark.parametrize("what", ["folder", "interpreter"])
def test_broken_node_requeues_job_and_excludes_itself(stage, what):
    """Such a node would be idle again at once, and Slurm would send it the next array element."""
    if what == "folder":
        shutil.rmtree(stage.folder)
    else:
        stage.script.write_text(stage.script.read_text().replace(sys.executable, "/nowhere/python"))
    assert stage.start(SLURMD_NODENAME="n7").wait(60) == (1 if what == "folder" else 127)
    failure = 1 if what == "folder" else 127
    assert stage.commands.calls() == [
        "scontrol show job 57_1",
        f"scontrol update JobId=57_1 Comment=away:1:0:0:{failure}:n7",
        "sinfo -h -N -p gpu -o %N|%T",
        "scontrol show hostnames n7",
        "scontrol show job 57_1",
        "scontrol requeue 57_1",
        "scontrol update JobId=57_1 ExcNodeList=n7",
    ]
    assert stage.run.newest_attempt() == 0


@pytest.mark.parametrize(
    "what, requeues, updated",
    [("silent", 9, True), ("started again", 0, False), ("answer lost", 1, True), ("refused", 20, False)],
)
def test_broken_node_retries_requeue_until_slurm_answers(stage, tmp_path, what, requeues, updated):
    """A node without network reaches neither files nor the controller until its network is back."""
    shutil.rmtree(stage.folder)
    stage.commands("sleep", "")
    tries = f"$(grep -c 'scontrol requeue' {tmp_path}/calls)"
    show_command = {
        "silent": f"[ {tries} -eq 0 ] && echo JobId=58",
        "started again": "echo Restarts=1 Batch",
        "answer lost": f"echo Restarts={tries} Batch",
        "refused": "echo Restarts=0 Batch",
    }[what]
    show_command = f"[ $(grep -c 'scontrol show' {tmp_path}/calls) -gt 1 ] || exit 1; {show_command}"
    stage.commands(
        "scontrol", f"case $1 in show) {show_command};; requeue) [ {tries} -gt 8 ] && [ {what[0]} = s ];; esac"
    )
    assert stage.start(SLURMD_NODENAME="n7").wait(60) == 1
    calls = stage.commands.calls()
    assert sum(call == "scontrol requeue 57_1" for call in calls) == requeues
    assert ("scontrol update JobId=57_1 ExcNodeList=n7" in calls) == updated


@pytest.mark.parametrize("state, requeued", [("RUNNING", True), ("CANCELLED", False)])
def test_script_requeues_job_if_exit_trap_cannot_start(stage, tmp_path, monkeypatch, state, requeued):
    """The node loses its mount during training. The next `begin` records the end."""
    hooks = tmp_path / "hooks"
    shutil.copytree(ROOT / "jobs", hooks / "jobs")
    shutil.copytree(ROOT / "flip", hooks / "flip")
    job = Job(stage.run, ROOT, JobResources(), {}, host_snapshot=hooks)
    stage.script.write_text(script(ClusterProfile(name="x", kind="slurm"), job, 2, stage.folder, monkeypatch))
    stage.commands("srun", f"mv {hooks} {hooks}.gone; exit 69")
    stage.commands("scontrol", f"[ $1 = show ] && echo 'JobState={state} Restarts=0'; exit 0")
    assert stage.start(SLURMD_NODENAME="n7").wait(60) == 69
    assert ("scontrol requeue 57_1" in stage.commands.calls()) == requeued
    assert ("scontrol update JobId=57_1 Comment=away:1:0:1:2:n7" in stage.commands.calls()) == requeued
    assert not (stage.run.attempt(1) / "end.json").exists()


@pytest.mark.parametrize("starts, before, again", [(7, 199, 8), (7, 150, 1), (100, 199, 0)])
def test_broken_node_counts_consecutive_failed_starts_without_preemptions(stage, starts, before, again):
    shutil.rmtree(stage.folder)
    stage.commands("scontrol", f"[ $1 = show ] && printf 'JobId=58\\n   Comment=away:{starts}:{before}:12 \\n'; exit 0")
    assert stage.start(SLURMD_NODENAME="n7", SLURM_RESTART_COUNT="200").wait(60) == 1
    changes = [call for call in stage.commands.calls() if "show" not in call and "sinfo" not in call]
    assert changes[:1] == ([f"scontrol update JobId=57_1 Comment=away:{again}:200:12:1:n7"] if again else [])
    assert len(changes) == (3 if again else 0), "the number of retries is limited"


@pytest.mark.long
@pytest.mark.parametrize("hours", [0, 24])
def test_script_stops_run_after_three_timeouts_unless_limit_was_lowered(stage, hours):
    """Slurm reports the present limit, and when a job was preempted. A run whose limit was 24 hours at its submission
    goes on, as after preemptions: each start waits longer."""
    write_json(stage.run.path / "job.json", {"token": "77aa77aa", "after": 0, "shape": {"hours": hours}})
    job_fields = "JobState=RUNNING Restarts={} RunTime=00:00:50 TimeLimit=00:01:00 PreemptTime={}"
    stage.commands("srun", "exit 75")
    for n, preempted in ((1, "2026-11-25T09:24:14"), (2, "None"), (3, "None"), (4, "None")):
        stage.commands("scontrol", f"[ $1 = show ] && echo '{job_fields.format(n - 1, preempted)}'; exit 0")
        assert stage.start(SLURM_RESTART_COUNT=str(n - 1)).wait(60) == 75
        assert stage.end(n)["cause"] == ("stopped" if n == 1 or hours else "timeout")
    if hours:
        assert (stage.end(4)["action"], stage.end(4)["delay"]) == ("requeue", 120.0)
        assert stage.end(4)["reason"].endswith("its wall limit was lowered from 24 h to 60 s")
        return
    assert stage.end(4)["action"] == "stop" and "the wall limit of 60 s passed" in stage.end(4)["reason"]


@pytest.mark.parametrize("what, requeued", [("sweep", False), ("root", True), ("code", True)])
def test_job_ends_if_sweep_was_deleted_but_not_if_it_is_out_of_reach(stage, tmp_path, monkeypatch, what, requeued):
    """A node that does not mount the runs root has an empty folder in its place, with another inode."""
    root = stage.run.path.parent.parent / "runs"
    stage.run.path.parent.rename(tmp_path / "gone")
    root.mkdir()
    (tmp_path / "gone").rename(root / "demo")
    folder = root / "demo" / ".slurm" / "77aa77aa"
    job = Job(RunDir(root / "demo" / "run with space"), ROOT, JobResources())
    stage.script.write_text(script(ClusterProfile(name="x", kind="slurm"), job, 2, folder, monkeypatch))
    if what == "code":
        stage.script.write_text(stage.script.read_text().replace(f"{ROOT}/jobs/host", "/nowhere/jobs/host"))
    else:
        shutil.rmtree(root / "demo")
    if what == "root":
        root.rename(tmp_path / "mounted elsewhere")
        root.mkdir()
    assert stage.start().wait(60) == {"sweep": 78, "root": 1, "code": 2}[what]
    assert ("scontrol requeue 57_1" in stage.commands.calls()) == requeued


@pytest.mark.parametrize("what", ["begin", "end"])
def test_batch_hooks_requeue_job_if_disk_and_logs_are_full(stage, what):
    """Error messages cannot be written either."""
    file = stage.run.path / "job.json"
    command = [sys.executable, "-c", FULL, str(stage.run.path), what, *(["--attempt", "1"] if what == "end" else [])]
    stage.run.start_attempt({})
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=full, env={**os.environ, "SLURM_JOB_ID": "58"}, timeout=60)
    assert done.returncode == 69 and "scontrol requeue 58" in stage.commands.calls(), file
    assert f"scontrol update JobId=58 Comment=away:1:0:{int(what == 'end')}:69:" in stage.commands.calls()


FULL = """
import errno, sys
from flip.runs import attempts as ledger
from jobs.host import batch_hooks as requeue
def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")
ledger.start_attempt = ledger.end_attempt = full
requeue.RETRY_SECONDS = 0.0
sys.exit(requeue.main([sys.argv[2], sys.argv[1], *sys.argv[3:]]))
"""


@pytest.mark.long
def test_exit_trap_records_storage_cause_if_disk_is_full(tmp_path, small_disk):
    """The ranks could not write their causes either, and their exit codes alone would mean a crash."""
    run = RunDir(small_disk / "sweep" / "run")
    run.start_attempt({})
    filler = small_disk / "filler"
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    command = [
        sys.executable,
        ROOT / "jobs" / "host" / "batch_hooks.py",
        "end",
        run.path,
        "--code",
        "70",
        "--state",
        "RUNNING",
    ]
    environment = {**os.environ, "SLURM_JOB_ID": ""}
    trap = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert "No space left on device" in trap.stderr.readline()
    filler.unlink()
    decision = json.loads(trap.communicate(timeout=60)[0])
    assert (decision["cause"], decision["action"], decision["delay"]) == ("storage", "requeue", 30.0)
    assert decision["reason"].startswith("the exit trap: [Errno 28] No space left on device")


@pytest.mark.long
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.sh")), ids=lambda path: path.stem)
def test_shellcheck_reports_no_problems_in_golden_scripts(path):
    # SC1091: /etc/profile belongs to the node and is not checked here
    done = subprocess.run([require_shellcheck(), "--exclude=SC1091", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_profile_python_defaults_to_submitting_interpreter():
    assert ClusterProfile().jobs_python == ClusterProfile().hosts_python == sys.executable
    boxed = ClusterProfile(container="x.sif")
    assert (boxed.jobs_python, boxed.hosts_python) == ("python3", "python3")


@pytest.mark.parametrize("line", ['partition: "gpu\\nrm"', 'options: {mem: "1\\r2"}', 'container_mounts: ["/a\\n/b"]'])
def test_profile_refuses_control_characters(tmp_path, line):
    (tmp_path / "bad.yaml").write_text(f"kind: slurm\n{line}\n")
    with pytest.raises(ConfigError, match=f"{line.partition(':')[0]}: a control character"):
        load_profile(str(tmp_path / "bad.yaml"))
