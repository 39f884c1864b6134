"""Writes the first corpus of the fuzzer: files of real encoders, small, each with a request (fuzz/target.c).

python fuzz/corpus.py FOLDER [COUNT]
"""

import struct
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from images import draw_image, encode


def main(folder: str, count: str = "400") -> None:
    into = Path(folder)
    into.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(7)
    for i in range(int(count)):
        width, height = random.integers(16, 72, 2).tolist()
        file = encode(random, draw_image(random, width, height))
        box = [int(random.integers(width)), int(random.integers(height)), width, height]
        request = struct.pack(">4H8B", *box, *random.integers(0, 256, 8).tolist())
        (into / f"{i:04d}").write_bytes(file + request)


if __name__ == "__main__":
    main(*sys.argv[1:])
