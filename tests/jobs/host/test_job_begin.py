"""Tests of what the owner of a job does before and after an attempt whose ranks srun starts.

It never guesses the cause of an attempt's end: a scheduler that does not answer is asked again.
"""

import errno
import os
import signal

import pytest

from flip.runs import attempts, records
from flip.runs.rundir import RunDir, read_json, write_json
from jobs.host import held_jobs, job, notify, requeue, slurm_cli
from jobs.host.failed_starts import FailedStarts
from jobs.host.job import REQUEUE_DELAY
from jobs.host.scheduler import JobSeen
from tests.harness.job_records import write_job
from tests.jobs.host.owned import NODE, ON_NODES, WrittenScheduler, end_of, owner, serve

END = {"committed": False, "delay": 0.0, "exclude": [], "time": 1.0}
AWAY = ON_NODES._replace(failed=FailedStarts(1, 1))
REQUEUED = ("requeue", 0.0, None, 2)
STOPPED = {"attempt": 1, "action": "stop", "cause": "data", "reason": "a shard is damaged", **END}
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def run(tmp_path, monkeypatch, clock):
    """A run whose job has restarted; its first attempt has no end."""
    run = RunDir(tmp_path / "sweep" / "run")
    run.path.mkdir(parents=True)
    write_job(run)
    run.start_attempt({"resumes_from": 0, "after": 0})
    monkeypatch.setenv("SLURM_JOB_ID", "57")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURMD_NODENAME", NODE)
    return run


@pytest.fixture
def told(monkeypatch):
    """What follows from the end of a run for others: jobs that wait for it, and the user's command."""
    told = []
    monkeypatch.setattr(held_jobs, "settle", lambda run, action, *rest: told.append(f"canary: {action}"))
    monkeypatch.setattr(notify, "send_events", lambda run, action: told.append(f"notify: {action}") or [])
    return told


def causes(run):
    return [(end_of(run, n) or {}).get("cause") for n in run.attempt_numbers()]


# -- BEGIN: which starts win an attempt --------------------------------------------------------------------------------


def idle_run(run, why):
    """Let there be a reason to start nothing; returns the token of the job."""
    if why == "submitted again":
        return "of an earlier submission"
    if why == "complete":
        write_json(run.result, {})
    if why == "cancelled":
        write_json(run.cancel, {"who": "ann", "why": "a mistake"})
    return "t"


@pytest.mark.parametrize(
    "why, words, settled",
    [
        ("submitted again", "it was submitted again since, as another job", []),
        ("complete", "it is complete", ["canary: done"]),
        ("cancelled", "cancelled by ann: a mistake", []),
    ],
)
def test_start_without_work_ends_with_code_0_and_starts_nothing(run, told, capsys, why, words, settled):
    scheduler = WrittenScheduler()
    assert serve(run, scheduler, idle_run(run, why)) == 0
    assert words in capsys.readouterr().err and told == settled
    assert (scheduler.steps, scheduler.did, run.newest_attempt()) == ([], [], 1)


def test_successor_starts_nothing_if_another_job_has_continued_the_run(run, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    monkeypatch.setenv(requeue.FOLLOWS, "1")
    run.start_attempt({"resumes_from": 0, "after": 0, "job": "58"})
    scheduler = WrittenScheduler()
    assert serve(run, scheduler) == 0 and scheduler.did == []
    assert "another job has continued it" in capsys.readouterr().err


def test_missing_run_directory_is_a_configuration_error_without_restart(run, tmp_path, capsys):
    scheduler = WrittenScheduler()
    assert serve(RunDir(tmp_path / "gone"), scheduler) == 78 and scheduler.did == []
    assert "Was it moved to the trash?" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["job.json", "attempts/1/end.json"])
def test_damaged_record_ends_the_job_without_restart(run, capsys, name):
    (run.path / name).write_text('{"token": [')
    scheduler = WrittenScheduler()
    assert serve(run, scheduler) == 65 and scheduler.did == []
    assert "a record of the run is damaged: " in capsys.readouterr().err


@pytest.mark.parametrize("absent", records.NEEDED_TO_START)
def test_partial_job_record_ends_the_job_without_attempt(run, capsys, absent):
    write_job(run, **{absent: None})
    scheduler = WrittenScheduler()
    assert serve(run, scheduler) == 78 and scheduler.did == [] and run.newest_attempt() == 1
    assert f"job.json: lacks `{absent}`" in capsys.readouterr().err


