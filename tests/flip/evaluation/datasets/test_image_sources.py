"""Tests how images are read for evaluation, from shards and from single files."""

import threading

import pytest

from flip.data.chunk_reader import ChunkReader
from flip.evaluation.datasets.image_sources import READER_THREADS, File, ImageFiles, Shards
from flip.runs.errors import DataError
from tests.synthetic import draw_image, encode


def files_of(folder, count):
    for i in range(count):
        (folder / f"{i}.png").write_bytes(encode(draw_image(i)))
    return ImageFiles([File(str(folder / f"{i}.png"), i) for i in range(count)], str(folder))


@pytest.mark.parametrize("form", ["shards", "files"])
def test_samples_are_read_by_several_threads_and_stay_in_order(data, tmp_path, form, monkeypatch):
    """The fixture has READER_THREADS + 1 chunks."""
    if form == "shards":
        images = Shards(data)
    else:
        images = files_of(tmp_path, READER_THREADS + 1)
    name = "read_chunk" if form == "shards" else "read"
    read = getattr(ChunkReader, name)
    reads = []
    all_wait = threading.Barrier(READER_THREADS)  # broken if fewer threads read

    def read_with_others(*args):
        reads.append(args)
        all_wait.wait(60)
        return read(*args)

    monkeypatch.setattr(ChunkReader, name, read_with_others)
    positions = range(images.manifest.chunk if form == "shards" else 1, images.count)
    samples = list(images.samples(positions))
    assert [id for id, _ in samples] == list(positions) and len(reads) == READER_THREADS
    images_read = [bytes(sample.get("png", sample.get("jpg"))) for _, sample in samples]
    assert images_read == [encode(draw_image(id)) for id in positions]


def test_files_are_examined_once_for_digest_and_cache_key(tmp_path, monkeypatch):
    """Each takes a request in object storage."""
    images = files_of(tmp_path, 3)
    examined = []
    stat = ImageFiles._stat
    monkeypatch.setattr(ImageFiles, "_stat", lambda self, id: examined.append(id) or stat(self, id))
    assert images.digest and images.cache_key and sorted(examined) == [0, 1, 2]


def test_missing_image_file_is_named_with_the_list_that_names_it(tmp_path):
    images = ImageFiles([File(str(tmp_path / "gone.png"), 0)], str(tmp_path), "list.jsonl")
    for read in (lambda: images.digest, lambda: images.cache_key, lambda: list(images.samples(range(1)))):
        with pytest.raises(DataError, match=r"gone\.png: the image is missing, .*take it out of list\.jsonl") as raised:
            read()
        assert "shard" not in str(raised.value)
