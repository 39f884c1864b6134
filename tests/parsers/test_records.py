"""Fuzz tests of a run's JSON: checkpoints, pins, causes, metrics. Damage raises a documented error or is ignored."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flip.monitoring import metrics_reader
from flip.runs import checkpoint_folder
from flip.runs.errors import CAUSES
from flip.runs.metric_lines import newest_line
from flip.runs.records import PIN
from flip.runs.rundir import RunDir, read_json, read_record, write_json
from tests.parsers.spoil import DEEP, VALUES, spoiled, texts

pytestmark = pytest.mark.timeout(60)

CHECKPOINT = {
    "attempt": 1,
    "files": {
        "a.safetensors": {"bytes": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}
    },
    "samples": 64,
    "stage": "pretrain",
}
LINE = {"step": 3, "samples": 192, "loss": 2.5, "seconds": 1.25, "time": 1700000000.0, "samples_per_second": 100.0}
CAUSE = {"cause": "data", "code": 65, "rank": 0, "reason": "no", "time": 1.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = RunDir(tmp_path_factory.mktemp("records") / "sweep" / "run")
    run.start_attempt({})
    run.metrics.mkdir()
    return run


@pytest.fixture(scope="module")
def commit_file(run):
    """Return the path of commit.json of a checkpoint; a second checkpoint stays valid."""
    for samples in (64, 32):
        folder = checkpoint_folder.folder(run, "pretrain", samples, 1)
        folder.mkdir(parents=True)
        (folder / "a.safetensors").write_bytes(b"abc")
        write_json(folder / checkpoint_folder.COMMIT_FILE, dict(CHECKPOINT, samples=samples))
    return checkpoint_folder.folder(run, "pretrain", 64, 1) / checkpoint_folder.COMMIT_FILE


@given(texts(CHECKPOINT))
@example(DEEP)
@example(json.dumps(dict(CHECKPOINT, files={"../../../escaped": CHECKPOINT["files"]["a.safetensors"]})).encode())
@example(json.dumps(dict(CHECKPOINT, files={"/etc/passwd": CHECKPOINT["files"]["a.safetensors"]})).encode())
def test_read_checkpoint_verifies_or_rejects_any_record(run, commit_file, text):
    commit_file.write_bytes(text)
    try:
        checkpoint = checkpoint_folder.read_checkpoint(commit_file.parent)
        for name in checkpoint.record["files"]:
            assert (checkpoint.path / name).resolve().parent == checkpoint.path
        checkpoint_folder.verify(checkpoint)
        checkpoint_folder.summary(checkpoint)
    except checkpoint_folder.CorruptCheckpoint:
        pass
    assert 32 in [entry.samples_seen for entry in checkpoint_folder.checkpoints(run)]


@given(texts({"by": "/x", "stage": "pretrain", "samples": 64, "time": 1.0}))
@example(DEEP)
def test_retention_deletes_nothing_that_is_pinned_or_if_pin_cannot_be_read(run, commit_file, text):
    write_json(commit_file, CHECKPOINT)
    run.pins.mkdir(exist_ok=True)
    (run.pins / "one.json").write_bytes(text)
    deleted = []
    try:
        checkpoint_folder.apply_retention(run, 1, keep=1, delete=deleted.append)
    except OSError:
        assert deleted == []
    else:
        assert read_record(run.pins / "one.json", PIN)  # raises ValueError if it cannot be read
        deleted_checkpoints = {
            (c.stage, c.samples_seen) for c in checkpoint_folder.checkpoints(run) if c.path in deleted
        }
        assert not deleted_checkpoints & checkpoint_folder.pinned(run)


@given(texts(CAUSE))
@example(DEEP)
def test_causes_have_typed_fields_for_any_cause_file(run, text):
    (run.attempt(1) / "cause.0.json").write_bytes(text)
    (cause,) = run.causes(1)
    assert isinstance(cause["cause"], str) and isinstance(cause["rank"], int)


@given(st.lists(texts(LINE) | st.just(json.dumps(LINE).encode()), max_size=4), st.sampled_from([b"", b"\n"]))
@example([DEEP], b"\n")
def test_read_metrics_survives_any_lines(run, lines, end):
    (run.metrics / "1.jsonl").write_bytes(b"\n".join(lines) + end)
    metrics = metrics_reader.read_columns(run)
    assert all(isinstance(step, float) for step in metrics["step"].tolist())
    metrics.last("loss"), metrics.seconds_at(100)
    assert isinstance(newest_line(run), dict)


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=5))
def test_read_metrics_returns_losses_as_written(run, losses):
    lines = [dict(LINE, step=step, loss=loss) for step, loss in enumerate(losses)]
    (run.metrics / "1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert metrics_reader.read_columns(run)["loss"].tolist() == losses and newest_line(run) == lines[-1]


@pytest.mark.parametrize("name", ["²", "x", "1.tmp.7"])
def test_run_ignores_attempts_with_non_numeric_names(tmp_path, name):
    run = RunDir(tmp_path / "sweep" / "run")
    run.start_attempt({})
    (run.attempts / name).mkdir()
    run.metrics.mkdir()
    (run.metrics / f"{name}.jsonl").write_text("{}\n")
    assert run.attempt_numbers() == [1] and len(metrics_reader.read_columns(run)) == 0 and newest_line(run) == {}


@given(spoiled(b'{"a": [1, 2.5, null, "b"]}') | st.binary(max_size=20))
@example(DEEP)
@example(b"1" * 5000)
def test_read_json_names_file_in_error_for_any_bytes(tmp_path, data):
    path = tmp_path / "some.json"
    path.write_bytes(data)
    try:
        read_json(path)
    except ValueError as error:
        assert str(path) in str(error)


@given(VALUES)
def test_write_json_round_trips_or_rejects_any_value(tmp_path, value):
    path = tmp_path / "some.json"
    try:
        write_json(path, value)
    except ValueError:  # not finite, or text that UTF-8 cannot encode
        return
    assert read_json(path) == value


def test_causes_have_valid_exit_codes():
    assert set(CAUSES.values()) <= set(range(128))
