"""Tests that export.json of a foreign folder is read as a checkpoint of that folder or rejected with a reason."""

import json
from contextlib import suppress

from hypothesis import example, given

from flip.checkpoint import export_record
from flip.runs import checkpoint_folder
from flip.runs.errors import ConfigError, DataError
from tests.parsers.spoil import DEEP, texts

FILES = {"a.safetensors": {"bytes": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}}


@given(texts({"form": 1, "files": FILES, "stage": "pretrain", "samples": 64, "attempt": 1}))
@example(DEEP)
@example(json.dumps({"form": 1, "files": {"../escaped": FILES["a.safetensors"]}, "stage": "a"}).encode())
def test_read_export_verifies_or_rejects_any_record(tmp_path, text):
    (tmp_path / export_record.EXPORT_FILE).write_bytes(text)
    with suppress(DataError, ConfigError, checkpoint_folder.CorruptCheckpoint):
        export = export_record.read_export(tmp_path)
        assert all((tmp_path / name).resolve().is_relative_to(tmp_path) for name in export.record["files"])
        checkpoint_folder.verify(export)
