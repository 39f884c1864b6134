"""Tests that both decoders accept or reject odd and damaged images alike, and return the same pixels."""

import io
import random
import struct
import warnings
import zlib
from collections import Counter

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from flip.data import decode
from flip.data.decode import DecodeError
from tests.synthetic import draw_image

DECODERS = ("pillow", "simplejpeg")
TOLERANCE = 2
"""Largest difference of a channel between the decoders on an undamaged JPEG; 0 if both use the same libjpeg-turbo."""
SMALL = Image.fromarray(draw_image(5, 16)).resize((64, 48), Image.Resampling.BICUBIC)


def saved(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(colour, *values, size=4, header=None):
    """A 16-bit PNG of a single colour, as Pillow does not write it. ``colour``: 0 grey, 2 RGB, 4 and 6 with alpha.

    ``header``: width and height that it states.
    """
    rows = (b"\0" + struct.pack(f">{len(values)}H", *values) * size) * size

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", *(header or (size, size)), 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def verdict(data, decoder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # EXIF warnings of Pillow
        try:
            return decode.decode(data, decoder)
        except DecodeError as error:
            return str(error)


JPEG = saved(SMALL, "JPEG", quality=92)
SCAN = JPEG.index(b"\xff\xda")
FRAME = JPEG.index(b"\xff\xc0")


def resampled(data, factors):
    """A JPEG file whose header states other sampling factors, with as many blocks in a unit: another image."""
    frame = data.index(b"\xff\xc0")
    return data[: frame + 11] + bytes([factors]) + data[frame + 12 :]


SOUND = {
    "baseline": JPEG,
    "baseline, no chroma subsampling": saved(SMALL, "JPEG", subsampling=0),
    "baseline, 4:2:2": saved(SMALL, "JPEG", subsampling=1),
    "baseline, 4:4:0": resampled(saved(SMALL, "JPEG", subsampling=1), 0x12),
    "baseline, 4:1:1": resampled(JPEG, 0x41),
    "baseline, sampling 1x4": resampled(JPEG, 0x14),  # as `cjpeg -sample 1x4` writes: simplejpeg raises KeyError
    "baseline, stored as RGB": saved(SMALL, "JPEG", keep_rgb=True),
    "baseline, odd size": saved(SMALL.resize((7, 5)), "JPEG"),
    "one pixel": saved(SMALL.resize((1, 1)), "JPEG"),
    "one pixel wide": saved(SMALL.resize((1, 300)), "JPEG"),
    "progressive": saved(SMALL, "JPEG", progressive=True),
    "grey": saved(SMALL.convert("L"), "JPEG"),
    "CMYK": saved(SMALL.convert("CMYK"), "JPEG"),
    "several images in one JPEG": saved(SMALL, "MPO", save_all=True, append_images=[SMALL.rotate(90)]),
    "garbage after its end": JPEG + b"advertisement" * 99,
    "EXIF cut off": saved(SMALL, "JPEG", exif=exif(6)[:20]),
    "EXIF of nonsense": saved(SMALL, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"x" * 50),
    "a thumbnail that is none": saved(SMALL, "JPEG", exif=exif(1) + b"\xff\xd8\xff\xff" * 9),
}


@pytest.mark.parametrize("name", SOUND)
def test_decoders_agree_on_sound_jpegs(name):
    a, b = (verdict(SOUND[name], decoder) for decoder in DECODERS)
    assert not isinstance(a, str) and a.shape == b.shape and a.dtype == b.dtype == np.uint8
    assert np.abs(a.astype(int) - b).max() <= TOLERANCE


@pytest.mark.parametrize("decoder", DECODERS)
def test_decode_returns_expected_pixels_for_every_format(decoder):
    original = np.asarray(SMALL)
    for format, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {}), ("PPM", {})):
        assert np.array_equal(decode.decode(saved(SMALL, format, **options), decoder), original), format
    assert np.abs(decode.decode(JPEG, decoder).astype(int) - original).mean() < 5
    cyan = decode.decode(saved(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=95), decoder)
    assert np.abs(cyan.astype(int) - (0, 255, 255)).max() <= TOLERANCE
    grey = decode.decode(SOUND["grey"], decoder)
    assert (grey.min(axis=2) == grey.max(axis=2)).all()


