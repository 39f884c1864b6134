"""Tests that small files which expand to gigabytes end with a FlipError in a process with limited memory.

A child process performs its imports, limits its address space (RLIMIT_AS) to the present size plus an allowance, and
reads the file. A MemoryError, or any other exception than a FlipError, fails the test.
"""

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import textwrap
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flip.data import decode
from flip.data.manifest import tar
from flip.data.parquet import small_file
from flip.tokenizer import train

ROOT = Path(__file__).resolve().parents[2]
MB = 1 << 20
ALLOWANCE = 256 * MB
CHILD = """
import json, os, resource, sys
from flip.runs.errors import FlipError
{imports}
cases = json.load(sys.stdin)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + {allowance},) * 2)
found = {{}}
for name, values in cases.items():
    try:
        found[name] = [0, str({call})]
    except FlipError as error:
        found[name] = [error.code, error.paragraph()]
    except BaseException as error:
        found[name] = [-1, repr(error)]
json.dump(found, sys.stdout)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and /proc are Linux's")


def read(imports, call, cases, allowance=ALLOWANCE):
    """Evaluate ``call``, an expression in ``values``, for each of the cases in a process with limited memory.

    Return for each name the exit code (0 without an error, -1 for an error other than FlipError) and the text.
    """
    program = CHILD.format(imports=textwrap.dedent(imports), call=call, allowance=allowance)
    # One malloc arena, and Arrow on malloc: otherwise they reserve gigabytes of addresses that they never use.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1"}
    text = json.dumps({name: str(value) for name, value in cases.items()})
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, input=text, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def hole(path, size, *parts):
    """Write a sparse file of ``size`` bytes that takes almost no disk space; ``parts``: (offset, bytes) of data."""
    with open(path, "wb") as file:
        for offset, data in parts:
            file.seek(offset)
            file.write(data)
        file.truncate(size)
    return path


# -- parquet ----------------------------------------------------------------------------------------------------------


def varint(number):
    if number > 127:
        return bytes([number & 127 | 128]) + varint(number >> 7)
    return bytes([number])


def footer_of(chunks):
    """Return a footer with three bytes per column chunk, which become objects several hundred times as large."""

    def structs(number):
        return b"\xfc" + varint(number)

    schema = b"\x19" + structs(1) + b"\x48\x04root\x15\x00\x00"
    groups = b"\x19" + structs(1) + b"\x19" + structs(chunks) + b"\x26\x00\x00" * chunks + b"\x16\x00\x16\x00\x00"
    text = b"\x15\x02" + schema + b"\x16\x00" + groups + b"\x00"
    return b"PAR1" + text + len(text).to_bytes(4, "little") + b"PAR1"


def lying(data, size):
    """Return a parquet file whose footer states 2 MB although its pages state ``size``."""

    def zigzag(number, width=1):
        out = []
        number = 2 * number
        while number > 127 or len(out) + 1 < width:
            out = [*out, number & 127 | 128]
            number = number >> 7
        return bytes([*out, number])

    true_size = zigzag(size)
    offset = data.rindex(true_size)
    return data[:offset] + zigzag(2 * MB, len(true_size)) + data[offset + len(true_size) :]


EMPTY_PAGE = b"\x15\x00\x15\x00\x15\x00\x2c\x15\x00\x15\x00\x15\x06\x15\x06\x00\x00"
"""The header of a page without values."""
STRUCT = b"\x1c"
"""The head of a field that is a struct: repeated, each is inside the one before."""


def before_pages(data, headers):
    """Return a parquet file with ``headers`` in front of the pages of its last column."""
    row_group = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0)
    column = row_group.column(row_group.num_columns - 1)
    start = column.dictionary_page_offset or column.data_page_offset
    return data[:start] + headers + data[start:]


def schema_of(columns):
    """Return a parquet file of columns named a, without rows."""
    count = varint(columns + 1)
    schema = b"\x19\xfc" + count + b"\x48\x01r\x15" + varint(2 * columns) + b"\x00"
    text = b"\x15\x02" + schema + b"\x15\x02\x25\x00\x18\x01a\x00" * columns + b"\x16\x00\x19\x0c\x00"
    return b"PAR1" + text + len(text).to_bytes(4, "little") + b"PAR1"


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    keys = [f"{i:09d}" for i in range(4096)]
    text = "x" * MB
    repeated = pa.table({"a": pa.DictionaryArray.from_arrays(np.zeros(4096, np.int32), pa.array([text]))})["a"]
    plain_options = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
    dictionary_options = {"compression": "zstd", "store_schema": False, "dictionary_pagesize_limit": 2 * MB}

    def write(name, columns, **options):
        pq.write_table(pa.table(columns), folder / f"{name}.parquet", **options)

    write("dictionary", {"key": keys, "score": repeated}, **dictionary_options)
    write("keys", {"key": repeated, "score": keys}, **dictionary_options)
    write("pages", {"key": keys[:400], "score": pa.repeat(text, 400)}, **plain_options)
    write("rows", {"key": pa.nulls(20 * MB, pa.string()), "score": np.zeros(20 * MB, np.int8)}, compression="zstd")
    encoding = {"key": "PLAIN", "score": "DELTA_BYTE_ARRAY"}
    write("prefixes", {"key": keys[:500], "score": pa.repeat(text, 500)}, column_encoding=encoding, **plain_options)
    data = (folder / "pages.parquet").read_bytes()
    stated = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0).column(1).total_uncompressed_size
    (folder / "lying.parquet").write_bytes(lying(data, stated))
    assert pq.ParquetFile(folder / "lying.parquet").metadata.row_group(0).column(1).total_uncompressed_size == 2 * MB
    (folder / "footer.parquet").write_bytes(footer_of(2 * MB))
    (folder / "wide.parquet").write_bytes(schema_of(60_000))
    hole(folder / "hole.parquet", 1 << 40)
    sound = io.BytesIO()
    pq.write_table(pa.table({"key": keys, "score": np.arange(4096)}), sound)
    (folder / "sound.parquet").write_bytes(sound.getvalue())
    (folder / "empty.parquet").write_bytes(before_pages(sound.getvalue(), EMPTY_PAGE * 400_000))
    (folder / "nested.parquet").write_bytes(before_pages(sound.getvalue(), STRUCT * 100_000))
    return folder


@pytest.mark.long
def test_filters_refuse_parquet_bombs(tables):
    bombs = {path.stem: path.with_suffix(".tar") for path in tables.glob("*.parquet")}
    assert sum(path.stat().st_blocks * 512 for path in tables.glob("*.parquet")) < 16 * MB
    results = read(
        "import pyarrow.compute, pyarrow.parquet\nfrom flip.data.manifest import filters\n"
        "from flip.data.chunk_reader import ChunkReader as Reader",
        "filters.parse(['score==7'], '').predicate(values, Reader()) and 'read'",
        bombs,
    )
    assert results["sound"] == results["dictionary"] == [0, "read"]  # a text shared by all rows is held once
    sentences = {
        "keys": "the parquet file has rows of one key",
        "pages": f"bytes in the columns key, score, at most {small_file.COLUMNS_LIMIT:,} are read",
        "lying": f"bytes in the columns key, score, at most {small_file.COLUMNS_LIMIT:,} are read",
        "rows": f"20,971,520 rows, at most {small_file.ROWS_LIMIT:,} are read",
        "prefixes": "the column score has encoding 7, which does not state its size",
        "empty": "the column score: more pages than its 4,096 values",
        "nested": "the column score: a page is damaged",
        "wide": "the parquet file has no column key. There are: a, a, a",
        "footer": f"a footer of 6,291,487 bytes, at most {small_file.FOOTER_LIMIT:,} are read",
        "hole": f"a parquet file of 1,099,511,627,776 bytes, at most {small_file.FILE_LIMIT:,} are read",
    }
    refused(results, sentences, tables, ".parquet")


def refused(results, sentences, folder, suffix):
    """Assert that each bomb ended with exit code 65 and an error that names the file and contains its sentence."""
    for name, sentence in sentences.items():
        code, text = results[name]
        assert code == 65 and text.startswith(f"{folder}/{name}{suffix}: ") and sentence in text, (name, code, text)
        assert len(text) < 1000, name


# -- tars -------------------------------------------------------------------------------------------------------------


def header(name, size, kind=b"0"):
    info = tarfile.TarInfo(name)
    info.size = size
    info.type = kind
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.long
def test_scan_shard_refuses_sparse_tar_bombs(tmp_path):
    half = 512 * MB
    limit = f"{tar.SAMPLE_LIMIT:,}"
    hole(tmp_path / "member.tar", half, (0, header("a.jpg", half - 2048)))
    hole(tmp_path / "stated.tar", half, (0, header("a.jpg", 1 << 60)))
    hole(tmp_path / "name.tar", half, (0, header("././@LongLink", half - 4096, b"L")))
    hole(tmp_path / "records.tar", half, (0, header("a", half - 4096, b"x")))
    chain = (header("a", 5, b"x") + b"5 =a\n".ljust(512, b"\0")) * 2048
    hole(tmp_path / "chain.tar", half, (0, chain))
    member_size = 60 * MB
    parts = [(i * (512 + member_size), header(f"a.{i}", member_size)) for i in range(8)]
    hole(tmp_path / "sample.tar", half, *parts)
    cases = {path.stem: path for path in tmp_path.glob("*.tar")}
    assert sum(path.stat().st_blocks * 512 for path in cases.values()) < 8 * MB
    program = (
        "from flip.data.manifest.scan import file_stat, scan_shard\n"
        "from flip.data.chunk_reader import ChunkReader as Reader"
    )
    results = read(program, "scan_shard(values, file_stat(values), Reader())", cases, ALLOWANCE + tar.SAMPLE_LIMIT)
    extension = f"at most {tar.EXTENSION_LIMIT:,} are read; they begin at byte 0"
    sentences = {
        "member": f"a member of 536,868,864 bytes, at most {limit} are read; its header is at byte 0",
        "stated": f"a member of 1,152,921,504,606,846,976 bytes, at most {limit} are read; its header is at byte 0",
        "name": f"extension headers of 536,866,816 bytes, {extension}",
        "records": f"extension headers of 536,866,816 bytes, {extension}",
        "chain": extension,
        "sample": f"a sample of more than {limit} bytes, the most that are read; it begins at byte 0",
    }
    refused(results, sentences, tmp_path, ".tar")


# -- pictures ---------------------------------------------------------------------------------------------------------


def zeros(size):
    """Return the zlib stream of ``size`` zeros. Compress a block that ends with a full flush once, and repeat it."""
    pack = zlib.compressobj(9)
    first, block = (pack.compress(bytes(MB)) + pack.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    rest = pack.compress(bytes(size % MB)) + pack.flush()
    return first + block * (size // MB - 1) + rest[:-4] + struct.pack(">HH", size % 65521, 1)


def png(side, depth, colour, *chunks):
    """Return a PNG of zeros with further chunks (type, data)."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    data = zeros(max(side * (1 + side * depth // 8 * {0: 1, 6: 4}[colour]), MB))
    ihdr = struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", ihdr), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff_with_tile(side):
    """Return a TIFF of 16 x 16 pixels in a single tile of ``side`` x ``side`` zeros."""
    data = zeros(side * side)
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 134, 325: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


