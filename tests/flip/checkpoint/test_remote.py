"""Checkpoints at a URL: whose record may name the address."""

import os

import pytest

from flip.checkpoint.remote import local_copy
from flip.runs.commit import Commit
from flip.runs.errors import PermissionDenied
from flip.runs.rundir import write_json

ADDRESS = "s3://others/runs/demo/a-1"


@pytest.fixture
def made(tmp_path):
    """A commit whose record another user may write."""

    def make(address=ADDRESS, mode=0o666):
        record = {"url": address, "files": {}, "stage": "pretrain", "samples": 8, "attempt": 1}
        write_json(tmp_path / "commit.json", record)
        (tmp_path / "commit.json").chmod(mode)
        return Commit(tmp_path, record)

    return make


@pytest.mark.parametrize("url", ["", "s3://other", "s3://another", "s3://others/runs/demo/a-12"])
def test_an_address_in_another_users_record_is_not_read(made, url):
    """It could be any host, or a file of the reader's own."""
    with pytest.raises(PermissionDenied, match="names an address, and its record is not trusted.*url=ADDRESS"):
        local_copy(made(), url=url).__enter__()


def test_nor_one_that_leads_out_of_the_place_that_was_named(made):
    with pytest.raises(PermissionDenied):
        local_copy(made("file:///data/../etc"), url="file:///data").__enter__()


@pytest.mark.parametrize(("mode", "url"), [(0o600, ""), (0o666, "file:///"), (0o666, "file:///runs/")])
def test_ones_own_record_and_a_named_place_are(made, mode, url):
    with local_copy(made("file:///runs/a-1", mode), url=url) as folder:
        assert not os.listdir(folder), "it names no files"
