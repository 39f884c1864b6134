"""Tests that notifications are sent once, and that their failure changes nothing else."""

import json
import sys
import time

import pytest

from flip.runs import attempts
from flip.runs.rundir import RunDir, create_json, write_json
from jobs.host import notify
from tests.harness.job_records import write_job
from tests.jobs.host.owned import WrittenScheduler, serve

TAKES = "import sys; open(sys.argv[1], 'a').write(sys.stdin.read() + chr(10))"


@pytest.fixture
def sweep(tmp_path):
    """Two submitted runs, a and b. ``events()`` returns the notifications so far."""

    class Sweep:
        folder = tmp_path / "runs" / "demo"
        command = [sys.executable, "-c", TAKES, str(tmp_path / "heard")]

        def run(self, name):
            run = RunDir(self.folder / name)
            run.path.mkdir(parents=True)
            write_job(run, after=0, notify=self.command)
            return run

        def events(self):
            path = tmp_path / "heard"
            if path.exists():
                return [json.loads(line) for line in path.read_text().splitlines()]
            return []

    submitted = Sweep()
    submitted.a, submitted.b = submitted.run("a"), submitted.run("b")
    write_json(submitted.folder / "sweep.json", {"runs": ["a", "b", "never-submitted"]})
    return submitted


def end_run(run, cause="data", code=65):
    """Let an attempt of the run end by this cause; returns the exit code of its job."""

    def play():
        n = run.newest_attempt()
        if cause == "complete":
            create_json(run.result, {})
        elif cause == "cancelled":
            create_json(run.cancel, {"who": "ann"})
        else:
            run.write_cause(n, 0, cause, code, f"why {cause}")

    return serve(run, WrittenScheduler(code, play=play))


def test_notify_reports_stopped_run_and_end_of_sweep(sweep):
    assert end_run(sweep.a) == 65
    (event,) = sweep.events()
    assert abs(event.pop("time") - time.time()) < 60
    assert event == {
        "event": "run_stopped", "sweep": "demo", "run": "a", "folder": str(sweep.a.path), "attempt": 1,
        "cause": "data", "reason": "rank 0: why data",
    }  # fmt: skip
    assert end_run(sweep.b, "complete", 0) == 0
    ended = sweep.events()[1]
    assert ended["event"] == "sweep_ended"
    assert (ended["complete"], ended["failed"], ended["cancelled"]) == (["b"], ["a"], [])
    assert notify.send_events(sweep.a, "stop") == [] and [e["event"] for e in sweep.events()[2:]] == ["run_stopped"]


def test_notify_reports_end_of_sweep_again_after_retry(sweep):
    end_run(sweep.a)
    end_run(sweep.b)
    write_job(sweep.a, after=1, notify=sweep.command)
    end_run(sweep.a)
    assert [e["event"] for e in sweep.events()] == [
        "run_stopped", "run_stopped", "sweep_ended", "run_stopped", "sweep_ended",
    ]  # fmt: skip


def test_sweep_ends_if_others_wait_for_canary_that_failed(sweep):
    write_job(sweep.a, after=0, notify=sweep.command, canary={"steps": 50})
    write_job(sweep.b, token=None, after=0, notify=sweep.command, waits_for="a")
    end_run(sweep.a)
    assert [event["event"] for event in sweep.events()] == ["run_stopped", "sweep_ended"]
    assert sweep.events()[1]["failed"] == ["a", "b"]
    attempts.start_attempt(sweep.b, {})  # released by hand
    write_job(sweep.a, after=1, notify=sweep.command, canary={"steps": 50})
    end_run(sweep.a)
    assert [event["event"] for event in sweep.events()[2:]] == ["run_stopped"], "b may still complete"


def test_sweep_ends_if_canary_of_other_run_is_gone(sweep):
    write_job(sweep.a, after=0, notify=sweep.command)
    write_job(sweep.b, token=None, after=0, notify=sweep.command, waits_for="deleted")
    end_run(sweep.a)
    assert sweep.events()[-1]["event"] == "sweep_ended" and sweep.events()[-1]["failed"] == ["a", "b"]


def test_notify_ignores_requeued_and_cancelled_runs(sweep):
    assert end_run(sweep.a, "stopped", 75) == 75
    assert end_run(sweep.b, "cancelled", 75) == 75
    assert sweep.events() == []


def test_notify_ignores_end_of_evaluation_job(sweep):
    job = RunDir(sweep.folder / ".evaluate" / "a-1125")
    job.path.mkdir(parents=True)
    write_job(job, after=0, notify=sweep.command)
    end_run(job, "complete", 0)
    assert sweep.events() == [] and not (job.path.parent / ".notified").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        (["/nowhere/mail"], "No such file"),
        ([sys.executable, "-c", "import sys; sys.exit(3)"], "ended with 3"),
        ([sys.executable, "-c", "import time; time.sleep(60)"], "took longer"),
        (["true"], ""),
    ],
)
def test_failing_or_hanging_notify_command_leaves_decision_unchanged(sweep, words, said, monkeypatch):
    if said == "took longer":
        monkeypatch.setattr(notify, "DEADLINE", 0.5)
    write_job(sweep.a, after=0, notify=words)
    assert end_run(sweep.a) == 65
    log = sweep.a.logs / "1" / "job.err"
    assert said in (log.read_text() if said else "") and log.exists() is bool(said)
    assert attempts.current_end(sweep.a)["action"] == "stop"


def test_notify_reports_unobserved_end_once_at_next_start(sweep):
    n = attempts.start_attempt(sweep.a, {})
    sweep.a.write_cause(n, 0, "config", 78, "a key is unknown")
    assert serve(sweep.a) == 78
    assert [(e["event"], e["cause"]) for e in sweep.events()] == [("run_stopped", "config")]
    assert serve(sweep.a) == 78 and len(sweep.events()) == 1


@pytest.mark.long
def test_supervisor_sends_notifications(field, tmp_path):
    field.cluster.profile.notify = [sys.executable, "-c", TAKES, str(tmp_path / "heard")]
    bad = field.run("a", attempts={"1": {"0": "exit:78"}})
    good = field.run("b")
    write_json(field.sweep / "sweep.json", {"runs": ["a", "b"]})
    field.submit(bad, good)
    field.until(lambda: not field.left())
    events = [json.loads(line) for line in (tmp_path / "heard").read_text().splitlines()]
    assert sorted(event["event"] for event in events) == ["run_stopped", "sweep_ended"]
    assert next(event for event in events if event["event"] == "sweep_ended")["failed"] == ["a"]
