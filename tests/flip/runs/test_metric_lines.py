"""Tests of the only reader of metric lines: in order, from where it stopped, and newest first."""

import json
import os

import pytest

from flip.runs import metric_lines
from flip.runs.metric_lines import metric_file, metric_files, newest_line
from flip.runs.rundir import RunDir


def line(step, **more):
    return {"step": step, "samples": 8 * step, "stage": "pretrain", "loss": step / 10, "storage": {"held": 1.5}, **more}


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path)
    run.metrics.mkdir()
    return run


def append(run, n, *lines):
    texts = [item if isinstance(item, str) else json.dumps(item) + "\n" for item in lines]
    with open(run.metrics / f"{n}.jsonl", "a") as file:
        file.write("".join(texts))


def test_lines_of_an_attempt_in_order(run):
    append(run, 1, line(1), line(2), "\n", line(3, loss=None), '{"step": 4, "samp')
    file = metric_file(run, 1)
    without_loss = line(3)
    del without_loss["loss"]
    assert list(file) == [line(1), line(2), without_loss]
    assert (file.damaged, file.problem) == (0, ""), "a blank line and an incomplete one are not damaged"


def test_attempt_without_metrics(run):
    file = metric_file(run, 1)
    assert list(file) == []
    assert list(file.newest_first()) == []
    assert file.complete_lines() == b""
    assert file.damaged == 0
    append(run, 1, line(1))
    assert list(file) == [line(1)], "it may appear later"


def test_growing_file_is_read_from_where_the_reader_stopped(run):
    append(run, 1, line(1), line(2), '{"step": 3, "samples": 2')
    file = metric_file(run, 1)
    assert next(iter(file)) == line(1)
    assert [each["step"] for each in file] == [2], "an iteration that was left continues after its last line"
    assert list(file) == []
    append(run, 1, "4}\n", line(4))
    assert [each["step"] for each in file] == [3, 4]


@pytest.mark.parametrize("text", [
    "no json", "\0\0\0", "\xff", "null", "3", "[4]", "{}", '{"samples": 8}', '{"step": 2}',
    '{"step": null, "samples": 8}', '{"step": "2", "samples": 16}', '{"step": 2.0, "samples": 16}',
    '{"step": -2, "samples": 16}', '{"step": 2, "samples": 16, "loss": NaN}',
    '{"step": 2, "samples": 16, "accuracy": "x"}', "[" * 20_000,
])  # fmt: skip
def test_damaged_line_is_left_out_and_counted(run, text):
    append(run, 1, line(1), text + "\n", line(3), text + "\n")
    file = metric_file(run, 1)
    assert [each["step"] for each in file] == [1, 3]
    assert file.damaged == 2 and file.problem.startswith("line 2 cannot be read: ")
    assert [each["step"] for each in file.newest_first()] == [3, 1]


def test_newest_first_reads_only_the_end_of_a_large_file(run, monkeypatch):
    monkeypatch.setattr(metric_lines, "TAIL_BYTES", 1000)
    append(run, 1, *(line(step) for step in range(100)), '{"step": 100')
    steps = [each["step"] for each in metric_file(run, 1).newest_first()]
    assert steps == list(range(99, 99 - len(steps), -1)) and 5 < len(steps) < 20


def test_newest_line_of_a_run_is_that_of_the_highest_attempt_with_a_valid_line(run):
    assert newest_line(run) == {}
    append(run, 9, line(1))
    append(run, 10, line(2), line(3), "\0\0\0\n", '{"step": 5')
    append(run, 11, "\0\n")
    append(run, "notes", line(7))
    assert newest_line(run) == line(3) and list(metric_files(run)) == [9, 10, 11]


def test_file_that_is_not_regular_is_refused_without_waiting(run):
    os.mkfifo(run.metrics / "1.jsonl")
    with pytest.raises(ValueError, match=r"1\.jsonl: not a regular file"):
        list(metric_file(run, 1))
    assert list(metric_file(run, 1).newest_first()) == []


def test_text_ends_with_the_last_complete_line(run):
    append(run, 1, line(1), '{"step": 2')
    assert metric_file(run, 1).complete_lines() == json.dumps(line(1)).encode() + b"\n"
