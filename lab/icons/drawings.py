"""The drawings of the icon sets, rendered set by set; a set that an interrupted build has rendered is read back."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flip.files.creation import atomic_write
from jobs.common.terminal import ProgressBar
from lab.icons import families, names
from lab.icons.names import Icon
from tools.demo_datasets import npm, render

SIDE = 16
INK = 250
"""Pixels darker than this are part of the drawing."""


@dataclass(frozen=True, eq=False)
class Drawing:
    """A rendered icon. ``number``: its position among those of the package. ``shape``: (SIDE * SIDE,), see `shape`."""

    number: int
    family: str
    prefix: str
    icon: Icon
    png: bytes
    shape: NDArray[np.uint8]

    @property
    def key(self) -> str:
        return f"{self.prefix}_{self.icon.name}"


def convert(pixels: NDArray[np.uint8]) -> tuple[bytes, NDArray[np.uint8]]:
    """(PNG, shape) of a picture (SIZE, SIZE, 3)."""
    from PIL import Image

    grey = np.asarray(Image.fromarray(pixels).convert("L"))
    return render.png(grey if (pixels == grey[..., None]).all() else pixels), shape(grey)


def shape(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The drawing without its margins, centred, its darkest part black, as (SIDE * SIDE,) means of the grey picture.

    About equal for copies of a drawing that differ in colour, margin or size. All 255 if it is blank.
    """
    from PIL import Image

    rows, columns = np.nonzero(grey < INK)
    if not len(rows):
        return np.full(SIDE * SIDE, 255, np.uint8)
    darkness = 255 - grey.astype(np.int64)
    grey = (255 - darkness * 255 // darkness.max()).astype(np.uint8)
    top = rows.min()
    bottom = rows.max() + 1
    left = columns.min()
    right = columns.max() + 1
    half = max(bottom - top, right - left) / 2
    pad = render.SIZE // 2
    x = (left + right) / 2 + pad
    y = (top + bottom) / 2 + pad
    padded = Image.fromarray(np.pad(grey, pad, constant_values=255))
    box = (x - half, y - half, x + half, y + half)
    return np.asarray(padded.resize((SIDE, SIDE), Image.Resampling.BOX, box=box)).reshape(-1)


def read(store: Path, work: Path) -> tuple[list[Drawing], dict[str, Any]]:
    """The drawings of the sets that are used, rendered or read from the folder ``work``; and the info of each set."""
    listed = npm.member_json(families.PACKAGE, store, "collections.json")
    total = sum(info["total"] for prefix, info in listed.items() if not families.refusal(prefix, info))
    drawings: list[Drawing] = []
    sets = {}
    with ProgressBar("rendering icons") as bar, render.renderers() as pool:
        for item in npm.members_json(families.PACKAGE, store, "json"):
            prefix = item["prefix"]
            icons = list(names.icons(item))
            if families.refusal(prefix, item["info"]) or not icons:
                continue
            sets[prefix] = item["info"]
            for icon, png, shape in zip(icons, *_rendered(pool, item, icons, work / f"{prefix}.npz"), strict=True):
                drawings.append(Drawing(len(drawings), families.family(prefix), prefix, icon, png, shape))
            bar(len(drawings), max(len(drawings), total), prefix)  # the listed total leaves out hidden icons
    return drawings, sets


def _rendered(pool: Executor, item: Any, icons: list[Icon], path: Path) -> tuple[list[bytes], NDArray[np.uint8]]:
    if not path.exists():
        done = list(render.render(pool, (render.svg(item, icon.name) for icon in icons), convert))
        pictures = [png for png, _ in done]
        sizes = np.array([len(png) for png in pictures], dtype=np.int64)
        joined = np.frombuffer(b"".join(pictures), np.uint8)
        shapes = np.stack([shape for _, shape in done])
        with atomic_write(path) as file:
            np.savez(file, pictures=joined, sizes=sizes, shapes=shapes)
    with np.load(path, allow_pickle=False) as stored:
        joined = stored["pictures"].tobytes()
        ends = np.cumsum(stored["sizes"]).tolist()
        shapes = stored["shapes"]
    return [joined[start:end] for start, end in zip([0, *ends], ends, strict=False)], shapes
