"""``Follower`` sends each step once, after its checkpoint, and resumes at the newest step of the tracker."""

import json
import shutil

import pytest

from flip.runs.command_record import COMMAND, content_of, record_checkpoint
from flip.runs.errors import ConfigError, StorageError
from flip.runs.lifecycle import RunState
from flip.runs.rundir import RunDir, write_json
from jobs.commands.follow import main
from jobs.runtime.program_metrics import Pattern, ProgramMetrics
from jobs.submitted_runs import clusters
from jobs.tracking import follower, tracker
from jobs.tracking.follower import Follower
from tests.jobs.tracking.run_files import BATCH, attempt, complete, log, save, score


@pytest.fixture(autouse=True)
def table(monkeypatch):
    monkeypatch.setitem(tracker.TRACKERS, "lines", "tests.jobs.tracking.lines_tracker:LinesTracker")


def send_once(run, close=True):
    sender = Follower(run, "lines", "project")
    sender.send()
    if close:
        sender.close()
    return sender


def records(run, key):
    text = (run.path / "trackers" / "lines" / "project.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if key in line]


def sent(run):
    return [(line["step"], line["values"].get("batch/loss")) for line in records(run, "step")]


def test_follower_sends_each_step_once_after_checkpoint(run):
    n = attempt(run, 0, range(1, 8))
    sender = send_once(run, close=False)
    assert not (run.path / "trackers").exists(), "without a checkpoint the tracker is not opened"
    save(run, n, 5)
    sender.send()
    assert sent(run) == [(step, 1 + step / 100) for step in range(1, 6)]
    sender.send()
    assert len(sent(run)) == 5


def test_follower_never_sends_lost_steps(run):
    n = attempt(run, 0, range(1, 8))
    save(run, n, 5)
    send_once(run)
    n = attempt(run, 5, range(6, 9))
    send_once(run)
    assert sent(run)[-1] == (5, 1.05), "steps 6 and 7 of attempt 1 are lost, and attempt 2 has no checkpoint yet"
    save(run, n, 8)
    send_once(run)
    assert sent(run)[5:] == [(6, 2.06), (7, 2.07), (8, 2.08)]


def test_follower_started_late_sends_only_surviving_steps(run):
    for resumes, stop, saved in ((0, 8, 5), (5, 7, None), (5, 12, 10)):
        n = attempt(run, resumes, range(resumes + 1, stop))
        if saved:
            save(run, n, saved)
    attempt(run, 10, ())
    shutil.rmtree(run.checkpoints / "pretrain" / f"{5 * BATCH}-1")  # retention deletes it
    send_once(run)
    assert sent(run) == [(s, 1 + s / 100) for s in range(1, 6)] + [(s, 3 + s / 100) for s in range(6, 11)]


def test_follower_sends_steps_once_after_damaged_checkpoint(run):
    save(run, attempt(run, 0, range(1, 11)), 10)
    send_once(run)
    n = attempt(run, 5, range(6, 13))  # the checkpoint of step 10 is damaged
    save(run, n, 12)
    send_once(run)
    assert [step for step, _ in sent(run)] == list(range(1, 13))
    assert sent(run)[9:] == [(10, 1.1), (11, 2.11), (12, 2.12)]


def test_follower_continues_at_newest_tracker_step_after_kill(run):
    n = attempt(run, 0, range(1, 6))
    save(run, n, 5)
    send_once(run, close=False)  # a killed follower does not store its position
    assert not (run.path / "trackers" / "lines.json").exists()
    log(run, n, range(6, 9))
    save(run, n, 8)
    send_once(run)
    assert [step for step, _ in sent(run)] == list(range(1, 9))


def test_follower_sends_complete_run_without_checkpoints(run):
    attempt(run, 0, range(1, 6))
    complete(run, 5)
    send_once(run)
    assert [step for step, _ in sent(run)] == [1, 2, 3, 4, 5]
    assert records(run, "summary")[-1]["summary"]["state"] == "complete"
    before = (run.path / "trackers" / "lines" / "project.jsonl").read_text()
    send_once(run)
    assert (run.path / "trackers" / "lines" / "project.jsonl").read_text() == before, "the second call sends nothing"


def test_follower_sends_scores_with_sample_count(run):
    n = attempt(run, 0, (1, 2, 3, 4))
    save(run, n, 4)
    score(run, 2, 0.25)
    send_once(run)
    score(run, 4, 0.5)
    complete(run, 4)
    send_once(run)
    send_once(run)
    rows = [(line["step"], line["values"]) for line in records(run, "step")]
    scores = [
        (step, values["scored_samples"], values["scores/val_top1"])
        for step, values in rows
        if "scored_samples" in values
    ]
    assert scores == [(2, 16, 0.25), (5, 32, 0.5)], "the late score gets a row after the last step"
    assert [step for step, _ in rows] == [1, 2, 3, 4, 5]


def test_follower_uses_same_id_for_all_attempts_and_new_id_for_copy(run, tmp_path):
    first = attempt(run, 0, (1, 2))
    save(run, first, 2)
    send_once(run)
    save(run, attempt(run, 2, (3,)), 3)
    send_once(run)
    shutil.copytree(run.path, tmp_path / "sweep" / "copy")
    copy = RunDir(tmp_path / "sweep" / "copy")
    send_once(copy)
    opened = records(copy, "open")
    assert len(opened) == 3 and len({line["open"] for line in opened[:2]}) == 1
    assert opened[2]["open"] != opened[0]["open"]
    assert (opened[0]["name"], opened[0]["group"], opened[0]["config"]["seed"]) == ("run", "sweep", 3)
    assert opened[0]["config"]["checkpoint.url"] == "s3://...@host/bucket"


def test_follower_skips_damaged_metric_lines(run):
    n = attempt(run, 0, (1,))
    with open(run.metrics / "1.jsonl", "a") as file:
        file.write('not JSON\n{"step": 7}\n[]\n{"step": 2, "sam')
    save(run, n, 2)
    sender = send_once(run, close=False)
    with open(run.metrics / "1.jsonl", "a") as file:
        file.write('ples": 16, "loss": 1.02}\n')
    sender.send()
    assert sent(run) == [(1, 1.01), (2, 1.02)]


def test_follower_retries_unavailable_tracker(run, monkeypatch):
    from tests.jobs.tracking.lines_tracker import LinesTracker

    real = LinesTracker.open
    answers = iter([False, True])

    def open_second_time(self, tracked_run, step):
        if not next(answers):
            raise StorageError("the tracker does not answer")
        return real(self, tracked_run, step)

    monkeypatch.setattr(LinesTracker, "open", open_second_time)
    monkeypatch.setattr(follower, "_wait", lambda seconds, ended: None)
    save(run, attempt(run, 0, (1, 2)), 2)
    rounds = iter([False, False, True])
    Follower(run, "lines", "project").follow(lambda: next(rounds))
    assert [step for step, _ in sent(run)] == [1, 2]


def test_follower_lock_excludes_second_follower(run):
    with follower.lock(run, "lines") as first, follower.lock(run, "lines") as second:
        assert first and not second
        tries = iter([False, False, True])
        with follower.lock(run, "lines", lambda: next(tries)) as third:
            assert not third
    with follower.lock(run, "lines") as reopened:
        assert reopened


def test_follow_command_sends_sweep_once_and_refuses_bad_arguments(run, capsys):
    save(run, attempt(run, 0, (1, 2)), 2)
    args = [str(run.path.parent), "--tracker", "lines", "--root", str(run.path.parents[1])]
    assert main([*args, "--once", "--project", "project"]) == 0
    assert capsys.readouterr().out == "sweep/run: up to date\n" and len(sent(run)) == 2
    assert main([*args, "--once"]) == 78
    assert "monitor.lines: no project for this run" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([str(run.path), "--tracker", "line", "--once"])
    assert "lines" in capsys.readouterr().err


def test_follow_command_sends_other_runs_if_one_cannot_be_locked(run, capsys):
    save(run, attempt(run, 0, (1, 2)), 2)
    first = run.path.with_name("a")
    shutil.copytree(run.path, first)
    (first / "trackers").write_text("no folder")
    args = [str(run.path.parent), "--tracker", "lines", "--root", str(run.path.parents[1])]
    assert main([*args, "--once", "--project", "project"]) != 0
    output = capsys.readouterr()
    assert output.err.startswith("sweep/a: ") and output.out == "sweep/run: up to date\n" and len(sent(run)) == 2


def test_follow_command_waits_for_first_start_and_for_requeued_job(run, monkeypatch, capsys):
    def states(_):
        step = next(steps)
        if step:
            save(run, attempt(run, step - 2, (step - 1, step)), step)
        return {run.path: RunState("queued" if step != 6 else "complete")}

    steps = iter([0, 2, 4, 6])
    monkeypatch.setattr(clusters, "states", states)
    monkeypatch.setattr(clusters, "poll_interval", lambda _: 0.0)
    monkeypatch.setattr(follower, "POLL", 0.0)
    root = str(run.path.parents[1])
    args = [str(run.path), "--tracker", "lines", "--project", "project", "--root", root]
    assert main([*args, "--once"]) == 0
    assert capsys.readouterr().out == "sweep/run: has not started\n"
    assert not (run.path / "trackers" / "lines").exists()
    assert main(args) == 0
    assert [step for step, _ in sent(run)] == [1, 2, 3, 4, 5, 6]
    assert len({line["open"] for line in records(run, "open")}) == 1, "one run of the tracker"


def test_follow_command_reports_damaged_record_and_sends_other_runs(run, capsys):
    save(run, attempt(run, 0, (1, 2)), 2)
    shutil.copytree(run.path, run.path.with_name("a"))
    (run.path.with_name("a") / "result.json").write_text("{")
    args = [str(run.path.parent), "--tracker", "lines", "--root", str(run.path.parents[1])]
    assert main([*args, "--once", "--project", "project"]) == 65
    output = capsys.readouterr()
    assert "a record is damaged" in output.err and output.out == "sweep/run: up to date\n"


def test_follow_command_ends_at_ctrl_c_before_all_is_sent(run, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    attempt(run, 0, (1,))
    monkeypatch.setattr(Follower, "follow", interrupt)
    args = [str(run.path), "--tracker", "lines", "--project", "project", "--root", str(run.path.parents[1])]
    with pytest.raises(KeyboardInterrupt):
        main([*args, "--once"])
    assert main(args) == 130, "without --once, Ctrl-C is how it ends"
    assert capsys.readouterr().out == "sweep/run: up to date\n"


def test_follower_refuses_run_without_project(run):
    with pytest.raises(ConfigError, match="--project"):
        Follower(run, "wandb")


def test_follower_sends_the_numbers_of_a_program(run, tmp_path):
    """The project is in command.json. A step is sent once the program has saved it."""
    run.config.unlink()
    record = {"argv": ["true"], "parameters": {"lr": 0.1}, "code": "c", "world": 1, "monitor": {"lines": "project"}}
    write_json(run.path / COMMAND, record)
    n = run.start_attempt({})
    source = Pattern(r"step (?P<step>\d+) loss (?P<loss>\S+)")
    for step in range(1, 6):
        source.on_line(f"step {step} loss {1 / step}")
    metrics = ProgramMetrics(run, n, source, {}, 0)
    metrics.finish()
    metrics.close("training")
    saved = tmp_path / "step-3"
    saved.write_text("weights")
    record_checkpoint(run, n, 3, saved, content_of(saved))
    sender = Follower(run, "lines")
    sender.send()
    sender.close()
    assert sent(run) == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert records(run, "open")[0]["config"]["set.lr"] == 0.1
