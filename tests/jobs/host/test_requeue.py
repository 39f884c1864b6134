"""Tests of requeues and successors, with stub commands on PATH; tests/slurm/test_requeue.py uses the real commands."""

import os
import subprocess

import pytest

from flip.runs.rundir import RunDir
from jobs.host import failed_starts, own_job, requeue, slurm_cli
from tests.jobs.host.scontrol_answers import NODES, show


def test_requeue_sets_start_time_and_excluded_nodes_afterwards(commands):
    commands("sinfo", NODES)
    commands(
        "scontrol", f"[ $2 = hostnames ] && echo $3 | tr , ' '\n[ $2 = job ] && {{ {show(out='n[1-2]')}\n}}; exit 0"
    )
    assert requeue.requeue("50_3", 0) == "requeued"
    result = requeue.requeue("50_3", 0, delay=30.4, exclude=("n9", "n4"))
    assert result == "requeued StartTime=now+30 ExcNodeList=n9,n4"
    assert [line for line in commands.calls() if "show" not in line] == [
        "scontrol requeue 50_3",
        "sinfo -h -N -p gpu -o %N|%T",
        "scontrol requeue 50_3",
        "scontrol update JobId=50_3 StartTime=now+30 ExcNodeList=n9,n4",
    ]


def test_requeue_retries_during_outage_and_leaves_ended_jobs_alone(commands, naps, tmp_path, monkeypatch):
    away = tmp_path / "away"
    away.write_text("xx")
    commands("scontrol", f"[ $1 = show ] && exit 1\nif [ -s {away} ]; then truncate -s -1 {away}; exit 1; fi")
    assert requeue.requeue("57", 0) == "requeued" and naps == [1.0, 2.0]
    away.write_text("xxxxxxxx")
    with monkeypatch.context() as patch, pytest.raises(slurm_cli.SlurmUnavailable):
        patch.setattr(slurm_cli, "OUTAGE_SECONDS", 0.0)  # silence has its own time limit
        requeue.requeue("57", 0)
    commands("scontrol", f"[ $1 = requeue ] && exit 1\n{show()}")
    with monkeypatch.context() as patch, pytest.raises(slurm_cli.SlurmUnavailable):
        patch.setattr(slurm_cli, "RETRY_SECONDS", 0.0)
        requeue.requeue("57", 0)
    for fields, state in (({"state": "COMPLETING"}, "CANCELLED"), ({"state": "PENDING"}, "PENDING")):
        before = len(commands.calls())
        commands("scontrol", show(**fields))
        assert requeue.requeue("57", 0) == f"left alone: it is {state}"
        assert [call.split()[1] for call in commands.calls()[before:]] == ["show"], "requeue is not called"


def test_requeue_retries_refusal_after_long_silence(commands, slept, tmp_path):
    """A controller that comes back may answer one call and not the next."""
    tries = f"$(grep -c requeue {tmp_path}/calls)"
    commands("scontrol", f"[ $1 = requeue ] && exit $(({tries} < 42))\n[ {tries} -lt 40 ] && exit 1\n{show()}")
    assert requeue.requeue("57", 0) == "requeued" and slept[-1] > 2 * slurm_cli.RETRY_SECONDS
    refuses = f"[ $1 = requeue ] && exit 1\n[ {tries} -lt 80 ] && exit 1\n{show()}"
    commands("scontrol", refuses)
    start = slept[-1]
    with pytest.raises(slurm_cli.SlurmUnavailable):
        requeue.requeue("57", 0)
    # The retries end before the outage timeout.
    assert slurm_cli.RETRY_SECONDS < slept[-1] - start < slurm_cli.OUTAGE_SECONDS