@pytest.mark.long
def test_decode_refuses_image_bombs(tmp_path):
    """An image with the maximum number of pixels takes 8 bytes per pixel; larger images are refused by their header."""
    text = b"a\0\0" + zlib.compress(bytes(MB - 1))
    webp = b"RIFF\x1a\0\0\0WEBPVP8L\x0e\0\0\0\x2f" + struct.pack("<I", 16382 | 16382 << 14) + bytes(9)
    gif = b"GIF89a" + struct.pack("<HHBBB", 50000, 50000, 0, 0, 0)
    gif += b"\x21\xf9\x04\x08\0\0\0\0," + struct.pack("<HHHHB", 0, 0, 50000, 50000, 0) + b"\x02\x02\x4c\x01\0;"
    bombs = {
        "deep": png(8192, 16, 0),
        "alpha": png(8192, 8, 6),
        "wide": png(8200, 8, 0),
        "texts": png(8, 8, 0, *[(b"zTXt", text)] * 100),
        "text": png(8, 8, 0, (b"zTXt", b"a\0\0" + zeros(300 * MB))),
        "profile": png(8, 8, 0, (b"iCCP", b"a\0\0" + zeros(300 * MB))),
        "tile": tiff_with_tile(24576),
        "webp": webp,
        "gif": gif,
    }
    for name, data in bombs.items():
        (tmp_path / name).write_bytes(data)
    assert sum(map(len, bombs.values())) < 4 * MB
    program = """
        from pathlib import Path
        from PIL import Image
        from flip.data import decode
        Image.init()

        def decoded(path):
            data = Path(path).read_bytes()
            try:
                return decode.decode(data).nbytes
            except decode.DecodeError as error:
                return str(error)

        def converted(path):
            try:
                return decode.to_rgb(decode.open_image(Path(path).read_bytes())).size
            except decode.DecodeError as error:
                return str(error)
        """
    results = read(program, "[decoded(values), converted(values)]", {name: tmp_path / name for name in bombs}, 560 * MB)
    assert results["deep"] == results["alpha"] == [0, f"[{3 << 26}, (8192, 8192)]"]
    limit = f"at most {decode.LIMIT} are read"
    sentences = {
        "wide": f"8200 x 8200 pixels, {limit}",
        "tile": f"24576 x 24576 pixels, {limit}",
        "webp": f"too many pixels, {limit}",
        "gif": f"too many pixels, {limit}",
        "text": "ValueError: Decompressed data too large",
        "texts": "ValueError: Too much memory used in text chunks",
    }
    for name, sentence in sentences.items():
        assert results[name][0] == 0 and results[name][1].count(sentence) == 2, (name, results[name])
    assert results["profile"][0] == 0


