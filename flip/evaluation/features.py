"""Images and texts -> features on rank 0, each image once, to the same bits whatever the number of ranks.

In bf16 that holds for all numbers above one: a single rank rounds otherwise (``parallel.autocast``).

A batch is the positions k * b .. (k + 1) * b - 1 of the data set, never a rank's own: who computes it moves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flip.data.chunk_reader import Sample
from flip.distributed.collectives import RankGroup
from flip.evaluation.encoders import Encoder
from flip.evaluation.images import Images, Viewed, ahead


def nothing() -> None:
    """No progress to tell."""


class Embedded(NamedTuple):
    """A data set as a model sees it, in order."""

    features: Tensor
    """(N, E) fp32."""
    of: list[Any]
    """What was read with each image: its label, or its captions."""
    ids: Tensor
    """(N,) int64."""


def embed_images(
    encoder: Encoder, images: Images, of: Callable[[Sample], Any], batch: int, ranks: RankGroup,
    progress: Callable[[], None] = nothing,
) -> Embedded | None:  # fmt: skip
    """All images, on rank 0; None elsewhere. Collective. ``of``: what else to read of a sample; raises DecodeError.

    ``progress`` is called after every batch. Raises DataError where an image cannot be decoded or has no such thing.
    """
    batches = _batches(images.count, batch)
    told: list[Any] = []
    seen: list[int] = []
    features = [torch.empty(0, encoder.width)]
    for views, ids, more in _together(encoder, images, of, batches, ranks):
        features.append(encoder.image(views, ids)[: len(more)])
        told, seen = told + more, seen + ids.tolist()[: len(more)]
        progress()
    rows = [sum(len(batches[k]) for k in ranks.shard(len(batches), rank)) for rank in range(ranks.size)]
    whole, numbers = ranks.gather(torch.cat(features), rows), ranks.gather(torch.tensor(seen, dtype=torch.int64), rows)
    gathered = ranks.all_gather_object(told)
    if whole is None or numbers is None:
        return None
    return Embedded(whole, [one for part in gathered for one in part], numbers)


def embed_texts(
    encoder: Encoder, texts: Sequence[str], batch: int, ranks: RankGroup, progress: Callable[[], None] = nothing
) -> Tensor | None:
    """(n, E) of all texts, on rank 0; None elsewhere. Collective: all ranks name the same texts."""
    batches = _batches(len(texts), batch)
    ours, features = ranks.shard(len(batches)), [torch.empty(0, encoder.width)]
    for step in range(_most(len(batches), ranks)):
        part = batches[ours[step]] if step < len(ours) else None
        found = encoder.text([texts[i] for i in part] if part else [""])
        features += [found] if part else []
        progress()
    rows = [sum(len(batches[k]) for k in ranks.shard(len(batches), rank)) for rank in range(ranks.size)]
    return ranks.gather(torch.cat(features), rows)


def _batches(count: int, batch: int) -> list[range]:
    return [range(start, min(start + batch, count)) for start in range(0, count, batch)]


def _most(batches: int, ranks: RankGroup) -> int:
    """How many times every rank encodes: as often as the one with most, since encoding is collective under sharding."""
    return max(len(ranks.shard(batches, rank)) for rank in range(ranks.size))


def _together(
    encoder: Encoder, images: Images, of: Callable[[Sample], Any], batches: list[range], ranks: RankGroup
) -> Iterator[tuple[Tensor, Tensor, list[Any]]]:
    """(views, ids, what was read) of this rank's batches; one that has run out gives a grey image and nothing read."""
    parts = ahead(images, [batches[k] for k in ranks.shard(len(batches))], encoder.view, of)
    for _ in range(_most(len(batches), ranks)):
        part = next(parts, None)
        found = part or [Viewed(0, encoder.view(np.full((32, 32, 3), 127, dtype=np.uint8)), None)]
        ids = torch.tensor([one.id for one in found], dtype=torch.int64)
        yield torch.from_numpy(np.stack([one.view for one in found])), ids, [one.more for one in part or ()]
