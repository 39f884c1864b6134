"""Fuzz tests of manifests: a folder of any bytes is a consistent manifest or raises DataError."""

import copy
import hashlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flip.data.manifest import manifest as manifests
from flip.data.manifest.manifest import ChunkTable, Manifest, SampleFilter
from flip.runs.errors import DataError
from tests.parsers.spoil import DEEP, changed, spoiled, texts

pytestmark = pytest.mark.timeout(60)


def table(filtered):
    rows = np.array([[3, 4096, 3072], [0, 1024, 0], [4, 5120, 4096]], dtype=np.int64)
    kept = SampleFilter(np.array([[5, 1], [0, 0], [4, 0]], np.uint32), np.array([0b11010, 0b1111], np.uint8))
    etags = ["", "", "ab-2"]
    keys, offsets = ["a.tar", "s3://b/c.tar", "d.tar"], np.array([1, 2, 1, 4], np.uint32)
    return ChunkTable(keys, rows, 2, offsets, etags, kept if filtered else None)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "filtered"])
def good(request, tmp_path_factory):
    """Return name -> bytes of the files of a valid manifest."""
    folder = tmp_path_factory.mktemp("manifest") / "good"
    manifests.write(folder, table(request.param), np.arange(4, dtype=np.uint32), {1: "no image"}, {"left_out": []})
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("spoiled")


def sealed(files):
    """Return the files with checksums and digest that match their bytes, if these can be computed."""
    try:
        facts = json.loads(files["manifest.json"])
        for name, entry in facts["files"].items():
            entry |= {"bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
        facts["digest"] = manifests._digest(facts)
        return {**files, "manifest.json": json.dumps(facts).encode()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return files


def read(files, folder, check=True):
    """Load the manifest and check all that training reads from it. Return None if it raises DataError."""
    for path in folder.iterdir():
        path.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    try:
        found = Manifest.load(folder, check)
    except DataError as error:
        assert str(folder) in error.paragraph()
        return None
    assert (
        found.samples > 0
        and 0 <= found.tail < found.chunk
        and found.mean_bytes >= 0
        and found.total_samples_in_tars >= found.samples
    )
    for j in range(found.chunks):
        ids = found.chunk_ids(j)
        assert sum(count for *_, count in found.chunk_reads(j)) == len(ids)
        for id in ids:
            key, ordinal = found.locate(id)
            assert key in found.keys and ordinal >= 0
    assert all(0 <= id < found.samples and isinstance(why, str) for id, why in found.exceptions.items())
    assert len(found.etags) == len(found.keys) and isinstance(found.digest, str)
    found.settings.get("left_out")
    return found


def test_manifest_loads_valid_files(good, place):
    assert read(good, place).samples == 7 and read(sealed(good), place).digest == read(good, place).digest


@given(data=st.data(), check=st.booleans())
def test_manifest_with_any_facts_is_consistent_or_data_error(data, check, good, place):
    facts = data.draw(texts(json.loads(good["manifest.json"])))
    read(sealed({**good, "manifest.json": facts}), place, check)
    read({**good, "manifest.json": facts}, place, check)


@given(data=st.data())
def test_manifest_rejects_any_damaged_file(data, good, place):
    name = data.draw(st.sampled_from(sorted(good.keys() - {"manifest.json"})))
    content = data.draw(spoiled(good[name]))
    assert content == good[name] or read({**good, name: content}, place) is None
    read(sealed({**good, name: content}), place)


@pytest.mark.parametrize("name", ["manifest.json", "exceptions.jsonl"])
def test_manifest_rejects_json_nested_too_deeply(name, good, place):
    assert read(sealed({**good, name: DEEP}), place) is None


@given(data=st.data())
def test_manifest_with_any_array_value_is_consistent_or_data_error(data, good, place):
    """The checksums match, so only deliberate manipulation produces such a manifest."""
    name, kind = data.draw(st.sampled_from([("shards.i64", "<i8"), ("offsets.u32", "<u4")]))
    numbers = np.frombuffer(good[name], kind).copy()
    numbers[data.draw(st.integers(0, len(numbers) - 1))] = data.draw(st.sampled_from([0, 1, 2, 4, 2**31, 2**32 - 1]))
    read(sealed({**good, name: numbers.tobytes()}), place)


@given(data=st.data())
def test_manifest_with_any_exception_line_is_consistent_or_data_error(data, good, place):
    line = data.draw(changed(copy.deepcopy({"id": 1, "shard": "a.tar", "ordinal": 1, "reason": "no image"})))
    read(sealed({**good, "exceptions.jsonl": json.dumps(line).encode() + b"\n"}), place)


def test_manifest_rejects_missing_file_or_folder_in_its_place(good, place):
    for name in good:
        rest = {other: content for other, content in good.items() if other != name}
        assert read(rest, place) is None
        (place / name).mkdir()
        with pytest.raises(DataError):
            Manifest.load(place)
        (place / name).rmdir()


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\0/"), min_size=1, max_size=12)


@given(data=st.data())
def test_manifest_round_trips_through_write_and_load(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "m"
    counts = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(any))
    keys = [f"s3://b/{name}" for name in data.draw(st.lists(TEXT, min_size=len(counts), max_size=len(counts)))]
    rows = np.array([[count, 1024 + 512 * count, 512 * count] for count in counts], dtype=np.int64)
    chunk = data.draw(st.integers(1, sum(counts)))
    chunks = -(-sum(counts) // chunk)
    numbers = st.lists(st.integers(0, 2**32 - 1), min_size=chunks, max_size=chunks)
    offsets, crcs = (np.array(data.draw(numbers), dtype=np.uint32) for _ in range(2))
    excepted = data.draw(st.dictionaries(st.integers(0, sum(counts) - 1), TEXT, max_size=3))
    made = manifests.write(folder, ChunkTable(keys, rows, chunk, offsets), crcs, excepted, {"why": data.draw(TEXT)})
    found = Manifest.load(folder)
    assert (found.keys, found.exceptions, found.digest) == (keys, excepted, made.digest)
    assert found.shards.tolist() == rows.tolist() and found.chunk == chunk and found.settings == made.settings
    assert found.offsets.tolist() == offsets.tolist() and found.checksums.tolist() == crcs.tolist()
