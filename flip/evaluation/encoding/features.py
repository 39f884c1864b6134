"""Computes features of images and texts on all ranks, gathers them on rank 0, and caches them.

A batch is the positions k * b .. (k + 1) * b - 1 of the data set, whichever rank computes it. So features have the same
bits for every number of ranks; in bf16, for every number above one (``parallel.autocast``).
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flip.checkpoint.export_record import check_header
from flip.checkpoint.safetensors_io import save_tensors
from flip.data.chunk_reader import Sample
from flip.distributed.collectives import RankGroup, all_gather_json
from flip.evaluation.datasets.image_sources import Images, PreparedImage, prefetch
from flip.evaluation.encoding.encoders import GREY, Encoder
from flip.files.creation import FILE_MODE, private_folder, run_folder
from flip.runs.errors import DataError

log = logging.getLogger(__name__)


def no_op(*_: int) -> None:
    """Ignore progress."""


class Features(NamedTuple):
    """Features of a data set, in its order."""

    features: Tensor
    """(N, E) fp32."""
    labels: list[Any]
    """The label, or the captions, of each image."""
    ids: Tensor
    """(N,) int64."""


def embed_images(
    encoder: Encoder, images: Images, read_label: Callable[[Sample], Any], batch: int, ranks: RankGroup,
    progress: Callable[[int, int], None] = no_op,
) -> Features | None:  # fmt: skip
    """The features of all images on rank 0, None on others. Collective.

    ``read_label`` reads a sample's label or captions and raises DecodeError; ``progress`` is called after every batch
    with about the images done, and their number. Raises DataError if an image cannot be decoded or has no label.
    """
    batches = _batches(images.count, batch)
    labels: list[Any] = []
    ids: list[int] = []
    features = [torch.empty(0, encoder.width)]
    for views, batch_ids, batch_labels in _own_batches(encoder, images, read_label, batches, ranks):
        features.append(encoder.image(views, batch_ids)[: len(batch_labels)])
        labels += batch_labels
        ids += batch_ids.tolist()[: len(batch_labels)]
        progress(min(len(ids) * ranks.size, images.count), images.count)
    rows = _rows(batches, ranks)
    all_features = ranks.gather(torch.cat(features), rows)
    all_ids = ranks.gather(torch.tensor(ids).long(), rows)
    all_labels = all_gather_json(labels, ranks.group)
    if all_features is None or all_ids is None:
        return None
    return Features(all_features, [label for part in all_labels for label in part], all_ids)


def embed_texts(
    encoder: Encoder, texts: Sequence[str], batch: int, ranks: RankGroup, progress: Callable[[int, int], None] = no_op
) -> Tensor | None:
    """(n, E) of all texts on rank 0, None on others. Collective: ``texts`` is equal on all ranks."""
    batches = _batches(len(texts), batch)
    own = ranks.shard(len(batches))
    features = [torch.empty(0, encoder.width)]
    for step in range(_steps(batches, ranks)):
        part = batches[own[step]] if step < len(own) else None
        encoded = encoder.text([texts[i] for i in part] if part else [""])
        if part:
            features += [encoded]
        progress(min((step + 1) * batch * ranks.size, len(texts)), len(texts))
    return ranks.gather(torch.cat(features), _rows(batches, ranks))


def _batches(count: int, batch: int) -> list[range]:
    return [range(start, min(start + batch, count)) for start in range(0, count, batch)]


def _rows(batches: list[range], ranks: RankGroup) -> list[int]:
    """Number of images or texts by rank."""
    return [sum(len(batches[k]) for k in ranks.shard(len(batches), rank)) for rank in range(ranks.size)]


def _steps(batches: list[range], ranks: RankGroup) -> int:
    """Number of batches of the rank with most: all ranks encode as often, since encoding is collective under FSDP."""
    return max(len(ranks.shard(len(batches), rank)) for rank in range(ranks.size))


def _own_batches(
    encoder: Encoder, images: Images, read_label: Callable[[Sample], Any], batches: list[range], ranks: RankGroup
) -> Iterator[tuple[Tensor, Tensor, list[Any]]]:
    """(views, ids, labels) of this rank's batches; then a grey image without label until all ranks have finished."""
    parts = prefetch(images, [batches[k] for k in ranks.shard(len(batches))], encoder.view, read_label)
    for _ in range(_steps(batches, ranks)):
        part = next(parts, None)
        prepared = part or [PreparedImage(0, encoder.view(GREY), None)]
        ids = torch.tensor([image.id for image in prepared], dtype=torch.int64)
        views = torch.from_numpy(np.stack([image.view for image in prepared]))
        yield views, ids, [image.label for image in part or ()]


class FeatureCache:
    """Features that are kept between evaluations; used by rank 0 alone.

        <root>/flip-features-<uid>/<model>/images-<key>.safetensors    features (N, E), labels (N,), ids (N,)
        <root>/flip-features-<uid>/<model>/texts-<key>.safetensors     features (C, E)

    The folder of a user is private: others can neither put features into it nor read them. ``model`` is the digest of
    a checkpoint with the compute settings; a key is a hash of everything else that determines a feature. Files are
    replaced atomically; an unreadable file is computed again.
    """

    def __init__(self, root: os.PathLike[str] | str, model: str) -> None:
        self._own = Path(root) / f"flip-features-{os.geteuid()}"
        self.folder = self._own / model

    def path(self, kind: str, *parts: Any) -> Path:
        """The file of the features that ``parts`` (JSON values) determine."""
        text = json.dumps(parts, sort_keys=True)
        return self.folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"

    def get(self, path: Path) -> dict[str, Tensor] | None:
        """The tensors of a file; None if it is missing or unreadable."""
        try:
            private_folder(self._own)
            check_header(path)
            return load_file(path)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, DataError) as error:
            log.warning("cached features cannot be read and are computed again: %s: %s", path, error)
            return None

    def put(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Write a file; a failure (a full disk) is logged and ignored."""
        try:
            private_folder(self._own)
            run_folder(self.folder)
            save_tensors(tensors, path, FILE_MODE)
        except (SafetensorError, OSError) as error:
            log.warning("features are not cached: %s: %s", path, error)
