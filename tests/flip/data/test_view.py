"""Tests the evaluation view against open_clip, transformers and Pillow, and the colours of training."""

import io

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from flip.config import schema
from flip.data import decode
from flip.data.decode import DecodeError
from flip.data.manifest.build import index
from flip.data.view import EvaluationView
from tests.flip.data.loading import BATCH, CHUNK, loader
from tests.synthetic import encode, make_tokenizer, odd_images, oriented, smooth

SIZE = 48


FILES = odd_images(SIZE)


@pytest.mark.parametrize("name", FILES)
def test_resize_crop_with_convert_equals_open_clip_transform(name):
    transform = pytest.importorskip("open_clip.transform").image_transform
    reference = transform(SIZE, False, mean=(0, 0, 0), std=(1, 1, 1))(Image.open(io.BytesIO(FILES[name])))
    result = EvaluationView(SIZE, "resize_crop", "convert")(decode.open_image(FILES[name]))
    assert np.array_equal(result, (reference.numpy() * 255).round().astype(np.uint8).transpose(1, 2, 0))


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"RGBA", "LA", "clear palette"}))
def test_resize_crop_floor_with_convert_equals_transformers_processor(name):
    """Images with transparency are left out: versions of transformers convert them differently."""
    library = pytest.importorskip("transformers")
    processor = getattr(library, "CLIPImageProcessorPil", library.CLIPImageProcessor)  # version 5, version 4
    crop = {"height": SIZE, "width": SIZE}
    transform = processor(size={"shortest_edge": SIZE}, crop_size=crop, do_normalize=False)
    reference = transform(Image.open(io.BytesIO(FILES[name])), return_tensors="np")["pixel_values"][0]
    result = EvaluationView(SIZE, "resize_crop_floor", "convert")(decode.open_image(FILES[name]))
    assert np.array_equal(result, (reference * 255).round().astype(np.uint8).transpose(1, 2, 0))


@pytest.mark.parametrize("name", FILES)
def test_default_view_resizes_central_square_of_decoded_image(name):
    pixels = decode.decode(FILES[name])
    height, width = pixels.shape[:2]
    side = min(height, width)
    left = (width - side) / 2
    top = (height - side) / 2
    box = (left, top, left + side, top + side)
    expected = np.asarray(Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box))
    for image in (decode.open_image(FILES[name]), pixels):
        assert np.array_equal(EvaluationView(SIZE)(image), expected)


@pytest.mark.parametrize("name", FILES)
def test_evaluation_view_is_idempotent(name):
    for view in (EvaluationView(SIZE), EvaluationView(SIZE, "resize_crop", "convert")):
        once = view(decode.open_image(FILES[name]))
        assert once.shape == (SIZE, SIZE, 3) and once.dtype == np.uint8 and np.array_equal(view(once), once)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
def test_decode_with_convert_equals_pillow_convert(name, decoder):
    expected = np.asarray(Image.open(io.BytesIO(FILES[name])).convert("RGB"))
    pixels = decode.decode(FILES[name], decoder, "convert").astype(int)
    assert np.abs(pixels - expected).max() <= (2 if decoder == "simplejpeg" else 0)


def test_view_label_names_all_settings():
    views = [EvaluationView(SIZE, *settings) for settings in ((), ("resize_crop",), ("resize_crop", "convert"))]
    assert [view.label for view in views] == ["48px", "48px-resize_crop", "48px-resize_crop-convert"]
    config = schema.Config()
    config.data.exif = "apply"
    assert EvaluationView.of(config).label == f"{config.model.image.size}px-exif"


def test_open_image_rejects_damaged_or_empty_file():
    with pytest.raises(DecodeError):
        decode.open_image(FILES["tall"][:200])
    with pytest.raises(DecodeError):
        decode.open_image(b"")


@pytest.mark.parametrize("conversion, colour", [("flatten", (255, 255, 255)), ("convert", (10, 200, 30))])
def test_training_batch_converts_transparent_images_by_to_rgb_field(conversion, colour, tmp_path):
    """Fully transparent images of a single colour become white, or drop only their alpha channel."""
    pixels = np.zeros((24, 24, 4), np.uint8)
    pixels[..., :3] = 10, 200, 30
    with webdataset.TarWriter(str(tmp_path / "0.tar"), mtime=0) as writer:
        for i in range(203):
            writer.write({"__key__": f"{i:03d}", "png": encode(pixels), "txt": "nothing"})
    index([str(tmp_path / "0.tar")], tmp_path / "data", chunk=CHUNK)
    make_tokenizer(tmp_path / "tokenizer.json")
    batches = loader(tmp_path / "data", to_rgb=conversion).batches(0, BATCH, "0.5")
    batch = next(batches)
    batches.close()
    assert (batch.patches.reshape(-1, 3) == torch.tensor(colour)).all()


def test_training_with_exif_apply_equals_training_on_upright_files(tmp_path):
    make_tokenizer(tmp_path / "tokenizer.json")
    batches = {}
    for exif in ("apply", "ignore"):
        with webdataset.TarWriter(str(tmp_path / f"{exif}.tar"), mtime=0) as writer:
            for i in range(203):
                image = smooth(24, 40, seed=i)
                if exif == "apply":
                    encoded = oriented(image, i % 8 + 1)
                else:
                    encoded = encode(image)
                writer.write({"__key__": f"{i:03d}", "png": encoded, "txt": "nothing"})
        index([str(tmp_path / f"{exif}.tar")], tmp_path / exif, chunk=CHUNK)
        stream = loader(tmp_path / exif, exif=exif).batches(0, BATCH, "0.5")
        batches[exif] = next(stream)
        stream.close()
    assert torch.equal(batches["apply"].patches, batches["ignore"].patches)
    assert torch.equal(batches["apply"].ids, batches["ignore"].ids)
