"""Tests decoding: colour modes, limits, damage, EXIF orientation, patches and the evaluation view."""

import io

import numpy as np
import pytest
from PIL import Image

from flip.data import decode
from flip.data.decode import DecodeError
from flip.data.view import EvaluationView
from tests.synthetic import ORIENTATIONS, draw_image, encode, oriented, smooth


def saved(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


RGB = Image.fromarray(draw_image(5, 32))


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "RGB"])
@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
def test_decode_converts_every_image_mode_to_rgb(mode, decoder):
    if mode == "CMYK":
        format = "JPEG"
    else:
        format = "TIFF" if mode == "LA" else "PNG"
    pixels = decode.decode(saved(RGB.convert(mode), format), decoder)
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8


def test_decode_scales_16_bits_and_puts_transparency_on_white():
    assert np.array_equal(decode.decode(encode(draw_image(5, 32))), draw_image(5, 32))
    deep = Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16))
    assert (decode.decode(saved(deep, "PNG")) == 0x80).all()
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert (decode.decode(saved(clear, "PNG")) == 255).all()
    keyed = saved(Image.new("RGB", (4, 4), (10, 20, 30)), "PNG", transparency=(10, 20, 30))
    assert (decode.decode(keyed) == 255).all()


@pytest.mark.parametrize("conversion", ["flatten", "convert"])
def test_conversion_in_strips_equals_conversion_of_full_image(monkeypatch, conversion):
    deep = np.random.default_rng(0).integers(0, 1 << 16, (32, 32), np.uint16)
    files = [saved(RGB.convert(mode), "PNG") for mode in ("L", "1", "P", "RGB", "RGBA", "LA")]
    files += [saved(Image.fromarray(deep), form) for form in ("PNG", "TIFF")]
    files += [saved(Image.fromarray(deep.astype(np.int32)), "TIFF"), saved(RGB.convert("CMYK"), "JPEG")]
    files += [saved(RGB.convert("P"), "PNG", transparency=7), saved(RGB, "PNG", transparency=RGB.getpixel((3, 3)))]
    intact = [decode.decode(data, conversion=conversion) for data in files]
    monkeypatch.setattr(decode, "STRIP", 5 * 32)
    for data, expected in zip(files, intact, strict=True):
        assert np.array_equal(decode.decode(data, conversion=conversion), expected)
        assert np.array_equal(decode.to_rgb(decode.open_image(data), conversion), expected)


def test_jpeg_decoders_agree_within_eight_levels():
    data = encode(draw_image(2, 64), "jpg")
    difference = decode.decode(data).astype(int) - decode.decode(memoryview(data), "simplejpeg").astype(int)
    assert np.abs(difference).max() <= 8


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
@pytest.mark.parametrize("fmt", ["png", "jpg"])
def test_decode_rejects_damaged_data(decoder, fmt):
    intact = encode(draw_image(1, 64), fmt)
    for data in (b"", b"no image", intact[: len(intact) // 2], intact[:20]):
        with pytest.raises(DecodeError):
            decode.decode(data, decoder)


def test_decode_rejects_images_above_pixel_limit(monkeypatch):
    monkeypatch.setattr(decode, "LIMIT", 32 * 32 - 1)
    for data in (saved(RGB, "PNG"), saved(RGB, "JPEG")):
        for decoder in ("pillow", "simplejpeg"):
            with pytest.raises(DecodeError, match="32 x 32 pixels"):
                decode.decode(data, decoder)


def test_patches_are_row_major_and_evaluation_view_crops_centre():
    image = np.arange(6 * 6 * 3, dtype=np.uint8).reshape(6, 6, 3)
    rows = decode.patches(image, 2)
    assert rows.shape == (9, 12) and np.array_equal(rows[4], image[2:4, 2:4].ravel())
    assert np.array_equal(decode.patches(image, 2, np.array([7, 8], dtype=np.int16)), rows[[7, 8]])
    batch = np.zeros((4, 9, 12), dtype=np.uint8)
    decode.patches(np.asfortranarray(image), 2, out=batch[2])
    assert np.array_equal(batch[2], rows) and not batch[[0, 1, 3]].any()
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 200
    assert (EvaluationView(10)(wide) == 200).all()


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_apply_turns_images_upright_in_training_and_evaluation(orientation, monkeypatch):
    upright = smooth(23, 40)
    lossless = [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})]
    for form, options in lossless:
        data = oriented(upright, orientation, form, **options)
        assert np.array_equal(decode.decode(data, exif="apply"), upright)
        assert np.array_equal(np.asarray(decode.upright(decode.open_image(data))), upright)
        if form != "TIFF":  # Pillow applies its orientation
            assert np.array_equal(decode.decode(data), decode.decode(data, exif="apply")) == (orientation == 1)
    monkeypatch.setattr(decode, "STRIP", 5 * 23)
    for form, options in lossless:
        assert np.array_equal(decode.decode(oriented(upright, orientation, form, **options), exif="apply"), upright)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_orientation_of_jpeg_is_equal_in_all_decoders(orientation):
    data = oriented(smooth(23, 40), orientation, "JPEG", quality=95)
    pillow, simplejpeg = (decode.decode(data, name, exif="apply") for name in ("pillow", "simplejpeg"))
    assert pillow.shape == simplejpeg.shape == (23, 40, 3)
    assert np.abs(pillow.astype(int) - simplejpeg).max() <= 2
    assert np.abs(pillow.astype(int) - smooth(23, 40)).mean() < 10
    assert np.array_equal(np.asarray(decode.upright(decode.open_image(data))), pillow)
    assert np.array_equal(EvaluationView(16, exif="apply")(decode.open_image(data)), EvaluationView(16)(pillow))


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
def test_exif_apply_ignores_unreadable_or_unknown_orientations(decoder):
    data = oriented(smooth(23, 40), 6, "JPEG")
    entry = b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06"  # the tag, its type, one value: 6
    assert entry in data and b"Exif\0\0MM\0*" in data
    damaged = [data.replace(entry, entry[:-1] + b"\x09"), data.replace(entry, entry[:3] + b"\x02" + entry[4:])]
    damaged.append(data.replace(b"Exif\0\0MM\0*", b"Exif\0\0\xff\xff\xff\xff"))
    for file in damaged:
        assert np.array_equal(decode.decode(file, decoder, exif="apply"), decode.decode(data, decoder))
    assert not np.array_equal(decode.decode(data, decoder, exif="apply"), decode.decode(data, decoder))
