"""Tests of ``flip.read_metrics``: one row per step, from all attempts, ready for a data frame."""

import json

import pytest

import flip
from flip.runs.errors import ConfigError, DataError
from tests.jobs.outcomes import make


def write(run, n, *lines):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (run.metrics / f"{n}.jsonl").write_text("".join(f"{text}\n" for text in texts))


def test_each_step_stands_once_by_newest_attempt(tmp_path):
    run = make(tmp_path / "demo", "a", steps=10, complete=False)
    shares = {"shares": {"compute": 0.9}}
    write(run, 1, *({"step": step, "samples": 8 * step, "loss": 1.0, "stage": "pretrain"} for step in (1, 2, 3, 4)))
    write(run, 10, {"step": 5, "samples": 40, "loss": 3.0})
    write(run, 2, *({"step": step, "samples": 8 * step, "loss": 2.0, **shares} for step in (3, 4)))
    with open(run.metrics / "10.jsonl", "a") as file:
        file.write('{"step": 6, "samp')
    table = flip.read_metrics(run.path)
    assert table["step"] == [1, 2, 3, 4, 5] and table["attempt"] == [1, 1, 2, 2, 10]
    assert table["loss"] == [1.0, 1.0, 2.0, 2.0, 3.0] and table["stage"] == ["pretrain"] * 2 + [None] * 3
    assert table["shares.compute"] == [None, None, 0.9, 0.9, None]
    assert {len(column) for column in table.values()} == {5}, "a data frame needs columns of one length"


def test_run_without_steps_and_folder_without_run(tmp_path):
    assert flip.read_metrics(make(tmp_path / "demo", "a", steps=0, complete=False).path) == {}
    with pytest.raises(ConfigError, match="is no run directory"):
        flip.read_metrics(tmp_path)


@pytest.mark.parametrize("text", ["{", '{"samples": 8}', "[1]", '{"step": "x"}'])
def test_damaged_line_is_named(tmp_path, text):
    run = make(tmp_path / "demo", "a", steps=10, complete=False)
    write(run, 1, {"step": 1, "samples": 8}, text, {"step": 2, "samples": 16})
    with pytest.raises(DataError, match="line 2 cannot be read"):
        flip.read_metrics(run.path)
