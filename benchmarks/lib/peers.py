"""Data pipelines of other projects over the same images, each as its documentation recommends.

Where a project leaves decoding to its user (webdataset, mosaicml-streaming, Grain), it gets our decoder, crop and
tokenizer, which are faster than what its examples use. LitData, SPDL, Energon and open_clip decode as they do by
themselves. All deliver whole views: none of them knows a mask. With ``Work.workers`` each uses its own loader
processes; SPDL uses threads.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lib import formats
from benchmarks.lib.work import AUGMENT, LENGTH, SHUFFLE, SIZE, Finish, Work, batched, torchvisions_crop
from flip.data import decode
from flip.data.sample_members import captions_of
from flip.tokenizer import Tokenizer

SAMPLES_IN_A_ROW = 100
"""Of one shard that Energon reads before it changes to another, as in its quick start."""


def open_clip(work: Work) -> Iterator[int]:
    """open_clip_train's own training pipeline: Pillow, float32, its tokenizer; shards through pipe:curl, signed.

    Users of it write ``pipe:aws s3 cp``, which takes CPU seconds per shard: too much for shards as small as these.
    """
    from open_clip import get_tokenizer, image_transform
    from open_clip_train import data as open_clip_data
    from webdataset.tariterators import tar_file_expander

    # webdataset marks the end of a shard since 0.2.87, which open_clip takes for a file.
    open_clip_data.tar_file_expander = partial(tar_file_expander, eof_value=None)
    names = ",".join(Path(path).name for path in work.shards)
    source = f"{work.folder}/shards/{{{names}}}"
    if work.remote:
        sign = f"--aws-sigv4 aws:amz:us-east-1:s3 --user {work.key}:{work.secret}"
        source = f"pipe:curl -sf {sign} {work.address}/{work.remote}/shards/{{{names}}}"
    args = argparse.Namespace(
        train_data=source, train_num_samples=work.samples, train_data_upsampling_factors=None, dataset_resampled=False,
        seed=work.seed, batch_size=work.batch, workers=work.workers, world_size=1,
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
    yield from map(Finish(work), batched(samples_of_webdataset(work, at_once=False), work.batch))


def webdataset_at_once(work: Work) -> Iterator[int]:
    """webdataset over objects fetched at once by s3fs; our decoder, tokenizer and crop."""
    import webdataset

    samples = samples_of_webdataset(work, at_once=True)
    if not work.workers:
        yield from map(Finish(work), batched(samples, work.batch))
        return
    batches = samples.batched(work.batch, collation_fn=list).map(Finish(work))  # type: ignore[attr-defined]
    yield from webdataset.WebLoader(batches, batch_size=None, num_workers=work.workers)


def webdataset_torchvision(work: Work) -> Iterator[int]:
    """As ``webdataset_at_once``, but cropped by torchvision's public transform, as usual; our decoder."""
    crop = torchvisions_crop(work.seed)
    tokenizer = Tokenizer(work.tokenizer, LENGTH, True)
    for samples in batched(samples_of_webdataset(work, at_once=True), work.batch):
        images = crop(decode.decode(sample["jpg"], "simplejpeg") for sample in samples)
        assert len(images) == len(tokenizer([captions_of(sample, ["txt"])[0] for sample in samples]))
        yield len(images)


def samples_of_webdataset(work: Work, at_once: bool) -> Iterable[dict[str, Any]]:
    """webdataset as users have it: dictionaries of bytes, shuffled, one pass."""
    import webdataset

    urls = work.urls("shards", "*.tar")
    if work.remote:
        import s3fs

        store = s3fs.S3FileSystem(key=work.key, secret=work.secret, endpoint_url=work.address, skip_instance_cache=True)
        webdataset.gopen_schemes["s3"] = lambda url, mode, bufsize: (
            io.BytesIO(store.cat_file(url)) if at_once else store.open(url, mode)
        )
    return webdataset.WebDataset(urls, shardshuffle=len(urls), seed=work.seed).shuffle(SHUFFLE)


