"""Tests of what the owner of a job learns from Slurm, by answers of scontrol, and of the steps that it starts."""

import os
import signal
import sys

import pytest

from flip.runs.wall_limit import TimeUsed
from jobs.host import slurm_cli
from jobs.host.failed_starts import FailedStarts
from jobs.host.scheduler import LEFT, JobSeen, SlurmScheduler
from tests.harness.common import wait_until
from tests.jobs.host.scontrol_answers import show

DAY = 86400
TEN_MINUTES = 600


@pytest.fixture
def slurm(commands, monkeypatch):
    """``slurm(restarts, **fields)`` is a scheduler whose Slurm shows these fields of its job."""

    def make(own_restarts=0, more="", **fields):
        monkeypatch.setenv("SLURM_JOB_ID", "53")
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "50")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(own_restarts))
        commands("scontrol", f"case $2 in job) {show(**fields)}\n{more};; hostnames) echo $3 | tr , '\\n';; esac")
        return SlurmScheduler()

    return make


# -- see ---------------------------------------------------------------------------------------------------------------


def test_see_reads_all_that_an_owner_needs_from_one_answer(slurm, commands):
    times = "EligibleTime=2026-11-30T08:00:00 StartTime=2026-11-30T09:00:30"
    more = f"echo ' NodeList=n1,n7 {times} Comment=away:2:0:5:69:n3 '"
    seen = slurm(1, more, restarts=1).see()
    expected = JobSeen(
        state="RUNNING",
        used=TimeUsed(TEN_MINUTES, DAY, over=False, preempted=False),
        limit=DAY,
        seconds_left=float(DAY - TEN_MINUTES),
        queued=3630.0,
        node_list="n1,n7",
        node_count=2,
        failed=FailedStarts(2, 5, 69, "n3"),
        ending="",
    )
    assert seen == expected
    assert seen.is_ours and commands.calls() == ["scontrol show job 50_3"]


@pytest.mark.parametrize(
    "fields, state, ending",
    [
        ({}, "RUNNING", ""),
        ({"state": "SUSPENDED"}, "SUSPENDED", ""),
        ({"state": "CONFIGURING"}, "CONFIGURING", ""),
        ({"state": "STOPPED"}, "STOPPED", ""),
        ({"state": "COMPLETING"}, "CANCELLED", LEFT),
        ({"state": "COMPLETING", "reason": "TimeLimit", "ran": "01:00:00"}, "TIMEOUT", "TIMEOUT"),
        ({"state": "COMPLETING", "ran": "1-00:00:28"}, "TIMEOUT", "TIMEOUT"),
        ({"state": "TIMEOUT"}, "TIMEOUT", "TIMEOUT"),
        ({"state": "COMPLETING", "reason": "NodeDown"}, "NODE_FAIL", "NODE_FAIL"),
        ({"state": "NODE_FAIL"}, "NODE_FAIL", "NODE_FAIL"),
        ({"state": "COMPLETING", "reason": "NodeDown", "restarts": 1}, "PENDING", LEFT),  # requeued by Slurm
        ({"state": "PENDING", "restarts": 1}, "PENDING", LEFT),
        ({"state": "RUNNING", "restarts": 1}, "PENDING", LEFT),  # it runs elsewhere: not this start
        ({"state": "COMPLETING", "preempted": "2026-11-25T09:24:13"}, "PREEMPTED", "PREEMPTED"),
        ({"state": "CANCELLED"}, "CANCELLED", LEFT),
        ({"state": "SOMETHING_NEW"}, "UNSEEN", LEFT),
    ],
)
def test_see_tells_whether_the_job_ends_and_why(slurm, fields, state, ending):
    seen = slurm(**fields).see()
    assert (seen.state, seen.ending) == (state, ending)
    assert seen.is_ours is (state in ("RUNNING", "SUSPENDED"))


@pytest.mark.parametrize(
    "fields, limit, left",
    [
        ({}, DAY, DAY - 600.0),
        ({"limit": "UNLIMITED"}, None, None),
        ({"limit": "Partition_Limit"}, None, None),
        ({"ran": "1-00:00:30"}, DAY, -30.0),
        ({"ran": "INVALID"}, DAY, None),
    ],
)
def test_see_counts_the_time_until_the_limit(slurm, fields, limit, left):
    seen = slurm(**fields).see()
    assert (seen.limit, seen.seconds_left) == (limit, left)


def test_silent_slurm_says_nothing_and_an_unknown_job_is_an_answer(slurm, commands):
    scheduler = slurm()
    commands("scontrol", "exit 1")
    assert scheduler.see() == JobSeen() and scheduler.see().failed is None
    commands("scontrol", "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1")
    assert scheduler.see().state == "UNSEEN"


