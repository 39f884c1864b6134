"""Compares what webdataset yields from a tar with what the index and the reader of this repository yield."""

import re

import webdataset

from flip.data.chunk_reader import ChunkReader
from flip.data.manifest.build import index
from flip.runs.errors import DataError
from tools.shards_commands import inspect_samples

SAME = ""
"""Expected result of a tar that is accepted; any other value is a pattern of the expected error."""


def assert_same_samples_or_refusal(archive, expected, out):
    """The samples equal webdataset's (at least one) if ``expected`` is SAME, else the index refuses the tar (65)."""
    reference = webdataset_samples(archive)
    actual = indexed_samples(archive, out)
    if expected == SAME:
        assert not isinstance(reference, Exception) and reference == actual, (reference, actual)
        assert reference
        return
    assert isinstance(actual, DataError), (reference, actual)
    assert re.search(expected, str(actual)) and actual.code == 65 and actual.remedy, str(actual)
    assert not out.exists()


def webdataset_samples(path):
    """Return (key, extension -> bytes) of each sample that webdataset yields, or the error that it raises."""
    try:
        samples = list(webdataset.tariterators.tarfile_samples([{"url": str(path)}]))
    except Exception as error:  # webdataset documents no specific error
        return error
    return [(s["__key__"], {k: v for k, v in s.items() if k not in ("__key__", "__url__")}) for s in samples]


def indexed_samples(path, out):
    """Return the same, read by the index and reader of this repository."""
    try:
        manifest = index([str(path)], out, chunk=1)
    except DataError as error:
        return error
    keys = [inspect_samples.sample(manifest, id).key for id in range(manifest.samples)]
    members = [ChunkReader().read_chunk(manifest, id)[0] for id in range(manifest.samples)]
    return list(zip(keys, [{name: bytes(data) for name, data in sample.items()} for sample in members], strict=True))