@pytest.mark.parametrize("decoder", DECODERS)
def test_decode_composites_transparency_on_white(decoder):
    half = Image.new("RGBA", (8, 8), (200, 0, 0, 128))
    for format in ("PNG", "WEBP", "TIFF"):
        pixels = decode.decode(saved(half, format, **({"lossless": True} if format == "WEBP" else {})), decoder)
        assert np.abs(pixels.astype(int) - (227, 127, 127)).max() <= 1, format
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((0, 0), 1)
    for format in ("PNG", "GIF"):
        pixels = decode.decode(saved(palette, format, transparency=0), decoder)
        assert pixels[0, 0].tolist() == [40, 50, 60] and (pixels[1:] == 255).all(), format


@pytest.mark.parametrize("decoder", DECODERS)
def test_decode_scales_16_bit_png_without_clipping(decoder):
    assert (decode.decode(png(0, 0x8012), decoder) == 0x80).all()
    assert (decode.decode(png(2, 0x10FF, 0x8012, 0xFFFF), decoder) == (0x10, 0x80, 0xFF)).all()
    assert (decode.decode(png(4, 0x8012, 0xFFFF), decoder) == 0x80).all()
    assert (decode.decode(png(6, 0x8012, 0x8012, 0x8012, 0), decoder) == 255).all()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("orientation", [1, 3, 6, 8, 77])
def test_decode_ignores_exif_orientation_by_default(decoder, orientation):
    turned = decode.decode(saved(SMALL, "JPEG", quality=92, exif=exif(orientation)), decoder)
    assert np.array_equal(turned, decode.decode(JPEG, decoder))


def patched(data, offset, new):
    return data[:offset] + new + data[offset + len(new) :]


