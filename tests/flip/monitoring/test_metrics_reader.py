"""Tests of read_columns, which reads the metric lines of a run into columns."""

import json

import numpy as np
import pytest

from flip.monitoring import metrics_reader
from flip.monitoring.metrics_reader import FIELDS, read_columns
from flip.runs.rundir import RunDir


def write(run, n, lines, tail=""):
    run.metrics.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run.metrics / f"{n}.jsonl").write_text(text + tail, encoding="utf-8")


def line(step, **more):
    return {"step": step, "samples": 8 * step, "stage": "pretrain", "loss": step / 10, "storage": {"held": 1.5}, **more}


def test_read_metrics_prefers_highest_attempt_for_repeated_steps(tmp_path):
    run = RunDir(tmp_path)
    write(run, 2, [line(3, loss=30.0), line(4, loss=40.0)], tail='{"step": 5, "sam')
    write(run, 1, [line(1), line(2), line(3), line(7)])
    write(run, 10, [line(4, loss=400.0, seconds=9.0, saves=2, saving=1.5)])
    metrics = read_columns(run)
    assert len(metrics) == 5 and metrics["step"].tolist() == [1, 2, 3, 4, 7]
    assert metrics["loss"].tolist() == [0.1, 0.2, 30.0, 400.0, 0.7]
    assert metrics.attempt(2)["loss"].tolist() == [30.0, 40.0] and len(metrics.attempt(3)["loss"]) == 0
    assert (metrics.last("step"), metrics.last("seconds")) == (7, None)


def test_seconds_at_returns_value_of_last_line_up_to_samples(tmp_path):
    write(RunDir(tmp_path), 1, [line(10, seconds=1.0), line(20, seconds=2.5)])
    metrics = read_columns(RunDir(tmp_path))
    assert [metrics.seconds_at(s) for s in (79, 80, 100, 160, 10**9)] == [None, 1.0, 1.0, 2.5, 2.5]


def test_throughput_varies_by_quartiles_of_speed_per_stage(tmp_path):
    """The verdict is True if the throughput of any stage varies. Stages may differ in speed.

    The first line of each attempt and of each stage is warm-up and does not count.
    """

    def verdict(name, *attempts):
        run = RunDir(tmp_path / name)
        for n, speeds in enumerate(attempts, 1):
            first = sum(map(len, attempts[: n - 1])) + 1
            write(run, n, [line(first + i, samples_per_second=speed) for i, speed in enumerate(speeds)])
        return read_columns(run).throughput_varies([8 * 40])

    steady = [1.0, *[100.0, 96.0, 104.0] * 13]
    assert verdict("steady", steady) is False and verdict("short", steady[:12]) is None
    assert verdict("stages", [*steady, *[50.0] * 20]) is False
    assert verdict("restarts", *[[1.0, 100.0, 99.0]] * 13) is False
    assert verdict("stall", [*[100.0] * 38, 1.0, 1.0]) is False, "two slow lines do not make the throughput vary"
    for share in (13, 20, 27):
        assert verdict(f"shared{share}", [*[100.0] * share, *[70.0] * (40 - share)]) is True
    assert verdict("second", [*steady, *[100.0, 50.0] * 10]) is True


FILES = [
    "",
    "\n",
    "no json\n",
    '{"step": 1}\n',
    '{"step": "one", "samples": 1}\n',
    "null\n",
    "\ufeffnull\n",
    '{"step": 1}\nnull\n',
]


@pytest.mark.parametrize("text", FILES)
def test_read_metrics_reads_valid_file_despite_invalid_file(tmp_path, text):
    run = RunDir(tmp_path)
    write(run, 1, [line(1)])
    (run.metrics / "2.jsonl").write_text(text)
    (run.metrics / "notes.jsonl").write_text("not ours\n")
    assert read_columns(run)["step"].tolist() == [1]


def test_read_metrics_returns_empty_columns_if_run_has_no_metrics(tmp_path):
    metrics = read_columns(RunDir(tmp_path))
    assert len(metrics) == 0 and metrics.last("loss") is None and metrics.seconds_at(5) is None
    assert set(metrics.columns) == set(FIELDS)


def test_read_metrics_returns_exact_floats_of_many_lines(tmp_path):
    values = np.random.default_rng(0).normal(size=20_000)
    write(RunDir(tmp_path), 1, [line(i, loss=value) for i, value in enumerate(values.tolist())])
    assert (read_columns(RunDir(tmp_path))["loss"] == values).all()


DAMAGED = [
    "no json",
    "null",
    "[1]",
    '{"step": 2}',
    '{"step": 2.0, "samples": 16}',
    '{"step": -2, "samples": 16}',
    '{"step": 2, "samples": 2000000000000000000}',
    '{"step": 2, "samples": 16, "loss": 1e31}',
    '{"step": 2, "samples": 16, "loss": "x"}',
    '{"step": 2, "samples": 16, "loss": NaN}',
    '{"step": 2, "samples": 16, "accuracy": true}',
    '{"step": 2, "samples": 16, "time": -1}',
    '{"step": 2, "samples": 16, "stage": 5}',
]


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_line_is_left_out_and_named(tmp_path, text):
    """The parser of columns refuses what ``records.LINE`` refuses."""
    run = RunDir(tmp_path)
    write(run, 1, [line(1)], tail=text + "\n" + json.dumps(line(3)) + "\n")
    metrics = read_columns(run)
    assert metrics["step"].tolist() == [1, 3] and metrics["loss"].tolist() == [0.1, 0.3]
    (sentence,) = metrics.damage
    assert sentence.startswith(f"{run.metrics / '1.jsonl'}: 1 damaged lines are left out; line 2 cannot be read: ")


def test_both_parsers_return_the_same_columns(tmp_path, monkeypatch):
    run = RunDir(tmp_path)
    write(run, 1, [line(1, seconds=0.5, time=1e9), line(2, loss=None, accuracy=1), {"step": 3, "samples": 24}])
    fast = read_columns(run)
    monkeypatch.setattr(metrics_reader, "_parsed_by_pyarrow", lambda text: None)
    slow = read_columns(run)
    assert not fast.damage and not slow.damage
    for name in FIELDS:
        np.testing.assert_array_equal(fast.columns[name], slow.columns[name])
