"""Tests that the batch hooks query Slurm until it answers, and never guess the cause of an attempt's end."""

import errno

import pytest

from flip.runs.rundir import RunDir, read_json, write_json
from jobs.host import batch_hooks, requeue, slurm_cli
from tests.jobs.act import act
from tests.jobs.host.scontrol_answers import show

SILENT = "exit 1"
NONE = "[ $1 = show ] && echo 'JobState=RUNNING Restarts=1'; exit 0"
END = {"committed": False, "delay": 0.0, "exclude": [], "time": 1.0}
AWAY = "[ $1 = show ] && printf 'JobState=RUNNING Restarts=1\\n Comment=away:1:0:1 \\n'; exit 0"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose job has restarted; its first attempt has no end."""
    run = RunDir(tmp_path / "sweep" / "run")
    run.path.mkdir(parents=True)
    write_json(run.path / "job.json", {"token": "t", "after": 0})
    run.start_attempt({"resumes_from": 0, "after": 0})
    for name, value in {"SLURM_JOB_ID": "57", "SLURM_RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(slurm_cli.time, "sleep", lambda seconds: None)
    return run


def causes(run):
    return [(read_json(run.attempt(n) / "end.json") or {}).get("cause") for n in run.attempt_numbers()]


def test_open_attempt_is_ended_by_end_hook_if_slurm_was_silent_at_start(run, commands, capsys):
    """The node has no connection to Slurm. The end of attempt 1 could not be written to storage."""
    commands("scontrol", SILENT)
    assert act("begin", run.path, "--token", "t") == 0
    assert causes(run) == [None, None] and "Slurm does not say how the last attempt ended" in capsys.readouterr().err
    commands("scontrol", AWAY)
    assert act("end", run.path, "--attempt", "2", "--code", "70") == 0
    assert causes(run) == ["storage", "crash"]


def test_open_attempt_is_ended_by_next_start_if_slurm_was_silent_at_start(run, commands):
    commands("scontrol", SILENT)
    act("begin", run.path)
    commands("scontrol", AWAY)
    act("begin", run.path)
    assert causes(run) == ["storage", "node", None]


@pytest.mark.parametrize("said, cause", [(NONE, "node"), (AWAY, "storage")])
def test_open_attempt_is_ended_at_start_if_slurm_answers(run, commands, said, cause):
    commands("scontrol", said)
    act("begin", run.path)
    assert causes(run) == [cause, None]


def test_next_start_avoids_node_whose_batch_shell_was_killed_before_an_attempt(run, commands, monkeypatch):
    """As a node whose `begin` was killed, which the batch script notices."""
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    job = "echo 'JobState=RUNNING Restarts=1 Partition=gpu NumNodes=1 ExcNodeList=n4'"
    commands("scontrol", f"case $2 in job) {job};; hostnames) echo $3 | tr , '\\n';; esac")
    commands("sinfo", "printf 'n%s|idle\\n' 4 7 8")
    assert batch_hooks.on_shell_gone(batch_hooks.OwnAttempt(run)) == 0
    changes = [call for call in commands.calls() if "show" not in call and "sinfo" not in call]
    comment, requeued, update = (call.split(" ", 2)[2] for call in changes)
    assert (comment, requeued, update) == ("JobId=57 Comment=away:1:1:0:137:n7", "57", "JobId=57 ExcNodeList=n4,n7")


def test_successor_starts_again_after_its_start_could_not_be_recorded(run, commands, monkeypatch, capsys):
    """The attempt that it has won before the error is not that of another job."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    monkeypatch.setenv(requeue.FOLLOWS, "1")
    commands("scontrol", NONE)
    open_logs = RunDir.open_logs
    errors = [OSError(errno.ENOSPC, "No space left on device")]

    def fail_once(self, n):
        if errors:
            raise errors.pop()
        return open_logs(self, n)

    monkeypatch.setattr(RunDir, "open_logs", fail_once)
    assert act("begin", run.path) == 0 and capsys.readouterr().out == "3\n"


