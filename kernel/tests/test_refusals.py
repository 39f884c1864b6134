"""Tests that the kernel refuses what it does not reproduce, and accepts no file that simplejpeg refuses."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from images import crop, damage, draw_image, encode, reference, visible
from PIL import Image

BOX = (0, 0, 40, 30)
KEEP = np.arange(9, dtype=np.int16)


def file(mode: str = "RGB", **options) -> bytes:
    pixels = Image.fromarray(draw_image(np.random.default_rng(3), 40, 30)).convert(mode)
    out = io.BytesIO()
    pixels.save(out, "JPEG", **{"quality": 90, "subsampling": 2} | options)
    return out.getvalue()


def changed(before: bytes, after: bytes, data: bytes | None = None, count: int = 1) -> bytes:
    data = data or file()
    assert before in data
    return data.replace(before, after, count)


def frame(position: int, value: int, data: bytes | None = None) -> bytes:
    """The file with another byte in its frame header: 0 is its precision."""
    data = bytearray(data or file())
    data[data.index(b"\xff\xc0") + 4 + position] = value
    return bytes(data)


def scan(position: int, value: int, data: bytes | None = None) -> bytes:
    """The file with another byte in its scan header: 0 is the number of components."""
    data = bytearray(data or file())
    data[data.index(b"\xff\xda") + 4 + position] = value
    return bytes(data)


def segment(marker: int, content: bytes, data: bytes | None = None, before: bytes = b"\xff\xc0") -> bytes:
    """The file with one more segment before its frame header."""
    added = bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content
    data = data or file()
    at = data.index(before)
    return data[:at] + added + data[at:]


def table(content: bytes) -> bytes:
    """The file with one more Huffman table before its scan header."""
    return segment(0xC4, content, before=b"\xff\xda")


FRAME = file()[file().index(b"\xff\xc0") + 4 :][:15]
RGB_IDS = scan(1, 82, scan(3, 71, scan(5, 66, frame(6, 82, frame(9, 71, frame(12, 66))))))
RESTARTS = {"restart_marker_blocks": 1}
#: name -> (file, text of the refusal).
REFUSED = {
    "empty": (b"", "not a JPEG"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a JPEG"),
    "two bytes": (file()[:2], "not a JPEG"),
    "end in header": (file()[:100], "ends early"),
    "end in scan": (file()[:-100], "ends early"),
    "no end of image": (file()[:-2], "ends early"),
    "too many bytes": (file() + bytes(1 << 22), "larger than the limits"),
    "huge dimensions": (frame(1, 0xFF), "larger than the limits"),
    "too many pixels": (frame(1, 0x0F, frame(3, 0x0F)), "larger than the limits"),
    "no height": (frame(1, 0, frame(2, 0)), "smaller than 16"),
    "a line": (frame(2, 1), "smaller than 16"),
    "second start of image": (b"\xff\xd8" + file(), "marker"),
    "bytes between segments": (changed(b"\xff\xc0", b"\0\xff\xc0"), "marker"),
    "fill byte between segments": (changed(b"\xff\xc0", b"\xff\xff\xc0"), "marker"),
    "restart marker in header": (segment(0xD0, b""), "marker"),
    "number of lines": (segment(0xDC, b"\0\x20"), "marker"),
    "JFIF 2": (changed(b"JFIF\0\1", b"JFIF\0\2"), "wrong length or value"),
    "short JFIF": (segment(0xE0, b"JFIF\0\1\1"), "wrong length or value"),
    "16-bit quantisation": (segment(0xDB, b"\x10" + bytes(128)), "wrong length or value"),
    "quantisation that is too long": (segment(0xDB, b"\0" + b"\1" * 65), "wrong length or value"),
    "quantisation by zero": (segment(0xDB, b"\0" + bytes(64)), "quantisation"),
    "missing quantisation": (frame(8, 3), "quantisation"),
    "long restart interval": (segment(0xDD, b"\0\0\0\1"), "wrong length or value"),
    "two frames": (segment(0xC0, FRAME), "wrong length or value"),
    "spectral selection": (scan(7, 1), "wrong length or value"),
    "successive approximation": (scan(9, 1), "wrong length or value"),
    "progressive": (file(progressive=True), "not baseline"),
    "arithmetic": (changed(b"\xff\xc0", b"\xff\xc9"), "not baseline"),
    "arithmetic conditioning": (segment(0xCC, b"\0\0"), "not baseline"),
    "extended": (changed(b"\xff\xc0", b"\xff\xc1"), "not baseline"),
    "lossless": (changed(b"\xff\xc0", b"\xff\xc3"), "not baseline"),
    "12 bits": (frame(0, 12), "not baseline"),
    "CMYK": (file("CMYK"), "components"),
    "a scan of one component": (scan(0, 1), "components"),
    "an id twice": (frame(9, 1), "components"),
    "another id in the scan": (scan(1, 9), "components"),
    "4:1:1": (frame(7, 0x41), "sampling"),
    "4:4:0": (frame(7, 0x12), "sampling"),
    "chroma that is not halved": (frame(10, 0x12), "sampling"),
    "no sampling factor": (frame(7, 0), "sampling"),
    "RGB by Adobe": (segment(0xEE, b"Adobe" + bytes(7), changed(b"JFIF", b"JFXX")), "not YCbCr"),
    "RGB by ids": (changed(b"JFIF", b"JFXX", RGB_IDS), "not YCbCr"),
    "no Huffman table": (scan(2, 0x33), "Huffman"),
    "too many codes": (table(b"\0" + b"\3" + bytes(15) + b"\0\1\2"), "Huffman"),
    "too many symbols": (table(b"\0" + b"\xff" * 16 + bytes(300)), "Huffman"),
    "a Huffman table beyond its segment": (table(b"\0" + b"\0\5" + bytes(14) + b"\0\1"), "Huffman"),
    "an empty Huffman table": (table(bytes(17)), "Huffman"),
    "a DC symbol of 12 bits": (table(b"\0" + b"\0\1" + bytes(14) + b"\x0c"), "Huffman"),
    "an AC symbol of 11 bits": (table(b"\x10" + b"\0\1" + bytes(14) + b"\x0b"), "Huffman"),
    "an AC symbol of a progressive file": (table(b"\x10" + b"\0\1" + bytes(14) + b"\x10"), "Huffman"),
    "no restart marker": (changed(b"\xff\xd1", b"", file(**RESTARTS)), ""),
    "wrong restart marker": (changed(b"\xff\xd1", b"\xff\xd2", file(**RESTARTS)), "restart marker"),
    "bytes before restart marker": (changed(b"\xff\xd1", b"\0\0\xff\xd1", file(**RESTARTS)), "too short or too long"),
    "bytes before the end": (changed(b"\xff\xd9", b"\0\0\xff\xd9"), "too short or too long"),
    "another marker at the end": (file()[:-2] + b"\xff\xfe\0\2\xff\xd9", "not followed by the end"),
    "a scan without bytes": (file()[: file().index(b"\xff\xda") + 14] + b"\xff\xd9", "too short or too long"),
    "a second scan": (file()[:-2] + file()[file().index(b"\xff\xda") :], "not followed by the end"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_file_is_refused(kernel, name):
    data, reason = REFUSED[name]
    assert kernel.File(data).patches(BOX, 48, 16, KEEP) is None
    assert reason in kernel.why()


def test_undamaged_file_is_accepted(kernel):
    tables = file()[file().index(b"\xff\xc4") + 4 :][:29]
    repeated = segment(0xC4, tables * 2000)
    ended = file() + b"bytes after the end"
    for data in (file(), file("L"), file(**RESTARTS), ended, segment(0xFE, b"a comment"), repeated):
        assert np.array_equal(kernel.File(data).patches(BOX, 48, 16, KEEP), reference(data, BOX, 48, 16, KEEP))
        assert kernel.File(data).size() == (40, 30)


def test_file_with_metadata_is_refused_if_exif_counts(kernel):
    data = segment(0xE1, b"Exif\0\0")
    assert kernel.File(data).patches(BOX, 48, 16, KEEP) is not None and kernel.File(data).size() == (40, 30)
    strict = kernel.File(data, ignore_exif=False)
    assert strict.patches(BOX, 48, 16, KEEP) is None and "metadata" in kernel.why()
    assert strict.size() is None
    assert kernel.File(file(), ignore_exif=False).patches(BOX, 48, 16, KEEP) is not None


@pytest.mark.parametrize(
    ("box", "size", "patch", "keep"),
    [
        ((0, 0, 41, 30), 48, 16, [0]), ((0, 0, 40, 31), 48, 16, [0]), ((-1, 0, 40, 30), 48, 16, [0]),
        ((5, 0, 5, 30), 48, 16, [0]), ((0, 9, 40, 8), 48, 16, [0]), ((0, 0, 1 << 31, 30), 48, 16, [0]),
        (BOX, 48, 15, [0]), ((0, 0, (1 << 32) + 40, 30), 48, 16, [0]), (BOX, 0, 16, [0]), (BOX, 2048, 32, [0]),
        (BOX, 512, 128, [0]), (BOX, 1 << 20, 1 << 20, [0]), (BOX, 65, 1, [0]), (BOX, 48, 16, [9]),
        (BOX, 48, 16, [-1]), (BOX, 48, 16, [1, 1]), (BOX, 48, 16, []), (BOX, 48, 16, range(10)),
    ],
)  # fmt: skip
def test_request_outside_of_image_or_limits_is_refused(kernel, box, size, patch, keep):
    assert kernel.File(file()).patches(box, size, patch, np.array(keep, np.int16)) is None
    assert "request" in kernel.why()


def test_limits_of_the_package_are_those_of_the_library(kernel):
    header = (Path(__file__).resolve().parents[1] / "src" / "visible_jpeg.h").read_text()
    for name in ("MAX_SIZE", "MAX_PATCH", "MAX_ROW"):
        assert f"VJ_{name} = {getattr(kernel, name)}" in header
    assert f'VJ_VERSION "{kernel.version()}"' in header


def test_index_beyond_16_bits_is_an_error(kernel):
    with pytest.raises(ValueError, match="16 bits"):
        kernel.File(file()).patches(BOX, 48, 16, np.array([1 << 16]))


def test_view_of_small_image_and_of_one_patch(kernel):
    data = simplejpeg.encode_jpeg(draw_image(np.random.default_rng(1), 16, 17), 90)
    keep = np.zeros(1, np.int16)
    for box in ((0, 0, 16, 17), (3, 4, 4, 5)):
        assert np.array_equal(kernel.File(data).patches(box, 32, 32, keep), reference(data, box, 32, 32, keep))
    small = simplejpeg.encode_jpeg(draw_image(np.random.default_rng(1), 15, 17), 90)
    assert kernel.File(small).patches((0, 0, 15, 17), 32, 32, keep) is None and "16 pixels" in kernel.why()


def compare_damaged(kernel, seed: int, files: int) -> dict[str, int]:
    """Damaged files: the kernel must refuse what simplejpeg refuses, and else have its bits, or refuse."""
    random = np.random.default_rng(seed)
    originals = []
    for _ in range(40):
        width, height = random.integers(16, 80, 2).tolist()
        originals.append(encode(random, draw_image(random, width, height)))
    counts = {"both accept": 0, "both refuse": 0, "the kernel refuses": 0}
    for number in range(files):
        data = damage(random, originals[random.integers(len(originals))])
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            simplejpeg.decode_jpeg(data, "RGB")
            is_accepted = data[:3] == b"\xff\xd8\xff"
        except ValueError:
            is_accepted = False
        side = kernel.File(data).size()
        patches = None
        if side:
            box = crop(random, *side, 64)
            keep = visible(random, 16)
            patches = kernel.File(data).patches(box, 64, 16, keep)
        if patches is None:
            counts["the kernel refuses" if is_accepted else "both refuse"] += 1
            continue
        assert is_accepted, f"damaged file {number} of seed {seed} is accepted"
        assert side == (width, height)
        assert np.array_equal(patches, reference(data, box, 64, 16, keep)), f"damaged file {number} of seed {seed}"
        counts["both accept"] += 1
    return counts


def test_2500_damaged_files_are_decided_as_by_simplejpeg_or_refused(kernel):
    counts = compare_damaged(kernel, 1, 2500)
    assert counts["both accept"] > 250 and counts["both refuse"] > 1000, counts
    assert counts["the kernel refuses"] < 250, counts


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
def test_damaged_files_of_other_seeds(kernel, seed):
    compare_damaged(kernel, seed, 10_000)


OTHER_UNIT = """
import sys
sys.path.insert(0, sys.argv[1])
import visible_jpeg
from test_refusals import compare_damaged
print(compare_damaged(visible_jpeg, 1, 5000)["both accept"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["NONE", "SSE2"])
def test_damaged_files_have_the_bits_of_each_form_of_libjpeg_turbo(kernel, unit):
    """Its forms in C and for vector units differ where coefficients overflow: such blocks are refused."""
    done = subprocess.run(
        [sys.executable, "-c", OTHER_UNIT, str(Path(__file__).parent)],
        env={**os.environ, f"JSIMD_FORCE{unit}": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 500