REFUSED = {
    "empty": (b"", "an empty file"),
    "a web page": (b"\n<!DOCTYPE html><html><body>404</body></html>", "a web page"),
    "a web page in capitals": (b"<HTML>gone</HTML>", "a web page"),
    "JSON": (b'{"error": "denied"}', "not an image of a known format"),
    "an SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image of a known format"),
    "a PostScript file": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "not an image of a known format"),
    "a web page behind a JPEG's first bytes": (b"\xff\xd8\xff<html>" * 50, ""),
    "JPEG cut in its header": (JPEG[:50], ""),
    "JPEG cut before its scan": (JPEG[:SCAN], ""),
    "JPEG cut in the middle": (JPEG[: (SCAN + len(JPEG)) // 2], "truncated"),
    "JPEG without its last byte": (JPEG[:-1], "truncated"),
    "progressive JPEG cut": (SOUND["progressive"][:-40], "truncated"),
    "CMYK JPEG cut": (SOUND["CMYK"][:-40], "truncated"),
    "JPEG of no height": (patched(JPEG, FRAME + 5, b"\0\0"), ""),
    "PNG cut": (saved(SMALL, "PNG")[:-40], "truncated"),
    "WebP cut": (saved(SMALL, "WEBP")[:-40], ""),
    "GIF cut": (saved(SMALL, "GIF")[:30], ""),
    "a JPEG of 60000 x 60000": (patched(JPEG, FRAME + 5, struct.pack(">HH", 60000, 60000)), "pixels, at most"),
    "a PNG of 10000 x 10000": (patched(saved(SMALL, "PNG"), 16, struct.pack(">II", 10**4, 10**4)), ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_decoders_reject_damaged_and_foreign_files(name):
    data, message = REFUSED[name]
    reasons = [verdict(memoryview(data), decoder) for decoder in DECODERS]
    assert all(isinstance(reason, str) and message in reason for reason in reasons)
    assert reasons[0] == verdict(data, "pillow") and " at 0x" not in reasons[0]  # equal in every process


ERRORS = [KeyError(6), RuntimeError("odd"), AssertionError(), RecursionError(), AttributeError("x"), OSError("read")]


def raising(error):
    def call(*_args, **_options):
        raise error

    return call


@pytest.mark.parametrize("name", ["decode_jpeg_header", "decode_jpeg"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_simplejpeg_raises_pillow_decides_and_it_is_counted(monkeypatch, error, name):
    monkeypatch.setattr(simplejpeg, name, raising(error))
    fallbacks = Counter()
    pixels = decode.decode(JPEG, "simplejpeg", fallbacks=fallbacks)
    assert np.array_equal(pixels, decode.decode(JPEG, "pillow"))
    assert fallbacks == {f"simplejpeg {type(error).__name__}": 1}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_pillow_raises_is_a_decode_error_with_its_class(monkeypatch, error):
    monkeypatch.setattr(JpegImageFile, "load", raising(error))
    for work in (decode.decode, decode.open_image):
        with pytest.raises(DecodeError, match=type(error).__name__):
            work(JPEG)


def test_reason_of_a_decoder_has_no_memory_address(monkeypatch):
    monkeypatch.setattr(JpegImageFile, "load", raising(RuntimeError(f"bad {object()!r} here")))
    assert verdict(JPEG, "pillow") == "RuntimeError: bad <object object> here"


@pytest.mark.parametrize("target, name", [(simplejpeg, "decode_jpeg"), (JpegImageFile, "load")])
def test_memory_error_of_a_decoder_keeps_its_class(monkeypatch, target, name):
    monkeypatch.setattr(target, name, raising(MemoryError()))
    with pytest.raises(MemoryError):
        decode.decode(JPEG, "simplejpeg" if target is simplejpeg else "pillow")


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", ["_limit", "_turned"])
def test_errors_of_own_code_keep_their_class(monkeypatch, decoder, name):
    monkeypatch.setattr(decode, name, raising(KeyError("own")))
    with pytest.raises(KeyError, match="own"):
        decode.decode(JPEG, decoder, exif="apply")


def test_cmyk_and_damage_are_counted_as_fallbacks():
    fallbacks = Counter()
    for name in ("CMYK", "baseline", "baseline, sampling 1x4", "progressive"):
        decode.decode(SOUND[name], "simplejpeg", fallbacks=fallbacks)
    assert fallbacks == {"simplejpeg CMYK": 1, "simplejpeg KeyError": 1}


def test_decode_rejects_decompression_bomb_before_unpacking(monkeypatch):
    def unpack(*_):
        raise AssertionError("was decoded")

    bomb = saved(Image.new("1", (9000, 9000)), "PNG")
    assert len(bomb) < 20_000
    monkeypatch.setattr(decode, "to_rgb", unpack)
    for decoder in DECODERS:
        assert "9000 x 9000 pixels, at most" in verdict(bomb, decoder)


def test_decode_rejects_long_row_for_which_pillow_raises_memory_error():
    for decoder in DECODERS:
        assert "40000000 x 1 pixels, at most" in verdict(png(6, 0, 0, 0, 0, header=(40_000_000, 1)), decoder)


@pytest.mark.parametrize("name", ["baseline", "progressive", "grey", "CMYK"])
def test_decoders_agree_on_damaged_jpegs(name):
    """libjpeg only warns about much damage; both decoders then return what Pillow returns."""
    draw = random.Random(name)
    decoded = 0
    for _ in range(150):
        data = bytearray(SOUND[name])
        for _ in range(draw.choice((1, 1, 3))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        if draw.random() < 0.2:
            data = data[: draw.randrange(len(data))]
        a, b = (verdict(bytes(data), decoder) for decoder in DECODERS)
        assert isinstance(a, str) == isinstance(b, str), (a, b)
        if not isinstance(a, str):
            decoded += 1
            assert np.abs(a.astype(int) - b).max() <= TOLERANCE
    assert 20 < decoded < 150
