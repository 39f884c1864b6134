"""Tests of the queries about the own job, with stub commands on PATH."""

import pytest

from jobs.host import own_job, slurm_cli
from tests.jobs.host.scontrol_answers import show


@pytest.mark.parametrize(
    "fields, words",
    [
        ({}, "RUNNING"),
        ({"state": "COMPLETING"}, "CANCELLED"),
        ({"state": "COMPLETING", "restarts": 3}, "PENDING"),
        ({"state": "PENDING", "restarts": 3}, "PENDING"),
        ({"state": "COMPLETING", "ran": "1-00:00:28"}, "TIMEOUT"),
        ({"state": "COMPLETING", "ran": "1-00:00:28", "limit": "UNLIMITED"}, "CANCELLED"),
        ({"state": "COMPLETING", "reason": "TimeLimit", "ran": "01:00:00"}, "TIMEOUT"),  # at the end of a reservation
        ({"state": "COMPLETING", "preempted": "2026-11-25T09:24:13"}, "PREEMPTED"),
        ({"state": "COMPLETING", "preempted": "2026-11-25T09:24:02"}, "CANCELLED"),  # cancelled in the grace period
        ({"state": "COMPLETING", "preempted": "Unknown"}, "CANCELLED"),
        ({"state": "NODE_FAIL"}, "NODE_FAIL"),
        ({"state": "COMPLETING", "reason": "NodeDown"}, "NODE_FAIL"),  # with Requeue=0; not a cancellation
        ({"state": "COMPLETING", "reason": "NodeDown", "ran": "1-00:00:28"}, "NODE_FAIL"),
        ({"state": "COMPLETING", "reason": "RaisedSignal:9(Killed)"}, "FAILED"),
        ({"state": "COMPLETING", "reason": "DeadLine"}, "DEADLINE"),
        ({"state": "COMPLETING", "reason": "SomethingNew"}, "UNSEEN"),
        ({"state": "SOMETHING_NEW"}, "UNSEEN"),
        ({"state": "EXPEDITING"}, "EXPEDITING"),
        ({"state": "REQUEUE_HOLD", "restarts": 2}, "PENDING"),
    ],
)
def test_job_state_maps_scontrol_fields_of_ending_job(commands, fields, words):
    commands("scontrol", show(**{"restarts": 2, **fields}))
    assert own_job.job_state("50_3", 2) == words
    assert commands.calls() == ["scontrol show job 50_3"]


def test_own_job_names_array_element_by_index():
    """The array's number is also the id of one of its elements; a requeue by that number would requeue all elements."""
    environ = {"SLURM_JOB_ID": "50", "SLURM_ARRAY_JOB_ID": "50", "SLURM_ARRAY_TASK_ID": "2"}
    assert own_job.own_job(environ) == "50_2"
    assert own_job.own_job({"SLURM_JOB_ID": "50"}) == "50" and own_job.own_job({}) == ""


def test_wait_for_state_retries_until_slurm_answers_or_time_is_up(commands, naps, tmp_path, monkeypatch):
    commands("scontrol", f"echo >> {tmp_path}/asked; [ $(wc -l < {tmp_path}/asked) -lt 3 ] && exit 1\n{show()}")
    assert own_job.wait_for_state("57", 0) == "RUNNING" and naps == [1.0, 2.0]
    commands("scontrol", "exit 1")
    monkeypatch.setattr(slurm_cli, "RETRY_SECONDS", 0.5)
    assert own_job.wait_for_state("57", 0) is None


@pytest.fixture
def wait(commands, naps, tmp_path):
    def wait_with_answers(*answers):
        """Wait for the limit while scontrol gives these answers in turn; returns the state and the sleeps."""
        for i, fields in enumerate(answers):
            (tmp_path / f"answer{i}").write_text("exit 1" if fields.get("gone") else show(**fields))
        (tmp_path / "asked").write_text("")
        count = f"$(wc -l < {tmp_path}/asked)"
        commands("scontrol", f"n={count}; echo >> {tmp_path}/asked; . {tmp_path}/answer$n")
        naps.clear()
        return own_job.wait_for_time_limit("57", 0), list(naps)

    return wait_with_answers


def test_wait_for_time_limit_notices_lowered_limit(wait):
    half = {"limit": "00:26:00", "ran": "00:25:10"}
    ending = {"limit": "00:26:00", "ran": "00:26:00", "state": "COMPLETING", "reason": "TimeLimit"}
    assert wait({"limit": "01:00:00"}, half, ending) == ("TIMEOUT", [900.0, 50.0])
    assert wait({"limit": "01:00:00"}, {"gone": True}, half, ending) == ("TIMEOUT", [900.0, 60.0, 50.0])
    silence = [{"gone": True}] * 3
    lowered = {"limit": "00:27:00"}
    assert wait(lowered, *silence, ending) == ("TIMEOUT", [900.0, 60.0, 1.0, 1.0]), (
        "the limit passes during the silence"
    )


def test_wait_for_time_limit_sleeps_until_limit_and_returns_final_state(wait, monkeypatch):
    monkeypatch.setattr(own_job, "LIMIT_POLL_SECONDS", 3600.0)
    hour = {"limit": "01:00:00"}
    over = {"limit": "01:00:00", "ran": "01:00:20"}
    ending = {**over, "state": "COMPLETING", "reason": "TimeLimit"}
    assert wait(hour, over, ending) == ("TIMEOUT", [3000.0, 1.0])
    assert wait({"limit": "UNLIMITED"}) == ("", [])
    assert wait(hour, {**hour, "state": "COMPLETING"}) == ("", [3000.0])
    assert wait(hour, {**over, "restarts": 1}) == ("", [3000.0])
    assert wait(hour, {"gone": True}, {"gone": True}, ending) == ("TIMEOUT", [3000.0, 1.0, 1.0]), "KillWait is short"
    assert wait({"gone": True}, hour, ending) == ("TIMEOUT", [60.0, 3000.0])
    node = {**hour, "state": "COMPLETING", "reason": "NodeDown"}
    assert wait(hour, node) == ("NODE_FAIL", [3000.0])
    assert wait(hour, {**node, "restarts": 1}) == ("", [3000.0]), "Slurm has requeued it"
    stopped = {**hour, "state": "STOPPED"}
    assert wait(hour, stopped, ending) == ("TIMEOUT", [3000.0, 3000.0]), "scancel -s STOP, and CONT later"
    longer = {"limit": "02:00:00", "ran": "01:00:00"}
    assert wait(hour, longer, {**longer, "state": "CANCELLED"}) == ("", [3000.0, 3600.0])


@pytest.mark.parametrize(
    "eligible, start, seconds",
    [
        ("2026-11-30T08:00:00", "2026-11-30T09:00:30", 3630.0),
        ("2026-11-30T09:00:00", "2026-11-30T09:00:00", 0.0),
        ("Unknown", "2026-11-30T09:00:00", 0.0),
        ("2026-11-30T09:00:00", "", 0.0),
    ],
)
def test_seconds_queued_count_from_the_time_at_which_the_job_could_start(eligible, start, seconds):
    assert own_job.seconds_queued({"EligibleTime": eligible, "StartTime": start}) == seconds
