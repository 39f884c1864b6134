"""Tests storage behind fsspec: listed keys have the form of the requested URL."""

import os

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from flip.checkpoint.remote import RemoteCheckpoint
from flip.data.storage.fsspec_storage import FsspecStorage
from flip.data.storage.retry import RetryPolicy
from flip.runs.addresses import SCHEMES, Scheme


class Accounts(MemoryFileSystem):
    """A file system that reads URLs as adlfs reads ``abfs://container@account/path``.

    The account is no part of the path; it selects the store.
    """

    protocol = "accounts"
    root_marker = ""
    cachable = False
    stores: dict = {}

    def __init__(self, account_name="", **options):
        super().__init__(**options)
        self.store, self.pseudo_dirs = self.stores.setdefault(account_name, ({}, [""]))

    @classmethod
    def _strip_protocol(cls, path):
        container, _, rest = path.removeprefix("accounts://").partition("/")
        return "/" + "/".join(filter(None, [container.partition("@")[0], rest.rstrip("/")]))

    @staticmethod
    def _get_kwargs_from_urls(path):
        return {"account_name": path.removeprefix("accounts://").partition("/")[0].partition("@")[2]}


@pytest.fixture
def accounts(monkeypatch):
    monkeypatch.setattr(Accounts, "stores", {})
    monkeypatch.setitem(SCHEMES, "accounts", Scheme("accounts of this test"))
    fsspec.register_implementation("accounts", Accounts, clobber=True)


@pytest.mark.parametrize("folder", ["accounts://runs@mine/a", "accounts://runs@mine/a/"])
def test_listed_keys_keep_account_of_requested_url(accounts, folder):
    storage = FsspecStorage()
    prefix = folder.rstrip("/")
    for name in ("commit.json", "deep/b.safetensors"):
        storage.put(f"{prefix}/{name}", b"1234")
    keys = dict(storage.list(folder))
    assert sorted(keys) == [f"{prefix}/commit.json", f"{prefix}/deep/b.safetensors"]
    assert {storage.stat(key).size for key in keys} == {4}
    assert list(storage.list("accounts://runs@other/a")) == []


def test_remote_checkpoint_delete_spares_checkpoint_of_other_account(accounts):
    storage = FsspecStorage()
    for account in ("mine", ""):  # "": the account that the environment names
        storage.put(f"accounts://runs@{account}/a/commit.json", b"{}")
    RemoteCheckpoint("accounts://runs@mine/a", RetryPolicy(deadline=1.0)).delete("commit.json")
    assert list(storage.list("accounts://runs@mine/a")) == []
    assert len(list(storage.list("accounts://runs@/a"))) == 1


def test_local_files_are_listed_as_file_urls(tmp_path):
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "c").write_bytes(b"12")
    assert [key for key, _ in FsspecStorage().list(f"file://{tmp_path}/a b")] == [f"file://{tmp_path}/a b/c"]


def test_put_syncs_local_file_and_its_folder(tmp_path, monkeypatch):
    """A checkpoint counts as soon as its files are accepted, as objects are."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    FsspecStorage().put(f"file://{tmp_path}/a/b", b"12")
    assert synced == [(tmp_path / "a" / "b").stat().st_ino, (tmp_path / "a").stat().st_ino]
