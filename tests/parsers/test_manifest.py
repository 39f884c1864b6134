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
from flip.runs.formats import FormatError
from tests.parsers.spoil import DEEP, changed, spoiled, texts

pytestmark = pytest.mark.timeout(60)


def table(filtered):
    rows = np.array([[3, 4096, 3072], [0, 1024, 0], [4, 5120, 4096]], dtype=np.int64)
    sample_filter = SampleFilter(np.array([[5, 1], [0, 0], [4, 0]], np.uint32), np.array([0b11010, 0b1111], np.uint8))
    etags = ["", "", "ab-2"]
    keys = ["a.tar", "s3://b/c.tar", "d.tar"]
    offsets = np.array([1, 2, 1, 4], np.uint32)
    return ChunkTable(keys, rows, 2, offsets, etags, sample_filter if filtered else None)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "filtered"])
def good(request, tmp_path_factory):
    """Return name -> bytes of the files of a valid manifest."""
    folder = tmp_path_factory.mktemp("manifest") / "good"
    manifests.write(folder, table(request.param), np.arange(4, dtype=np.uint32), {1: "no image"}, {"left_out": []})
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def manifest_folder(tmp_path_factory):
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
    """Load the manifest and check all that training reads from it. Return None if it raises DataError, or FormatError
    for a number that this version does not read."""
    for path in folder.iterdir():
        path.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    try:
        manifest = Manifest.load(folder, check)
    except (DataError, FormatError) as error:
        assert str(folder) in error.paragraph()
        return None
    assert manifest.samples > 0
    assert 0 <= manifest.tail < manifest.chunk
    assert manifest.mean_bytes >= 0
    assert manifest.total_samples_in_tars >= manifest.samples
    for j in range(manifest.chunks):
        ids = manifest.chunk_ids(j)
        assert sum(count for *_, count in manifest.chunk_reads(j)) == len(ids)
        for id in ids:
            key, ordinal = manifest.locate(id)
            assert key in manifest.keys and ordinal >= 0
    assert all(0 <= id < manifest.samples and isinstance(why, str) for id, why in manifest.exceptions.items())
    assert len(manifest.etags) == len(manifest.keys) and isinstance(manifest.digest, str)
    manifest.settings.get("left_out")
    return manifest


def test_manifest_loads_valid_files(good, manifest_folder):
    assert read(good, manifest_folder).samples == 7
    assert read(sealed(good), manifest_folder).digest == read(good, manifest_folder).digest


@given(data=st.data(), check=st.booleans())
def test_manifest_with_any_facts_is_consistent_or_data_error(data, check, good, manifest_folder):
    facts = data.draw(texts(json.loads(good["manifest.json"])))
    read(sealed({**good, "manifest.json": facts}), manifest_folder, check)
    read({**good, "manifest.json": facts}, manifest_folder, check)


@given(data=st.data())
def test_manifest_rejects_any_damaged_file(data, good, manifest_folder):
    name = data.draw(st.sampled_from(sorted(good.keys() - {"manifest.json"})))
    content = data.draw(spoiled(good[name]))
    assert content == good[name] or read({**good, name: content}, manifest_folder) is None
    read(sealed({**good, name: content}), manifest_folder)


@pytest.mark.parametrize("name", ["manifest.json", "exceptions.jsonl"])
def test_manifest_rejects_json_nested_too_deeply(name, good, manifest_folder):
    assert read(sealed({**good, name: DEEP}), manifest_folder) is None


@given(data=st.data())
def test_manifest_with_any_array_value_is_consistent_or_data_error(data, good, manifest_folder):
    """The checksums match, so only deliberate manipulation produces such a manifest."""
    name, kind = data.draw(st.sampled_from([("shards.i64", "<i8"), ("offsets.u32", "<u4")]))
    numbers = np.frombuffer(good[name], kind).copy()
    numbers[data.draw(st.integers(0, len(numbers) - 1))] = data.draw(st.sampled_from([0, 1, 2, 4, 2**31, 2**32 - 1]))
    read(sealed({**good, name: numbers.tobytes()}), manifest_folder)


@given(data=st.data())
def test_manifest_with_any_exception_line_is_consistent_or_data_error(data, good, manifest_folder):
    line = data.draw(changed(copy.deepcopy({"id": 1, "shard": "a.tar", "ordinal": 1, "reason": "no image"})))
    read(sealed({**good, "exceptions.jsonl": json.dumps(line).encode() + b"\n"}), manifest_folder)


def test_manifest_rejects_missing_file_or_folder_in_its_place(good, manifest_folder):
    for name in good:
        rest = {other: content for other, content in good.items() if other != name}
        assert read(rest, manifest_folder) is None
        (manifest_folder / name).mkdir()
        with pytest.raises(DataError):
            Manifest.load(manifest_folder)
        (manifest_folder / name).rmdir()


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
    written = manifests.write(folder, ChunkTable(keys, rows, chunk, offsets), crcs, excepted, {"why": data.draw(TEXT)})
    loaded = Manifest.load(folder)
    assert (loaded.keys, loaded.exceptions, loaded.digest) == (keys, excepted, written.digest)
    assert loaded.shards.tolist() == rows.tolist() and loaded.chunk == chunk and loaded.settings == written.settings
    assert loaded.offsets.tolist() == offsets.tolist() and loaded.checksums.tolist() == crcs.tolist()