def test_unknown_job_is_given_up_long_before_outage_timeout(commands, slept):
    """This happens if a node loses its connection while its job is preempted, or if the controller loses its state."""
    commands("scontrol", "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1")
    with pytest.raises(slurm_cli.SlurmUnavailable):
        slurm_cli.call_with_retry("scontrol", "show", "job", "57", patience=slurm_cli.OUTAGE_SECONDS)
    assert slept[-1] == 31.0
    with pytest.raises(slurm_cli.NoSuchJob):
        requeue.requeue("57", 0)
    assert slept[-1] < 31.0 + 2 * slurm_cli.UNKNOWN_JOB_SECONDS
    assert own_job.job_state("57", 0) == "UNSEEN", "an unknown job counts as an answer"


def test_requeue_of_ending_job_tries_first_and_uses_short_deadlines(commands, naps, tmp_path, monkeypatch):
    """Only 30 seconds pass between TERM and KILL: no query comes before the first try, and no call may use them up."""
    calls = []
    real = slurm_cli.call
    monkeypatch.setattr(
        slurm_cli, "call", lambda *argv, **options: calls.append((argv[1], options)) or real(*argv, **options)
    )
    tries = f"$(grep -c requeue {tmp_path}/calls)"
    commands("scontrol", f"[ $1 = requeue ] && exit $(({tries} < 4))\n{show(state='TIMEOUT')}")
    assert requeue.requeue("57", 0, ending=True) == "requeued"
    assert [subcommand for subcommand, _ in calls] == ["requeue", "show"] * 3 + ["requeue"] and naps == [1.0] * 3
    assert all(options["deadline"] == slurm_cli.SHORT_DEADLINE for _, options in calls)


def test_requeue_sets_delay_and_nodes_if_answer_was_lost(commands, naps, tmp_path):
    """Otherwise unavailable storage would be retried at once, and on the broken node."""
    done = tmp_path / "done"
    commands("sinfo", NODES)
    commands("scontrol", "[ $2 = hostnames ] && { echo $3; exit; }\n"
             f"[ $1 = requeue ] && {{ touch {done}; exit 1; }}\n"
             f"[ $1 = show ] && {{ [ -e {done} ] && {{ {show(state='PENDING', restarts=1)}\n}} || {{ {show()}\n}}; }}\n"
             "exit 0")  # fmt: skip
    assert requeue.requeue("57", 0, delay=1800, exclude=("n4",)) == "requeued StartTime=now+1800 ExcNodeList=n4"
    assert [call.split()[1] for call in commands.calls()].count("requeue") == 1
    assert "scontrol update JobId=57 StartTime=now+1800 ExcNodeList=n4" in commands.calls()


def test_requeue_leaves_job_alone_if_it_restarted_since(commands):
    """Its node was unreachable for too long; since then Slurm has restarted the job elsewhere."""
    commands("scontrol", show(state="RUNNING", restarts=1))
    assert requeue.requeue("57", 0) == "left alone: it is PENDING"


SCRIPT = "#!/bin/bash\n#SBATCH --hold\n#SBATCH --array=0-3%2\necho '#SBATCH --hold'\n"


SHOWN = "JobId=60 JobState={state} Restarts=0 Partition=gpu NumNodes=1\n   Comment={comment}\n   ExcNodeList={out} n1\n"