def test_refused_requeue_cancels_held_jobs_and_notifies(run, commands, slept, monkeypatch):
    settled = []
    monkeypatch.setattr(batch_hooks, "settle_canary", lambda run, action: settled.append(action))
    monkeypatch.setattr(batch_hooks, "send_notification", lambda run, action: settled.append(f"notified of {action}"))
    commands("scontrol", "[ $1 = show ] && echo 'JobState=RUNNING Restarts=1' || { echo 'refused' >&2; exit 1; }")
    act("end", run.path, "--attempt", "1", "--code", "75", "--state", "RUNNING")
    assert settled == ["stop", "notified of stop"]
    assert read_json(run.attempt(1) / "end.json")["reason"].startswith("the requeue was refused (")


def test_repeated_preemptions_are_delayed_although_slurm_requeues_by_itself(run, commands):
    commands("scontrol", "[ $1 = show ] && echo 'JobState=PENDING Restarts=1' || exit 0")
    for n in range(2, 6):
        act("end", run.path, "--attempt", str(n - 1), "--code", "75", "--state", "PENDING")
        assert run.start_attempt({"resumes_from": 0, "after": 0}) == n
    delays = [call for call in commands.calls() if "StartTime" in call]
    end = read_json(run.attempt(4) / "end.json")
    assert end["action"] == "nothing" and delays[-1] == f"scontrol update JobId=57 StartTime=now+{end['delay']:g}"
    assert 0 < len(delays) < 4, "the first preemptions are not delayed"


def test_job_comment_is_written_before_requeue_after_slurm_outage(run, commands, slept, tmp_path, monkeypatch):
    """The outage outlasts the query of earlier failed starts; the comment is still written before the requeue."""
    monkeypatch.setattr(batch_hooks, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(slurm_cli, "OUTAGE_SECONDS", 100.0)
    call_count = f"$(wc -l < {tmp_path}/calls)"
    log = tmp_path / "heard"
    answers = f"[ $1 = show ] && echo 'JobState=RUNNING Restarts=1' || echo $* >> {log}"
    commands("scontrol", f"[ {call_count} -lt 11 ] && exit 1; {answers}; exit 0")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(batch_hooks, "end", full)
    assert act("end", run.path, "--attempt", "1", "--code", "75") == 69
    assert log.read_text().splitlines() == [
        "update JobId=57 Comment=away:1:1:1:69:",
        "requeue 57",
        "update JobId=57 StartTime=now+1800",
    ]


@pytest.mark.parametrize(
    "started_on, agents, cause", [("3", False, "node"), ("2", False, "crash"), ("3", True, "crash")]
)
def test_node_lost_by_job_that_goes_on_is_no_crash(run, commands, monkeypatch, started_on, agents, cause):
    """With --no-kill, a job with ranks that srun has started stays RUNNING, and its peers end by broken connections.

    With ranks of agents the node may have been a spare one: their coordinator records the end if it was not.
    """
    if agents:
        (run.attempt(1) / "coordinator.json").touch()
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", started_on)
    run.write_cause(1, 0, "crash", 70, "RuntimeError: the connection to rank 1 is broken", host="n1")
    commands("scontrol", show())
    assert act("end", run.path, "--attempt", "1", "--code", "1") == 0
    end = read_json(run.attempt(1) / "end.json")
    assert (end["cause"], end["action"]) == (cause, "requeue") and "scontrol requeue 57" in commands.calls()


@pytest.mark.parametrize("restarts, cause", [("1", "stopped"), ("0", "timeout")])
def test_attempt_that_had_the_rest_of_a_job_has_not_used_its_wall_limit(run, commands, restarts, cause):
    """A node agent started it 15 minutes before the limit of a day; it was asked to stop before its first commit."""
    first = {"resumes_from": 0, "after": 0, "job": "57"}
    write_json(run.attempt(1) / "start.json", {**first, "restarts": restarts, "attempt": 1, "time": 1.0})
    write_json(run.attempt(1) / "end.json", {"attempt": 1, "action": "requeue", "cause": "crash", "reason": "", **END})
    run.start_attempt({**first, "restarts": "1"})
    run.record_stop_request(2, "USR2")
    run.write_cause(2, 0, "stopped", 75, "signal SIGUSR2", signal="SIGUSR2")
    commands("scontrol", show(restarts=1, ran="23:59:30"))
    assert act("end", run.path, "--attempt", "2", "--code", "75") == 0
    assert read_json(run.attempt(2) / "end.json")["cause"] == cause
