"""Tests the table of image formats: each row is decoded, named and recognised, and no other file has a list of them."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flip.common import image_formats
from flip.common.image_formats import FORMATS
from flip.data import decode, sample_members
from flip.data.parquet import page_table
from tests.synthetic import draw_image
from tools.shards_commands.source_images import CHECKS, image_facts

ROOT = Path(__file__).resolve().parents[3]
LISTS = re.compile(r"""["'](?:webp|bmp|tiff|ppm|WEBP|BMP|TIFF|PPM)["']|b["'](?:RIFF|GIF8|BM|\\x89PNG)["']""")
"""Names and first bytes of formats, as a second table would have them."""


def encoded(form, tmp_path):
    path = tmp_path / "image"
    Image.fromarray(draw_image(3, 32)).save(path, form.pillow[0])
    return path.read_bytes()


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_format_is_recognised_decoded_and_packed(form, tmp_path):
    data = encoded(form, tmp_path)
    assert image_formats.by_start(memoryview(data)) is form
    assert decode.format_name(data) == form.name
    assert decode.header(data)["format"] in form.pillow
    assert np.array_equal(decode.decode(data).shape, (32, 32, 3))
    assert form.member in form.extensions and sample_members.encoded_image({form.member: memoryview(data)}) == data
    assert page_table._member(memoryview(data)) == form.member
    assert {image_facts(data, check).extension for check in CHECKS} == {form.member}


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_format_has_names_and_bytes_of_its_own(form):
    others = [other for other in FORMATS if other is not form]
    for other in others:
        assert not {*form.pillow, *form.extensions} & {*other.pillow, *other.extensions}
        assert not any(start.startswith(other.starts) for start in form.starts)
    assert all(image_formats.is_image_name(f"a/b.{extension.upper()}") for extension in form.extensions)


def test_other_files_are_no_images():
    sound = b"RIFF\x24\0\0\0WAVEfmt "
    for data in (b"", b"\xff\xd8", sound, b"<html>", b"PAR1"):
        assert image_formats.by_start(data) is None and decode.format_name(data) == "not a known format"
    assert not any(map(image_formats.is_image_name, ["png", "a.png/b", "a.parquet", "a", ".png", ""]))


def test_photograph_of_several_images_is_a_jpeg(tmp_path):
    first, second = (Image.fromarray(draw_image(n, 32)) for n in (1, 2))
    first.save(tmp_path / "image", "MPO", save_all=True, append_images=[second])
    data = (tmp_path / "image").read_bytes()
    assert decode.header(data)["format"] == "MPO"
    assert image_formats.by_pillow("MPO").member == image_facts(data, "header").extension == "jpg"


def test_no_other_file_lists_formats():
    table = ROOT / "flip" / "common" / "image_formats.py"
    assert LISTS.search(table.read_text(encoding="utf-8"))
    files = [path for folder in ("flip", "jobs", "tools") for path in (ROOT / folder).rglob("*.py") if path != table]
    found = {path.relative_to(ROOT): LISTS.findall(path.read_text(encoding="utf-8")) for path in files}
    assert not {str(path): texts for path, texts in found.items() if len(texts) > 1}
