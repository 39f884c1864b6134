"""Fuzzes the index and the reader of parquet files with images: python -m tests.parsers.fuzz_parquet --minutes 120.

Each input is a file of a writer (tests/flip/data/parquet_files, and forms of pyarrow) with some bytes changed, most of
them in footers and headers of pages. A child process with a limit of memory reads it; each sample must equal what
pyarrow reads in another child. Prints the seeds of failures; --seed repeats one.
"""

import argparse
import multiprocessing
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from flip.data.parquet import headers
from tests.parsers.test_parquet_images import FORMS, MEMORY, check


def places(data):
    """Ranges of bytes that state something: the footer, and headers, levels and first lengths of pages."""
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    found = [(footer, len(data))]
    for group in headers.row_groups(data):
        for chunk in group.chunks:
            at = chunk.start
            for page in headers.pages(data, chunk):
                found.append((at, min(page.start + 24, page.stop)))
                at = page.stop
    return found


def mutated(seed, forms=None):
    """The input of a seed. ``forms``: how many there were when it was found; None: as many as now."""
    draw = random.Random(seed)
    good = draw.choice(FORMS[:forms])
    data = bytearray(good)
    ranges = places(good)
    for _ in range(draw.randint(1, 5)):
        start, stop = draw.choice(ranges)
        if draw.random() < 0.1:
            start, stop = 0, len(data)
        at = min(draw.randrange(start, max(stop, start + 1)), len(data) - 1)
        kind = draw.random()
        if kind < 0.4:
            data[at] ^= 1 << draw.randrange(8)
        elif kind < 0.7:
            data[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF, draw.randrange(256)))
        elif kind < 0.85:
            size = draw.randint(1, 10)
            data[at : at + size] = draw.choice((b"\xff", b"\x80", b"\x00")) * size
        elif kind < 0.95:
            data[at:at] = draw.randbytes(draw.randint(1, 8))
        else:
            del data[at : at + draw.randint(1, 8)]
    return bytes(data)


def work(pipe):
    """Check the seeds that come; a death of this process is a failure of the seed."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.parquet"
        while True:
            seed = pipe.recv()
            try:
                pipe.send(("read" if check(path, mutated(seed)) else "refused", ""))
            except Exception:
                pipe.send(("error", traceback.format_exc()))


def started():
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=work, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="check this seed only")
    options = parser.parse_args()
    if options.seed is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(check(Path(folder) / "a.parquet", mutated(options.seed)))
        return 0
    end = time.monotonic() + 60 * options.minutes
    counts = Counter()
    failures = []
    process, pipe = started()
    seed = options.first
    while time.monotonic() < end:
        pipe.send(seed)
        outcome, text = "crash", ""
        try:
            if pipe.poll(120):
                outcome, text = pipe.recv()
            else:
                outcome = "hang"
        except EOFError:
            pass
        counts[outcome] += 1
        if outcome not in ("read", "refused"):
            failures.append(seed)
            print(f"seed {seed}: {outcome}\n{text}", flush=True)
        if outcome in ("crash", "hang"):
            process.kill()
            process, pipe = started()
        seed += 1
    process.kill()
    print(f"seeds {options.first} to {seed - 1}: {dict(counts)}; failures: {failures}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
