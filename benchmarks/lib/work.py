"""What every data pipeline of the benchmarks does: one pass over the same images, with the same crop and captions.

`Work` names the data, where they lie, and how many cores may work on them. All pipelines crop 0.5 to 1 of the area,
sides in 3:4 to 4:3, to 224 pixels, flip, and tokenise the caption.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flip.config import schema
from flip.data import augment as augmenting
from flip.data import decode
from flip.data.sample_members import captions_of
from flip.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

SIZE = 224
PATCH = 16
LENGTH = 32
AUGMENT = schema.Augment()
SHUFFLE = 1000
"""Samples in the shuffle buffers of peers that have one."""


@dataclass(frozen=True)
class Work:
    """The work: one pass over these data, in batches."""

    folder: str
    """Files of the data set: shards/, tokenizer.json and the formats of peers (benchmarks/lib/formats.py)."""
    remote: str
    """Where the same files lie in object storage (BUCKET/PREFIX); empty: they are read from ``folder``."""
    address: str
    """Of the S3 server, also in the environment with the credentials."""
    key: str
    secret: str
    manifest: str
    """Of the shards, for our pipeline."""
    marked: str
    """Manifest of the same images with a restart marker per MCU, as `flip shards recode` writes them; may be empty."""
    chunk: int
    samples: int
    batch: int
    seed: int
    workers: int = 0
    """Processes or threads that a pipeline may use; 0: it works in its own process, on one core."""

    @property
    def tokenizer(self) -> str:
        return f"{self.folder}/tokenizer.json"

    @property
    def shards(self) -> list[str]:
        """Paths of the shards as files."""
        return [str(path) for path in sorted(Path(self.folder, "shards").glob("*.tar"))]

    def url(self, name: str) -> str:
        """Of a file or folder of the data set."""
        return f"s3://{self.remote}/{name}" if self.remote else f"{self.folder}/{name}"

    def urls(self, folder: str, pattern: str) -> list[str]:
        """Of files in a folder of the data set."""
        return [self.url(f"{folder}/{path.name}") for path in sorted(Path(self.folder, folder).glob(pattern))]


class Finish:
    """The work on samples that a peer has only read: our decoder, crop and tokenizer, all pixels of the view."""

    def __init__(self, work: Work) -> None:
        self._seed = work.seed
        self._seen = 0
        self._tokenizer = Tokenizer(work.tokenizer, LENGTH, True)

    def __call__(self, samples: list[dict[str, Any]]) -> int:
        """The number of samples."""
        views = np.stack([self.view(sample["jpg"]) for sample in samples])
        tokens = self._tokenizer([captions_of(sample, ["txt"])[0] for sample in samples])
        assert len(views) == len(tokens)
        return len(tokens)

    def sample(self, image: bytes, caption: str) -> dict[str, NDArray[Any]]:
        """One sample, for loaders that join samples to batches themselves."""
        return {"image": self.view(image), "tokens": self.tokens(caption)}

    def view(self, image: bytes) -> NDArray[np.uint8]:
        """The next view, of an image decoded by simplejpeg."""
        pixels = decode.decode(image, "simplejpeg")
        described = self.describe(pixels.shape[1], pixels.shape[0])
        return np.asarray(augmenting.geometry(pixels, described, "torchvision"))

    def describe(self, width: int, height: int) -> augmenting.View:
        """Crop and flip of the next view."""
        draws = augmenting.draw(AUGMENT, self._seed, np.zeros(1, np.int64), np.array([self._seen]))
        self._seen += 1
        return augmenting.describe(width, height, SIZE, AUGMENT, draws, 0)

    def tokens(self, caption: str) -> NDArray[np.int32]:
        return self._tokenizer([caption])[0]


def torchvisions_crop(seed: int) -> Callable[[Iterable[NDArray[np.uint8] | torch.Tensor]], torch.Tensor]:
    """Images -> a batch of views (b, 3, SIZE, SIZE), uint8. Arrays have the channels last, tensors first."""
    import torch
    from torchvision.transforms import v2

    crop = v2.Compose([
        v2.RandomResizedCrop(SIZE, scale=tuple(AUGMENT.crop_area), interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(AUGMENT.flip),
    ])  # fmt: skip
    torch.manual_seed(seed)

    def views(images: Iterable[NDArray[np.uint8] | torch.Tensor]) -> torch.Tensor:
        return torch.stack([crop(_tensor(image)) for image in images])

    return views


def _tensor(image: NDArray[np.uint8] | torch.Tensor) -> torch.Tensor:
    import torch

    if isinstance(image, torch.Tensor):
        return image
    return torch.from_numpy(image).permute(2, 0, 1)


def batched(samples: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    """Lists of ``size`` samples; the last may be shorter."""
    held: list[dict[str, Any]] = []
    for sample in samples:
        held.append(sample)
        if len(held) == size:
            yield held
            held = []
    if held:
        yield held
