"""Compares the labels of evaluation sets with their class names on the node: before the first step of a run, and before
an evaluation job scores its first set.

Plans and `flip evaluate` compare the counts of the manifest. The ranks of a job read the labels of a set whose manifest
has no counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from flip.config.schema import EvaluationSet
from flip.data.manifest.labels import MEMBER, REMEDY, LabelCounts
from flip.data.storage.retry import DEFAULT_POLICY, RetryPolicy
from flip.distributed.collectives import SINGLE_RANK, RankGroup, all_gather_json, run_on_all
from flip.evaluation.datasets.catalog import ResolvedDataset
from flip.evaluation.datasets.image_sources import Images, Shards
from flip.evaluation.datasets.prompts import read_prompts
from flip.evaluation.encoding.features import no_op
from flip.runs.errors import DataError

BATCH = 256
"""Samples that a rank reads at a time."""


def check_labels(
    sets: Sequence[EvaluationSet],
    ranks: RankGroup = SINGLE_RANK,
    retry_policy: RetryPolicy = DEFAULT_POLICY,
    progress: Callable[[], None] = no_op,
) -> None:
    """Check that every label of a run's zero-shot sets has a class name. Collective.

    ``progress`` is called after every batch. All ranks raise ConfigError, DataError, StorageError or PermissionDenied.
    """
    for item in sets:
        if item.task == "zeroshot":
            read = partial(_labelled, item, retry_policy)
            _check(_SetLabels(read, item.manifest, item.classes, ranks, progress), ranks)


def check_resolved_labels(
    datasets: Sequence[ResolvedDataset],
    ranks: RankGroup = SINGLE_RANK,
    retry_policy: RetryPolicy = DEFAULT_POLICY,
    progress: Callable[[], None] = no_op,
) -> None:
    """``check_labels`` for the data sets of an evaluation job."""
    for dataset in datasets:
        if dataset.prompts is not None:
            read = partial(_resolved, dataset, retry_policy)
            _check(_SetLabels(read, dataset.location.where, dataset.name, ranks, progress), ranks)


def _labelled(item: EvaluationSet, retry_policy: RetryPolicy) -> tuple[Images, int]:
    return Shards(item.manifest, retry_policy), len(read_prompts(item.classes).names)


def _resolved(dataset: ResolvedDataset, retry_policy: RetryPolicy) -> tuple[Images, int]:
    assert dataset.prompts is not None
    return dataset.location.open(retry_policy), len(dataset.prompts.names)


def _check(labels: _SetLabels, ranks: RankGroup) -> None:
    failure = run_on_all(labels.read, ranks.group)
    if failure is not None:
        raise failure.error_class(failure.text)
    labels.compare()


class _SetLabels:
    """The labels of one set, of which each rank reads a share.

    Args:
        opened: returns the images and the number of class names.
        where: the location of the images, for errors.
        names: what names the classes, for errors.
    """

    def __init__(
        self,
        opened: Callable[[], tuple[Images, int]],
        where: str,
        names: str,
        ranks: RankGroup,
        progress: Callable[[], None],
    ) -> None:
        self._opened = opened
        self._where = where
        self._names = names
        self._ranks = ranks
        self._progress = progress
        self._classes = 0
        self._samples = 0
        self._counts = LabelCounts()
        """Of all samples if they are known without reading, else of this rank's share."""
        self._counted = False
        """Whether the counts are known without reading samples."""

    def read(self) -> None:
        """Read class names and manifest, and this rank's labels if the manifest has no counts."""
        images, self._classes = self._opened()
        self._samples = images.count
        counts = _known_counts(images)
        self._counted = counts.known
        if self._counted:
            self._counts = counts
            return
        batches = [range(start, min(start + BATCH, images.count)) for start in range(0, images.count, BATCH)]
        for number in self._ranks.shard(len(batches)):
            for _, sample in images.samples(batches[number]):
                if MEMBER in sample:
                    self._counts.count(bytes(sample[MEMBER]))
            self._progress()

    def compare(self) -> None:
        """Raise DataError if labels of all ranks do not fit the class names. Collective."""
        total = self._counts
        if not self._counted:
            total = LabelCounts()
            for part in all_gather_json(self._counts.json(), self._ranks.group):
                total.add(LabelCounts.of_json(part))
        defect = ""
        if total.known:
            defect = total.defect(self._samples, self._classes)
        if defect:
            raise DataError(f"{defect} ({self._names})", self._where, remedy=REMEDY)


def _known_counts(images: Images) -> LabelCounts:
    """The counts of a manifest, or of a list of files with their labels."""
    if isinstance(images, Shards):
        return LabelCounts.of_manifest(images.manifest)
    counts = LabelCounts()
    for file in images.files:
        if file.label is not None:
            counts.count(str(file.label).encode())
    return counts
