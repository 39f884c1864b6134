"""Tests of the batch script: its text against golden files, its protocol in a real bash with stand-ins for Slurm."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from flip.runs.errors import ConfigError
from flip.runs.rundir import RunDir, read_json, write_json
from jobs.common.cluster_profile import ClusterProfile, load_profile
from jobs.common.job import Job, JobResources
from jobs.slurm import batch_script
from jobs.slurm.site import rejection
from tests.harness.job_records import write_job
from tests.jobs.slurm import golden_scripts
from tests.jobs.slurm.batch_stage import JOB, ROOT, script
from tests.slurm_site import require_shellcheck


def test_script_of_evaluation_differs_from_training_by_its_places_and_module(monkeypatch):
    profile = ClusterProfile(
        name="a", kind="slurm", container="/img/torch.sif", container_runtime="apptainer", python="/py"
    )
    place = "/runs/demo/.evaluate"
    evaluation = replace(JOB, run=RunDir(f"{place}/a-1126-0000"), module="jobs.evaluator")
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


def test_requests_count_threads_where_slurm_does(monkeypatch):
    one, two = (
        script(ClusterProfile(kind="slurm", threads_per_core=threads, agents=True), monkeypatch=monkeypatch)
        for threads in (1, 2)
    )
    assert re.findall("--cpus-per-task=([0-9]+)", one) == ["12", "96", "12"]
    assert re.findall("--cpus-per-task=([0-9]+)", two) == ["24", "192", "24"], "job, node agents, ranks"
    assert re.sub("(--cpus-per-task)=[0-9]+", r"\1", one) == re.sub("(--cpus-per-task)=[0-9]+", r"\1", two)


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
    assert json.loads(output[1])["do"] == "requeue" and output[2] == "requeued"
    assert (stage.run.logs / "latest").resolve() == (stage.run.logs / "1").resolve()


def test_job_of_complete_run_ends_well_although_its_srun_was_killed(stage):
    """It outlived its ranks: jobs/host/rank_step.py. The record keeps the code."""
    stage.commands("srun", 'echo "{}" > "$FLIP_RUN/result.json"; kill -9 $$')
    assert stage.start().wait(60) == 0
    assert (stage.end()["code"], stage.end()["cause"]) == (137, "complete")


def test_host_hooks_run_from_newly_submitted_code(stage, tmp_path, monkeypatch):
    """A continued run keeps its older code, whose job.py may have other options."""
    old = tmp_path / "old"
    (old / "jobs" / "host").mkdir(parents=True)
    for name in ("host/job.py", "host/rank_entry.py"):
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
    assert env["FLIP_FOLLOWS"] == "1" and not {"FLIP_RUN", "FLIP_ATTEMPT", "SLURM_JOB_ID"} & env.keys()
    for restarts, attempt in (("", 2), ("", 2), ("1", 3)):  # successor, second successor, requeued first job
        restart_env = {}
        if restarts:
            restart_env = {"SLURM_RESTART_COUNT": restarts}
        stage.start(SLURM_ARRAY_JOB_ID="99", SLURM_JOB_ID="99", FLIP_FOLLOWS="1", **restart_env).wait(60)
        assert stage.run.newest_attempt() == attempt


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
        write_job(stage.run, token="99bb99bb")
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


def test_script_excludes_node_that_starts_no_rank(stage):
    """Such a node need not be the first of the job. The ranks that wait for it are killed, so their exit codes say
    nothing about the cause."""
    stage.commands("srun", "echo 'srun: error: n2: tasks 4-7: Exited with exit code 127' >&2; exit 137")
    assert stage.start(SLURM_JOB_NUM_NODES="4").wait(60) == 137
    assert (stage.end()["cause"], stage.end()["action"], stage.end()["exclude"]) == ("node", "requeue", ["n2"])
    assert "scontrol update JobId=57_1 ExcNodeList=n2" in stage.commands.calls()


@pytest.mark.long
@pytest.mark.parametrize("hours", [0, 24])
def test_script_stops_run_after_three_timeouts_unless_limit_was_lowered(stage, hours):
    """Slurm reports the present limit, and when a job was preempted. A run whose limit was 24 hours at its submission
    goes on, as after preemptions: each start waits longer."""
    write_job(stage.run, token="77aa77aa", shape={"processes": 1, "hours": hours})
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
def test_owner_records_storage_cause_if_disk_is_full(tmp_path, small_disk):
    """The ranks could not write their causes either, and their exit codes alone would mean a crash."""
    run = RunDir(small_disk / "sweep" / "run")
    run.path.mkdir(parents=True)
    write_job(run)
    filler = small_disk / "filler"
    script_path = tmp_path / "script"
    script_path.write_text(f"cat /dev/zero > {filler}; exit 70")
    owner = [sys.executable, ROOT / "jobs" / "host" / "job.py", run.path, "--script", script_path]
    environment = {**os.environ, "SLURM_JOB_ID": ""}
    process = subprocess.Popen(owner, stderr=subprocess.PIPE, text=True, env=environment)
    assert "No space left on device" in process.stderr.readline()
    filler.unlink()
    process.communicate(timeout=60)
    end = read_json(run.attempt(1) / "end.json")
    assert (end["cause"], end["action"], end["delay"]) == ("storage", "requeue", 30.0)
    assert end["reason"].startswith("the owner of the job: [Errno 28] No space left on device")


@pytest.mark.long
@pytest.mark.parametrize("name", golden_scripts.names())
def test_shellcheck_reports_no_problems_in_golden_scripts(tmp_path, name):
    path = tmp_path / f"sbatch-{name}.sh"
    path.write_text(golden_scripts.golden_script(name))
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
