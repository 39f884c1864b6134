"""One data set, one model: the results, equal on all ranks. The one function of this room that trainers call."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flip.config import schema
from flip.data.chunk_reader import Sample
from flip.data.decode import captions_of, label_of
from flip.data.storage.retry import RetryPolicy
from flip.distributed.collectives import SINGLE_RANK, RankGroup
from flip.evaluation import prompts
from flip.evaluation.cache import FeatureCache
from flip.evaluation.encoders import Encoder
from flip.evaluation.features import Embedded, embed_images, embed_texts, nothing
from flip.evaluation.images import Images, Shards
from flip.evaluation.linear_probe import probe
from flip.evaluation.prompts import Prompts
from flip.evaluation.retrieval import retrieve
from flip.evaluation.zero_shot import class_embeddings, classify


@dataclass(frozen=True)
class DataSet:
    """What is scored: images, and what its task needs beside them."""

    name: str
    task: str
    """zeroshot (needs ``wording``), retrieval (captions with the images), probe (needs ``train``)."""
    images: Images
    wording: Prompts | None = None
    train: Images | None = None
    role: str = "test"

    @classmethod
    def of(cls, item: schema.EvaluationSet, patience: RetryPolicy | None = None) -> DataSet:
        """As a configuration names it. Raises ConfigError, DataError, PermissionDenied."""
        train = Shards(item.train, patience) if item.task == "probe" else None
        wording = prompts.read(item.classes) if item.task == "zeroshot" else None
        return cls(item.name, item.task, Shards(item.manifest, patience), wording, train, item.role)


@dataclass(frozen=True)
class Scorer:
    """How data sets are scored. ``progress`` is called after every batch."""

    encoder: Encoder
    batch: int = 256
    ranks: RankGroup = SINGLE_RANK
    progress: Callable[[], None] = nothing
    cache: FeatureCache | None = None
    device: torch.device | str = "cpu"
    """Where rank 0 fits a probe."""
    cost: float = 0.0
    """Of a probe; 0: chosen on held-out training images."""

    def score(self, data: DataSet) -> list[dict[str, Any]]:
        """Results, one per table column. Collective: all ranks call it, and get the same but for the seconds.

        Each has name, set, task, role, top1, top5 (retrieval: top10 too) with correct1 ..., n, chance, interval,
        predictions (a digest of what was found for each image), data (the digest of the data set), view, precision
        (fp32 or bf16), seconds.
        Raises ConfigError, DataError, StorageError, PermissionDenied, and on all ranks Diverged where features are not
        finite.
        """
        begin = time.perf_counter()
        found = {"zeroshot": self._zeroshot, "retrieval": self._retrieval, "probe": self._probe}[data.task](data)
        encoder = self.encoder
        about = self.ranks.on_rank0(
            lambda: {"data": data.images.digest, "view": encoder.looks, "precision": encoder.precision}
        )
        seconds = time.perf_counter() - begin
        common = {"set": data.name, "task": data.task, "role": data.role, "seconds": seconds, **about}
        return [{"name": data.name + suffix, **one, **common} for suffix, one in found.items()]

    def _zeroshot(self, data: DataSet) -> dict[str, dict[str, Any]]:
        assert data.wording is not None
        classes, found = self._classes(data.wording), self._images(data.images)

        def judge() -> dict[str, Any]:
            assert classes is not None and found is not None
            return classify(found.features, torch.tensor(found.of, dtype=torch.int64), classes, data.name)

        return {"": self.ranks.on_rank0(judge)}

    def _retrieval(self, data: DataSet) -> dict[str, dict[str, Any]]:
        found = embed_images(self.encoder, data.images, _captions, self.batch, self.ranks, self.progress)
        captions = self.ranks.on_rank0(lambda: found.of if found is not None else [])
        texts = [text for one in captions for text in one]
        embedded = embed_texts(self.encoder, texts, self.batch, self.ranks, self.progress)
        owners = torch.tensor([i for i, one in enumerate(captions) for _ in one], dtype=torch.int64)

        def judge() -> dict[str, dict[str, Any]]:
            assert embedded is not None and found is not None
            return retrieve(found.features, embedded, owners, data.name)

        return {f"-{direction}": one for direction, one in self.ranks.on_rank0(judge).items()}

    def _probe(self, data: DataSet) -> dict[str, dict[str, Any]]:
        assert data.train is not None
        train, test = self._images(data.train), self._images(data.images)

        def judge() -> dict[str, Any]:
            assert data.train is not None and train is not None and test is not None
            parts = [(one.features, torch.tensor(one.of, dtype=torch.int64)) for one in (train, test)]
            found = probe(parts[0], parts[1], data.name, self.device, self.cost, self.progress)
            return found | {"train": {"data": data.train.digest, "n": len(train.of)}}

        return {"-probe": self.ranks.on_rank0(judge)}

    def _classes(self, wording: Prompts) -> Tensor | None:
        """(C, E) on rank 0, kept for the next evaluation of this model."""
        cache, held = self.cache, None
        path = cache.path("texts", wording.names, wording.templates, self.batch) if cache else None
        if cache and path and self.ranks.is_rank0:
            held = cache.get(path)
        if self.ranks.on_rank0(lambda: held is not None):
            return held["features"] if held else None
        found = class_embeddings(self.encoder, wording.names, wording.templates, self.batch, self.ranks, self.progress)
        if cache and path and found is not None:
            cache.put(path, {"features": found})
        return found

    def _images(self, images: Images) -> Embedded | None:
        """Features and labels on rank 0, kept for the next evaluation of this model."""
        cache, held = self.cache, None
        path = (
            cache.path("images", images.stamp, self.encoder.looks, self.batch)
            if cache and self.ranks.is_rank0
            else None
        )
        if cache and path:
            held = cache.get(path)
        if self.ranks.on_rank0(lambda: held is not None):
            return Embedded(held["features"], held["labels"].tolist(), held["ids"]) if held else None
        found = embed_images(self.encoder, images, label_of, self.batch, self.ranks, self.progress)
        if cache and path and found is not None:
            labels = torch.tensor(found.of, dtype=torch.int64)
            cache.put(path, {"features": found.features, "labels": labels, "ids": found.ids})
        return found


def _captions(sample: Sample) -> list[str]:
    return captions_of(sample, ["txt"])
