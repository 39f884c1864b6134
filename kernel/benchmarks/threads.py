"""Images a second of the README's data set of torchvision, in threads of one process, with the kernel and without it.

    python kernel/benchmarks/threads.py [PHOTOGRAPH...]

Prints a Markdown table: the number of threads, and images a second by the kernel and by decoding whole images. Each
photograph is stored with a shorter side of 384 px, quality 95 and 4:2:0. Both ways take turns; a figure is the median
of the rounds. Then it prints the share of an item's processor time that is spent in calls of the library, which hold no
lock: the other part limits the number of useful threads. Without arguments, the two photographs of scikit-learn are
used. Needs torch, torchvision and Pillow.
"""

import argparse
import os
import re
import runpy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import visible_jpeg
from views import _encode, _shipped

README = Path(__file__).resolve().parents[1] / "README.md"
IMAGES = 64
ROUNDS = 7


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("photographs", nargs="*", type=Path, metavar="PHOTOGRAPH")
    photographs = parser.parse_args(arguments).photographs or _shipped()
    if visible_jpeg.unavailable():
        print(f"no kernel: {visible_jpeg.unavailable()}", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        images = _data_set(Path(folder), photographs)
        print("| threads | kernel | whole images |\n|--:|--:|--:|")
        threads = 1
        while threads <= (os.cpu_count() or 1):
            _print_row(images, threads)
            threads *= 2
        print(f"\n{_share_without_lock(images):.0%} of the processor time of an item is spent without the lock.")
    return 0


def _data_set(folder: Path, photographs: Sequence[Path]) -> Any:
    """The README's data set, of the photographs."""
    example = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[1]
    program = folder / "masked_images.py"
    program.write_text(example, encoding="utf-8")
    (folder / "class").mkdir()
    for i, path in enumerate(photographs):
        (folder / "class" / f"{i}.jpg").write_bytes(_encode(path, 384, False))
    return runpy.run_path(str(program))["MaskedImages"](folder)


def _print_row(images: Any, threads: int) -> None:
    rates: dict[bool, list[float]] = {True: [], False: []}
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(ROUNDS):
            rates[True].append(_rate(pool, images))
            with mock.patch.object(visible_jpeg.File, "patches", lambda *_, **__: None):
                rates[False].append(_rate(pool, images))
    print(f"| {threads} | {statistics.median(rates[True]):.0f} | {statistics.median(rates[False]):.0f} |", flush=True)


def _rate(pool: ThreadPoolExecutor, images: Any) -> float:
    """Images a second, by the wall clock."""
    start = time.perf_counter()
    list(pool.map(lambda i: images[i % len(images)], range(IMAGES)))
    return IMAGES / (time.perf_counter() - start)


def _share_without_lock(images: Any) -> float:
    inside = 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal inside
            start = time.thread_time()
            result = function(*arguments, **named)
            inside += time.thread_time() - start
            return result

        return call

    library = visible_jpeg._library
    assert library is not None
    start = time.thread_time()
    with (
        mock.patch.object(library, "vj_patches", timed(library.vj_patches)),
        mock.patch.object(library, "vj_size", timed(library.vj_size)),
    ):
        for i in range(IMAGES):
            images[i % len(images)]
    return inside / (time.thread_time() - start)


if __name__ == "__main__":
    sys.exit(main())
