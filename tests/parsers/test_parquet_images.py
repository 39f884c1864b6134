"""Tests that damaged parquet files with images are refused, or give the images that pyarrow reads.

The oracle is pyarrow in a process with a limit of memory: it reads the same bytes.
"""

import io
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flip.data.chunk_reader import ChunkReader
from flip.data.manifest import build
from flip.data.manifest.row_texts import Columns
from flip.data.parquet import levels, snappy
from flip.runs.errors import ConfigError, DataError
from tests.parsers.spoil import spoiled

pytestmark = pytest.mark.timeout(120)

MEMORY = 4 << 30
COLUMNS = Columns("image", ("caption",))
FILES = Path(__file__).parents[1] / "flip" / "data" / "parquet_files"
CHILD = """
import hashlib, json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), int(sys.argv[2])))
import pyarrow.parquet as pq
found = []
for row in pq.read_table(sys.argv[1], columns=["image"], use_threads=False).to_pylist():
    image = row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"]
    found.append(hashlib.sha256(image).hexdigest() if image is not None else None)
print(json.dumps(found))
"""


def written(**options):
    out = io.BytesIO()
    images = [None if i % 7 == 3 else np.random.default_rng(i).bytes(90 + i) for i in range(20)]
    table = pa.table({"image": pa.array(images, pa.binary()), "caption": [f"row {i}" for i in range(20)]})
    pq.write_table(table, out, write_batch_size=4, **options)
    return out.getvalue()


FORMS = [
    written(compression=compression, data_page_version=version, use_dictionary=dictionary, data_page_size=400)
    for compression in ("none", "zstd", "snappy")
    for version in ("1.0", "2.0")
    for dictionary in (True, False)
] + [
    (FILES / f"{name}.parquet").read_bytes()
    for name in (
        "datasets-2.21.0",
        "datasets-5.2.0",
        "duckdb-2.0.1",
        "fastparquet-2026.9.0",
        "pandas-3.1.1",
        "polars-2.1.0",
        "datasets-4.0.0",
        "img2dataset-1.47.0",
        "pyspark-4.3.0",
        "datasets-4.0.0-nulls",
        "duckdb-2.0.1-nulls",
        "fastparquet-2026.9.0-nulls",
        "img2dataset-1.47.0-nulls",
        "pandas-3.1.1-nulls",
        "polars-2.1.0-nulls",
        "pyspark-4.3.0-nulls",
    )  # new ones at the end: seeds of the fuzzer count on the order
]


def read(path):
    """(row, SHA-256 of the image) of each sample, by the index and the reader."""
    import hashlib

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "m"
        scanned = build.scan_shards([str(path)], out, columns=COLUMNS)
        manifest = build.merge(scanned, out, 2, columns=COLUMNS)
        found = []
        for id, sample in ChunkReader().samples(manifest):
            image = next(data for name, data in sample.items() if name != "json")
            json.loads(bytes(sample["json"]))
            found.append((manifest.locate(id)[1], hashlib.sha256(image).hexdigest()))
        return found


def oracle(path):
    """SHA-256 of each row's image as pyarrow reads it; None if it fails."""
    done = subprocess.run([sys.executable, "-c", CHILD, str(path), str(MEMORY)], capture_output=True, text=True)
    if done.returncode:
        return None
    return json.loads(done.stdout)


@pytest.mark.parametrize("data", FORMS)
def test_samples_are_images_of_their_rows(tmp_path, data):
    path = tmp_path / "a.parquet"
    path.write_bytes(data)
    captions = pq.read_table(path, columns=["caption"])["caption"].to_pylist()
    expected = [(row, image) for row, image in enumerate(oracle(path)) if image is not None and captions[row]]
    assert read(path) == expected


def check(path, data):
    """Damaged bytes are refused, or give images that pyarrow reads from them. Returns whether they were read."""
    path.write_bytes(data)
    try:
        found = read(path)
    except (DataError, ConfigError) as error:
        assert "parquet" in error.paragraph() or "no row is left" in error.paragraph()
        return False
    expected = oracle(path)
    if expected is not None:  # pyarrow checks more columns and statistics
        assert all(expected[row] == image for row, image in found)
    return True


@given(st.sampled_from(FORMS).flatmap(spoiled))
def test_damaged_files_are_refused_or_read_as_pyarrow_reads_them(tmp_path_factory, data):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    check(tmp_path_factory.mktemp("files") / "a.parquet", data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # kB


@given(st.binary(max_size=64), st.integers(0, 34), st.integers(0, 300))
def test_levels_are_as_many_as_asked_for_or_an_error(data, width, count):
    try:
        numbers = levels.hybrid(memoryview(data), width, count)
    except levels.LevelsError:
        return
    assert len(numbers) == count and (not count or int(numbers.max()) < 1 << max(width, 1))


@given(st.lists(st.integers(0, 5), max_size=40))
def test_levels_of_pyarrow_are_read(values):
    # runs of one number, and eight packed numbers, as the format has them
    data = bytearray()
    for value in values:
        data += bytes([3 << 1, value])
    numbers = levels.hybrid(memoryview(bytes(data)), 3, 3 * len(values))
    assert numbers.tolist() == [value for value in values for _ in range(3)]


@given(st.binary(max_size=200))
def test_tags_of_snappy_never_run_past_the_end(data):
    try:
        marks = snappy.marks(memoryview(data))
    except snappy.SnappyError:
        return
    assert marks is None or (marks == sorted(marks) and marks[-1] == len(data))


@given(st.binary(max_size=300), st.integers(1, 2000))
def test_blocks_of_snappy_are_streams(piece, times):
    data = piece * times + np.random.default_rng(times).bytes(70_000)
    packed = pa.Codec("snappy").compress(data, asbytes=True)
    marks = snappy.marks(memoryview(packed))
    if marks is None:
        return
    for number, (start, stop) in enumerate(zip(marks[:-1], marks[1:], strict=True)):
        expected = data[number * snappy.BLOCK : (number + 1) * snappy.BLOCK]
        block = snappy.stream(memoryview(packed)[start:stop], len(expected))
        assert pa.Codec("snappy").decompress(block, len(expected)).to_pybytes() == expected
