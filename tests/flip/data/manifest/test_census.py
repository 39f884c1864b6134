"""Tests the count of samples with an image and a caption, and the reasons for incomplete samples."""

import pytest

from flip.data.manifest.census import MOST, OTHER, Census, Completeness, Counting, Incomplete
from flip.data.manifest.tar import Sample

LABEL = memoryview(bytes(512) + b"3")


def census(*samples):
    """The census of samples given as (key, members). A member whose name ends with 0 is empty."""
    counting = Counting()
    for key, names in samples:
        counting.add(
            [Sample(key, 0, {name.rstrip("0"): (512, not name.endswith("0")) for name in names.split()})], LABEL
        )
    return counting.census


@pytest.mark.parametrize(
    "samples, reason",
    [
        ([("a", "jpg txt")], ""),
        ([("a", "json txt webp cls")], ""),
        ([("a", "jpg alt txt0")], ""),
        ([("a", "jpg json")], "image without a caption"),
        ([("a", "jpg cls")], "image without a caption"),
        ([("a", "json txt")], "caption without an image"),
        ([("a", "heic txt")], "caption without an image"),
        ([("a", "json")], "neither image nor caption"),
        ([("a", "jpg txt0")], "empty caption"),
        ([("a", "jpg txt0 alt0")], "empty caption"),
        ([("a", "jpg0 txt")], "empty image"),
        ([("a", "jpg0 png txt")], "empty image"),
        ([("d/", "_a.jpg"), ("d/", "_a.txt"), ("d/", "_b.jpg _b.txt")], "AppleDouble files"),
        (
            [("a", "jpg"), ("b", "jpg"), ("a", "txt"), ("b", "txt"), ("a", "json")],
            "members of one sample that do not follow each other",
        ),
    ],
)
def test_completeness_classifies_samples_by_reason(samples, reason):
    completeness = Completeness(["txt", "alt"])
    completeness.add(Census.of_json(census(*samples).json()))
    assert completeness.complete == (0 if reason else len(samples))
    assert completeness.incomplete == ({reason: len(samples)} if reason else {})


def test_completeness_accepts_repeated_key_if_samples_are_complete():
    completeness = Completeness(["txt"])
    completeness.add(census(("a", "jpg txt"), ("b", "jpg txt"), ("a", "jpg txt"), ("a", "txt")))
    assert completeness.report() == {
        "complete": 3, "incomplete": 1, "incomplete_by_reason": {"caption without an image": 1}
    }  # fmt: skip


def test_completeness_accepts_caption_names_of_configuration():
    completeness = Completeness(["json:caption", "ALT"])
    completeness.add(census(("a", "jpg json"), ("b", "jpg alt"), ("c", "jpg txt")))
    assert (completeness.complete, completeness.incomplete.total()) == (2, 1)


def test_census_bounds_memory_for_many_sample_kinds():
    """The names contain dots, so each file is a sample of a kind of its own."""
    completeness = Completeness(["txt"])
    shards = 5
    for shard in range(shards):
        shard_census = census(*((f"http{i}", f"www.{shard}.{i}.jpg") for i in range(3 * MOST)))
        assert len(shard_census.kinds) == MOST + 1 and shard_census.kinds[OTHER] == 2 * MOST
        completeness.add(shard_census)
    assert completeness.incomplete == {
        "neither image nor caption": shards * MOST, f"of more than {MOST} kinds in one shard": shards * 2 * MOST
    }  # fmt: skip
    assert len(completeness._others) <= MOST


def test_completeness_check_fails_below_minimum_share():
    completeness = Completeness(["txt"], 0.5)
    completeness.check("nothing")
    completeness.add(census(("a", "jpg txt"), ("b", "jpg json")))
    completeness.check("half")
    completeness.add(census(("c", "jpg json"), ("d", "json")))
    with pytest.raises(Incomplete) as error:
        completeness.check("m")
    assert error.value.code == 65
    assert error.value.report == completeness.report()
    assert error.value.report["complete"] == 1
    message = str(error.value)
    assert message.startswith("m: 1 of 4 samples ")
    assert "--min-complete 0.5: 2 x image without a caption; 1 x neither image nor caption." in message
    assert "Members that are there: json." in message
    remedies = message.partition("Members that are there: json.")[2]
    assert "--captions" in remedies
    assert "--min-complete 0." in remedies


@pytest.mark.parametrize(
    "samples, remedy",
    [
        ([("d/", "_a.jpg")], "COPYFILE_DISABLE=1"),
        ([("a", "jpg"), ("a", "txt")], "tar --sort=name"),
        ([("a", "heic txt")], "Images are members named jpg, jpeg, png"),
        ([("a", "jpg")], "with --captions"),
    ],
)
def test_incomplete_error_suggests_remedy_for_reason(samples, remedy):
    completeness = Completeness(["txt"], 1.0)
    completeness.add(census(*samples))
    with pytest.raises(Incomplete) as error:
        completeness.check("m")
    assert remedy in error.value.remedy
