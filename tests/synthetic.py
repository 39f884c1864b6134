"""Small data sets for tests: distinct colour pictures with captions, as real shards with a real manifest."""

import io
import json
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from flip.data.index import index

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
SHAPES = ("square", "stripe", "corner", "frame")


def picture(i, size=64, seed=0):
    """Picture i: a shape on a ground with a little noise of its own, so that no two are equal. (size, size, 3)."""
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


def caption(i):
    return f"a {COLOURS[i % 8]} {SHAPES[i // 8 % 4]} number {i}\n{SHAPES[i // 8 % 4]}, {COLOURS[i % 8]}, {i}"


def make_dataset(folder, samples=200, shards=4, size=64, classes=0, fmt="png", seed=0, chunk=0):
    """Write shards and their manifest into ``folder`` and return it.

    Every third sample has a json member. With classes > 0 each sample carries its class (i % classes) as ``cls``, and
    ``classes.json`` with names and templates lies beside the manifest.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{shard:05d}.tar" for shard in range(shards)]
    for shard, path in enumerate(paths):
        with webdataset.TarWriter(str(path), mtime=0) as writer:
            for i in range(samples * shard // shards, samples * (shard + 1) // shards):
                sample = {"__key__": f"{shard:05d}{i:04d}", fmt: encode(picture(i, size, seed), fmt), "txt": caption(i)}
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
    """A small WordPiece tokenizer.json, trained on the captions of ``make_dataset``."""
    from flip.tokenizer import train

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    train(texts or [caption(i) for i in range(64)], vocabulary, path)
    return path
