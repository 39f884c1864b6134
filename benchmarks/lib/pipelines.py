"""Data pipelines on one core: ours, those of peers, and decoding alone as a lower bound.

Each is a generator that yields the number of samples of each batch, in one process without loader processes, so that
all of its work is on the measured core. All crop 0.5 to 1 of the area, sides in 3:4 to 4:3, to 224 pixels, flip, and
tokenise the caption. A peer that is not installed raises ModuleNotFoundError.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flip.config import schema
from flip.data import augment as augmenting
from flip.data import decode, masking
from flip.data.decode import captions_of
from flip.data.manifest import tar
from flip.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

SIZE = 224
PATCH = 16
LENGTH = 32
AUGMENT = schema.Augment()
BLOCK = 4
LANES = 1
SHUFFLE = 1000


@dataclass(frozen=True)
class Work:
    """The work: one pass over these data, in batches."""

    address: str
    """Address of the S3 server, also in the environment with the credentials."""
    key: str
    secret: str
    bucket: str
    shards: tuple[str, ...]
    """Names of objects."""
    mds: str
    """The same samples in mosaicml-streaming's format."""
    manifest: str
    chunk: int
    tokenizer: str
    local: tuple[str, ...]
    """The shards as files, for decoding alone."""
    samples: int
    batch: int
    seed: int


def flip_loader(work: Work, mask: str) -> Iterator[int]:
    """flip.data.loader over s3://: full shuffle of blocks, CRC32, visible patches as uint8."""
    from flip.data.loader import Loader
    from flip.data.worker import WorkerConfig

    data = dataclasses.replace(data_of(work), timeout=600.0, hedge=0.0)  # between two turns no answer is late
    loader = Loader(
        WorkerConfig(data, AUGMENT, schema.ImageTower(size=SIZE, patch=PATCH), schema.TextTower(), work.seed)
    )
    with closing(loader.batches(0, work.batch, mask)) as batches:
        for batch in batches:
            yield len(batch.ids)


def data_of(work: Work) -> schema.Data:
    return schema.Data(
        manifest=work.manifest, tokenizer=work.tokenizer, workers=0, chunk=work.chunk, block=BLOCK, lanes=LANES,
        decoder="simplejpeg", resize="torchvision",
    )  # fmt: skip


def bare(work: Work) -> Iterator[int]:
    """JPEGs in memory, decoded by simplejpeg, then cropped, resized and cut into visible patches as ours; no
    captions."""
    images, draws, keep = _prepared(work)
    for start in range(0, len(images), work.batch):
        rows = range(start, min(start + work.batch, len(images)))
        out = np.empty((len(rows), keep.shape[1], PATCH * PATCH * 3), dtype=np.uint8)
        for place, row in enumerate(rows):
            view = augmenting.view(decode.decode(images[row], "simplejpeg"), SIZE, AUGMENT, draws, row, "torchvision")
            decode.patches(view, PATCH, keep[row], out[place])
        yield len(out)


def bare_torchvision(work: Work) -> Iterator[int]:
    """JPEGs in memory, decoded by simplejpeg, cropped and resized by torchvision's public transform; nothing else."""
    images, _, _ = _prepared(work)
    crop = _torchvisions_crop(work.seed)
    for start in range(0, len(images), work.batch):
        yield len(crop(decode.decode(image, "simplejpeg") for image in images[start : start + work.batch]))