# -- files with holes -------------------------------------------------------------------------------------------------

READERS = """
    from pathlib import Path
    from flip.checkpoint import export_record as exported
    from flip.config.schema import TextTower
    from flip.common.yaml_io import read_yaml
    from flip.evaluation.datasets.image_sources import File, ImageFiles
    from flip.data.manifest.manifest import Manifest
    from flip.data.chunk_reader import ChunkReader as Reader
    from flip.evaluation.datasets import annotations as listings
    from flip.evaluation.encoding import open_clip_folder
    from flip.evaluation.datasets import prompts
    from flip.tokenizer import Tokenizer
    from tools.shards_commands.source_files import SourceFiles

    def opened(path):
        path = Path(path)
        if path.name == "chunk":
            return len(Reader().read(str(path), 0, 1 << 40))
        return {
            "yaml": lambda: read_yaml(path),
            "tokenizer": lambda: Tokenizer.of(path, TextTower()),
            "classes": lambda: prompts.read_prompts(str(path)),
            "listing": lambda: listings.read_annotations(path, "test"),
            "picture": lambda: list(ImageFiles([File(str(path))], str(path.parent)).samples(range(1))),
            "made": lambda: SourceFiles([str(path.parent)]).read(path.name, "image"),
            "weights": lambda: exported.check_header(path),
            "folder": lambda: prompts.read_folder(path),
            "keys": lambda: Manifest.load(path),
            "facts": lambda: Manifest.load(path),
            "open_clip": lambda: open_clip_folder.check(str(path)),
        }[path.name]()
    """


