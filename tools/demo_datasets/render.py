"""Renders SVG drawings to 64 px PNG with the same bytes on every machine, and finds drawings that look alike."""

from __future__ import annotations

import io
import os
import signal
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

SIZE = 64
"""Side of an image, pixels."""
PROCESSES = 2
THUMB = 16
ALIKE = 0.02
"""Two drawings look alike if the root mean square difference of their thumbnails is below this (white is 1)."""

Pixels = NDArray[np.uint8]
Converted = TypeVar("Converted")


def svg(icons: Mapping[str, Any], name: str) -> str:
    """The drawing as an SVG document with a square canvas."""
    icon = icons["icons"][name]
    width, height = (icon.get(key, icons.get(key, 16)) for key in ("width", "height"))
    side = max(width, height)
    left = icon.get("left", 0) - (side - width) / 2
    top = icon.get("top", 0) - (side - height) / 2
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{side}" height="{side}" viewBox="{left:g} {top:g} {side:g} {side:g}">{icon["body"]}</svg>'
    )


def picture(document: str) -> Pixels:
    """RGB as (SIZE, SIZE, 3) uint8, transparent parts on white."""
    import resvg_py
    from PIL import Image

    content = resvg_py.svg_to_bytes(
        svg_string=document, width=SIZE, height=SIZE, background="#ffffff", skip_system_fonts=True
    )
    return np.asarray(Image.open(io.BytesIO(bytes(content))).convert("RGB"))


def png(pixels: Pixels) -> bytes:
    """Encode an RGB (H, W, 3) or grey (H, W) picture as PNG without row filters: smaller and faster to decode for flat
    drawings."""
    height, width, *channels = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels else 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def thumbnail(pixels: Pixels) -> NDArray[np.float32]:
    """Means over squares, (THUMB * THUMB * 3,) in [0, 1]."""
    step = SIZE // THUMB
    return (pixels.reshape(THUMB, step, THUMB, step, 3).mean((1, 3), dtype=np.float32) / 255).reshape(-1)


@contextmanager
def renderers() -> Iterator[Executor]:
    """Processes for `render`. Ctrl-C ends this process, not the pool."""
    with ProcessPoolExecutor(min(PROCESSES, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by the processes, which start here
        try:
            for start in [pool.submit(int) for _ in range(PROCESSES)]:
                start.result()
        finally:
            signal.signal(signal.SIGINT, handler)
        yield pool


def render(pool: Executor, documents: Iterable[str], convert: Callable[[Pixels], Converted]) -> Iterator[Converted]:
    """``convert`` of the picture of each document, in order."""
    return pool.map(partial(_render, convert), documents, chunksize=32)


def _render(convert: Callable[[Pixels], Converted], document: str) -> Converted:
    return convert(picture(document))


def png_and_thumbnail(pixels: Pixels) -> tuple[bytes, NDArray[np.float32]]:
    return png(pixels), thumbnail(pixels)


def alike(slugs: Sequence[str], thumbnails: Sequence[NDArray[np.float32]]) -> set[tuple[str, str]]:
    """Pairs of slugs whose drawings by one vendor look alike."""
    x = np.stack(thumbnails).astype(np.float64)
    squares = (x**2).sum(1)
    distances = (squares[:, None] + squares - 2 * x @ x.T) / x.shape[1]
    return {(slugs[i], slugs[j]) for i, j in zip(*np.nonzero(np.triu(distances < ALIKE**2, 1)), strict=True)}
