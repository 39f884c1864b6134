"""Tests of the queries about the own job, with stub commands on PATH."""

import pytest

from jobs.host import own_job
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
