"""Tests what a fault cost: detect, decide, start, restore, replay, and a requeue in place of a restart in the job."""

from flip.monitoring.results import read_run
from flip.runs.lifecycle import RunState
from flip.runs.rundir import write_json
from jobs.common.terminal import Page
from jobs.reporting import faults, goodput, status
from tests.jobs.outcomes import make
from tests.jobs.reporting.test_goodput import end, line, run_of


def start(time, resumes=0, **fields):
    return {"time": time, "resumes_from": resumes, "after": 0, **fields}


def ended(noticed, time, saved=500, cause="crash", code=137, progressed=True):
    return {**end(time, saved, cause, code, progressed), "noticed": noticed}


#: The first start waits 300 s for the queue and takes 60 s. 1000 samples take 100 s; the last 500 are lost each time.
FIRST = (
    start(1300.0, job="7", restarts=0),
    {"time": 1360.0, "samples": 0, "restoring": 2.0},
    [line(1460.0, 1000)],
    ended(1460.5, 1462.5),
)
IN_JOB = (
    start(1462.75, 500, job="7", restarts=0),
    {"time": 1466.5, "samples": 500, "restoring": 1.0},
    [line(1566.5, 1500)],
    ended(1567.5, 1567.75, 1000, "node", 1),
)
REQUEUED = (start(1700.0, 1000, job="7", restarts=1), {"time": 1767.75, "samples": 1000, "restoring": 5.0}, [], None)


def of(folder, *attempts):
    return goodput.of_run(read_run(run_of(folder / "s", *attempts).path)).faults


def test_faults_split_seconds_from_last_work_to_replay(tmp_path):
    crash, node = of(tmp_path, FIRST, IN_JOB, REQUEUED)
    assert (crash.attempt, crash.cause, crash.place) == (1, "crash", faults.IN_JOB)
    assert crash.seconds == {"detect": 0.5, "decide": 2.0, "start": 3.0, "restore": 1.0, "replay": 50.0}
    assert crash.total == 56.5
    assert (node.attempt, node.cause, node.place) == (2, "node", faults.REQUEUED)
    assert node.seconds == {"detect": 1.0, "decide": 0.25, "start": 195.0, "restore": 5.0, "replay": 50.0}
    assert node.requeue_seconds is None


def test_requeue_is_estimated_by_requeues_else_by_first_start(tmp_path):
    crash, _ = of(tmp_path, FIRST, IN_JOB, REQUEUED)
    assert crash.requeue_seconds == 0.5 + 2.0 + 50.0 + 200.0
    (crash,) = of(tmp_path / "alone", FIRST, (*IN_JOB[:3], None))
    assert crash.requeue_seconds == 0.5 + 2.0 + 50.0 + 300.0 + 60.0


def test_recorded_cause_is_sign_of_work_unless_it_is_late(tmp_path):
    run = run_of(tmp_path / "s", FIRST, (*IN_JOB[:3], None))
    write_json(run.attempt(1) / "cause.0.json", {"cause": "crash", "code": 70, "time": 1460.25})
    (crash,) = goodput.of_run(read_run(run.path)).faults
    assert crash.seconds["detect"] == 0.25
    write_json(run.attempt(1) / "cause.0.json", {"cause": "hang", "code": 71, "time": 1460.25})
    (hang,) = goodput.of_run(read_run(run.path)).faults
    assert hang.seconds["detect"] == 0.5


def test_unobserved_end_has_neither_detect_nor_decide(tmp_path):
    unseen = (*FIRST[:3], ended(1700.0, 1700.0, 500, "node", None))
    (fault,) = of(tmp_path, unseen, REQUEUED)
    assert fault.seconds["detect"] is None and fault.seconds["decide"] is None
    assert fault.seconds["start"] == 1767.75 - 5.0 - 1460.0


def test_end_of_killed_agent_has_all_parts_although_its_code_is_lost(tmp_path):
    killed = (*FIRST[:3], ended(1460.5, 1463.5, 500, "stopped", None) | {"observed": True})
    (fault,) = of(tmp_path, killed, REQUEUED)
    assert fault.seconds["detect"] == 0.5 and fault.seconds["decide"] == 3.0
    assert fault.seconds["start"] == 1767.75 - 5.0 - 1463.5
    late = (*FIRST[:3], ended(1700.0, 1700.0, 500, "stopped", 75) | {"observed": False})
    (fault,) = of(tmp_path / "late", late, REQUEUED)
    assert fault.seconds["detect"] is None and fault.seconds["start"] == 1767.75 - 5.0 - 1460.0


def test_end_before_new_submission_is_no_fault(tmp_path):
    again = (start(1700.0, 500, job="8", restarts=0) | {"after": 1}, *REQUEUED[1:])
    assert not of(tmp_path, FIRST, again)


def test_records_without_some_times_give_the_others(tmp_path):
    old = {key: value for key, value in FIRST[3].items() if key != "noticed"}
    ready = {"time": 1466.5, "samples": 500}
    (fault,) = of(tmp_path, (*FIRST[:3], old), (IN_JOB[0], ready, *IN_JOB[2:3], None))
    assert fault.seconds == {"detect": 2.5, "decide": 0.0, "start": 4.0, "restore": None, "replay": 50.0}


def test_page_and_json_have_each_restart(tmp_path):
    account = goodput.of_run(read_run(run_of(tmp_path / "s", FIRST, IN_JOB, REQUEUED).path))
    text = Page(*faults.table([(account.name, fault) for fault in account.faults]))
    assert "in the job" in text and "56.5 s" in text and "4 min 12 s" in text, text
    first, second = goodput.as_dict([account])[0]["faults"]
    assert first["restart"] == "in the job" and first["seconds"]["replay"] == 50.0 and first["total_seconds"] == 56.5
    assert second["restart"] == "requeue" and second["requeue_seconds"] is None


def test_status_shows_restart_in_job(tmp_path):
    run = run_of(tmp_path / "s", FIRST, (*IN_JOB[:3], None))
    row = status.row(run, RunState("running", 2))
    assert row["restart"] == "in the job"
    assert status._shown(row)["attempts"] == "2 (in the job)"
    write_json(run.attempt(2) / "end.json", {**IN_JOB[3], "attempt": 2})
    row = status.row(run, RunState("running", 2))
    assert row["phase"] == "restarting in the job" and status.line(row)["state"] == "restarting in the job"
    write_json(run.attempt(2) / "start.json", {**IN_JOB[0], "restarts": 1})
    assert status.row(run, RunState("running", 2))["restart"] == "requeue"
    only = make(tmp_path / "t", "b", steps=0, complete=False)
    assert status.row(only, RunState("queued"))["restart"] is None