def test_readers_refuse_sparse_terabyte_files(tmp_path):
    """A terabyte of zeros is refused by its size before it is read."""
    size = 1 << 40
    files = ("yaml", "tokenizer", "classes", "listing", "picture", "made")
    for name in files:
        hole(tmp_path / name, size)
    hole(tmp_path / "chunk", MB)
    hole(tmp_path / "weights", size, (0, (size - 8).to_bytes(8, "little")))
    for name in ("folder", "keys", "facts", "open_clip"):
        (tmp_path / name).mkdir()
    hole(tmp_path / "folder" / "classnames.txt", size)
    hole(tmp_path / "facts" / "manifest.json", size)
    names = ("keys.txt", "shards.i64", "offsets.u32", "checksums.u32", "exceptions.jsonl", "etags.txt")
    listed = {"version": 2, "files": {name: {"sha256": ""} for name in names}}
    (tmp_path / "keys" / "manifest.json").write_text(json.dumps(listed))
    hole(tmp_path / "keys" / "keys.txt", size)
    hole(tmp_path / "open_clip" / "open_clip_model.safetensors", size, (0, (size - 8).to_bytes(8, "little")))
    (tmp_path / "open_clip" / "open_clip_config.json").write_text("{}")
    cases = {path.name: path for path in tmp_path.iterdir()}
    results = read(READERS, "opened(values)", cases)
    shown = f"{size:,}"
    sentences = {
        "yaml": (78, "more than 1,048,576 bytes, too large for a configuration"),
        "tokenizer": (78, f"{size} bytes, more than the limit of"),
        "classes": (78, f"{size} bytes, more than the limit of"),
        "folder": (78, f"{size} bytes, more than the limit of"),
        "listing": (65, f"{size} bytes, more than the limit of"),
        "made": (-1, f"{size} bytes, more than the limit of"),  # a DecodeError: the row is left out
        "picture": (65, f"an image file of {shown} bytes, at most"),
        "keys": (65, f"a file of {shown} bytes, at most"),
        "facts": (65, f"a file of {shown} bytes, at most"),
        "weights": (65, f"the weights state a header of {size - 8:,} bytes, at most"),
        "open_clip": (65, f"the weights state a header of {size - 8:,} bytes, at most"),
        "chunk": (65, f"the shard ends at byte {MB}, needed were {size}"),
    }
    assert results.keys() == sentences.keys()
    for name, (code, sentence) in sentences.items():
        assert results[name][0] == code and sentence in results[name][1], (name, results[name])
        assert name == "made" or str(tmp_path / name) in results[name][1], "make puts the name before the reason"