@cache
def _prepared(work: Work) -> tuple[list[bytes], augmenting.Draws, NDArray[np.int16]]:
    """Prepared before the clock starts: JPEGs and their random draws."""
    views = [memoryview(Path(path).read_bytes()) for path in work.local]
    places = [(view, *sample.members["jpg"]) for view in views for sample in tar.samples(view)]
    ids = np.arange(len(places))
    patches = (SIZE // PATCH) ** 2
    epochs = np.zeros_like(ids)
    keep = masking.visible_patches(work.seed, epochs, ids, patches, patches // 2)
    return [bytes(view[at : at + size]) for view, at, size in places], augmenting.draw(work.seed, epochs, ids), keep


def open_clip(work: Work) -> Iterator[int]:
    """open_clip_train's own training pipeline: Pillow, float32, its tokenizer; shards through pipe:curl, signed.

    Users of it write ``pipe:aws s3 cp``, which takes CPU seconds per shard: too much for shards as small as these.
    """
    from open_clip import get_tokenizer, image_transform
    from open_clip_train import data as open_clip_data
    from webdataset.tariterators import tar_file_expander

    # webdataset marks the end of a shard since 0.2.87, which open_clip takes for a file.
    open_clip_data.tar_file_expander = partial(tar_file_expander, eof_value=None)
    sign = f"--aws-sigv4 aws:amz:us-east-1:s3 --user {work.key}:{work.secret}"
    names = ",".join(work.shards)
    args = argparse.Namespace(
        train_data=f"pipe:curl -sf {sign} {work.address}/{work.bucket}/{{{names}}}",
        train_num_samples=work.samples, train_data_upsampling_factors=None, dataset_resampled=False, seed=work.seed,
        batch_size=work.batch, workers=0, world_size=1,
    )  # fmt: skip
    augment = {"scale": tuple(AUGMENT.crop_area)}
    preprocess = image_transform(SIZE, is_train=True, aug_cfg=augment)
    tokenizer = get_tokenizer("ViT-B-16", context_length=LENGTH)
    data = open_clip_data.get_wds_dataset(args, preprocess, is_train=True, tokenizer=tokenizer)
    for images, tokens in data.dataloader:
        assert len(images) == len(tokens)
        yield len(images)


def webdataset_open(work: Work) -> Iterator[int]:
    """webdataset over files opened by s3fs; our decoder and tokenizer, and our crop, which is faster."""
    yield from map(_Finish(work), _batched(samples_of_webdataset(work, whole=False), work.batch))


def webdataset_whole(work: Work) -> Iterator[int]:
    """webdataset over objects fetched at once by s3fs; our decoder, tokenizer and crop."""
    yield from map(_Finish(work), _batched(samples_of_webdataset(work, whole=True), work.batch))


def webdataset_torchvision(work: Work) -> Iterator[int]:
    """As ``webdataset_whole``, but cropped by torchvision's public transform, as usual; our decoder."""
    crop = _torchvisions_crop(work.seed)
    tokenizer = Tokenizer(work.tokenizer, LENGTH, True)
    for samples in _batched(samples_of_webdataset(work, whole=True), work.batch):
        images = crop(decode.decode(sample["jpg"], "simplejpeg") for sample in samples)
        assert len(images) == len(tokenizer([captions_of(sample, ["txt"])[0] for sample in samples]))
        yield len(images)


def _torchvisions_crop(seed: int) -> Callable[[Iterable[NDArray[np.uint8]]], torch.Tensor]:
    """Images -> a batch of views (b, 3, SIZE, SIZE), uint8."""
    import torch
    from torchvision.transforms import v2

    crop = v2.Compose([
        v2.RandomResizedCrop(SIZE, scale=tuple(AUGMENT.crop_area), interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(AUGMENT.flip),
    ])  # fmt: skip
    torch.manual_seed(seed)
    return lambda images: torch.stack([crop(torch.from_numpy(image).permute(2, 0, 1)) for image in images])


def samples_of_webdataset(work: Work, whole: bool) -> Iterable[dict[str, Any]]:
    """webdataset as users have it: dictionaries of bytes, shuffled, one pass."""
    import s3fs
    import webdataset

    files = s3fs.S3FileSystem(key=work.key, secret=work.secret, endpoint_url=work.address, skip_instance_cache=True)
    webdataset.gopen_schemes["s3"] = lambda url, mode, bufsize: (
        io.BytesIO(files.cat_file(url)) if whole else files.open(url, mode)
    )
    urls = [f"s3://{work.bucket}/{name}" for name in work.shards]
    return webdataset.WebDataset(urls, shardshuffle=len(urls), seed=work.seed).shuffle(SHUFFLE)


def mosaicml(work: Work) -> Iterator[int]:
    """mosaicml-streaming over the same samples in its own format, nothing cached; our decoder, crop and tokenizer."""
    from streaming import StreamingDataset

    os.environ["S3_ENDPOINT_URL"] = work.address
    finish = _Finish(work)
    folder = tempfile.mkdtemp(prefix="flip-mds-")
    try:
        samples = StreamingDataset(
            remote=work.mds, local=folder, shuffle=True, shuffle_seed=work.seed, batch_size=work.batch
        )
        yield from map(finish, _batched(({"jpg": s["jpg"], "txt": s["txt"].encode()} for s in samples), work.batch))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


PIPELINES: dict[str, Callable[[Work], Iterator[int]]] = {
    "ours, mask 0.5": lambda work: flip_loader(work, "0.5"),
    "ours, mask 0": lambda work: flip_loader(work, "0"),
    "bare decode + crop": bare,
    "bare decode + torchvision's crop": bare_torchvision,
    "open_clip": open_clip,
    "webdataset + s3fs open": webdataset_open,
    "webdataset + s3fs whole": webdataset_whole,
    "webdataset + s3fs whole, torchvision's crop": webdataset_torchvision,
    "mosaicml-streaming": mosaicml,
}


class _Finish:
    """The remaining work for peers that only read: as ours, but in their order and with all pixels."""

    def __init__(self, work: Work) -> None:
        self._seed = work.seed
        self._seen = 0
        self._tokenizer = Tokenizer(work.tokenizer, LENGTH, True)

    def __call__(self, samples: list[dict[str, Any]]) -> int:
        ids = np.arange(self._seen, self._seen + len(samples))
        self._seen += len(samples)
        draws = augmenting.draw(self._seed, np.zeros_like(ids), ids)
        images = np.empty((len(samples), SIZE, SIZE, 3), dtype=np.uint8)
        for row, sample in enumerate(samples):
            pixels = decode.decode(sample["jpg"], "simplejpeg")
            images[row] = augmenting.view(pixels, SIZE, AUGMENT, draws, row, "torchvision")
        tokens = self._tokenizer([captions_of(sample, ["txt"])[0] for sample in samples])
        return len(tokens)


def _batched(samples: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    held: list[dict[str, Any]] = []
    for sample in samples:
        held.append(sample)
        if len(held) == size:
            yield held
            held = []
    if held:
        yield held
