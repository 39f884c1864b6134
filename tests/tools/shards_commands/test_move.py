"""Tests of shards move: an equal data set at the new location, and rejection of missing or different shards."""

import json
import shutil

import pytest

from flip.data.chunk_reader import ChunkReader
from flip.data.manifest.build import index
from flip.data.manifest.filters import Filters, Length
from flip.data.manifest.manifest import Manifest, write
from flip.runs.errors import ConfigError
from tests.flip.data.manifest.test_filters import paths, samples
from tests.tools.commands.test_shards_cli import call
from tools.commands.shards import main
from tools.shards_commands.move import comparable_etags, replace_prefix

FILES = ("shards.i64", "offsets.u32", "checksums.u32", "exceptions.jsonl", "tars.u32", "kept.bits")


@pytest.fixture
def moved(folder, tmp_path):
    """Return a filtered manifest with exceptions in a separate folder; its shards have been moved to ``new``."""
    first = index(paths(folder), tmp_path / "first", 4, filters=Filters(length=Length(41, 44)))
    old = write(tmp_path / "old", first, first.checksums, {7: "ugly", 9: "a copy"}, first.settings)
    folder.rename(tmp_path / "new")
    return old


def test_move_preserves_samples_and_digest(moved, tmp_path, capsys):
    code, report = call(capsys, "move", moved.folder, "--to", tmp_path / "new", "--out", tmp_path / "m", "--json")
    assert code == 0 and (report["compared_by_etag"], report["compared_by_size"]) == (0, 5)
    manifest = Manifest.load(tmp_path / "m")
    assert manifest.keys == [key.replace("/shards/", "/new/") for key in moved.keys]
    assert report["digest"] == manifest.digest == moved.digest and manifest.settings == moved.settings
    for name in FILES:
        assert (manifest.folder / name).read_bytes() == (moved.folder / name).read_bytes()
    shutil.copytree(tmp_path / "new", moved.keys[0].rpartition("/")[0])  # makes the old manifest readable again
    assert samples(manifest) == samples(moved)


def test_move_reads_no_shard(moved, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ChunkReader, "read", lambda *_: pytest.fail("a shard was read"))
    assert call(capsys, "move", moved.folder, "--to", tmp_path / "new", "--out", tmp_path / "m")[0] == 0


def test_move_lists_missing_and_different_shards_and_writes_nothing(moved, tmp_path, capsys):
    (tmp_path / "new" / "00001.tar").unlink()
    with open(tmp_path / "new" / "00003.tar", "ab") as file:
        file.write(b"x")
    arguments = ["move", moved.folder, "--to", tmp_path / "new", "--out", tmp_path / "m"]
    code, text = call(capsys, *arguments)
    size = int(moved.shards[3, 1])
    assert code == 65 and "2 of 5 shards are missing there or differ" in text and text.count("\n") == 1
    assert f"{tmp_path}/new/00001.tar: the shard is missing; {tmp_path}/new/00003.tar: " in text
    assert f"00003.tar: {size + 1:,} bytes, indexed" in text
    assert main([*map(str, arguments), "--json"]) == 65
    assert json.loads(capsys.readouterr().err)["error"]["message"] == text.strip()
    code, report = call(capsys, *arguments, "--json")
    assert code == 65 and [entry["shard"][-9:] for entry in report["wrong"]] == ["00001.tar", "00003.tar"]
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "more, words",
    [
        (["--to", "gopher://server/x"], "shards are files or objects, and this is neither"),
        (["--to", "new", "--from", "nowhere"], "no shard is below this prefix"),
        (["--to", "new", "--out", "old"], "there is a manifest already"),
    ],
)
def test_move_writes_nothing_if_arguments_are_invalid(moved, tmp_path, capsys, monkeypatch, more, words):
    monkeypatch.chdir(tmp_path)
    code, text = call(capsys, "move", "old", "--out", "m", *more)
    assert code == 78 and words in text and not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "keys, prefix, to, moved",
    [
        (["/a/b/0.tar", "/a/b/1.tar"], None, "/x", ["/x/0.tar", "/x/1.tar"]),
        (["/a/part-0/0.tar", "/a/part-1/0.tar"], None, "s3://b/p", ["s3://b/p/part-0/0.tar", "s3://b/p/part-1/0.tar"]),
        (["s3://b/p/0.tar"], None, "/x", ["/x/0.tar"]),
        (["s3://b/p/0.tar"], "s3://b/", "s3://c", ["s3://c/p/0.tar"]),
        (["/a/0.tar", "/ab/0.tar"], "/a", "/x", ["/x/0.tar", "/ab/0.tar"]),
    ],
)
def test_replace_prefix_maps_shard_paths_and_urls(keys, prefix, to, moved):
    assert replace_prefix(keys, prefix, to) == moved


@pytest.mark.parametrize("keys", [["/a/0.tar", "/b/1.tar"], ["s3://a/0.tar", "s3://b/1.tar"]])
def test_replace_prefix_rejects_shards_without_common_folder(keys):
    with pytest.raises(ConfigError, match="no common folder"):
        replace_prefix(keys, None, "/x")


def test_replace_prefix_rejects_two_shards_with_equal_target():
    with pytest.raises(ConfigError, match="two shards would be at one place"):
        replace_prefix(["/a/0.tar", "/b/0.tar"], "/a", "/b")


def test_comparable_etags_excludes_differing_multipart_uploads():
    pairs = [("a1", "a1"), ("a1", "b2"), ("a1-3", "a1-3"), ("a1-3", "b2-3"), ("a1", "b2-3"), ("", "a1"), ("a1", "")]
    assert [comparable_etags(*pair) for pair in pairs] == [True, True, True, False, False, False, False]
