"""Tests of the goodput account: how runs spent each second of their time, and the advice that follows."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from flip.config import merge
from flip.config.merge import dump
from flip.monitoring.results import read_run
from flip.runs.rundir import write_json
from jobs.pages.html import render
from jobs.reporting import goodput, seed_groups
from jobs.reporting.report import findings
from tests.jobs.outcomes import config, make

HOUR = 3600.0


def run_of(folder, *attempts, submitted=1000.0, name="a", **settings):
    """A run with attempts (start.json, ready.json or None, metric lines, end.json)."""
    run = make(folder, name, steps=0, complete=False)
    run_config = config()
    run_config.resources.cpus = 4
    run_config.checkpoint.minutes = 15.0
    for key, value in settings.items():
        section, _, field = key.partition("_")
        setattr(getattr(run_config, section), field, value)
    run.config.write_text(dump(run_config), encoding="utf-8")
    if submitted is not None:
        write_json(run.path / "job.json", {"after": 0, "time": submitted})
    run.metrics.mkdir()
    for n, (start, ready, lines, end) in enumerate(attempts, 1):
        run.attempt(n).mkdir(parents=True)
        for file, record in (("start", start), ("ready", ready), ("end", end)):
            if record is not None:
                write_json(run.attempt(n) / f"{file}.json", record)
        text = "".join(json.dumps({"attempt": n, **line}) + "\n" for line in lines)
        (run.metrics / f"{n}.jsonl").write_text(text)
    return run


def line(time, samples, speed=10.0, **fields):
    return {
        "time": time,
        "samples": samples,
        "step": samples // 10,
        "samples_per_second": speed,
        "seconds": 0.0,
        **fields,
    }


def end(time, saved, cause="crash", code=70, progressed=True):
    return {
        "time": time, "commits": saved, "cause": cause, "code": code, "committed": progressed,
        "action": "requeue", "reason": "as asked", "delay": 0.0, "observed": code is not None,
    }  # fmt: skip


TWO = (
    # 50 s of start-up, 100 + 100 s of steps, 20 s of saves and 10 s of other work in between, 5 s until the end
    (
        {"time": 1100.0, "resumes_from": 0},
        {"time": 1150.0, "samples": 0},
        [line(1250.0, 1000, saving=0.0, saves=0), line(1380.0, 2000, saving=20.0, saves=1)],
        end(1385.0, 1500),
    ),
    # 15 s of waiting, 30 s of start-up; 500 repeated samples, 1000 new samples, and 500 without a metrics line
    (
        {"time": 1400.0, "resumes_from": 1500},
        {"time": 1430.0, "samples": 1500},
        [line(1530.0, 2500), line(1580.0, 3000)],
        end(1640.0, 3500, "stopped", 75),
    ),
)


def seconds(account):
    """Part -> seconds, for a run on four cores."""
    return {part: round(hours * HOUR / 4, 6) for part, hours in account.hours.items() if hours}


def test_of_run_assigns_every_second_of_two_attempts_to_a_part(tmp_path):
    account = goodput.of_run(read_run(run_of(tmp_path / "s", *TWO).path))
    assert account.unit == "core" and account.attempts == 2 and account.interruptions == 1
    assert seconds(account) == {
        "starting": 50 + 30, "useful": 150 + 150 + 50, "repeated": 50, "saving": 20, "other": 10 + 10, "lost": 5,
    }  # fmt: skip
    assert account.total * HOUR / 4 == pytest.approx((1385 - 1100) + (1640 - 1400))
    assert account.waiting_hours * HOUR == pytest.approx(100 + 15)


def test_of_run_reports_unknown_time_if_records_lack_fields(tmp_path):
    start, _, lines, ended = TWO[0]
    second = TWO[1]
    bare = [{key: value for key, value in row.items() if key not in ("saves", "saving")} for row in lines]
    old = run_of(tmp_path / "s", (start, None, bare, ended), (second[0], None, *second[2:]), submitted=None)
    account = goodput.of_run(read_run(old.path))
    assert seconds(account)["starting"] == 80, "the first metric line gives the start-up time"
    assert "saving" not in seconds(account) and seconds(account)["other"] == 20 + 10 + 10
    assert account.waiting_hours * HOUR == pytest.approx(15), "the waiting time of the first attempt is unknown"
    untimed = run_of(tmp_path / "s", (start, None, [{"samples": 10, "step": 1}], ended), submitted=None, name="b")
    account = goodput.of_run(read_run(untimed.path))
    assert seconds(account) == {"unknown": 285} and account.waiting_hours is None
    assert goodput.cells([account])[0]["waited"] == "unknown"


def test_of_run_counts_unobserved_end_at_last_logged_line(tmp_path):
    """Its end.json is written at the start of the next attempt, maybe hours later; the run did not use that time."""
    unseen = {**end(9000.0, 0, "node", None, progressed=False)}
    later = ({"time": 9000.0, "resumes_from": 0}, None, [], None)
    account = goodput.of_run(read_run(run_of(tmp_path / "s", (*TWO[0][:3], unseen), later).path))
    assert seconds(account) == {"starting": 50, "repeated": 200, "saving": 20, "other": 10}
    assert account.waiting_hours * HOUR == pytest.approx(100), "the waiting time after the unobserved end is unknown"


def test_of_run_does_not_count_time_between_submissions_as_waiting(tmp_path):
    """The second attempt was the first of a submission whose time is no longer known."""
    (start, *rest) = TWO[0]
    second = TWO[1]
    run = run_of(tmp_path / "s", (start, *rest), ({**second[0], "after": 1}, *second[1:]))
    assert goodput.of_run(read_run(run.path)).waiting_hours * HOUR == pytest.approx(100)


def test_of_run_counts_attempt_without_checkpoint_as_lost(tmp_path):
    uncommitted = (
        {"time": 1100.0, "resumes_from": 0},
        {"time": 1150.0, "samples": 0},
        [],
        end(1300.0, 0, progressed=False),
    )
    assert seconds(goodput.of_run(read_run(run_of(tmp_path / "s", uncommitted).path))) == {"starting": 50, "lost": 150}


def test_of_run_counts_unsaved_steps_of_newest_attempt_as_lost(tmp_path):
    """No attempt repeats them yet: 500 of 2000 samples were not saved, 5 s have no line."""
    account = goodput.of_run(read_run(run_of(tmp_path / "s", TWO[0]).path))
    assert seconds(account) == {"starting": 50, "useful": 150, "lost": 50 + 5, "saving": 20, "other": 10}


def test_of_run_counts_more_repeated_time_after_damaged_checkpoint(tmp_path):
    second = (TWO[1][0], {"time": 1430.0, "samples": 1000}, *TWO[1][2:])
    account = goodput.of_run(read_run(run_of(tmp_path / "s", TWO[0], second).path))
    assert seconds(account)["repeated"] == 100


def test_of_run_counts_running_attempt_until_now(tmp_path):
    run = run_of(tmp_path / "s", (*TWO[0][:3], None))
    assert seconds(goodput.of_run(read_run(run.path), now=1400.0))["unknown"] == 20
    assert "unknown" not in seconds(goodput.of_run(read_run(run.path)))


def cut(count=6):
    """Attempts with 1000 s of steps each, which save once, halfway, and are killed."""
    rows = []
    for i in range(count):
        t = 2000.0 * i
        s = 5000 * i
        lines = [line(t + 1000.0, s + 10_000, saves=1, saving=2.0, data_wait=0.5)]
        start = {"time": t, "resumes_from": s}
        rows.append((start, {"time": t, "samples": s}, lines, end(t + 1000.0, s + 5000, code=137)))
    return rows


def test_advice_suggests_longer_wall_limit_or_more_data_workers(tmp_path):
    attempts = []
    for i, (a, b) in enumerate(pairwise(range(0, 12_000, 4000))):
        lines = [line(a + 3600.0, 3000 * (i + 1), data_wait=0.0)]
        start = {"time": float(a), "resumes_from": 3000 * i}
        ready = {"time": a + 3300.0, "samples": 3000 * i}
        attempts.append((start, ready, lines, end(b - 400.0, 3000 * (i + 1), "stopped", 75)))
    run = run_of(tmp_path / "s", *attempts, resources_hours=1.0)
    assert goodput.of_run(read_run(run.path)).advice.startswith("resources.hours=2 in place of 1: 2 attempts")
    slow = [line(100.0 * i, 1000 * i, data_wait=0.5) for i in range(1, 8)]
    hungry = ({"time": 0.0, "resumes_from": 0}, {"time": 0.0, "samples": 0}, slow, end(700.0, 7000, "stopped", 75))
    account = goodput.of_run(read_run(run_of(tmp_path / "s", hungry, name="b").path))
    assert account.advice == "data.workers=2 in place of 1: steps wait 50.0 % for data"
    assert account.gain == pytest.approx(0.25)


def test_with_sums_adds_up_runs_of_sweep_and_page_shows_sum(tmp_path):
    run_of(tmp_path / "s", *TWO)
    run_of(tmp_path / "s", *cut(), name="b")
    outcomes = [read_run(tmp_path / "s" / name) for name in "ab"]
    first, second, combined = goodput.with_sums(outcomes)
    assert combined.runs == 2 and combined.total == pytest.approx(first.total + second.total)
    assert combined.advice.startswith("b: data.workers=")
    shares = goodput.as_dict([first, second, combined])[2]["share"]
    assert sum(shares.values()) == pytest.approx(1)
    html = render("s", findings(outcomes))
    assert "How the time was spent" in html and "all of s" in html and "b: data.workers=" in html


def test_resources_count_gpus_or_else_cores():
    assert goodput.resources({"resources.nodes": 2, "resources.gpus": 8, "resources.processes": 8}) == (16, "GPU")
    assert goodput.resources({"resources.processes": 2, "compute.threads": 3, "data.workers": 1}) == (8, "core")


@pytest.mark.parametrize("resources", [{}, {"cpus": 6}, {"gpus": 2}, {"nodes": 3, "processes": 2}])
def test_goodput_and_results_table_count_same_hours(tmp_path, resources):
    """All reserved cores count, not only those that threads and loader processes use."""
    run = make(tmp_path / "s", "a")
    run_config = merge.read_config(run.config)
    for key, value in resources.items():
        setattr(run_config.resources, key, value)
    run.config.write_text(merge.dump(run_config), encoding="utf-8")
    outcome = read_run(run.path)
    width, kind = goodput.resources(outcome.settings)
    assert seed_groups.hours(outcome, f"{kind}-hours", 7200.0) == 2 * width


def test_account_of_run_without_attempts_is_empty(tmp_path):
    run = make(Path(tmp_path) / "s", "a", steps=0, complete=False)
    (account,) = goodput.with_sums([read_run(run.path)])
    assert account.total == 0 and account.advice == "" and goodput.render([account])


def test_of_run_counts_spares_and_only_used_nodes_of_range(tmp_path):
    """Four nodes and a spare are requested; the second attempt had two of the four."""
    starts = [{**attempt[0], "world": world} for attempt, world in zip(TWO, (4, 2), strict=True)]
    attempts = [(start, *attempt[1:]) for start, attempt in zip(starts, TWO, strict=True)]
    shape = {"resources_nodes": 4, "resources_least_nodes": 2, "resources_spares": 1}
    outcome = read_run(run_of(tmp_path / "s", *attempts, **shape).path)
    account = goodput.of_run(outcome)
    assert account.total * HOUR / 4 == pytest.approx(5 * (1385 - 1100) + 3 * (1640 - 1400))
    assert outcome.samples_by_world == {2: 3000 - 1500, 4: 1500}
    page = render("t", findings([outcome]))
    assert "1,500 at W = 2, 1,500 at W = 4" in page