@pytest.fixture
def slurm(commands, tmp_path, monkeypatch):
    """``slurm(...)`` writes stub commands. sbatch stores its script in tmp_path / given, its environment in env."""
    for name, value in {"SLURM_JOB_ID": "60", "SLURM_ARRAY_JOB_ID": "57", "SLURM_ARRAY_TASK_ID": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_JOB_NAME", "demo.77aa")
    (tmp_path / "script").write_text(SCRIPT)

    def make(state="RUNNING", comment="", out="(null)", queue="demo.77aa|3|57_3|RUNNING|n1|None", sbatch=""):
        (tmp_path / "shown").write_text(SHOWN.format(state=state, comment=comment, out=out))
        commands("squeue", f"echo '{queue}'")
        answers = f"job) cat {tmp_path}/shown;; hostnames) echo $3 | tr , ' ';; batch_script) cat {tmp_path}/script;;"
        commands("scontrol", f"case $2 in {answers} *) exit 1;; esac")
        commands("sinfo", NODES)
        commands("sbatch", sbatch or f"cat > {tmp_path}/given; env > {tmp_path}/env; echo '99;far'")

    make.sbatch = lambda: [call for call in commands.calls() if call.startswith("sbatch")]
    make()
    return make


@pytest.mark.parametrize(
    "nodes, present, exclude, updated",
    [
        ("n1 n2 n3", "(null)", ("n1",), " ExcNodeList=n1"),
        ("n1 n2 n2", "(null)", ("n1",), ""),
        ("n1 n2", "n9", ("n1", "n2"), ""),
        ("n1 n2", "n1", (), " ExcNodeList="),
        ("n1 n2", "(null)", (), ""),
        ("n1 n2 n3", "n1", ("n1",), ""),
        ("n1 n2 n3|drained n4|down*", "(null)", ("n1",), ""),
    ],
)
def test_requeue_leaves_enough_nodes_and_frees_others(commands, nodes, present, exclude, updated):
    """The job needs two nodes; Slurm would hold one that excludes too many for ever."""
    fields = f"JobState=RUNNING Restarts=0 Partition=gpu NumNodes=2 ExcNodeList={present}"
    commands("scontrol", f"case $2 in hostnames) echo $3 | tr , ' ';; job) echo '{fields}';; esac")
    lines = [node if "|" in node else f"{node}|idle" for node in nodes.split()]
    commands("sinfo", "printf '%s\\n' " + " ".join(f"'{line}'" for line in lines))
    assert requeue.requeue("57", 0, exclude=exclude) == f"requeued{updated}"


def test_no_node_is_excluded_if_sinfo_fails(commands, naps, tmp_path):
    """A job that excludes too many nodes of its partition would never start; sinfo is tried again before that."""
    commands("scontrol", f"case $2 in hostnames) echo $3;; job) {show()}\n;; esac")
    commands("sinfo", f"echo >> {tmp_path}/asked; [ $(wc -l < {tmp_path}/asked) -gt 2 ] && {NODES}")
    assert requeue.requeue("57", 0, exclude=("n4",)) == "requeued ExcNodeList=n4" and naps == [1.0, 5.0]
    commands("sinfo", "exit 1")
    assert requeue.requeue("57", 0, delay=60, exclude=("n4",)) == "requeued StartTime=now+60"
    before_requeue = [call for call in commands.calls() if not call.startswith("sinfo")][-3:]
    assert before_requeue[0] == "scontrol show job 57", "a job that was cancelled meanwhile is not requeued"


def test_submit_successor_submits_same_script_for_own_array_element(slurm, tmp_path):
    result = requeue.submit_successor("57_3", 0, 4)
    assert result == "requeue is disabled for this job; submitted its successor 99"
    assert slurm.sbatch() == ["sbatch --parsable --dependency=afterany:57_3 --array=3"]
    assert (tmp_path / "given").read_text() == SCRIPT.replace("#SBATCH --hold\n", "", 1), "the successor is not held"


def test_submit_successor_passes_on_delay_nodes_and_failed_starts(slurm):
    slurm(comment="away:7:0:4", out="n[8-9]")
    requeue.submit_successor("57_3", 0, 4, delay=59.6, exclude=("n3", "n2"))
    options = "--begin=now+60 --exclude=n3,n2 --comment=away:7:-1:4:0:"
    assert slurm.sbatch() == [f"sbatch --parsable --dependency=afterany:57_3 --array=3 {options}"]
    requeue.submit_successor("57_3", 0, 4)
    assert "--exclude=n[8-9]" in slurm.sbatch()[-1], "those of the job, of its profile for instance"


def test_submit_successor_passes_on_failed_starts_that_own_comment_lacks(slurm):
    """Slurm changes no comment of a job whose batch script was killed, because it has ended."""
    slurm(comment="away:7:4:4")
    requeue.submit_successor("57_3", 5, None, failed=failed_starts.FailedStarts(8, 4, 137, "n3"))
    requeue.submit_successor("57_3", 5, None)
    calls = slurm.sbatch()
    assert calls[0].endswith("--comment=away:8:-1:4:137:n3") and "--comment" not in calls[1]


@pytest.fixture(params=["gone", "other"])
def parent(request):
    """The parent's pid after the batch script was killed: 0, or another process. The hook's own environment counts."""
    if request.param == "gone":
        yield 0
        return
    with subprocess.Popen(["sleep", "60"], env={"PATH": os.environ["PATH"]}) as other:
        yield other.pid
        other.kill()


def test_submit_successor_passes_on_environment_without_job_variables(slurm, tmp_path, monkeypatch, parent):
    monkeypatch.setattr(slurm_cli.os, "getppid", lambda: parent)
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("OWN_NAME", "kept")
    requeue.submit_successor("57_3", 0, 4)
    env = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line)
    assert {name for name in env if name.startswith("SLURM")} == {"SLURM_CONF"}
    assert (env["OWN_NAME"], env["FLIP_FOLLOWS"]) == ("kept", "4")


