"""Tests which manifests may name addresses: those that no other person can have written."""

import os

import pytest

from flip.data.manifest.manifest import Manifest, write
from flip.runs.errors import ConfigError, PermissionDenied
from tests.synthetic import make_dataset


def manifest_of(folder, keys):
    """A manifest with other keys, as its author would write it."""
    local = Manifest.load(make_dataset(folder / "shards", 40, 2, size=16, chunk=4))
    local.keys = list(keys)
    return write(folder / "manifest", local, local.checksums).folder


@pytest.mark.parametrize("scheme", ["https", "gs", "sftp", "memory"])
def test_addresses_of_a_manifest_that_others_may_write_are_not_followed(tmp_path, scheme):
    folder = manifest_of(tmp_path, [f"{scheme}://host/{i}.tar" for i in range(2)])
    assert Manifest.load(folder).keys[1] == f"{scheme}://host/1.tar"
    (folder / "keys.txt").chmod(0o666)
    with pytest.raises(PermissionDenied, match="names addresses, and it is not trusted: .*chmod") as error:
        Manifest.load(folder)
    assert error.value.code == 77
    (folder / "keys.txt").chmod(0o644)
    folder.chmod(0o777)
    with pytest.raises(PermissionDenied):
        Manifest.load(folder)


def test_addresses_of_s3_and_paths_of_any_manifest_are_read(tmp_path):
    for name, key in (("a", "s3://bucket/{}.tar"), ("b", "/data/{}.tar")):
        (tmp_path / name).mkdir()
        folder = manifest_of(tmp_path / name, [key.format(i) for i in range(2)])
        (folder / "keys.txt").chmod(0o666)
        assert len(Manifest.load(folder).keys) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="files of another user are made as root")
def test_addresses_of_another_users_manifest_are_not_followed(tmp_path):
    folder = manifest_of(tmp_path, ["https://host/0.tar", "https://host/1.tar"])
    os.chown(folder / "keys.txt", 12345, 12345)
    with pytest.raises(PermissionDenied, match="not trusted"):
        Manifest.load(folder)


@pytest.mark.parametrize("key", ["https://host/0.tar::file:///etc/passwd", "gs://b/0.tar::https://h/x"])
def test_chain_in_a_manifest_is_refused(tmp_path, key):
    with pytest.raises(ConfigError, match="chain of addresses"):
        manifest_of(tmp_path, [key, "https://host/1.tar"])
