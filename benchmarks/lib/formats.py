"""Writes a data set in the formats of the peers that `stream.py` measures, as far as these are installed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.lib import results
from benchmarks.lib.work import Work

MEMBERS = ("jpg", "json", "txt")
"""Of each sample in a shard, in this order."""
Pair = tuple[bytes, str]
"""Image and caption."""
CHUNK_BYTES = 8 << 20
"""Of a file of LitData: a few per data set, as with its default of 64 MB and data sets of the usual size."""


def write(pairs: Sequence[Pair], folder: Path) -> None:
    """All formats but the shards, which are in ``folder``/shards."""
    for package, writer in WRITERS.items():
        if results.is_installed(package):
            writer(pairs, folder)


def mosaicml(pairs: Sequence[Pair], folder: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder / "mds"), columns={"jpg": "bytes", "txt": "str"}) as writer:
        for image, text in pairs:
            writer.write({"jpg": image, "txt": text})


def litdata(pairs: Sequence[Pair], folder: Path) -> None:
    from litdata import optimize

    optimize(
        fn=_litdata_sample, inputs=list(pairs), output_dir=str(folder / "litdata"), chunk_bytes=CHUNK_BYTES,
        num_workers=1, verbose=False,
    )  # fmt: skip


def _litdata_sample(pair: Pair) -> dict[str, object]:
    from litdata.types import Jpeg

    image, text = pair
    return {"image": Jpeg(bytes=image), "caption": text}


def array_record(pairs: Sequence[Pair], folder: Path) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    (folder / "records").mkdir()
    # A group of 1: the setting that its documentation recommends for random access.
    writer = ArrayRecordWriter(str(folder / "records" / "0.array_record"), "group_size:1")
    for image, text in pairs:
        writer.write(len(image).to_bytes(4, "big") + image + text.encode())
    writer.close()


def parse_record(record: bytes) -> Pair:
    size = int.from_bytes(record[:4], "big")
    return record[4 : 4 + size], record[4 + size :].decode()


def energon(pairs: Sequence[Pair], folder: Path) -> None:
    """Its index of the shards, by its own command."""
    fields = json.dumps({"image": "jpg", "caption": "txt"})
    command = [str(Path(sys.executable).parent / "energon"), "prepare", "--non-interactive", "--no-progress"]
    command += ["--num-workers", "1", "--split-ratio", "1,0,0", "--sample-type", "CaptioningSample"]
    subprocess.run([*command, "--field-map", fields, str(folder / "shards")], check=True, capture_output=True)


def energon_path(work: Work, folder: Path) -> str:
    """Path of the shards for Energon; of object storage through a profile of its storage client in ``folder``."""
    if not work.remote:
        return f"{work.folder}/shards"
    import os

    bucket, _, prefix = work.remote.partition("/")
    options = {"base_path": bucket, "endpoint_url": work.address, "region_name": "us-east-1"}
    credentials = {"type": "S3Credentials", "options": {"access_key": work.key, "secret_key": work.secret}}
    profile = {"storage_provider": {"type": "s3", "options": options}, "credentials_provider": credentials}
    path = folder / "storage.json"
    path.write_text(json.dumps({"profiles": {"benchmark": profile}}))
    os.environ["MSC_CONFIG"] = str(path)
    return f"msc://benchmark/{prefix}/shards"


WRITERS: dict[str, Callable[[Sequence[Pair], Path], None]] = {
    "streaming": mosaicml,
    "litdata": litdata,
    "array_record": array_record,
    "megatron.energon": energon,
}
