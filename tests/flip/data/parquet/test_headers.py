"""Tests that places and sizes of pages agree with pyarrow's totals, and are read without their bodies."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flip.data.parquet import headers as parquet_headers

ROWS = 90
IMAGES = [bytes([i]) * (1000 + i) for i in range(ROWS)]
OPTIONS = [
    {"compression": compression, "data_page_version": version, "use_dictionary": dictionary, "row_group_size": size}
    for compression in ("none", "snappy", "zstd")
    for version in ("1.0", "2.0")
    for dictionary in (True, False)
    for size in (40, 200)
]


class Recorder:
    """Bytes that record which of them were read one by one."""

    def __init__(self, data):
        self.data = data
        self.read = set()

    def __len__(self):
        return len(self.data)

    def __getitem__(self, at):
        if not isinstance(at, slice):
            self.read.add(at)
        return self.data[at]


def written(**options):
    out = io.BytesIO()
    table = pa.table({"key": np.arange(ROWS), "image": pa.array(IMAGES, pa.binary())})
    pq.write_table(table, out, data_page_size=4096, write_batch_size=8, **options)
    return out.getvalue()


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_pages_fill_their_column_chunk_and_no_body_is_read(options):
    data = Recorder(written(**options))
    metadata = pq.ParquetFile(io.BytesIO(data.data)).metadata
    groups = parquet_headers.row_groups(data)
    assert [group.rows for group in groups] == [metadata.row_group(i).num_rows for i in range(len(groups))]
    bodies = []
    for number, group in enumerate(groups):
        stated = metadata.row_group(number).column(1)
        chunk = group.chunks[1]
        pages = list(parquet_headers.pages(data, chunk))
        headers = sum(page.start for page in pages) - sum(page.stop for page in pages[:-1]) - chunk.start
        assert pages[-1].stop == chunk.start + stated.total_compressed_size
        assert sum(page.size for page in pages) + headers == stated.total_uncompressed_size
        values = [page for page in pages if page.kind != parquet_headers.DICTIONARY]
        assert sum(page.values for page in values) == chunk.values == group.rows
        assert options["use_dictionary"] or len(values) > 1
        bodies += pages
    for page in bodies:
        assert not data.read & set(range(page.start, page.stop))


def test_images_of_plain_pages_are_at_the_stated_places():
    data = written(compression="none", use_dictionary=False, row_group_size=40)
    images = []
    for group in parquet_headers.row_groups(data):
        for page in parquet_headers.pages(data, group.chunks[1]):
            body = data[page.start : page.stop]
            at = 4 + int.from_bytes(body[:4], "little")  # levels of definition
            for _ in range(page.values):
                size = int.from_bytes(body[at : at + 4], "little")
                images.append(body[at + 4 : at + 4 + size])
                at += 4 + size
            assert at == len(body)
    assert images == IMAGES


def test_a_damaged_footer_or_page_is_an_error():
    data = written(compression="none", use_dictionary=False)
    with pytest.raises(parquet_headers.HeaderError, match="its footer is damaged"):
        parquet_headers.row_groups(data[:-8] + bytes(4) + b"PAR1")
    (group,) = parquet_headers.row_groups(data)
    cut = data[: group.chunks[1].start + 2000]
    with pytest.raises(parquet_headers.HeaderError, match="a page is damaged"):
        list(parquet_headers.pages(cut, group.chunks[1]))