def test_code_of_another_version_ends_the_job_without_attempt(run, tmp_path, capsys):
    write_job(run, snapshot=str(tmp_path / "code"))
    scheduler = WrittenScheduler()
    assert serve(run, scheduler) == 78 and scheduler.did == [] and run.newest_attempt() == 1
    assert f"{tmp_path}/code: the code of the run has other messages" in capsys.readouterr().err


def test_run_that_has_stopped_is_not_started_and_its_jobs_are_settled_once_more(run, told, capsys):
    """The owner that decided it may have been killed before it did this."""
    write_json(run.attempt(1) / "end.json", STOPPED)
    scheduler = WrittenScheduler()
    assert serve(run, scheduler) == 65 and scheduler.did == []
    assert "not started: a shard is damaged" in capsys.readouterr().err and told == ["canary: stop"]


def test_run_whose_abandoned_attempt_stops_it_is_reported(run, told):
    run.write_cause(1, 0, "data", 65, "a shard is damaged")
    assert serve(run) == 65
    assert told == ["canary: stop", "notify: stop"] and end_of(run, 1)["observed"] is False


def test_attempt_of_ranks_gets_its_number_and_its_logs(run):
    """The step is started with what its ranks need; processes of earlier attempts end before."""
    numbers = []
    scheduler = WrittenScheduler(75, play=lambda: numbers.append(os.environ["FLIP_ATTEMPT"]))
    started = owner(run, scheduler)
    assert started.serve() == 75 and numbers == ["2"]
    assert scheduler.steps == [["step", "ranks", "1"]] and scheduler.did[0] == ("end leftovers", 2)
    start = read_json(run.attempt(2) / "start.json")
    assert (start["job"], start["restarts"], start["world"]) == ("57", "1", "1")
    assert '"do": "requeue"' in (run.logs / "2" / "job.out").read_text()
    assert started.guard.facts == {"attempt": 2, "delay": 0.0, "exclude": "", "over": 1}


def test_each_tracker_gets_a_follower_with_the_pid_of_the_step(run):
    scheduler = WrittenScheduler()
    owner(run, scheduler, trackers=("wandb", "mlflow")).serve()
    assert scheduler.steps == [["step", "ranks", "1"], ["follow", "wandb", "4711"], ["follow", "mlflow", "4711"]]


# -- attempts that ended unobserved ------------------------------------------------------------------------------------


def test_open_attempt_is_ended_with_its_successor_if_slurm_was_silent_at_start(run, capsys):
    """The node has no connection to Slurm. The end of attempt 1 could not be written to storage."""
    scheduler = WrittenScheduler(70, seen=JobSeen())
    seen = []

    def play():
        seen.extend(causes(run))
        scheduler.seen = AWAY

    scheduler._play = play
    assert serve(run, scheduler) == 70
    assert seen == [None, None] and "Slurm does not say how the last attempt ended" in capsys.readouterr().err
    assert causes(run) == ["storage", "crash"]


def test_open_attempts_are_ended_by_next_start_if_slurm_was_silent_at_start(run, monkeypatch):
    monkeypatch.setattr(slurm_cli, "RETRY_SECONDS", 5.0)
    with pytest.raises(KeyboardInterrupt):
        serve(run, WrittenScheduler(seen=JobSeen(), play=interrupt))
    assert causes(run) == [None, None]
    serve(run, WrittenScheduler(70, seen=AWAY))
    assert causes(run) == ["storage", "node", "crash"]


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("seen, cause", [(ON_NODES, "node"), (AWAY, "storage")])
def test_open_attempt_is_ended_at_start_if_slurm_answers(run, seen, cause):
    at_start = []
    serve(run, WrittenScheduler(75, seen, play=lambda: at_start.extend(causes(run))))
    assert at_start == [cause, None]


def test_signal_that_comes_while_ranks_start_reaches_them(run):
    """The step runs before the call that starts it has returned."""
    scheduler = WrittenScheduler(75, play=lambda: starting.on_signal(signal.SIGUSR1))
    scheduler.polls = 3
    starting = owner(run, scheduler)
    starting.serve()
    assert starting.processes.step.signals == [signal.SIGUSR2]


# -- DECIDE ------------------------------------------------------------------------------------------------------------


