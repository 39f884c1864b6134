"""Tests that parquet files of filters yield the requested columns or a documented error."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flip.data.chunk_reader import ChunkReader
from flip.data.manifest import filters
from flip.runs.errors import ConfigError, DataError
from tests.parsers.spoil import spoiled

pytestmark = pytest.mark.timeout(60)

TABLE = pa.table({
    "key": [None if i == 7 else f"{i:09d}" for i in range(40)],
    "text": [None if i % 3 == 0 else "ab"[i % 2] for i in range(40)],
    "number": [None if i % 5 == 0 else i / 8 for i in range(40)],
    "count": np.arange(40, dtype=np.int32),
    "nested": [[i] for i in range(40)],
})  # fmt: skip


def written(**options):
    out = io.BytesIO()
    pq.write_table(TABLE, out, **options)
    return out.getvalue()


FORMS = [
    written(compression=compression, data_page_version=version, use_dictionary=dictionary, row_group_size=size)
    for compression in ("none", "zstd", "snappy")
    for version in ("1.0", "2.0")
    for dictionary in (True, False)
    for size in (7, 100)
]


def read(path, data):
    path.write_bytes(data)
    texts = ["text==a", "number<2", "count>=3"]
    return filters._table(str(path), [filters.Filter.parse(text) for text in texts], ChunkReader())


@pytest.mark.parametrize("data", FORMS)
def test_filters_read_same_columns_from_any_parquet_encoding(tmp_path, data):
    keys, (text, number, count) = read(tmp_path / "a.parquet", data)
    rows = TABLE.to_pydict()
    assert keys.to_pylist() == rows["key"]
    assert text.to_pylist() == [None if value is None else value == "a" for value in rows["text"]]
    assert number.to_pylist() == [None if value is None else value < 2 for value in rows["number"]]
    assert count.to_pylist() == [value >= 3 for value in rows["count"]]


@given(st.sampled_from(FORMS).flatmap(spoiled))
def test_filters_name_damaged_parquet_file_in_error(tmp_path, data):
    try:
        keys, columns = read(tmp_path / "a.parquet", data)
        assert all(len(column) == len(keys) for column in columns)
    except (DataError, ConfigError) as error:
        assert "a.parquet" in error.paragraph()
