"""Image data sets as files, and behind an S3 server that runs on other cores than the measured code."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from multiprocessing import get_context
from pathlib import Path

from benchmarks.lib import formats
from benchmarks.lib.work import Work
from flip.data.manifest.build import index
from flip.tokenizer import train
from jobs.measuring.functions import photo_shards
from jobs.measuring.functions.photo_shards import Kind
from tests.s3.servers import BUCKET, KEY, SECRET, Nanio, Server, Weed, files
from tools.commands import shards as shards_command

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


def alone(count: int = 1, first: int = 0) -> ProcessPoolExecutor:
    """A process on the measured core, with one torch thread: more would wait for each other.

    ``count``: how many cores it may use, from the core ``first`` on; of those that exist.
    """
    cores = sorted(os.sched_getaffinity(0))
    own_cores = cores[first : first + count] or cores[:count]
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "webdataset", "benchmarks.lib.pipelines"])  # imported once for all
    return ProcessPoolExecutor(1, context, _settle, (own_cores,))


def _settle(own_cores: list[int]) -> None:
    import atexit
    import ctypes
    import gc
    import multiprocessing
    from multiprocessing import util

    import torch

    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG: one that stands still notices nothing itself
    # Processes of multiprocessing skip what is registered for their exit, where mosaicml-streaming frees its memory.
    util.Finalize(None, atexit._run_exitfuncs, exitpriority=0)  # type: ignore[attr-defined]
    os.sched_setaffinity(0, own_cores)
    multiprocessing.set_start_method("fork", force=True)  # as in a program of the user, for loader processes of peers
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # as our trainer and our loader processes do; for all pipelines


def prepare(kind: Kind, samples: int, chunk: int, batch: int, address: str, folder: Path, seed: int) -> Work:
    """Create a data set, upload it, and index it."""
    pairs = photo_shards.samples(kind, samples, seed)
    return upload(as_files(pairs, folder / str(kind.side), chunk, batch, seed), address)


def as_files(pairs: list[tuple[bytes, str]], folder: Path, chunk: int, batch: int, seed: int) -> Work:
    """Create a data set of files, in all formats."""
    paths = photo_shards.write(pairs, folder / "shards", SHARDS)
    manifest = index([str(path) for path in paths], folder / "manifest", chunk)
    train((text for _, text in pairs), 30_522, folder / "tokenizer.json")
    formats.write(pairs, folder)
    return Work(
        folder=str(folder), remote="", address="", key=KEY, secret=SECRET, manifest=str(manifest.folder), marked="",
        chunk=chunk, samples=len(pairs), batch=batch, seed=seed,
    )  # fmt: skip


def add_marked(work: Work, side: int) -> Work:
    """The same, with its images recoded at the same size and quality, with restart markers."""
    recoded = f"{work.folder}/recoded"
    _shards("recode", work.manifest, "--short", str(side), "--quality", str(photo_shards.QUALITY), "--out", recoded)
    return dataclasses.replace(work, marked=recoded)


def upload(work: Work, address: str) -> Work:
    """The same data set in object storage."""
    folder = Path(work.folder)
    store = files(address)
    remote = f"{BUCKET}/{folder.name}"
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.pipe_file(f"{remote}/{path.relative_to(folder)}", path.read_bytes())
    marked = ""
    if work.marked:
        marked = f"{work.marked}-remote"
        _shards("move", work.marked, "--to", f"s3://{remote}/recoded", "--out", marked)
    work = dataclasses.replace(work, remote=remote, address=address, marked=marked)
    manifest = index(work.urls("shards", "*.tar"), folder / "remote-manifest", work.chunk)
    return dataclasses.replace(work, manifest=str(manifest.folder))


def _shards(*arguments: str) -> None:
    with redirect_stdout(io.StringIO()):
        status = shards_command.main([*arguments, "--quiet"])
    if status:
        raise RuntimeError(f"flip shards {arguments[0]} failed")
