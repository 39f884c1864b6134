"""Images, encoded files, damage, and the reference that the kernel's patches are compared with."""

import io

import numpy as np
import simplejpeg
import torch
from numpy.random import Generator
from PIL import Image
from torch.nn.functional import interpolate

SIZES = ((224, 16), (112, 16), (224, 14), (224, 32), (96, 8), (160, 32), (64, 64), (48, 16))
"""Views and their patches."""
QUALITIES = (1, 5, 20, 50, 75, 85, 92, 95, 98, 100)


def draw_image(random: Generator, width: int, height: int) -> np.ndarray:
    """An image: noise, waves, waves with noise, or hard edges."""
    kind = random.integers(4)
    if kind == 0:
        return random.integers(0, 256, (height, width, 3), np.uint8)
    y, x = np.mgrid[:height, :width]
    across = x * random.uniform(0.01, 0.5)
    down = y * random.uniform(0.01, 0.5)
    waves = np.stack([127 + 120 * np.sin(across + channel) * np.cos(down) for channel in range(3)], axis=-1)
    if kind == 1:
        waves += random.normal(0, random.uniform(1, 60), waves.shape)
    if kind == 2:
        waves = np.where(waves > 127, 255, 0)
    return waves.clip(0, 255).astype(np.uint8)


def encode(random: Generator, pixels: np.ndarray) -> bytes:
    """A JPEG file with a random quality, sampling, restart interval and kind of tables."""
    image = Image.fromarray(pixels)
    options: dict = {"quality": int(random.choice(QUALITIES)), "optimize": bool(random.random() < 0.3)}
    if random.random() < 0.15:
        image = image.convert("L")
    else:
        options["subsampling"] = int(random.integers(3))
    restarts = random.random()
    if restarts < 0.2:
        options["restart_marker_blocks"] = int(random.integers(1, 9))
    elif restarts < 0.4:
        options["restart_marker_rows"] = int(random.integers(1, 4))
    file = io.BytesIO()
    try:
        image.save(file, "JPEG", **options)
    except OSError:  # Pillow's buffer is too small for optimised tables of some noise
        file = io.BytesIO()
        image.save(file, "JPEG", **options | {"optimize": False})
    return file.getvalue()


def crop(random: Generator, width: int, height: int, size: int) -> tuple[int, int, int, int]:
    """A box of the image; now and then as wide or as high as the view, which needs no resize then."""
    wide = int(random.integers(1, width + 1))
    high = int(random.integers(1, height + 1))
    if random.random() < 0.1:
        wide = min(width, size)
    if random.random() < 0.1:
        high = min(height, size)
    left = int(random.integers(width - wide + 1))
    top = int(random.integers(height - high + 1))
    return left, top, left + wide, top + high


def visible(random: Generator, patches: int) -> np.ndarray:
    """Some of the patches, or all, in any order."""
    count = max(1, patches // int(random.choice([1, 2, 4, patches])))
    return random.permutation(patches)[:count].astype(np.int16)


def reference(data: bytes, box, size: int, patch: int, keep: np.ndarray, mirrored: bool = False) -> np.ndarray:
    """The patches by simplejpeg and torch. Raises ValueError if simplejpeg refuses the file."""
    left, top, right, bottom = box
    cut = simplejpeg.decode_jpeg(data, "RGB")[top:bottom, left:right].copy()
    view = torch.from_numpy(cut[None].transpose(0, 3, 1, 2))
    if cut.shape[:2] != (size, size):
        view = interpolate(view, size=(size, size), mode="bicubic", antialias=True)
    if mirrored:
        view = view.flip(3)
    side = size // patch
    pixels = view.numpy()[0].transpose(1, 2, 0).reshape(side, patch, side, patch, 3)
    return pixels.swapaxes(1, 2).reshape(side * side, 3 * patch * patch)[keep]


_MARKERS = (0xC0, 0xC1, 0xC4, 0xD0, 0xD1, 0xD3, 0xD7, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD, 0xE0, 0xFE, 0x00, 0xFF)


def damage(random: Generator, data: bytes) -> bytes:
    """The file with one to three changes: bits, bytes, markers; cut, shortened or lengthened."""
    changed = bytearray(data)
    for _ in range(int(random.choice([1, 1, 1, 2, 3]))):
        if len(changed) < 4:
            break
        scan = max(1, changed.find(b"\xff\xda"))
        at = int(random.integers(len(changed)))
        if random.random() < 0.35:
            at = int(random.integers(min(scan, len(changed))))
        kind = random.integers(7)
        if kind == 0:
            changed[at] ^= 1 << int(random.integers(8))
        elif kind == 1:
            changed[at] = int(random.integers(256))
        elif kind == 2:
            del changed[at:]
        elif kind == 3:
            del changed[at : at + int(random.integers(1, 9))]
        elif kind == 4:
            changed[at:at] = random.bytes(int(random.integers(1, 5)))
        elif kind == 5:
            changed[at : at + 2] = bytes([0xFF, int(random.choice(_MARKERS))])
        else:
            changed[at] = int(random.choice([0, 255, 1, 127, 128]))
    return bytes(changed)
