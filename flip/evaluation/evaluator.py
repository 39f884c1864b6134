"""Evaluates a model on a data set; the results are equal on all ranks. Training and evaluation jobs call it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flip.data.chunk_reader import Sample
from flip.data.decode import DecodeError
from flip.data.sample_members import captions_of, label_of
from flip.data.storage.retry import DEFAULT_POLICY, RetryPolicy
from flip.distributed.collectives import SINGLE_RANK, RankGroup
from flip.evaluation.datasets import associations
from flip.evaluation.datasets.catalog import ResolvedDataset
from flip.evaluation.datasets.image_sources import Images
from flip.evaluation.datasets.prompts import Prompts
from flip.evaluation.encoding.encoders import Encoder
from flip.evaluation.encoding.features import FeatureCache, Features, embed_images, embed_texts, no_op
from flip.evaluation.metrics.measures import METRICS, Answers, check_finite, label_and_group
from flip.evaluation.metrics.predictions import TOP, Predictions
from flip.evaluation.tasks import association
from flip.evaluation.tasks.linear_probe import probe
from flip.evaluation.tasks.retrieval import retrieve
from flip.evaluation.tasks.zero_shot import class_embeddings, classify, nearest_classes


@dataclass(frozen=True)
class Evaluator:
    """Settings of an evaluation. ``progress`` is called after every batch, and on rank 0 while it fits a probe."""

    encoder: Encoder
    batch: int = 256
    ranks: RankGroup = SINGLE_RANK
    progress: Callable[[], None] = no_op
    cache: FeatureCache | None = None
    device: torch.device | str = "cpu"
    """The device on which rank 0 fits a probe."""
    C: float = 0.0
    """Inverse regularisation of a probe; 0: chosen on held-out training images."""
    predictions: dict[str, Predictions] = field(default_factory=dict)
    """On rank 0, filled by ``score``: the predictions of zero-shot results, by name."""
    retry_policy: RetryPolicy = DEFAULT_POLICY
    """How long storage is waited for."""
    stop_if_requested: Callable[[], None] = no_op
    """Called on all ranks after every batch; it may be collective, and raise on all of them."""
    counted: Callable[[int, int], None] = no_op
    """Called after every batch with the images or texts that are encoded, and their number."""

    def score(self, data: ResolvedDataset, role: str = "test") -> list[dict[str, Any]]:
        """Results, one per table column, with ``role``. Collective: all ranks get the same results but for the seconds.

        Each has name, set, task, role, metric and score for sets whose published score is no accuracy, top1, top5
        (retrieval: top10 too) with correct1 ..., n, chance, interval, predictions (a digest of the answer for each
        image), data (the digest of the data set), view, precision (fp32 or bf16), seconds.
        Raises ConfigError, DataError, StorageError, PermissionDenied, and Diverged if features are not finite.
        """
        images = data.location.open(self.retry_policy)
        start_time = time.perf_counter()
        tasks = {
            "zeroshot": self._zeroshot, "retrieval": self._retrieval, "probe": self._probe,
            "association": self._association,
        }  # fmt: skip
        results = tasks[data.task](data, images)
        encoder = self.encoder
        view = {"view": encoder.view_id, "precision": encoder.precision}
        origin = self.ranks.on_rank0(lambda: {"data": images.digest, **view})
        seconds = time.perf_counter() - start_time
        common = {"set": data.name, "task": data.task, "role": role, "seconds": seconds, **origin}
        scores = [{"name": data.name + suffix, **result, **common} for suffix, result in results.items()]
        for score in scores:
            if notes := [note for note in (data.note, score.get("note")) if note]:
                score["note"] = "; ".join(notes)
        return scores

    def _after_batch(self, done: int, total: int) -> None:
        self.progress()
        self.counted(done, total)
        self.stop_if_requested()

    def _zeroshot(self, data: ResolvedDataset, images: Images) -> dict[str, dict[str, Any]]:
        assert data.prompts is not None
        classes = self._classes(data.prompts)
        embedded = self._images(images, data.group)

        def result() -> dict[str, Any]:
            assert classes is not None and embedded is not None and data.prompts is not None
            columns = torch.tensor(embedded.labels, dtype=torch.int64).view(embedded.ids.shape[0], -1)
            labels = columns[:, 0]
            scores = classify(embedded.features, labels, classes, data.name)
            nearest = [part.numpy() for part in nearest_classes(embedded.features, classes, TOP)]
            if data.metric:
                groups = None
                if data.group is not None:
                    groups = columns[:, 1].numpy()
                answers = Answers(labels.numpy(), nearest[0], groups)
                scores |= {"metric": data.metric, "score": METRICS[data.metric](answers)}
            subject = scores["predictions"], images.root, data.prompts.names, images.names(embedded.ids.tolist())
            self.predictions[data.name] = Predictions(*subject, labels.numpy(), *nearest)
            return scores

        return {"": self.ranks.on_rank0(result)}

    def _retrieval(self, data: ResolvedDataset, images: Images) -> dict[str, dict[str, Any]]:
        of_images = embed_images(self.encoder, images, _captions, self.batch, self.ranks, self._after_batch)
        captions = self.ranks.on_rank0(lambda: of_images.labels if of_images is not None else [])
        texts = [text for of_image in captions for text in of_image]
        embedded = embed_texts(self.encoder, texts, self.batch, self.ranks, self._after_batch)
        owners = torch.tensor([i for i, of_image in enumerate(captions) for _ in of_image], dtype=torch.int64)

        def result() -> dict[str, dict[str, Any]]:
            assert embedded is not None and of_images is not None
            return retrieve(of_images.features, embedded, owners, data.name)

        return {f"-{direction}": scores for direction, scores in self.ranks.on_rank0(result).items()}

    def _probe(self, data: ResolvedDataset, images: Images) -> dict[str, dict[str, Any]]:
        assert data.train is not None
        train_images = data.train.open(self.retry_policy)
        train = self._images(train_images)
        test = self._images(images)

        def result() -> dict[str, Any]:
            assert train is not None and test is not None
            splits = [(split.features, torch.tensor(split.labels, dtype=torch.int64)) for split in (train, test)]
            scores = probe(splits[0], splits[1], data.name, self.device, self.C, self.progress)
            return scores | {"train": {"data": train_images.digest, "n": len(train.labels)}}

        return {"-probe": self.ranks.on_rank0(result)}

    def _association(self, data: ResolvedDataset, images: Images) -> dict[str, dict[str, Any]]:
        _, instances = associations.read(images.where)
        embedded = self._images(images)
        texts = [association.prompt(instance.cue) for instance in instances]
        cues = embed_texts(self.encoder, texts, self.batch, self.ranks, self._after_batch)

        def result() -> dict[str, Any]:
            assert embedded is not None and cues is not None
            check_finite(embedded.features, data.name)
            scores = association.score(instances, embedded.features, cues)
            summary = {"metric": "jaccard", "score": scores["top1"], "images": len(embedded.labels), "chance": 0.0}
            return scores | summary

        return {"": self.ranks.on_rank0(result)}

    def _classes(self, prompts: Prompts) -> Tensor | None:
        """(C, E) on rank 0, cached."""

        def compute() -> dict[str, Tensor] | None:
            names = prompts.names
            templates = prompts.templates
            classes = class_embeddings(self.encoder, names, templates, self.batch, self.ranks, self._after_batch)
            if classes is None:
                return None
            return {"features": classes}

        tensors = self._cached(compute, "texts", lambda: (prompts.names, prompts.templates, self.batch))
        if tensors:
            return tensors["features"]
        return None

    def _images(self, images: Images, group: int | None = None) -> Features | None:
        """Features and labels on rank 0, cached. ``group``: each label is [label, group of this column]."""
        own = () if group is None else (group,)
        read: Callable[..., int | list[int]] = label_of
        if group is not None:
            read = partial(label_and_group, group)

        def compute() -> dict[str, Tensor] | None:
            computed = embed_images(self.encoder, images, read, self.batch, self.ranks, self._after_batch)
            if computed is None:
                return None
            labels = torch.tensor(computed.labels, dtype=torch.int64)
            return {"features": computed.features, "labels": labels, "ids": computed.ids}

        tensors = self._cached(compute, "images", lambda: (images.cache_key, self.encoder.view_id, self.batch, *own))
        if tensors:
            return Features(tensors["features"], tensors["labels"].tolist(), tensors["ids"])
        return None

    def _cached(
        self, compute: Callable[[], dict[str, Tensor] | None], kind: str, key: Callable[[], tuple[Any, ...]]
    ) -> dict[str, Tensor] | None:
        """The tensors, cached or computed, on rank 0; None on others. ``compute`` is collective."""
        path = None
        if self.cache and self.ranks.is_rank0:
            path = self.cache.path(kind, *key())
        tensors = None
        if self.cache and path:
            tensors = self.cache.get(path)
        if self.ranks.on_rank0(lambda: tensors is not None):
            return tensors
        tensors = compute()
        if self.cache and path and tensors is not None:
            self.cache.put(path, tensors)
        return tensors


def _captions(sample: Sample) -> list[str]:
    """Raises DecodeError if there is none: training reads an empty text, which would be a wrong query here."""
    captions = captions_of(sample, ["txt"])
    if captions == [""]:
        raise DecodeError("its captions are empty")
    return captions
