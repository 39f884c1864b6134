"""Processor time of a training view by the kernel, and by decoding and resizing the whole image.

    python kernel/benchmarks/views.py [PHOTOGRAPH...]

Prints a Markdown table: the shorter side of the source, the mask, microseconds a view, and how many times the kernel is
faster. Each photograph is stored with quality 95 and 4:2:0. Crops have half to all of the area, as `augment.crop_area`
[0.5, 1]. Both ways use one thread and take turns; a figure is the median of the rounds. Without arguments, the two
photographs of scikit-learn are used. Needs simplejpeg, torch and Pillow.
"""

import argparse
import io
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import simplejpeg
import torch
import visible_jpeg
from numpy.random import Generator
from PIL import Image
from torch.nn.functional import interpolate

SIZE = 224
PATCH = 16
PATCHES = (SIZE // PATCH) ** 2
SHORT_SIDES = (256, 384)
MASKS = (0.0, 0.5, 0.75)
VIEWS = 24
"""Views that a round decodes, of all photographs together."""
ROUNDS = 15

Box = tuple[int, int, int, int]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("photographs", nargs="*", type=Path, metavar="PHOTOGRAPH")
    photographs = parser.parse_args(arguments).photographs or _shipped()
    if visible_jpeg.unavailable():
        print(f"no kernel: {visible_jpeg.unavailable()}", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    print("| source | mask | whole image, us | kernel, us | times faster |\n|---|--:|--:|--:|--:|")
    for short in SHORT_SIDES:
        for has_markers in (False, True):
            files = [_encode(path, short, has_markers) for path in photographs]
            for mask in MASKS:
                _print_row(short, has_markers, mask, files)
    return 0


def _print_row(short: int, has_markers: bool, mask: float, files: Sequence[bytes]) -> None:
    random = np.random.default_rng(0)
    views = [_view(random, files[i % len(files)], mask) for i in range(VIEWS)]

    def whole() -> None:
        for data, box, keep in views:
            _whole_image(data, box, keep)

    def kernel() -> None:
        for data, box, keep in views:
            if visible_jpeg.File(data).patches(box, SIZE, PATCH, keep, verified=has_markers) is None:
                raise RuntimeError(f"the kernel refuses a photograph: {visible_jpeg.why()}")

    for data, box, keep in views[: len(files)]:
        patches = visible_jpeg.File(data).patches(box, SIZE, PATCH, keep, verified=has_markers)
        assert np.array_equal(patches, _whole_image(data, box, keep)), "the kernel's patches differ"
    times = [(_microseconds(whole), _microseconds(kernel)) for _ in range(ROUNDS)]
    slow = statistics.median(pair[0] for pair in times)
    quick = statistics.median(pair[1] for pair in times)
    ratio = statistics.median(pair[0] / pair[1] for pair in times)
    source = f"{short} px"
    if has_markers:
        source += ", marker per MCU, verified"
    print(f"| {source} | {mask:g} | {slow:.0f} | {quick:.0f} | {ratio:.2f} |", flush=True)


def _microseconds(function: Callable[[], None]) -> float:
    """Processor time of a view."""
    start = time.process_time()
    function()
    return 1e6 * (time.process_time() - start) / VIEWS


def _whole_image(data: bytes, box: Box, keep: np.ndarray) -> np.ndarray:
    """The patches by simplejpeg and torch: decode, crop, resize, cut."""
    left, top, right, bottom = box
    pixels = torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB")).permute(2, 0, 1)[None]
    view = interpolate(pixels[..., top:bottom, left:right], size=(SIZE, SIZE), mode="bicubic", antialias=True)
    side = SIZE // PATCH
    grid = view.numpy()[0].transpose(1, 2, 0).reshape(side, PATCH, side, PATCH, 3).swapaxes(1, 2)
    return grid.reshape(PATCHES, 3 * PATCH * PATCH)[keep]


def _view(random: Generator, data: bytes, mask: float) -> tuple[bytes, Box, np.ndarray]:
    """A file with a random crop of half to all of its area, and the visible patches."""
    width, height = visible_jpeg.File(data).size() or (0, 0)
    share = np.sqrt(random.uniform(0.5, 1.0))
    wide = int(width * share)
    high = int(height * share)
    left = int(random.integers(width - wide + 1))
    top = int(random.integers(height - high + 1))
    keep = np.sort(random.permutation(PATCHES)[: round(PATCHES * (1 - mask))]).astype(np.int16)
    return data, (left, top, left + wide, top + high), keep


def _encode(path: Path, short: int, has_markers: bool) -> bytes:
    image = Image.open(path).convert("RGB")
    scale = short / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    options = {"restart_marker_blocks": 1} if has_markers else {}
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, subsampling=2, **options)
    return file.getvalue()


def _shipped() -> list[Path]:
    from sklearn import datasets

    folder = Path(datasets.__file__).parent / "images"
    return [folder / "china.jpg", folder / "flower.jpg"]


if __name__ == "__main__":
    sys.exit(main())
