"""The files of the corpus, each also with other headers and with damage: thousands of files from a few hundred.

Every change is a pure function of the file and its number, so that a failure names a file that can be made again.
"""

import hashlib
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageCms

HERE = Path(__file__).resolve().parent
END = b"\xff\xd9"


def listed():
    """The rows of the list: file, encoder and the command that wrote it."""
    return json.loads((HERE / "corpus.json").read_text(encoding="utf-8"))


def corpus():
    """Name -> bytes of the files as their encoders wrote them."""
    with tarfile.open(HERE / "corpus.tar.xz") as file:
        return {member.name: file.extractfile(member).read() for member in file}


def every():
    """Name -> bytes of all files and variants, in an order that mixes them: neighbours are of different files."""
    files = {}
    for number, (name, data) in enumerate(corpus().items()):
        stem = name.removesuffix(".jpg")
        for change in CHANGES:
            files[f"{stem}-{change.__name__}"] = change(data, number)
    return dict(sorted(files.items(), key=lambda row: hashlib.sha256(row[0].encode()).digest()))


def as_written(data, number):
    return data


def turned(data, number):
    tags = Image.Exif()
    tags[0x0112] = 1 + number % 8
    return _segment(data, 0xE1, tags.tobytes())


def with_profile(data, number):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return _segment(data, 0xE2, b"ICC_PROFILE\0\x01\x01" + profile)


def with_damaged_exif(data, number):
    return _segment(data, 0xE1, b"Exif\0\0II*\0\xff\xff\xff\x7f" + bytes([number % 256]) * 8)


def without_jfif(data, number):
    return _without(data, 0xE0)


def as_rgb_of_adobe(data, number):
    """Colours are RGB by the segment of Adobe, whatever they were."""
    return _segment(_without(data, 0xE0), 0xEE, b"Adobe\0\x64\0\0\0\0\0")


def without_huffman_tables(data, number):
    return _without(data, 0xC4)


def with_more_behind(data, number):
    return data + bytes(100) + data[:50]


def cut_off(data, number):
    scan = _scan(data)
    return data[: scan + (len(data) - scan) * (1 + number % 4) // 5]


def without_end(data, number):
    return data.removesuffix(END)


def with_a_wrong_bit(data, number):
    return _flipped(data, _scan(data), len(data), 1, number)


def with_wrong_bits(data, number):
    return _flipped(data, _scan(data), len(data), 9, number)


def with_a_wrong_header(data, number):
    return _flipped(data, 2, _scan(data), 1, number)


def with_zeros(data, number):
    at = _place(data, number)
    return data[:at] + bytes(24) + data[at + 24 :]


def with_a_gap(data, number):
    at = _place(data, number)
    return data[:at] + data[at + 11 :]


def with_a_damaged_unit(data, number):
    """Damage between two restart markers, beyond which a reader that skips does not see it."""
    markers = [at for at in range(_scan(data), len(data) - 1) if data[at] == 0xFF and 0xD0 <= data[at + 1] <= 0xD7]
    if len(markers) < 3:
        return with_zeros(data, number + 1)
    first = number * 7 % (len(markers) - 1)
    start = markers[first] + 2
    return data[:start] + b"\x55" * (markers[first + 1] - start) + data[markers[first + 1] :]


CHANGES: tuple[Callable[[bytes, int], bytes], ...] = (
    as_written, turned, with_profile, with_damaged_exif, without_jfif, as_rgb_of_adobe, without_huffman_tables,
    with_more_behind, cut_off, without_end, with_a_wrong_bit, with_wrong_bits, with_a_wrong_header, with_zeros,
    with_a_gap, with_a_damaged_unit,
)  # fmt: skip


def written_by(words):
    """The bytes of the first file whose command contains ``words``."""
    names = [row["file"] for row in listed() if words in row["command"]]
    return corpus()[names[0]]


def _scan(data):
    """Where the first scan starts; in the middle of a file without one."""
    at = data.find(b"\xff\xda")
    if at < 0:
        return len(data) // 2
    return at


def _place(data, number):
    scan = _scan(data)
    return scan + 16 + number * 37 % max(1, len(data) - scan - 48)


def _segment(data, marker, content):
    """The file with a segment in front of the others."""
    return data[:2] + bytes([0xFF, marker]) + (2 + len(content)).to_bytes(2, "big") + content + data[2:]


def _without(data, marker):
    """The file without the segments of a marker before its first scan."""
    kept = [data[:2]]
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] != marker:
            kept.append(data[at:end])
        at = end
    return b"".join([*kept, data[at:]])


def _flipped(data, start, stop, count, number):
    """The file with other bits at places between two positions."""
    changed = bytearray(data)
    for n in range(count):
        digest = hashlib.sha256(f"{number} {n}".encode()).digest()
        at = start + int.from_bytes(digest[:4], "big") % (stop - start)
        changed[at] ^= 1 << digest[4] % 8
    return bytes(changed)
