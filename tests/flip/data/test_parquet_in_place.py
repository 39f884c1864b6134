"""Tests that training on parquet files read in place gives the batches of tars of the same rows."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from flip.config import schema
from flip.data.chunk_reader import ChunkReader
from flip.data.decode_counts import DecodeCounts
from flip.data.loader import Loader
from flip.data.manifest import build, filters
from flip.data.manifest.manifest import Manifest
from flip.data.manifest.row_texts import Columns
from flip.data.parquet import image_pages
from flip.data.worker import WorkerConfig
from flip.runs.errors import DataError
from tests.flip.data.loading import PLAIN
from tests.flip.data.parquet_files.write import jpeg
from tests.synthetic import make_tokenizer

ROWS = 150
CHUNK = 8
BATCH = 24
STEPS = 8
COLUMNS = Columns("image", ("caption",))
FILES = Path(__file__).with_name("parquet_files")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("words") / "tokenizer.json")


@pytest.fixture(scope="module")
def images():
    return [jpeg(seed) for seed in range(ROWS)]


def table(images, struct=False):
    if struct:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        column = pa.array([{"bytes": image, "path": f"{i}.jpg"} for i, image in enumerate(images)], kind)
    else:
        column = pa.array(images, pa.binary())
    captions = [f"a caption of row {i}" for i in range(len(images))]
    return pa.table({"image": column, "caption": captions, "score": np.arange(len(images)) / len(images)})


def write(rows, folder, borders=(0, 67, ROWS), **options):
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, (start, stop) in enumerate(zip(borders[:-1], borders[1:], strict=True)):
        paths.append(str(folder / f"train-{number:05d}.parquet"))
        pq.write_table(rows.slice(start, stop - start), paths[-1], **options)
    return paths


def indexed(paths, out, chosen=None, chunk=CHUNK, columns=COLUMNS):
    scanned = build.scan_shards(build.sorted_keys(paths), out, filters=chosen, columns=columns)
    return build.merge(scanned, out, chunk, filters=chosen, columns=columns)


def tars(rows, folder, chunk=CHUNK):
    """The manifest of tars with the image and the line of each row, (image, record)."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number, (image, record) in enumerate(rows):
            for name, content in (("jpg", image), ("json", json.dumps(record).encode())):
                info = tarfile.TarInfo(f"{number:09d}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return build.index([str(folder / "00000.tar")], folder / "manifest", chunk)


def records(rows):
    return [(row["image"], {"caption": row["caption"]}) for row in rows.to_pylist()]


def digest(manifest, tokenizer, layouts=((1, STEPS),)):
    """SHA-256 over all batches; ``layouts``: (ranks, steps), one after the other."""
    data = schema.Data(
        manifest=str(manifest.folder), workers=0, chunk=manifest.chunk, samples=manifest.samples, block=2, lanes=12,
        decoder="simplejpeg", resize="pillow", tokenizer=str(tokenizer), captions=["json:caption"],
    )  # fmt: skip
    config = WorkerConfig(data, PLAIN, schema.ImageTower(size=24, patch=8), schema.TextTower(8, vocabulary=300), 11)
    total = hashlib.sha256()
    start = 0
    for world, steps in layouts:
        sources = [Loader(config, rank, world).batches(start * BATCH, BATCH, "0.5") for rank in range(world)]
        for _ in range(steps):
            parts = [next(source) for source in sources]
            for name in ("patches", "keep_indices", "tokens", "ids"):
                total.update(torch.cat([getattr(part, name) for part in parts]).numpy().tobytes())
        for source in sources:
            source.close()
        start += steps
    return total.hexdigest()


@pytest.fixture(scope="module")
def reference(images, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tars") / "data"
    return digest(tars(records(table(images)), folder), tokenizer, [(1, STEPS)])


WRITTEN = {
    "none": {"compression": "none", "use_dictionary": False},
    "default": {},
    "small pages": {"data_page_size": 4096, "write_batch_size": 4, "use_dictionary": False},
    "mixed pages": {"dictionary_pagesize_limit": 20_000, "data_page_size": 4096, "write_batch_size": 4},
    "small groups": {"row_group_size": 13, "use_dictionary": False},
    "zstd": {"compression": "zstd", "data_page_size": 4096, "write_batch_size": 4, "use_dictionary": False},
    "gzip": {"compression": "gzip"},
    "brotli": {"compression": "brotli"},
    "lz4": {"compression": "lz4"},
    "version 2": {"data_page_version": "2.0", "use_dictionary": False, "compression": "snappy"},
    "version 2 none": {"data_page_version": "2.0", "use_dictionary": False, "compression": "none"},
}


@pytest.mark.parametrize("struct", [False, True], ids=["bytes", "struct"])
@pytest.mark.parametrize("name", WRITTEN)
def test_batches_equal_those_of_tars(images, tokenizer, reference, tmp_path, name, struct):
    manifest = indexed(write(table(images, struct), tmp_path, **WRITTEN[name]), tmp_path / "m")
    assert digest(manifest, tokenizer) == reference


def test_batches_are_equal_for_two_ranks_and_after_resume_at_another_number(images, tokenizer, reference, tmp_path):
    manifest = indexed(write(table(images), tmp_path), tmp_path / "m")
    for layouts in ([(2, STEPS)], [(4, STEPS)], [(2, 3), (1, 2), (4, STEPS - 5)]):
        assert digest(manifest, tokenizer, layouts) == reference


@pytest.mark.parametrize("name", WRITTEN)
def test_dropped_rows_are_counted_and_batches_equal_tars_of_others(images, tokenizer, tmp_path, name):
    rows = table(images)
    present = [None if i % 11 == 3 else image for i, image in enumerate(images)]
    captions = [None if i % 13 == 5 else f"a caption of row {i}" for i in range(ROWS)]
    rows = rows.set_column(0, "image", pa.array(present, pa.binary())).set_column(1, "caption", [captions])
    chosen = filters.parse(["score>=0.1", "score<0.9"], "")
    manifest = indexed(write(rows, tmp_path, **WRITTEN[name]), tmp_path / "m", chosen)
    kept = [r for r in rows.to_pylist() if r["image"] and r["caption"] and 0.1 <= r["score"] < 0.9]
    expected = tars([(row["image"], {"caption": row["caption"]}) for row in kept], tmp_path / "tars")
    assert digest(manifest, tokenizer) == digest(expected, tokenizer)
    nulls = sum(image is None for image in present)
    assert manifest.settings["dropped"]["the image is null"] == nulls
    assert manifest.settings["seen"] == ROWS and manifest.samples == len(kept)
    for id in (0, 7, 30, manifest.samples - 1):
        shard, row = manifest.locate(id)
        first = 67 if shard.endswith("00001.parquet") else 0
        assert images[first + row] == kept[id]["image"]


def test_chunk_of_many_small_files_has_all_of_their_rows(images, tokenizer, reference, tmp_path):
    borders = (0, 1, 2, 3, 40, 43, 44, 100, 149, ROWS)
    manifest = indexed(write(table(images), tmp_path, borders), tmp_path / "m")
    assert digest(manifest, tokenizer) == reference


def test_repeated_images_are_dropped_up_to_share_and_refused_above_it(images, tmp_path):
    repeated = [*images[:-1], images[3]]
    manifest = indexed(write(table(repeated), tmp_path / "one", (0, ROWS)), tmp_path / "m")
    assert manifest.settings["dropped"] == {"the image of an earlier row": 1}
    each_twice = [image for image in images[:50] for _ in range(2)]
    with pytest.raises(DataError, match="a row per caption"):
        indexed(write(table(each_twice), tmp_path / "two", (0, 100)), tmp_path / "n")


def test_images_that_are_paths_only_are_named(images, tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": None, "path": f"{i}.jpg"} for i in range(20)]
    paths = write(table(images[:20]).set_column(0, "image", pa.array(rows, kind)), tmp_path, (0, 20))
    with pytest.raises(DataError, match="20 x the bytes are null: the file holds a path"):
        indexed(paths, tmp_path / "m")


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[b"a"], [b"b", b"c"]], pa.list_(pa.binary())),
        pa.array([b"abcd", b"efgh"], pa.binary(4)),
        pa.array([1, 2]),
    ],
    ids=["lists", "fixed", "numbers"],
)
def test_columns_without_images_are_refused_with_command_that_converts_them(tmp_path, column):
    paths = write(pa.table({"image": column, "caption": ["a", "b"]}), tmp_path, (0, 2))
    with pytest.raises(DataError, match="not read in place") as caught:
        indexed(paths, tmp_path / "m")
    assert "flip shards make" in caught.value.paragraph()


