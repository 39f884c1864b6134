"""Tests of attempt records: each end is decided once, and attempts that ended unobserved get an end."""

from flip.runs import attempts, checkpoint_folder
from flip.runs.errors import CAUSES
from flip.runs.records import is_observed
from flip.runs.restart_policy import EndFacts
from flip.runs.rundir import RunDir, read_json, write_json


def make(tmp_path) -> RunDir:
    run = RunDir(tmp_path / "sweep" / "run")
    run.path.mkdir(parents=True)
    return run


def save(run, samples, n):
    folder = checkpoint_folder.folder(run, "pretrain", samples, n)
    folder.mkdir(parents=True)
    checkpoint_folder.complete_checkpoint(folder, {"stage": "pretrain", "samples": samples, "attempt": n})


def test_end_attempt_keeps_first_decision_if_called_again(tmp_path):
    run = make(tmp_path)
    n = attempts.start_attempt(run, {"world": 2})
    first = attempts.end_attempt(run, n, EndFacts(70, "RUNNING"))
    run.write_cause(n, 0, "config", CAUSES["config"], "too late")
    second = attempts.end_attempt(run, n, EndFacts(78, "RUNNING"))
    assert (second.do, second.cause, second.reason) == ("requeue", first.cause, first.reason)
    assert read_json(run.attempt(n) / "start.json")["world"] == 2


def test_excluded_nodes_are_those_of_profile_and_of_last_day(tmp_path):
    run = make(tmp_path)
    write_json(run.path / "job.json", {"after": 0, "exclude": "node[07-08]"})
    assert attempts.excluded_nodes(run, 1_000_000.0) is None, "what the job excludes stays"
    for node, ago in (("n1", 90_000.0), ("n2", 60.0), ("n3", 30.0)):
        n = attempts.start_attempt(run, {})
        save(run, 100 * n, n)
        run.write_cause(n, 0, "crash", CAUSES["crash"], "CUDA error: uncorrectable ECC error encountered", host=node)
        assert attempts.end_attempt(run, n, EndFacts(CAUSES["crash"], "RUNNING")).exclude == (node,)
        path = run.attempt(n) / "end.json"
        write_json(path, {**read_json(path), "time": 1_000_000.0 - ago})
    assert attempts.excluded_nodes(run, 1_000_000.0) == ("node[07-08]", "n2", "n3")
    assert attempts.excluded_nodes(run, 2_000_000.0) == ("node[07-08]",), "a day later they are used again"


def test_end_attempt_counts_only_newer_checkpoints_as_progress(tmp_path):
    run = make(tmp_path)
    for _ in range(4):
        save(run, 100, attempts.start_attempt(run, {}))  # same S each time, as after a damaged checkpoint
        attempts.end_attempt(run, run.newest_attempt(), EndFacts(70, "RUNNING"))
    rows = list(attempts.ends(run))[::-1]
    assert [row["committed"] for row in rows] == [True, False, False, False]
    assert [row["action"] for row in rows] == ["requeue", "requeue", "requeue", "stop"]
    assert rows[-1]["commits"] == 100


def test_end_abandoned_records_no_checkpoint_for_attempt_without_start_record(tmp_path):
    run = make(tmp_path)
    save(run, 100, attempts.start_attempt(run, {}))
    attempts.end_attempt(run, 1, EndFacts(75, "RUNNING"))
    write_json(run.path / "job.json", {"after": 1})
    run.attempt(2).mkdir()
    attempts.end_abandoned(run)
    assert [(row["cause"], row["committed"]) for row in list(attempts.ends(run))[::-1]] == [
        ("stopped", True),
        ("node", False),
    ]


def test_end_attempt_reports_stopped_if_peer_is_lost_after_stop_signal(tmp_path):
    """Rank 0 receives a stop signal; then its node loses the connection to its peer and to the scheduler."""
    run = make(tmp_path)
    n = attempts.start_attempt(run, {})
    run.record_stop_request(n, "SIGTERM")
    run.write_cause(n, 0, "peer_lost", CAUSES["peer_lost"], "Connection closed by peer")
    assert attempts.end_attempt(run, n, EndFacts(70, None)).cause == "stopped"