def mosaicml(work: Work) -> Iterator[int]:
    """mosaicml-streaming over the same samples in its own format, nothing cached; our decoder, crop and tokenizer."""
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    finish = Finish(work)

    class Captions(StreamingDataset):
        """Samples as a model takes them."""

        def __getitem__(self, at: Any) -> Any:
            sample = super().__getitem__(at)
            return finish.sample(sample["jpg"], sample["txt"])

    os.environ["S3_ENDPOINT_URL"] = work.address
    folder = tempfile.mkdtemp(prefix="flip-mds-") if work.remote else work.url("mds")
    try:
        samples = Captions(
            remote=work.url("mds") if work.remote else None, local=folder, shuffle=True, shuffle_seed=work.seed,
            batch_size=work.batch,
        )  # fmt: skip
        for batch in DataLoader(samples, work.batch, num_workers=work.workers):
            yield len(batch["tokens"])
    finally:
        if work.remote:
            shutil.rmtree(folder, ignore_errors=True)


def litdata(work: Work) -> Iterator[int]:
    """LitData: optimised chunks, its StreamingDataset and StreamingDataLoader, its JPEG decoder, torchvision's crop."""
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import downloader

    crop = torchvisions_crop(work.seed)
    tokenizer = Tokenizer(work.tokenizer, LENGTH, True)

    def transform(sample: dict[str, Any]) -> dict[str, Any]:
        return {"image": crop([sample["image"]])[0], "tokens": tokenizer([sample["caption"]])[0]}

    options = {}
    folder = tempfile.mkdtemp(prefix="flip-litdata-")
    if work.remote:
        access = {"aws_access_key_id": work.key, "aws_secret_access_key": work.secret}
        options = {"cache_dir": folder, "storage_options": {"endpoint_url": work.address} | access}
        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = "true"  # it has no option for a server without TLS
    try:
        samples = StreamingDataset(work.url("litdata"), shuffle=True, seed=work.seed, transform=transform, **options)
        for batch in StreamingDataLoader(samples, batch_size=work.batch, num_workers=work.workers):
            yield len(batch["tokens"])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def grain(work: Work) -> Iterator[int]:
    """Grain over ArrayRecord files, which it reads from local files; our decoder, crop and tokenizer."""
    from grain import MapDataset, ReadOptions, multiprocessing, sources

    source = sources.ArrayRecordDataSource(work.urls("records", "*.array_record"))
    samples = MapDataset.source(source).seed(work.seed).shuffle().map(_FromRecord(work))
    batches = samples.to_iter_dataset(ReadOptions(prefetch_buffer_size=work.batch)).batch(work.batch)
    if work.workers:
        batches = batches.mp_prefetch(multiprocessing.MultiprocessingOptions(num_workers=work.workers))
    for batch in batches:
        yield len(batch["tokens"])