def test_submit_successor_submits_nothing_if_successor_exists(slurm):
    slurm(queue="demo.77aa|3|61_3|PENDING||Dependency")
    assert requeue.submit_successor("57_3", 0, 4) == "left alone: job 61_3 continues its run"
    assert slurm.sbatch() == []


@pytest.mark.parametrize("state", ["RUNNING", "CANCELLED"])
def test_submit_successor_does_not_retry_refusal(slurm, state):
    slurm(
        state=state, sbatch="echo 'sbatch: error: Batch job submission failed: QOSMaxSubmitJobPerUserLimit' >&2; exit 1"
    )
    if state == "CANCELLED":
        assert requeue.submit_successor("57_3", 0, 4) == "left alone: it is CANCELLED"
        return
    with pytest.raises(slurm_cli.SlurmUnavailable, match="QOSMaxSubmitJobPerUserLimit"):
        requeue.submit_successor("57_3", 0, 4)
    assert len(slurm.sbatch()) == 1


@pytest.mark.parametrize("text", ["Socket timed out on send/recv operation", "Zero Bytes were transmitted or received"])
def test_submit_successor_retries_request_without_answer_although_slurm_answers_again(slurm, slept, text):
    slurm(
        sbatch="echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2; exit 1"
    )
    with pytest.raises(slurm_cli.SlurmUnavailable, match="timed out"):
        requeue.submit_successor("57_3", 0, 4)
    assert len(slurm.sbatch()) > 5 and slept[-1] <= slurm_cli.RETRY_SECONDS


def test_submit_successor_retries_while_slurm_is_silent(slurm, commands, monkeypatch):
    naps = []

    def nap(seconds):
        naps.extend([seconds] if seconds >= 1 else [])  # without the short waits for the end of a command
        if seconds == 2:
            slurm()

    monkeypatch.setattr(slurm_cli.time, "sleep", nap)
    commands("squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    commands("scontrol", "exit 1")
    assert requeue.submit_successor("57_3", 0, 4).endswith("successor 99") and naps == [1.0, 2.0]


@pytest.mark.parametrize(
    "environ, jobs, over",
    [({}, "57 58", False), ({"FLIP_FOLLOWS": "1"}, "57", False), ({"FLIP_FOLLOWS": "1"}, "57 58", True),
     ({"FLIP_FOLLOWS": "1", "SLURM_RESTART_COUNT": "1"}, "57 58", False),
     ({"FLIP_FOLLOWS": "1"}, "57 57", False), ({"FLIP_FOLLOWS": "1"}, "57 57 58", True)],
)  # fmt: skip
def test_superseded_detects_attempt_of_another_job_at_first_start_of_successor(environ, jobs, over, tmp_path):
    """The predecessor may have restarted in its job after the attempt that the successor knows."""
    run = RunDir(tmp_path)
    for job in jobs.split():
        run.start_attempt({"job": job})
    assert requeue.superseded(run, environ) is over
