"""Image data sets behind an S3 server that runs on other cores than the measured code."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.lib.pipelines import Work
from flip.data.manifest.build import index
from flip.tokenizer import train
from tests.s3.servers import BUCKET, KEY, SECRET, Nanio, Server, Weed, files
from tools.measuring import photo_shards
from tools.measuring.photo_shards import Kind

SERVERS: dict[str, type[Server]] = {"weed": Weed, "nanio": Nanio}
SHARDS = 4


def cores() -> tuple[int, set[int]]:
    """The measured core, and those of the server: the others, or the same if there is only one."""
    first, *others = sorted(os.sched_getaffinity(0))
    return first, set(others) or {first}


@contextmanager
def serving(name: str, folder: Path) -> Iterator[str]:
    """Address of an empty server; s3:// URLs use it, also in later processes."""
    server = SERVERS[name](folder / name)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores()[1])  # the server inherits it
    try:
        server.start()
    finally:
        os.sched_setaffinity(0, before)
    try:
        files(server.address).mkdir(BUCKET)
        os.environ.update(
            AWS_ENDPOINT_URL=server.address, AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET,
            AWS_REGION="us-east-1", AWS_EC2_METADATA_DISABLED="true", S3_ENDPOINT_URL=server.address,
        )  # fmt: skip
        yield server.address
    finally:
        server.kill()


def alone() -> ProcessPoolExecutor:
    """A process on the measured core, with one torch thread: more would wait for each other."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "webdataset", "benchmarks.lib.pipelines"])  # imported once for all
    return ProcessPoolExecutor(1, context, _settle, (cores()[0],))


def _settle(core: int) -> None:
    import atexit
    import ctypes
    from multiprocessing import util

    import torch

    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG: one that stands still notices nothing itself
    # Processes of multiprocessing skip what is registered for their exit, where mosaicml-streaming frees its memory.
    util.Finalize(None, atexit._run_exitfuncs, exitpriority=0)  # type: ignore[attr-defined]
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)


def prepare(kind: Kind, samples: int, chunk: int, batch: int, address: str, folder: Path, seed: int) -> Work:
    """Create a data set, upload it, and index it."""
    pairs = photo_shards.samples(kind, samples, seed)
    name = f"{kind.side}"
    remote_files = files(address)
    local = photo_shards.write(pairs, folder / name, SHARDS)
    shards = tuple(f"{name}/{path.name}" for path in local)
    for path, key in zip(local, shards, strict=True):
        remote_files.pipe_file(f"{BUCKET}/{key}", path.read_bytes())
    manifest = index([f"s3://{BUCKET}/{key}" for key in shards], folder / f"{name}-manifest", chunk)
    train((text for _, text in pairs), 30_522, folder / f"{name}.json")
    mds = _mds(pairs, folder / f"{name}-mds", remote_files, f"{BUCKET}/{name}-mds")
    return Work(
        address=address, key=KEY, secret=SECRET, bucket=BUCKET, shards=shards, local=tuple(map(str, local)), mds=mds,
        manifest=str(manifest.folder), chunk=chunk, tokenizer=str(folder / f"{name}.json"), samples=samples,
        batch=batch, seed=seed,
    )  # fmt: skip


def _mds(pairs: list[tuple[bytes, str]], folder: Path, remote_files: Any, remote: str) -> str:
    """The same samples in mosaicml-streaming's format; nothing if it is not installed."""
    try:
        from streaming import MDSWriter
    except ModuleNotFoundError:
        return ""
    with MDSWriter(out=str(folder), columns={"jpg": "bytes", "txt": "str"}) as writer:
        for image, text in pairs:
            writer.write({"jpg": image, "txt": text})
    for path in sorted(folder.iterdir()):
        remote_files.pipe_file(f"{remote}/{path.name}", path.read_bytes())
    return f"s3://{remote}"
