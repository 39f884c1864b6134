"""Ends are decided once, and attempts that ended unseen do not stay open."""

from flip.runs import commit
from flip.runs.errors import CAUSES
from flip.runs.rundir import RunDir, read_json, write_json
from jobs.host import attempts


def make(tmp_path) -> RunDir:
    run = RunDir(tmp_path / "sweep" / "run")
    run.path.mkdir(parents=True)
    return run


def save(run, samples, n):
    folder = commit.folder(run, "pretrain", samples, n)
    folder.mkdir(parents=True)
    commit.commit(folder, {"stage": "pretrain", "samples": samples, "attempt": n})


def test_the_first_verdict_stays(tmp_path):
    run = make(tmp_path)
    n = attempts.start_attempt(run, {"world": 2})
    first = attempts.end_attempt(run, n, 70, "RUNNING")
    run.write_cause(n, 0, "config", CAUSES["config"], "too late")
    assert first.action == "requeue" and attempts.end_attempt(run, n, 78, "RUNNING") == first
    assert read_json(run.attempt(n) / "start.json")["world"] == 2


def test_progress_is_a_newer_commit_than_the_attempt_began_with(tmp_path):
    run = make(tmp_path)
    for _ in range(4):
        save(run, 100, attempts.start_attempt(run, {}))  # the same S each time: a damaged newest one was made again
        attempts.end_attempt(run, run.newest_attempt(), 70, "RUNNING")
    rows = list(attempts.ends(run))[::-1]
    assert [row["committed"] for row in rows] == [True, False, False, False]
    assert [row["action"] for row in rows] == ["requeue", "requeue", "requeue", "stop"]
    assert rows[-1]["commits"] == 100


def test_an_attempt_cut_off_before_its_first_file_made_no_commit(tmp_path):
    run = make(tmp_path)
    save(run, 100, attempts.start_attempt(run, {}))
    attempts.end_attempt(run, 1, 75, "RUNNING")
    write_json(run.path / "job.json", {"after": 1})
    run.attempt(2).mkdir()
    attempts.end_abandoned(run)
    assert [(row["cause"], row["committed"]) for row in list(attempts.ends(run))[::-1]] == [
        ("stopped", True),
        ("node", False),
    ]


def test_an_echo_of_a_preemption_is_no_lost_node(tmp_path):
    """Rank 0 was asked to stop; then its node was cut off, from its peer and from the scheduler."""
    run = make(tmp_path)
    n = attempts.start_attempt(run, {})
    run.record_stop_signal(n, "SIGTERM")
    run.write_cause(n, 0, "peer_lost", CAUSES["peer_lost"], "Connection closed by peer")
    assert attempts.end_attempt(run, n, 70, None).cause == "stopped"


def test_attempts_that_nobody_saw_end_are_settled_before_the_next(tmp_path):
    run = make(tmp_path)
    attempts.start_attempt(run, {})
    attempts.end_abandoned(run)
    assert attempts.start_attempt(run, {}) == 2
    assert [(row["attempt"], row["cause"]) for row in list(attempts.ends(run))[::-1]] == [(1, "node")]
    assert attempts.last_end(run)["reason"].startswith("ended unseen"), "Slurm did not say that a node failed"
    assert read_json(run.attempt(2) / "start.json")["first_commit"]


def test_an_end_that_could_not_be_written_is_put_down_to_storage(tmp_path):
    run = make(tmp_path)
    attempts.start_attempt(run, {})
    attempts.end_abandoned(run, unwritten=1)
    assert [(row["cause"], row["action"], row["code"]) for row in list(attempts.ends(run))[::-1]] == [
        ("storage", "requeue", 69)
    ]


def test_an_end_that_is_written_late_has_no_part_in_later_commits(tmp_path):
    run = make(tmp_path)
    attempts.start_attempt(run, {})
    assert attempts.start_attempt(run, {}) == 2, "the end of attempt 1 is unknown"
    assert read_json(run.attempt(2) / "start.json")["first_commit"], "it may have been cut off"
    save(run, 100, 2)
    attempts.end_abandoned(run, unwritten=1, before=2)
    assert attempts.unended(run) == [2]
    attempts.end_attempt(run, 2, 70, "RUNNING")
    rows = list(attempts.ends(run))[::-1]
    assert [(row["cause"], row["committed"], row["commits"]) for row in rows] == [
        ("storage", False, 0),
        ("crash", True, 100),
    ]


def test_a_new_submission_forgets_verdicts_but_not_history(tmp_path):
    run = make(tmp_path)
    attempts.end_attempt(run, attempts.start_attempt(run, {}), 78, "RUNNING")
    assert attempts.current_end(run)["action"] == "stop"
    write_json(run.path / "job.json", {"after": 1})
    assert attempts.current_end(run) is None and attempts.last_end(run)["action"] == "stop"


def test_a_score_that_is_kept_is_progress(tmp_path):
    run = make(tmp_path)
    for _ in range(5):
        n = attempts.start_attempt(run, {})
        run.record_progress(n)
        assert attempts.end_attempt(run, n, 75, "RUNNING", late=True).cause == "stopped"
    causes = [attempts.end_attempt(run, attempts.start_attempt(run, {}), 75, "RUNNING", late=True) for _ in range(3)]
    assert [(one.cause, one.action) for one in causes] == [("timeout", "requeue")] * 2 + [("timeout", "stop")]