# -- captions ---------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_tokenizer_and_filters_bound_memory_for_huge_captions(tmp_path):
    """A caption of megabytes is cut: encoding it in full took 280 bytes per character."""
    train(["a red cat"], 60, tmp_path / "tokenizer.json")
    program = f"""
        from flip.data.decode import DecodeError
        from flip.data.manifest.filters import Length, _by_length
        from flip.data.sample_members import captions_of
        from flip.data.manifest.tar import Sample
        from flip.tokenizer import Tokenizer
        tokenizer = Tokenizer({str(tmp_path / "tokenizer.json")!r}, 8, False)
        TEXTS = {{"zeros": bytes(40 << 20), "words": b"\\xc3\\xa9 " * (8 << 20), "lines": b"\\n" * (24 << 20) + b"a"}}

        def tokens(name):
            if name == "json":
                try:
                    return captions_of({{"json": b"[" + b"[]," * (12 << 20)}}, ["json:caption"])
                except DecodeError as error:
                    return str(error)
            data = TEXTS[name]
            sample = Sample("a", 0, {{"txt": (0, len(data))}})
            codes = _by_length(Length(0, None), [sample], memoryview(data), 1)
            return tokenizer([max(captions_of({{"txt": data}}, ["txt"]), key=len)[:]]).shape, codes.tolist()
        """
    results = read(program, "tokens(values)", {name: name for name in ("zeros", "words", "lines", "json")})
    assert results.pop("json") == [0, "its json has 37,748,737 bytes, at most 4,194,304 are read"]
    assert all(result == [0, "((1, 8), [0])"] for result in results.values()), results
