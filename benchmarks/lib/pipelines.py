"""Our data pipeline, decoding alone as a lower bound, and the table of all pipelines that `stream.py` measures.

Each is a generator that yields the number of samples of each batch. With ``Work.workers`` 0 all of its work is in one
process. A peer that is not installed raises ModuleNotFoundError.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache, partial
from itertools import cycle
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.lib import peers
from benchmarks.lib.work import AUGMENT, PATCH, SIZE, Work, torchvisions_crop
from flip.config import schema
from flip.data import augment as augmenting
from flip.data import decode, masking
from flip.data.manifest import tar

BLOCK = 4
LANES = 2
"""Two, so that two loader processes have one each."""
MASKS = ("0", "0.5", "0.75")
BARE = "bare decode + crop"
BARE_TORCHVISION = "bare decode + torchvision's crop"


def flip_loader(work: Work, mask: str, marked: bool = False) -> Iterator[int]:
    """flip.data.loader: full shuffle of blocks, CRC32, visible patches as uint8. ``marked``: of recoded shards."""
    from flip.data.loader import Loader
    from flip.data.worker import WorkerConfig

    if marked:
        work = dataclasses.replace(work, manifest=work.marked)
    data = dataclasses.replace(data_of(work), timeout=600.0, hedge=0.0)  # between two turns no answer is late
    loader = Loader(
        WorkerConfig(data, AUGMENT, schema.ImageTower(size=SIZE, patch=PATCH), schema.TextTower(), work.seed)
    )
    with closing(loader.batches(0, work.batch, mask)) as batches:
        for batch in batches:
            yield len(batch.ids)


def data_of(work: Work) -> schema.Data:
    return schema.Data(
        manifest=work.manifest, tokenizer=work.tokenizer, workers=work.workers, chunk=work.chunk, block=BLOCK,
        lanes=LANES, decoder="simplejpeg", resize="torchvision",
    )  # fmt: skip


def bare(work: Work) -> Iterator[int]:
    """JPEGs in memory, decoded by simplejpeg, then cropped, resized and cut into visible patches as ours; no captions.
    Without end, as ours."""
    images, draws, keep = _prepared(work)
    for start in cycle(range(0, len(images), work.batch)):
        rows = range(start, min(start + work.batch, len(images)))
        out = np.empty((len(rows), keep.shape[1], PATCH * PATCH * 3), dtype=np.uint8)
        for place, row in enumerate(rows):
            view = augmenting.view(decode.decode(images[row], "simplejpeg"), SIZE, AUGMENT, draws, row, "torchvision")
            decode.patches(view, PATCH, keep[row], out[place])
        yield len(out)


def bare_torchvision(work: Work) -> Iterator[int]:
    """JPEGs in memory, decoded by simplejpeg, cropped and resized by torchvision's public transform; nothing else."""
    images, _, _ = _prepared(work)
    crop = torchvisions_crop(work.seed)
    for start in range(0, len(images), work.batch):
        yield len(crop(decode.decode(image, "simplejpeg") for image in images[start : start + work.batch]))


@cache
def _prepared(work: Work) -> tuple[list[bytes], augmenting.Draws, NDArray[np.int16]]:
    """Prepared before the clock starts: JPEGs and their random draws."""
    views = [memoryview(Path(path).read_bytes()) for path in work.shards]
    places = [(view, *sample.members["jpg"]) for view in views for sample in tar.samples(view)][: work.samples]
    ids = np.arange(len(places))
    patches = (SIZE // PATCH) ** 2
    epochs = np.zeros_like(ids)
    keep = masking.visible_patches(work.seed, epochs, ids, patches, patches // 2)
    return (
        [bytes(view[at : at + size]) for view, at, size in places],
        augmenting.draw(AUGMENT, work.seed, epochs, ids),
        keep,
    )


def name_of(mask: str, marked: bool = False) -> str:
    """Of our pipeline."""
    return f"ours{', markers' if marked else ''}, mask {mask}"


PLAIN = [name_of(mask) for mask in MASKS]
MARKED = [name_of(mask, True) for mask in MASKS]
PIPELINES: dict[str, Callable[[Work], Iterator[int]]] = {
    **{name_of(mask): partial(flip_loader, mask=mask) for mask in MASKS},
    **{name_of(mask, True): partial(flip_loader, mask=mask, marked=True) for mask in MASKS},
    BARE: bare,
    BARE_TORCHVISION: bare_torchvision,
    **peers.PIPELINES,
}