def test_delta_encoded_images_are_refused(images, tmp_path):
    options = {"use_dictionary": False, "column_encoding": {"image": "DELTA_LENGTH_BYTE_ARRAY"}}
    with pytest.raises(DataError, match="encoding DELTA_LENGTH_BYTE_ARRAY"):
        indexed(write(table(images), tmp_path, **options), tmp_path / "m")


def test_large_compressed_pages_are_refused(images, tmp_path, monkeypatch):
    monkeypatch.setattr(image_pages, "PAGE_LIMIT", 1000)
    with pytest.raises(DataError, match="a compressed page of"):
        indexed(write(table(images), tmp_path), tmp_path / "m")


def test_flipped_bit_is_named_by_chunk_and_command_that_excludes_it(images, tmp_path):
    paths = write(table(images), tmp_path, compression="none", use_dictionary=False)
    manifest = indexed(paths, tmp_path / "m")
    _, start, stop, _ = manifest.chunk_reads(4)[0]
    data = bytearray(Path(paths[0]).read_bytes())
    data[(start + stop) // 2] ^= 1
    Path(paths[0]).write_bytes(data)
    with pytest.raises(DataError, match=r"chunk 4 \(samples 32 to 39\) is damaged") as caught:
        ChunkReader().read_chunk(manifest, 4)
    assert "flip shards exclude" in caught.value.paragraph() and "--ids 32-39" in caught.value.paragraph()


def test_stopped_index_continues_with_scans_of_same_columns_only(images, tmp_path):
    paths = write(table(images), tmp_path)
    out = tmp_path / "m"
    build.scan_shards(build.sorted_keys(paths), out, columns=COLUMNS)
    again = build.scan_shards(build.sorted_keys(paths), out, columns=COLUMNS)
    assert again.reused == 2
    others = build.scan_shards(build.sorted_keys(paths), out, columns=Columns("image", ("caption",), ("score",)))
    assert others.reused == 0


def test_plain_files_read_little_more_than_images(images, tmp_path):
    manifest = indexed(write(table(images), tmp_path, **WRITTEN["none"]), tmp_path / "m")
    assert manifest.settings["parquet"]["read_per_used"] <= 1.01


def test_snappy_files_are_read_by_blocks(tmp_path):
    large = [np.random.default_rng(i).bytes(20_000) for i in range(ROWS)]
    manifest = indexed(write(table(large), tmp_path), tmp_path / "m", chunk=64)
    assert len(manifest.pages.marks) > 40
    assert manifest.settings["parquet"]["read_per_used"] <= 1.1
    read = [bytes(sample["jpg"]) for _, sample in ChunkReader().samples(manifest)]
    assert read == large


def test_whole_pages_name_chunk_that_reads_less(images, tmp_path):
    manifest = indexed(write(table(images), tmp_path, compression="zstd"), tmp_path / "m")
    assert manifest.settings["parquet"]["read_per_used"] > 2
    assert manifest.settings["parquet"]["chunk_that_does"] == 128


def test_views_of_images_have_format_that_decoders_accept(images, tokenizer, tmp_path):
    manifest = indexed(write(table(images), tmp_path, compression="zstd"), tmp_path / "m")
    sample = ChunkReader().read_chunk(manifest, 0)[0]
    assert sample["jpg"].format == "B"
    assert DecodeCounts().fallbacks == {}


OTHER_WRITERS = sorted(path.name for path in FILES.glob("*.parquet"))
RESUMED = [(2, 3), (1, 2), (4, STEPS - 5)]


def rows_of(name):
    """(image, caption, number) of each row of a recorded file."""
    rows = pq.read_table(FILES / name).to_pylist()
    images = [row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"] for row in rows]
    return [(image, row["caption"], row["number"]) for image, row in zip(images, rows, strict=True)]


def test_files_of_all_writers_are_recorded():
    writers = {name.split("-")[0] for name in OTHER_WRITERS}
    assert writers == {"datasets", "duckdb", "fastparquet", "img2dataset", "pandas", "polars", "pyspark"}
    assert {name[:10] for name in OTHER_WRITERS if name.startswith("datasets")} == {
        "datasets-2",
        "datasets-4",
        "datasets-5",
    }
    assert {name.split("-")[0] for name in OTHER_WRITERS if "nulls" in name} == writers


@pytest.mark.parametrize("name", OTHER_WRITERS)
def test_batches_of_files_of_other_writers_equal_those_of_tars(tokenizer, tmp_path, name):
    rows = rows_of(name)
    if "nulls" not in name:
        assert [image for image, _, _ in rows] == [jpeg(seed) for seed in range(24)]
    manifest = indexed([str(FILES / name)], tmp_path / "m", chunk=2)
    kept = [(image, {"caption": caption}) for image, caption, _ in rows if image and caption]
    assert len(kept) == 18 if "nulls" in name else 24
    expected = digest(tars(kept, tmp_path / "tars", 2), tokenizer)
    for layouts in ([(1, STEPS)], [(2, STEPS)], [(4, STEPS)], RESUMED):
        assert digest(manifest, tokenizer, layouts) == expected


@pytest.mark.parametrize("name", OTHER_WRITERS)
def test_batches_of_filtered_files_of_other_writers_equal_those_of_tars(tokenizer, tmp_path, name):
    chosen = filters.parse(["number>=3", "number<20"], "")
    manifest = indexed([str(FILES / name)], tmp_path / "m", chosen, chunk=2)
    rows = rows_of(name)
    kept = [(image, {"caption": caption}) for image, caption, n in rows if image and caption and 3 <= n < 20]
    assert digest(manifest, tokenizer) == digest(tars(kept, tmp_path / "tars", 2), tokenizer)


def test_manifest_in_another_folder_has_same_digest_and_own_rows(images, tmp_path):
    from tools.shards_commands.manifest import excepting

    manifest = indexed(write(table(images), tmp_path), tmp_path / "m")
    other = excepting(manifest, {5: "by hand"}, str(tmp_path / "other"))
    assert other.exceptions == {5: "by hand"}
    assert all(Path(key).is_relative_to(tmp_path / "other") for key in other.keys[other.shard_count :])
    assert Manifest.load(tmp_path / "other").read_bytes == manifest.read_bytes
