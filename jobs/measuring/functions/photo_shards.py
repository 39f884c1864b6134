"""Shards of synthetic images with the cost of photographs: to read, decode, resize and tokenise.

An image is noise of all scales with the spectrum of photographs, and shapes with edges; the grain of the finest scale
sets the bytes of a JPEG of quality 95. Captions are as long as LAION's.
"""

from __future__ import annotations

import io
import json
import tarfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from flip.files.creation import create_file, output_folder

QUALITY = 95
_TEXT = """beautiful old small large wooden vintage modern black white red blue green golden handmade classic original
silver soft summer winter morning evening wild happy little great new free best photo picture image print poster canvas
painting art design pattern vector illustration stock background house garden kitchen table chair lamp window street
bridge river lake mountain beach forest city village market flower rose tree leaf dog cat horse bird fish car truck
bicycle boat train plane dress shirt shoes jacket ring necklace watch bag phone case camera book cover wedding birthday
christmas party food cake coffee tea bread salad soup woman man girl boy baby family people team player sale price
review online shop home set of in on with for and the a by at from"""
_WORDS = _TEXT.split()


class Kind(NamedTuple):
    """``side``: of a square, or the short side of 4:3 images; ``grain``: amplitude of the finest noise."""

    name: str
    side: int
    square: bool
    grain: float


KINDS = Kind("256 px", 256, True, 1.75), Kind("384 px", 384, False, 1.5)


def picture(rng: np.random.Generator, width: int, height: int, grain: float) -> NDArray[np.uint8]:
    """(height, width, 3)."""
    noise = np.full((height, width, 3), 128, dtype=np.float32)
    for cells, strength in ((3, 60), (9, 30), (27, 15), (81, 8)):
        light = rng.normal(128, strength, (cells, cells, 1))
        colour = rng.normal(0, strength / 4, (cells, cells, 3))
        coarse = (light + colour).clip(0, 255).astype(np.uint8)
        noise += np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float32) - 128
    image = Image.fromarray(noise.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        left, top, right, bottom = (rng.uniform(0, 1, 4) * [width, height, width, height] / [1, 1, 2, 2]).tolist()
        if rng.random() < 0.5:
            shape = draw.ellipse
        else:
            shape = draw.rectangle
        shape((left, top, left + right / 2, top + bottom / 2), tuple(rng.integers(0, 255, 3).tolist()))
    fine = rng.standard_normal((height, width, 1), dtype=np.float32) * grain
    return (np.asarray(image, np.float32) + fine).clip(0, 255).astype(np.uint8)


def jpeg(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def caption(rng: np.random.Generator) -> str:
    """Three to eighteen words."""
    words = rng.choice(_WORDS, rng.integers(3, 19)).tolist()
    return " ".join([words[0].title(), *words[1:], *(["-", str(rng.integers(1, 2000))] if rng.random() < 0.3 else [])])


def samples(kind: Kind, count: int, seed: int) -> list[tuple[bytes, str]]:
    """JPEG bytes and caption of each sample."""
    entries = []
    for i in range(count):
        rng = np.random.default_rng([seed, kind.side, i])
        width = kind.side
        height = kind.side
        if not kind.square:
            if rng.random() < 0.5:
                width = kind.side * 4 // 3
                height = kind.side
            else:
                width = kind.side
                height = kind.side * 4 // 3
        entries.append((jpeg(picture(rng, width, height, kind.grain)), caption(rng)))
    return entries


def write(pairs: list[tuple[bytes, str]], folder: Path, shards: int) -> list[Path]:
    """The samples as shards with members jpg, json, txt, as img2dataset writes them with webdataset.

    By tarfile: webdataset would import torch, which takes longer than all of the shards.
    """
    output_folder(folder, new=True)
    paths = [folder / f"{shard:05d}.tar" for shard in range(shards)]
    for shard, path in enumerate(paths):
        with create_file(path) as file, tarfile.open(fileobj=file, mode="w|") as tar:
            for i in range(len(pairs) * shard // shards, len(pairs) * (shard + 1) // shards):
                image, text = pairs[i]
                json_member = {"caption": text, "key": f"{i:09d}", "status": "success", "sha256": "0" * 64}
                members = {"jpg": image, "json": json.dumps(json_member).encode(), "txt": text.encode()}
                for extension, content in members.items():
                    tar.addfile(_member(f"{i:09d}.{extension}", len(content)), io.BytesIO(content))
    return paths


def _member(name: str, size: int) -> tarfile.TarInfo:
    """The header of a member, with webdataset's fields."""
    member = tarfile.TarInfo(name)
    member.size = size
    member.mtime = time.time()
    member.mode = 0o444
    member.uname = "bigdata"
    member.gname = "bigdata"
    return member