def test_see_gives_scontrol_its_deadline(slurm, monkeypatch):
    scheduler = slurm()
    deadlines = []
    real = slurm_cli.call
    monkeypatch.setattr(
        slurm_cli, "call", lambda *argv, **options: deadlines.append(options["deadline"]) or real(*argv, **options)
    )
    scheduler.see(5.0)
    assert deadlines == [5.0]


def test_outside_of_a_job_nothing_is_asked_or_restarted(commands, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    commands("scontrol", "exit 1")
    scheduler = SlurmScheduler()
    assert scheduler.see() == JobSeen("UNSEEN", failed=FailedStarts()) and not scheduler.can_restart
    assert commands.calls() == []


# -- nodes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "node_list, own, held",
    [
        ("n1,n7", "n7", {"n1", "n7"}),
        ("n1,n2", "n7", None),  # a list without the node of this process says nothing of others
        ("", "n7", None),
    ],
)
def test_held_nodes_are_those_of_a_list_with_the_own_node(slurm, monkeypatch, node_list, own, held):
    monkeypatch.setenv("SLURMD_NODENAME", own)
    assert slurm().held_nodes(JobSeen("RUNNING", node_list=node_list)) == held


def test_held_nodes_are_unknown_while_slurm_is_silent(slurm, commands, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    scheduler = slurm()
    commands("scontrol", "exit 1")
    assert scheduler.held_nodes(JobSeen("RUNNING", node_list="n1,n7")) is None


def test_failed_node_is_excluded_in_place_of_the_one_before(slurm):
    scheduler = slurm(out="n4,n3")
    scheduler.see()
    assert scheduler.nodes_without("n7", "n3") == ["n4", "n7"]


def test_job_of_this_start_is_requeued_and_delayed(slurm, commands):
    scheduler = slurm()
    assert scheduler.requeue(0.0, None, 1) == "requeued"
    assert scheduler.delay_start(30.0) == ""
    scheduler.note_failed_start(FailedStarts(1, 2, 69, "n7"))
    assert [call for call in commands.calls() if "show" not in call] == [
        "scontrol requeue 50_3",
        "scontrol update JobId=50_3 StartTime=now+30",
        "scontrol update JobId=50_3 Comment=away:1:0:2:69:n7",
    ]


# -- processes ---------------------------------------------------------------------------------------------------------

PROGRAM = """
import os, sys
print("pid", os.getpid(), os.environ["FLIP_ATTEMPT"], sys.stdin.read() == "", flush=True)
print("an error", file=sys.stderr, flush=True)
for line in open("/proc/self/status"):
    if line.startswith("SigIgn"):
        print(line, flush=True)
import time
time.sleep(60)
"""
STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


@pytest.fixture
def handled():
    """The signals of an owner are handled or ignored in this process."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_step_has_logs_of_its_own_and_default_signals(tmp_path, handled):
    """Its owner ignores signals in the guard, and handles them itself; srun must end its ranks by them."""
    (tmp_path / "job.out").write_text("before\n")
    step = SlurmScheduler().start_step([sys.executable, "-c", PROGRAM], {**os.environ, "FLIP_ATTEMPT": "7"}, tmp_path)
    try:
        wait_until(lambda: "SigIgn" in (tmp_path / "job.out").read_text(), "the output of the step")
        lines = (tmp_path / "job.out").read_text().split("\n")
        assert lines[:2] == ["before", f"pid {step.pid} 7 True"]
        ignored = int(lines[2].split()[1], 16)
        assert not [number for number in STOP if ignored >> (number - 1) & 1]
        step.send_signal(signal.SIGUSR1)
        assert step.wait(60) == -signal.SIGUSR1 and (tmp_path / "job.err").read_text() == "an error\n"
    finally:
        step.kill()
        step.wait()


def test_follower_gets_logs_by_its_name(tmp_path):
    step = SlurmScheduler().start_step(["/bin/sh", "-c", "echo sent"], os.environ, tmp_path, "wandb")
    assert step.wait(60) == 0 and (tmp_path / "wandb.out").read_text() == "sent\n"


def test_step_is_not_started_if_its_log_cannot_be_opened(tmp_path):
    with pytest.raises(OSError):
        SlurmScheduler().start_step(["true"], os.environ, tmp_path / "gone")


def test_ports_of_agents_differ_between_jobs(slurm, monkeypatch):
    scheduler = slurm()
    places = set()
    for job in range(100, 120):
        monkeypatch.setenv("SLURM_JOB_ID", str(job))
        address, port = scheduler.place_for_agents(1)
        places.add(port)
        assert address == "127.0.0.1"
    assert len(places) == 20