def test_end_abandoned_records_node_failure_for_unobserved_attempt(tmp_path):
    run = make(tmp_path)
    attempts.start_attempt(run, {})
    attempts.end_abandoned(run)
    assert not is_observed(attempts.last_end(run))
    assert attempts.start_attempt(run, {}) == 2
    assert [(row["attempt"], row["cause"]) for row in list(attempts.ends(run))[::-1]] == [(1, "node")]
    assert attempts.last_end(run)["reason"].startswith("ended unseen"), "Slurm did not say that a node failed"
    assert read_json(run.attempt(2) / "start.json")["first_commit"]


def test_end_abandoned_records_storage_failure_for_unwritten_end(tmp_path):
    run = make(tmp_path)
    attempts.start_attempt(run, {})
    attempts.end_abandoned(run, unwritten=1)
    assert [(row["cause"], row["action"], row["code"]) for row in list(attempts.ends(run))[::-1]] == [
        ("storage", "requeue", 69)
    ]


def test_end_abandoned_records_storage_failure_after_restart_in_same_job(tmp_path):
    """The exit trap could not read which attempt was the newest of its start, and has named the first."""
    run = make(tmp_path)
    for job in ("57", "57", "58"):
        attempts.start_attempt(run, {"job": job})
    attempts.end_attempt(run, 1, EndFacts(70, "RUNNING"))
    attempts.end_abandoned(run, unwritten=1)
    assert [row["cause"] for row in attempts.ends(run)] == ["node", "storage", "crash"]


def test_end_abandoned_ignores_checkpoints_of_later_attempts(tmp_path):
    run = make(tmp_path)
    attempts.start_attempt(run, {})
    assert attempts.start_attempt(run, {}) == 2, "the end of attempt 1 is unknown"
    assert read_json(run.attempt(2) / "start.json")["first_commit"], "attempt 1 may have been cut off"
    save(run, 100, 2)
    attempts.end_abandoned(run, unwritten=1, before=2)
    assert attempts.unended(run) == [2]
    attempts.end_attempt(run, 2, EndFacts(70, "RUNNING"))
    rows = list(attempts.ends(run))[::-1]
    assert [(row["cause"], row["committed"], row["commits"]) for row in rows] == [
        ("storage", False, 0),
        ("crash", True, 100),
    ]


def test_new_submission_resets_current_end_but_not_last_end(tmp_path):
    run = make(tmp_path)
    attempts.end_attempt(run, attempts.start_attempt(run, {}), EndFacts(78, "RUNNING"))
    assert attempts.current_end(run)["action"] == "stop"
    write_json(run.path / "job.json", {"after": 1})
    assert attempts.current_end(run) is None and attempts.last_end(run)["action"] == "stop"


def test_end_attempt_counts_recorded_scores_as_progress(tmp_path):
    run = make(tmp_path)
    for _ in range(5):
        n = attempts.start_attempt(run, {})
        run.record_progress(n)
        ended = attempts.end_attempt(run, n, EndFacts(75, "RUNNING", limit_reason="its wall limit passed"))
        assert ended.cause == "stopped"
    ends = [
        attempts.end_attempt(
            run, attempts.start_attempt(run, {}), EndFacts(75, "RUNNING", limit_reason="its wall limit passed")
        )
        for _ in range(3)
    ]
    assert [(end.cause, end.action) for end in ends] == [("timeout", "requeue")] * 2 + [("timeout", "stop")]


def test_end_that_is_recorded_after_a_later_attempt_completed_the_run_is_not_complete(tmp_path):
    """Slurm did not answer at the second start, so the end of the first attempt stayed open."""
    run = RunDir(tmp_path / "s" / "r")
    for _ in range(2):
        attempts.start_attempt(run, {})
    write_json(run.result, {"run": "r", "attempt": 2})
    attempts.end_abandoned(run, before=2)
    attempts.end_attempt(run, 2, EndFacts(0, "RUNNING"))
    assert [end["cause"] for end in attempts.ends(run)] == ["complete", "node"]
