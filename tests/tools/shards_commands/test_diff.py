"""Tests of the comparison of two manifests and of its effects on the sample order and ids of a run."""

import shutil

import pytest

from flip.data.manifest.build import index
from flip.data.manifest.manifest import Manifest, write
from tests.synthetic import make_dataset
from tools.shards_commands import diff
from tools.shards_commands.diff import below_common, compare


@pytest.fixture
def folder(tmp_path):
    return make_dataset(tmp_path / "data", samples=30, shards=3, size=16, chunk=4)


def shards(folder):
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def test_compare_reports_no_difference_for_equal_and_moved_data_sets(folder):
    old = Manifest.load(folder)
    moved = Manifest.load(shutil.copytree(folder, folder.parent / "elsewhere"))
    for other in (old, moved):
        difference = compare(old, other)
        assert difference.equal and not (
            difference.added or difference.removed or difference.changed or difference.order_changes
        )


def test_compare_lists_added_and_removed_shards(folder):
    old = Manifest.load(folder)
    fewer = index(shards(folder)[1:], folder.parent / "fewer", chunk=4)
    difference = compare(old, fewer)
    assert (difference.removed, difference.added, difference.changed) == ([old.keys[0]], [], [])
    assert difference.samples == (30, 20) and difference.order_changes and not difference.equal
    assert compare(fewer, old).added == [old.keys[0]]
    elsewhere = index(shards(shutil.copytree(folder, folder.parent / "b"))[:2], folder.parent / "m", chunk=4)
    assert compare(old, elsewhere).removed == ["00002.tar"]


def test_compare_lists_changed_shards(folder):
    old = Manifest.load(folder)
    other = make_dataset(folder.parent / "other", samples=30, shards=3, size=16, seed=1, chunk=4)
    shutil.copy(other / "00001.tar", folder / "00001.tar")
    difference = compare(old, index(shards(folder), folder.parent / "new", chunk=4))
    (shard,) = difference.changed
    assert (
        shard.name == old.keys[1] and shard.samples == (10, 10) and shard.bytes[0] == shard.bytes[1] and shard.content
    )
    assert not difference.order_changes and not difference.equal
    longer = make_dataset(folder.parent / "longer", samples=36, shards=3, size=16, chunk=4)
    shutil.copy(longer / "00002.tar", folder / "00002.tar")
    difference = compare(old, index(shards(folder), folder.parent / "newer", chunk=4))
    assert [(shard.name, shard.samples, shard.content) for shard in difference.changed] == [
        (old.keys[2], (10, 12), False)
    ]
    assert difference.order_changes


def test_compare_reports_stable_ids_if_shards_are_appended(folder):
    old = index(shards(folder)[:2], folder.parent / "old", chunk=4)
    difference = compare(old, Manifest.load(folder))
    assert (
        difference.added == [shards(folder)[2]]
        and difference.order_changes
        and difference.ids_stay
        and not (difference.removed or difference.changed)
    )
    other = index(shards(folder)[1:], folder.parent / "other", chunk=4)
    assert not compare(other, Manifest.load(folder)).ids_stay and not compare(Manifest.load(folder), old).ids_stay


def test_compare_lists_changed_shard_before_appended_shard(folder):
    old = index(shards(folder)[:2], folder.parent / "old", chunk=4)
    other = make_dataset(folder.parent / "other", samples=30, shards=3, size=16, seed=1, chunk=4)
    shutil.copy(other / "00000.tar", folder / "00000.tar")
    difference = compare(old, index(shards(folder), folder.parent / "new", chunk=4))
    assert [(shard.name, shard.content) for shard in difference.changed] == [(shards(folder)[0], True)] and len(
        difference.added
    ) == 1


def test_compare_reports_changes_of_chunk_size_and_exceptions(folder):
    old = Manifest.load(folder)
    other_size = compare(old, index(shards(folder), folder.parent / "r8", chunk=8))
    assert other_size.order_changes and "Sample ids do not change." in diff._lines(other_size)
    first = write(folder.parent / "some", old, old.checksums, {3: "bad", 4: "bad"})
    second = write(folder.parent / "others", old, old.checksums, {4: "worse", 5: "bad"})
    difference = compare(first, second)
    assert (difference.excepted, difference.readmitted) == ({5: "bad"}, {3: "bad"})
    assert not difference.order_changes and not difference.equal and not difference.changed


def test_compare_matches_renamed_shards_of_equal_samples_by_position(folder):
    old = Manifest.load(folder)
    elsewhere = folder.parent / "elsewhere"
    for i, path in enumerate(shards(folder)):
        (elsewhere / f"part-{i}").mkdir(parents=True)
        shutil.copy(path, elsewhere / f"part-{i}" / f"{i}.tar")
    new = index([str(path) for path in elsewhere.glob("*/*.tar")], elsewhere / "m", chunk=4)
    for other in (new, write(elsewhere / "less", new, new.checksums, {3: "bad"})):
        difference = compare(old, other)
        assert difference.ids_stay and not difference.order_changes
        assert not (difference.added or difference.removed or difference.changed)


def test_below_common_strips_shared_prefix():
    assert below_common(["/a/b/part_0/1.tar", "/a/b/part_1/1.tar"]) == ["part_0/1.tar", "part_1/1.tar"]
    assert below_common(["s3://bucket/x/1.tar", "s3://bucket/x/2.tar"]) == ["1.tar", "2.tar"]
    assert below_common(["/a/1.tar"]) == ["1.tar"] and below_common(["/a/1", "/b/1"]) == ["a/1", "b/1"]