class _FromRecord:
    """A record -> a sample; made anew in each process of Grain."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._finish: Finish | None = None

    def __call__(self, record: bytes) -> dict[str, Any]:
        if self._finish is None:
            self._finish = Finish(self._work)
        return self._finish.sample(*formats.parse_record(record))

    def __reduce__(self) -> tuple[Any, ...]:
        return _FromRecord, (self._work,)


def spdl(work: Work) -> Iterator[int]:
    """SPDL: threads that fetch shards, walk them with its tar reader, and decode, crop and resize by FFmpeg."""
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    finish = Finish(work)
    urls = work.urls("shards", "*.tar")
    np.random.default_rng(work.seed).shuffle(urls)

    def samples(content: bytes) -> Iterator[dict[str, Any]]:
        sample = dict[str, Any]()
        for name, member in spdl.io.iter_tarfile(content):
            sample[name.rpartition(".")[2]] = bytes(member)
            if len(sample) == len(formats.MEMBERS):
                yield sample
                sample = {}

    def view(sample: dict[str, Any]) -> tuple[Any, Any]:
        packets = spdl.io.demux_image(sample["jpg"])
        drawn = finish.describe(packets.width, packets.height)
        left, top, right, bottom = drawn.box
        steps = [f"crop={right - left}:{bottom - top}:{left}:{top}", f"scale={SIZE}:{SIZE}:flags=bicubic"]
        if drawn.is_mirrored:
            steps.append("hflip")
        frames = spdl.io.decode_packets(packets, filter_desc=",".join([*steps, "format=pix_fmts=rgb24"]))
        return frames, finish.tokens(sample["txt"].decode())

    def join(pairs: list[tuple[Any, Any]]) -> int:
        images = spdl.io.to_numpy(spdl.io.convert_frames([frames for frames, _ in pairs]))
        tokens = np.stack([ids for _, ids in pairs])
        assert images.shape == (len(tokens), SIZE, SIZE, 3)
        return len(tokens)

    threads = max(1, work.workers)
    pipeline = (
        PipelineBuilder()
        .add_source(urls)
        .pipe(_reader_of(work))
        .pipe(samples)
        .pipe(view, concurrency=threads)
        .aggregate(work.batch)
        .pipe(join)
        .add_sink()
        .build(num_threads=threads + 2)
    )
    with pipeline.auto_stop():
        yield from pipeline


def _reader_of(work: Work) -> Callable[[str], bytes]:
    """URL of a shard -> its bytes."""
    if not work.remote:
        return lambda path: Path(path).read_bytes()
    import s3fs

    store = s3fs.S3FileSystem(key=work.key, secret=work.secret, endpoint_url=work.address, skip_instance_cache=True)
    return lambda url: bytes(store.cat_file(url))


def energon(work: Work) -> Iterator[int]:
    """Megatron-Energon: prepared shards, a task encoder, its decoder to uint8 tensors, torchvision's crop."""
    from megatron.energon import (
        DefaultTaskEncoder,
        SampleDecoder,
        WorkerConfig,
        get_loader,
        get_train_dataset,
        stateless,
    )

    crop = torchvisions_crop(work.seed)
    tokenizer = Tokenizer(work.tokenizer, LENGTH, True)

    class Encoder(DefaultTaskEncoder):  # type: ignore[misc]
        """Crops and tokenises."""

        decoder = SampleDecoder(image_decode="torchrgb8")

        @stateless(restore_seeds=True)
        def encode_sample(self, sample: Any) -> Any:
            sample.image = crop([sample.image])[0]
            sample.caption = tokenizer([sample.caption])[0]
            return sample

    with tempfile.TemporaryDirectory(prefix="flip-energon-") as folder:
        path = formats.energon_path(work, Path(folder))
        samples = get_train_dataset(
            path, batch_size=work.batch, shuffle_buffer_size=SHUFFLE, max_samples_per_sequence=SAMPLES_IN_A_ROW,
            worker_config=WorkerConfig(rank=0, world_size=1, num_workers=work.workers), task_encoder=Encoder(),
        )  # fmt: skip
        for batch in get_loader(samples):
            yield len(batch.image)


PIPELINES: dict[str, Callable[[Work], Iterator[int]]] = {
    "open_clip": open_clip,
    "webdataset + s3fs open": webdataset_open,
    "webdataset + s3fs whole": webdataset_at_once,
    "webdataset + s3fs whole, torchvision's crop": webdataset_torchvision,
    "mosaicml-streaming": mosaicml,
    "LitData": litdata,
    "Grain": grain,
    "SPDL": spdl,
    "Energon": energon,
}
ONLY_FILES = ("Grain",)
"""Peers that read local files only."""
ONE_CORE = ("webdataset + s3fs open", "webdataset + s3fs whole, torchvision's crop")
"""Variants that are not measured on two cores: webdataset has a faster one."""
