"""Small data sets for tests: distinct colour images with captions, as real shards with a real manifest."""

import io
import json
from pathlib import Path

import numpy as np
import webdataset
from PIL import ExifTags, Image

from flip.data.manifest.build import index

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
SHAPES = ("square", "stripe", "corner", "frame")


def draw_image(i, size=64, seed=0):
    """Return image i, (size, size, 3): a shape on a ground with its own noise, so that no two images are equal."""
    rng = np.random.default_rng([seed, i])
    image = np.empty((size, size, 3), dtype=np.uint8)
    image[:] = rng.integers(0, 255, 3)
    part = {0: np.s_[size // 4 : -size // 4, size // 4 : -size // 4], 1: np.s_[:, size // 3 : size // 2]}
    image[part.get(i % 4, np.s_[: size // 2, : size // 2])] = rng.integers(0, 255, 3)
    image[:8, :8] = rng.integers(0, 255, (8, 8, 3))
    return image


def encode(image, fmt="png"):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, {"jpg": "JPEG", "png": "PNG"}[fmt], **({"quality": 92} if fmt == "jpg" else {}))
    return buffer.getvalue()


def smooth(height, width, channels=3, seed=0):
    """Return a smooth picture of random colours; its resized pixels depend on the sampling positions."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, channels), dtype=np.uint8)
    planes = [np.asarray(Image.fromarray(small[..., c]).resize((width, height), 3)) for c in range(channels)]
    return np.stack(planes, axis=-1)


def odd_images(equal=48):
    """Return name -> encoded image: sizes that are not square, and every mode that a file can have.

    ``equal``: side of the image that needs no resize.
    """
    rgb = smooth(75, 131)
    clear = Image.fromarray(smooth(64, 90)).quantize(16)
    images = {
        "square": (Image.fromarray(smooth(96, 96)), "PNG", {}),
        "equal": (Image.fromarray(smooth(equal, equal)), "PNG", {}),
        "wide": (Image.fromarray(rgb), "PNG", {}),
        "wide, odd": (Image.fromarray(smooth(101, 240)), "JPEG", {}),
        "tall": (Image.fromarray(smooth(300, 127)), "JPEG", {}),
        "short side equal": (Image.fromarray(smooth(equal, 83)), "PNG", {}),
        "smaller": (Image.fromarray(smooth(20, 31)), "WEBP", {"lossless": True}),
        "a line": (Image.fromarray(smooth(2, 300)), "PNG", {}),
        "RGBA": (Image.fromarray(smooth(64, 91, 4)), "PNG", {}),
        "LA": (Image.fromarray(smooth(64, 91, 2)), "PNG", {}),
        "grey": (Image.fromarray(smooth(60, 90, 1)[..., 0]), "PNG", {}),
        "16 bit": (Image.fromarray(smooth(64, 91, 1)[..., 0].astype(np.uint16) * 257), "PNG", {}),
        "16 bit, dark": (Image.fromarray(smooth(64, 91, 1)[..., 0].astype(np.uint16)), "PNG", {}),
        "palette": (clear, "GIF", {}),
        "clear palette": (clear, "PNG", {"transparency": 3}),
        "CMYK": (Image.fromarray(rgb).convert("CMYK"), "JPEG", {}),
        "two colours": (Image.fromarray(rgb).convert("1"), "PNG", {}),
    }
    encoded = {}
    for name, (image, form, options) in images.items():
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        encoded[name] = buffer.getvalue()
    return encoded


#: EXIF 2.32, tag 0x0112: orientation -> the visual sides of the stored row 0 and column 0.
ORIENTATIONS = {
    1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"), 5: ("left", "top"),
    6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom"),
}  # fmt: skip


def oriented(upright, orientation, form="PNG", **options):
    """Return a file with rotated or mirrored pixels and the EXIF orientation that restores ``upright``."""
    row, column = ORIENTATIONS[orientation]
    if row in ("left", "right"):
        stored = upright.swapaxes(0, 1)
    else:
        stored = upright
    stored = stored[:: -1 if row in ("bottom", "right") else 1, :: -1 if column in ("bottom", "right") else 1]
    exif = Image.Exif()
    buffer = io.BytesIO()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(buffer, form, exif=exif, **options)
    return buffer.getvalue()


def caption(i):
    return f"a {COLOURS[i % 8]} {SHAPES[i // 8 % 4]} number {i}\n{SHAPES[i // 8 % 4]}, {COLOURS[i % 8]}, {i}"


def make_dataset(folder, samples=200, shards=4, size=64, classes=0, fmt="png", seed=0, chunk=0):
    """Write shards and their manifest into ``folder`` and return it.

    Every third sample has a json member. With classes > 0 each sample carries its class (i % classes) as ``cls``, and
    the folder has a ``classes.json`` with names and templates.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{shard:05d}.tar" for shard in range(shards)]
    for shard, path in enumerate(paths):
        with webdataset.TarWriter(str(path), mtime=0) as writer:
            for i in range(samples * shard // shards, samples * (shard + 1) // shards):
                sample = {
                    "__key__": f"{shard:05d}{i:04d}",
                    fmt: encode(draw_image(i, size, seed), fmt),
                    "txt": caption(i),
                }
                if i % 3 == 0:
                    sample["json"] = {"number": i}
                if classes:
                    sample["cls"] = i % classes
                writer.write(sample)
    index([str(path) for path in paths], folder, chunk=chunk)
    if classes:
        names = [f"{COLOURS[c % 8]} {SHAPES[c // 8 % 4]}" for c in range(classes)]
        text = json.dumps({"names": names, "templates": ["{}", "a picture of {}"]})
        (folder / "classes.json").write_text(text, encoding="utf-8")
    return folder


def make_tokenizer(path, texts=None, vocabulary=300):
    """Write a small WordPiece tokenizer.json, trained on the captions of ``make_dataset``."""
    from flip.tokenizer import train

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    train(texts or [caption(i) for i in range(64)], vocabulary, path)
    return path