def test_end_is_decided_when_slurm_answers_again(run, clock):
    """The cause depends on the state of the job, which a node without connection does not know."""
    scheduler = WrittenScheduler(75)

    def play():
        scheduler.answers_in = 5
        scheduler.seen = JobSeen("CANCELLED", failed=FailedStarts(), ending="LEFT")

    scheduler._play = play
    serve(run, scheduler)
    assert end_of(run, 2)["cause"] == "cancelled" and clock[-1] - clock[0] >= 15.0


def test_end_without_an_answer_of_slurm_is_recorded_after_the_patience_for_a_refused_requeue(run, clock):
    scheduler = WrittenScheduler(70)
    scheduler._play = lambda: setattr(scheduler, "seen", JobSeen())
    serve(run, scheduler)
    assert end_of(run, 2)["state"] is None and scheduler.did[-1] == REQUEUED
    assert slurm_cli.RETRY_SECONDS - 60 < clock[-1] - clock[0] <= slurm_cli.RETRY_SECONDS + 60


@pytest.mark.parametrize("nodes, cause", [(3, "node"), (2, "crash")])
def test_node_lost_by_job_that_goes_on_is_no_crash(run, monkeypatch, nodes, cause):
    """With --no-kill, a job with ranks that srun has started stays RUNNING, and its peers end by broken connections."""
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", str(nodes))
    reason = "RuntimeError: the connection to rank 1 is broken"
    scheduler = WrittenScheduler(1, ON_NODES._replace(node_count=2))
    scheduler._play = lambda: run.write_cause(2, 0, "crash", 70, reason, host="n1")
    serve(run, scheduler)
    assert (end_of(run, 2)["cause"], end_of(run, 2)["action"]) == (cause, "requeue")
    assert scheduler.did[-1] == REQUEUED


@pytest.mark.parametrize("cause, code, exit_code", [("data", 65, 65), ("complete", 0, 0), ("complete", 137, 0)])
def test_last_end_is_carried_out_without_restart(run, told, cause, code, exit_code):
    """A complete run whose srun was killed ends with code 0."""

    def play():
        run.write_cause(2, 0, cause, code, "why")
        if cause == "complete":
            write_json(run.result, {})

    scheduler = WrittenScheduler(code, play=play)
    assert serve(run, scheduler) == exit_code
    action = {"data": "stop", "complete": "done"}[cause]
    assert told == [f"canary: {action}", f"notify: {action}"] and scheduler.did == [("end leftovers", 2)]


def test_end_of_cancelled_run_restarts_and_reports_nothing(run, told):
    play = lambda: write_json(run.cancel, {"who": "ann"})  # noqa: E731
    scheduler = WrittenScheduler(75, play=play)
    serve(run, scheduler)
    assert end_of(run, 2)["cause"] == "cancelled" and scheduler.did == [("end leftovers", 2)]


@pytest.mark.parametrize(
    "refusal, words",
    [
        (slurm_cli.SlurmUnavailable("no"), "the requeue was refused (no)"),
        (requeue.SuccessorRefused("too many"), "requeue is disabled here, and a new job was refused (too many)"),
    ],
)
def test_refused_requeue_stops_the_run_and_settles_its_jobs(run, told, refusal, words):
    scheduler = WrittenScheduler(75)
    scheduler.refusal = refusal
    assert serve(run, scheduler) == 75
    assert told == ["canary: stop", "notify: stop"]
    assert attempts.current_end(run)["reason"].startswith(words)


def test_repeated_preemptions_are_delayed_although_slurm_requeues_by_itself(run):
    delays = []
    for _ in range(5):
        scheduler = WrittenScheduler(75)
        scheduler._play = lambda scheduler=scheduler: setattr(
            scheduler, "seen", JobSeen("PENDING", failed=FailedStarts(), ending="LEFT")
        )
        serve(run, scheduler)
        delays += [what for what in scheduler.did if what[0] == "delay"]
    end = end_of(run, run.newest_attempt())
    assert end["action"] == "nothing" and delays[-1] == ("delay", end["delay"])
    assert 0 < len(delays) < 5, "the first preemptions are not delayed"


# -- files that are away -----------------------------------------------------------------------------------------------


def fail_logs(monkeypatch, errors):
    """Let ``open_logs`` raise these errors in turn, then work; returns what is left of them."""
    open_logs = RunDir.open_logs

    def fail(self, n):
        if errors:
            raise errors.pop()
        return open_logs(self, n)

    monkeypatch.setattr(RunDir, "open_logs", fail)


