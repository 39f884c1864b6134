"""Tests the samples that lists of uids select, in any form and order, and the files that are rejected."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flip.data.manifest import filters, uids
from flip.data.manifest.build import index, merge, scan_shards
from flip.data.manifest.filters import Filters, Length
from flip.data.manifest.uids import UidList
from flip.runs.errors import ConfigError
from tests.flip.data.manifest.test_filters import paths, samples
from tests.flip.data.manifest.test_manifest import write_tar

#: Equal in the first or last half, at the ends of the range, and halves that fit neither int64 nor float64.
UIDS = ["0" * 32, "0" * 31 + "1", "0" * 16 + "f" * 16, "8000000000000001" + "0" * 16, "8000000000000000" + "0" * 16]
UIDS += ["0123456789abcdef" * 2, "f" * 32, "f" * 16 + "0" * 16]


def pairs(digits):
    return np.array([(int(uid[:16], 16), int(uid[16:], 16)) for uid in digits], "u8,u8")


def saved(path, rows):
    np.save(path, rows)
    return str(path)


@pytest.fixture
def shards(tmp_path):
    """Two shards in the form of DataComp. The last sample has no json, the sample before has a uid of another form."""
    members = []
    for i, uid in enumerate([*UIDS, "7"]):
        text = json.dumps({"url": "http", "uid": uid.upper() if i % 2 else uid})
        members.append([(f"{i:012d}.jpg", b"image"), (f"{i:012d}.json", text.encode()), (f"{i:012d}.txt", b"caption")])
    members.append([("z.jpg", b"image"), ("z.txt", b"caption")])
    for shard, group in (("00000", members[:5]), ("00001", members[5:])):
        write_tar(tmp_path / f"{shard}.tar", [member for sample in group for member in sample])
    return tmp_path


@pytest.mark.parametrize("form", ["numbers", "unsorted", "text", "bytes"])
def test_uid_list_selects_listed_samples_in_any_array_form(shards, tmp_path, form):
    chosen = [UIDS[i] for i in (1, 3, 5, 6)]
    elsewhere = ["1" * 32, "e" * 32]
    rows = pairs(sorted(chosen + elsewhere))
    rows = {"numbers": rows, "unsorted": rows[::-1]}.get(
        form, np.array(chosen + elsewhere, "S" if form == "bytes" else "U")
    )
    selected = filters.parse([], "", saved(tmp_path / "list.npy", rows))
    assert selected.uids.is_sorted == (form == "numbers")
    manifest = index(paths(shards), tmp_path / "m", 1, filters=selected)
    assert [json.loads(sample["json"])["uid"].lower() for (sample,) in samples(manifest)] == chosen
    name = str(selected.uids)
    assert name.startswith("uid in list.npy (sha256 ")
    assert manifest.settings == {
        "filters": [name], "seen": 10, "kept": 4, "dropped": {name: 4, f"{name}: no value": 2},
        "uids": {"listed": 6, "in_shards": 4, "not_in_shards": 2},
    }  # fmt: skip


def test_uid_list_counts_are_independent_of_other_filters(shards, tmp_path):
    chosen = UidList.open(saved(tmp_path / "list.npy", pairs(UIDS[:3])))
    every = Filters(length=Length(1, None), uids=chosen)
    manifest = index(paths(shards), tmp_path / "m", 1, filters=every)
    assert manifest.samples == 3 and manifest.settings["uids"]["in_shards"] == 3
    combined = Filters(length=Length(0, 3), uids=chosen)
    with pytest.raises(ConfigError, match="3 x caption length 0:3; 5 x uid in list.npy"):
        index(paths(shards), tmp_path / "n", 1, filters=combined)


def test_scan_shards_reuses_only_scans_of_same_uid_list(shards, tmp_path):
    for digits, reused in ((UIDS[:3], 0), (UIDS[:4], 0), (UIDS[:3], 2)):
        chosen = filters.parse([], "", saved(tmp_path / "list.npy", pairs(digits)))
        results = scan_shards(paths(shards), tmp_path / "m", filters=chosen)
        assert results.reused == reused
    assert merge(results, tmp_path / "m", 1, filters=chosen).samples == 3


@given(st.lists(st.integers(0, 40), min_size=1), st.lists(st.integers(0, 40)))
def test_uid_list_search_agrees_with_set(tmp_path_factory, listed, requested):
    spread = [(number // 7 * (1 << 61), number % 7 * (1 << 61)) for number in range(41)]
    path = saved(tmp_path_factory.mktemp("uids") / "list.npy", np.array([spread[i] for i in listed], "u8,u8"))
    chosen = np.array([spread[i] for i in requested], "u8").reshape(-1, 2)
    assert UidList.open(path)._contains(chosen).tolist() == [i in listed for i in requested]


def test_uid_list_checks_order_across_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(uids, "_PIECE", 2)
    for rows in ([1, 2, 3, 4, 5], [1, 2, 4, 3, 5], [1, 3, 2, 4, 5], [2, 2, 2, 2]):
        path = saved(tmp_path / "list.npy", np.array([(0, i) for i in rows], "u8,u8"))
        assert UidList.open(path).is_sorted == (rows == sorted(rows))


@pytest.mark.parametrize(
    "rows",
    [
        np.array([{"uid": 1}], object), np.zeros(0, "u8,u8"), np.zeros(3, "u8"), np.zeros((3, 2), "u8"), np.zeros(3,
        "i8,i8"), np.zeros(3, ">u8,>u8"), np.zeros(3, "u8,u4"), np.zeros(3, "u8,u8,u8"), np.array(["0" * 31]),
        np.array(["g" * 32]), np.array(["0" * 32, "0" * 30]), np.array([" " * 2 + "0" * 30]), np.array(["ä" * 32]),
    ],
    ids=lambda rows: f"{rows.dtype}{rows.shape}",
)  # fmt: skip
def test_uid_list_rejects_invalid_array(tmp_path, rows):
    np.save(tmp_path / "list.npy", rows, allow_pickle=True)
    with pytest.raises(ConfigError, match="--uids"):
        UidList.open(str(tmp_path / "list.npy"))


@pytest.mark.parametrize("data", [None, b"", b"uid\n", b"\x93NUMPY\x01\x00", b"\x80\x04\x95"])
def test_uid_list_rejects_missing_or_invalid_npy_file(tmp_path, data):
    if data is not None:
        (tmp_path / "list.npy").write_bytes(data)
    with pytest.raises(ConfigError, match="list"):
        UidList.open(str(tmp_path / "list.npy"))
    np.savez(tmp_path / "list.npz", pairs(UIDS))
    with pytest.raises(ConfigError, match="no list of uids"):
        UidList.open(str(tmp_path / "list.npz"))
