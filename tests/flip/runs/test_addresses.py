"""Tests the table of admitted addresses, for settings and for records."""

import pytest

from flip.checkpoint.remote import RemoteCheckpoint
from flip.config.merge import merge
from flip.config.validate import check_fields
from flip.data.manifest.build import shard_key
from flip.data.storage.base import is_remote
from flip.data.storage.fsspec_storage import FsspecStorage
from flip.data.storage.retry import RetryPolicy
from flip.runs.addresses import SCHEMES, Scheme, as_url, require_admitted, scheme_of, why_refused
from flip.runs.errors import ConfigError
from flip.runs.rundir import write_json

POLICY = RetryPolicy(deadline=1.0)
ADMITTED = ["/data/runs", "s3://bucket/a", "file:///data", "gs://b/c", "az://b/c", "abfs://container@account/path"]
REFUSED = [
    "reference::s3://bucket/refs.json", "simplecache::s3://b/c", "s3://b/c::file:///d", "/data/a::b", "a::", "://x",
    "http://host/x", "https://host/x", "github://org:repo@main/x", "ssh://host/x", "jar://x", "data:text/plain,x",
    "S3://bucket/a", "runs", "",
]  # fmt: skip


@pytest.mark.parametrize("address", ADMITTED)
def test_admitted_address(address):
    require_admitted(address)
    assert scheme_of(address) in ("", *SCHEMES)


@pytest.mark.parametrize("address", REFUSED)
def test_address_is_refused_with_its_reason_and_the_remedy(address):
    with pytest.raises(ConfigError, match="is no address of a storage: .*one of these schemes: abfs, ") as error:
        require_admitted(address, "commit.json")
    assert error.value.code == 78 and "commit.json" in str(error.value)


@pytest.mark.parametrize("address", [each for each in REFUSED if "::" in each or "://" in each])
def test_setting_is_refused_like_a_record(address):
    with pytest.raises(ConfigError):
        RemoteCheckpoint(address, POLICY)
    with pytest.raises(ConfigError):
        FsspecStorage().put(address, b"")
    with pytest.raises(ConfigError, match="checkpoint.url: "):
        check_fields(merge([("x.yaml", {"checkpoint": {"url": address}})]))


def test_chain_is_not_read(tmp_path):
    """fsspec reads ``reference::`` files, and executed the templates in them."""
    write_json(tmp_path / "owner.json", {"version": 1, "templates": {"u": "x"}, "refs": {"a": "b"}})
    with pytest.raises(ConfigError, match="it is a chain of addresses"):
        RemoteCheckpoint(f"reference::file://{tmp_path}", POLICY).read_small("owner.json", 100)


def test_shards_use_the_same_table(monkeypatch):
    assert is_remote("s3://b/0.tar") and is_remote("gs://b/0.tar") and not is_remote("/s3://b")
    for address in ("gs://b/0.tar", "https://h/0.tar?download=true", "abfs://container@account/0.tar"):
        assert shard_key(address) == address


@pytest.mark.parametrize(
    "address",
    [
        "reference::s3://b/0.tar", "simplecache::gs://b/0.tar", "gs://b/0.tar::file:///c", "filecache::https://h/0.tar",
        "s3://b/0.tar::https://h/0.tar", "github://o:r@main/0.tar", "zip://0.tar", "HTTPS://h/0.tar", "pipe:cat",
        "https://user:secret@h/0.tar", "https://h/0.tar?token=secret", "sftp://me@h/0.tar",
    ],
)  # fmt: skip
def test_address_of_shard_is_refused_without_its_secret(address):
    with pytest.raises(ConfigError) as error:
        shard_key(address)
    assert error.value.code == 78 and "secret" not in str(error.value)


def test_new_storage_is_a_row(monkeypatch):
    assert "'tape' is not admitted" in why_refused("tape://x")
    monkeypatch.setitem(SCHEMES, "tape", Scheme("tapes"))
    assert not why_refused("tape://x") and as_url("/a/") == "file:///a" and as_url("tape://x/") == "tape://x"