def test_successor_starts_again_after_its_start_could_not_be_recorded(run, monkeypatch):
    """The attempt that it has won before the error is not that of another job."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    monkeypatch.setenv(requeue.FOLLOWS, "1")
    start_attempt = attempts.start_attempt
    errors = [FULL]

    def fail_once(*arguments):
        n = start_attempt(*arguments)
        if errors:
            raise errors.pop()
        return n

    monkeypatch.setattr(attempts, "start_attempt", fail_once)
    started = owner(run, WrittenScheduler())
    assert started.serve() == 0 and started.n == 3


def test_full_disk_of_logs_wins_no_further_attempt(run, monkeypatch):
    """Each would be a failure without a new checkpoint, and ten of them stop the run."""
    fail_logs(monkeypatch, [FULL] * 5)
    scheduler = WrittenScheduler(75)
    assert serve(run, scheduler) == 75
    assert run.newest_attempt() == 2 and scheduler.steps == [["step", "ranks", "1"]]


def test_start_without_files_counts_as_a_failed_one_and_comes_again_later(run, monkeypatch, clock, capsys):
    fail_logs(monkeypatch, [FULL] * 1000)
    scheduler = WrittenScheduler(seen=AWAY._replace(failed=FailedStarts(3, 1)))
    assert serve(run, scheduler) == 69
    assert 500 < clock[-1] - clock[0] <= job.RETRY_SECONDS
    assert [what for what in scheduler.did if what[0] != "end leftovers"] == [
        ("note", 4, 2, 69, NODE),
        ("requeue", REQUEUE_DELAY, None, 2),
    ]
    assert "No space left on device; retried for up to 600 s" in capsys.readouterr().err


def test_end_that_cannot_be_written_is_named_to_the_next_start(run, monkeypatch, clock):
    """The outage of Slurm outlasts the query of earlier failed starts; they are still counted before the requeue."""

    def full(*_, **__):
        raise FULL

    scheduler = WrittenScheduler(75)

    def play():
        monkeypatch.setattr(attempts, "record_step", full)
        scheduler.answers_in = 11

    scheduler._play = play
    monkeypatch.setattr(slurm_cli, "RETRY_SECONDS", 10.0)
    assert serve(run, scheduler) == 69
    assert scheduler.did[1:] == [("note", 1, 2, 69, NODE), ("requeue", REQUEUE_DELAY, None, 2)]


def test_files_that_are_away_do_not_restart_a_run_that_was_cancelled(run, monkeypatch):
    fail_logs(monkeypatch, [FULL] * 1000)
    scheduler = WrittenScheduler(seen=JobSeen("CANCELLED", failed=FailedStarts(), ending="LEFT"))
    assert serve(run, scheduler) == 69
    assert {what[0] for what in scheduler.did} == {"end leftovers"}


def test_nothing_restarts_without_a_scheduler_that_can(run, monkeypatch):
    fail_logs(monkeypatch, [FULL] * 1000)
    scheduler = WrittenScheduler()
    scheduler.can_restart = False
    assert serve(run, scheduler) == 69 and {what[0] for what in scheduler.did} == {"end leftovers"}


@pytest.mark.parametrize("restarts, cause", [("1", "stopped"), ("0", "timeout")])
def test_attempt_that_had_the_rest_of_a_job_has_not_used_its_wall_limit(run, monkeypatch, restarts, cause):
    """A node agent started it 15 minutes before the limit of a day; it was asked to stop before its first
    checkpoint."""
    first = {"resumes_from": 0, "after": 0, "job": "57"}
    write_json(run.attempt(1) / "start.json", {**first, "restarts": restarts, "attempt": 1, "time": 1.0})
    write_json(run.attempt(1) / "end.json", {"attempt": 1, "action": "requeue", "cause": "crash", "reason": "", **END})

    def play():
        run.record_stop_request(2, "USR2")
        run.write_cause(2, 0, "stopped", 75, "signal SIGUSR2", signal="SIGUSR2")

    used = slurm_cli.parse_duration("23:59:30")
    seen = ON_NODES._replace(used=job.end_evidence.wall_limit.TimeUsed(used, 86400, False, False), limit=86400)
    assert serve(run, WrittenScheduler(75, seen, play)) == 75
    assert end_of(run, 2)["cause"] == cause
