"""Tests of checkpoints at a URL: their address, verification, and which records ``local_copy`` trusts."""

import hashlib
import os

import pytest

from flip.checkpoint import remote
from flip.checkpoint.remote import local_copy
from flip.data.storage.retry import RetryPolicy
from flip.runs.checkpoint_folder import CorruptCheckpoint, SavedCheckpoint
from flip.runs.errors import PermissionDenied
from flip.runs.rundir import write_json

ADDRESS = "s3://others/runs/demo/a-1"


@pytest.fixture
def make_checkpoint(tmp_path):
    """Returns a function that makes a checkpoint. By default other users may write its record."""

    def make(address=ADDRESS, mode=0o666):
        record = {"url": address, "files": {}, "stage": "pretrain", "samples": 8, "attempt": 1}
        write_json(tmp_path / "commit.json", record)
        (tmp_path / "commit.json").chmod(mode)
        return SavedCheckpoint(tmp_path, record)

    return make


@pytest.mark.parametrize("url", ["", "s3://other", "s3://another", "s3://others/runs/demo/a-12"])
def test_local_copy_rejects_url_of_untrusted_record_outside_given_prefix(make_checkpoint, url):
    """The URL could name any host, or a private file of the reader."""
    with pytest.raises(PermissionDenied, match="names an address, and its record is not trusted.*url=ADDRESS"):
        local_copy(make_checkpoint(), url=url).__enter__()


def test_local_copy_rejects_url_that_leaves_given_prefix_via_dotdot(make_checkpoint):
    with pytest.raises(PermissionDenied):
        local_copy(make_checkpoint("file:///data/../etc"), url="file:///data").__enter__()


@pytest.mark.parametrize(("mode", "url"), [(0o600, ""), (0o666, "file:///"), (0o666, "file:///runs/")])
def test_local_copy_accepts_own_record_or_url_below_given_prefix(make_checkpoint, mode, url):
    with local_copy(make_checkpoint("file:///runs/a-1", mode), url=url) as folder:
        assert not os.listdir(folder), "the record names no files"


def test_verify_reads_files_of_storage_without_etags(tmp_path):
    """Size alone does not show that a file was written wrongly."""
    (tmp_path / "a").write_bytes(b"right")
    expected = {"bytes": 5, "sha256": hashlib.sha256(b"right").hexdigest()}
    record = {"url": f"file://{tmp_path}", "files": {"a": expected}, "stage": "pretrain", "samples": 8, "attempt": 1}
    source = SavedCheckpoint(tmp_path, record)
    remote.verify(source, RetryPolicy())
    (tmp_path / "a").write_bytes(b"wrong")
    with pytest.raises(CorruptCheckpoint):
        remote.verify(source, RetryPolicy())
