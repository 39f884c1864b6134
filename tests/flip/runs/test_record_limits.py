"""Tests of the limits in flip/runs/records.py: how large a record may be, and that ours are smaller."""

import json

import pytest

from flip.files.creation import RECORD_LIMIT
from flip.runs import checkpoint_folder, records
from flip.runs.errors import CAUSES
from flip.runs.rundir import RunDir, read_record, write_json


@pytest.mark.parametrize("name", [*records.FIELDS, "other.json"])
def test_record_above_its_limit_is_refused_with_its_name(tmp_path, name):
    limit = records.limit_of(name)
    assert limit == RECORD_LIMIT == 1 << 20 or records.LIMITS[name][1], "a higher limit has its reason"
    (tmp_path / name).write_text(" " * (limit + 1))
    with pytest.raises(ValueError, match=rf"{name}: {limit + 1} bytes, more than the limit of {limit}"):
        read_record(tmp_path / name)


def test_limits_are_of_known_records():
    assert records.LIMITS.keys() <= records.FIELDS.keys() | {"export.json", "task.json"}
    assert max(limit for limit, _ in records.LIMITS.values()) <= 16 << 20


def test_checkpoint_of_thousands_of_ranks_is_read(tmp_path):
    run = RunDir(tmp_path / "run")
    path = checkpoint_folder.folder(run, "pretrain", 8, 1)
    path.mkdir(parents=True)
    facts = {"bytes": 1 << 40, "sha256": "f" * 64, "etag": "e" * 70}
    files = {f"optimizer-{rank:05d}-of-08192-{part}.safetensors": facts for rank in range(8192) for part in range(4)}
    checkpoint_folder.complete_checkpoint(
        path, {"stage": "pretrain", "samples": 8, "attempt": 1, "url": "s3://bucket/x"}, files
    )
    assert (path / "commit.json").stat().st_size > 2 << 20
    assert len(checkpoint_folder.read_checkpoint(path).record["files"]) == len(files)


@pytest.mark.parametrize("piece", [b"[],", b"{},", b"0,", b'"",'])
def test_record_with_too_many_values_is_refused_before_it_is_parsed(piece):
    text = b"[" + piece * records.MAX_PARTS + b"0]"
    with pytest.raises(ValueError, match="more than 500,000 values"):
        records.parse(text)


@pytest.mark.long
def test_long_messages_are_written_in_part(tmp_path):
    """A compiler may write megabytes; the end has the error."""
    run = RunDir(tmp_path / "run")
    attempt = run.start_attempt({})
    run.write_cause(attempt, 0, "crash", CAUSES["crash"], "x" * 3_000_000 + "the error", trace="y" * 3_000_000)
    (cause,) = run.causes(attempt)
    assert cause["cause"] == "crash" and cause["reason"].startswith("xxx")
    text = (run.attempt(attempt) / "cause.0.json").read_text()
    assert len(text) < 300_000 and "the error" in json.loads(text)["reason"]


def test_record_of_many_runs_is_read(tmp_path):
    names = [f"{'n' * 200}-{number}" for number in range(10_000)]
    write_json(tmp_path / "sweep.json", {"name": "x", "runs": names})
    assert read_record(tmp_path / "sweep.json")["runs"] == names
