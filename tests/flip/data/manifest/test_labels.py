"""Tests of counts of labels in manifests, and of their comparison with the number of class names."""

import pytest

from flip.data.manifest import build, labels, manifest
from flip.data.manifest.filters import Filters, parse
from flip.data.manifest.labels import LabelCounts
from flip.data.manifest.manifest import Manifest
from tests.flip.data.manifest.test_manifest import write_tar
from tools.shards_commands.manifest import excepting


def shard(folder, name, values):
    """Write a shard with one sample for each label; None: without a label."""
    members = []
    for i, value in enumerate(values):
        members += [(f"{name}{i}.jpg", b"x"), (f"{name}{i}.txt", f"text {i}".encode())]
        if value is not None:
            members.append((f"{name}{i}.cls", value))
    folder.mkdir(exist_ok=True)
    write_tar(folder / f"{name}.tar", members)
    return str(folder / f"{name}.tar")


def counted(folder):
    return Manifest.load(folder).settings.get("labels")


def test_index_counts_labels_in_settings_outside_of_digest(tmp_path, monkeypatch):
    keys = [shard(tmp_path, "a", [b"0", b" 7\n", b"7", b"x", None]), shard(tmp_path, "b", [b"-1", b"3", b"%d" % 2**31])]
    build.index(keys, tmp_path / "m", 1)
    assert counted(tmp_path / "m") == {"counts": {"0": 1, "3": 1, "7": 2}, "unusable": 3}
    build.index(keys, tmp_path / "several", 1, workers=2)
    assert (tmp_path / "m" / "manifest.json").read_bytes() == (tmp_path / "several" / "manifest.json").read_bytes()
    monkeypatch.setattr(labels, "MOST", 2)
    build.index(keys, tmp_path / "many", 1)
    assert counted(tmp_path / "many") is None
    assert Manifest.load(tmp_path / "many").digest == Manifest.load(tmp_path / "m").digest


def test_manifest_of_shards_without_labels_is_as_before(tmp_path):
    build.index([shard(tmp_path, "a", [None, None])], tmp_path / "m", 1)
    assert Manifest.load(tmp_path / "m").settings == {}


def test_added_shards_are_counted_with_those_of_manifest_that_has_counts(tmp_path):
    first = shard(tmp_path, "a", [b"0", b"1"])
    second = shard(tmp_path, "b", [b"1", b"x"])
    old = build.index([first], tmp_path / "old", 1)
    results = build.scan_shards([second], tmp_path / "new")
    build.merge(results, tmp_path / "new", old=old)
    assert counted(tmp_path / "new") == {"counts": {"0": 1, "1": 2}, "unusable": 1}
    manifest.write(tmp_path / "uncounted", old, old.checksums)  # as one that excludes samples
    uncounted = Manifest.load(tmp_path / "uncounted")
    build.merge(build.scan_shards([second], tmp_path / "no"), tmp_path / "no", old=uncounted)
    assert counted(tmp_path / "no") is None


def test_only_samples_that_filters_keep_are_counted(tmp_path):
    keys = [shard(tmp_path, "a", [b"0", b"5", b"5"])]
    build.index(keys, tmp_path / "m", 1, filters=parse([], "6:6", None))
    assert counted(tmp_path / "m") == {"counts": {"0": 1, "5": 2}, "unusable": 0}
    without = excepting(Manifest.load(tmp_path / "m"), {1: "bad"}, str(tmp_path / "less"))
    assert "labels" not in without.settings and not LabelCounts.of_manifest(without).known
    build.index(keys, tmp_path / "dropped", 1, filters=Filters(manifest=str(tmp_path / "less")))
    assert counted(tmp_path / "dropped") == {"counts": {"0": 1, "5": 1}, "unusable": 0}


@pytest.mark.parametrize(
    ("values", "classes", "words"),
    [
        ([b"0", b"1", b"1"], 2, ""),
        ([b"0", b"0", b"0"], 5, ""),
        ([b"0", b"7", b"5"], 2, "2 of 3 labels have no class name: the largest is 7, with 2 class names"),
        ([b"0", b"1", b"x"], 2, "1 of 3 labels are not whole numbers"),
        ([b"0", b"1", None], 2, "1 of 3 samples have no label"),
    ],
)
def test_defect_of_labels_is_named(tmp_path, values, classes, words):
    counts = LabelCounts.of_manifest(build.index([shard(tmp_path, "a", values)], tmp_path / "m", 1))
    assert counts.known
    assert counts.defect(3, classes).startswith(words)
    assert bool(words) == bool(counts.defect(3, classes))


@pytest.mark.parametrize("value", [None, 3, {}, {"counts": 3, "unusable": 0}, {"counts": {"a": 1}, "unusable": 0}])
def test_damaged_counts_are_not_known(value):
    assert not LabelCounts.of_json(value).known
