"""Compares the labels of evaluation sets with their class names on the node, before the first step of a run.

Plans compare the counts of the manifest. The ranks of a job read the labels of a set whose manifest has no counts.
"""

from collections.abc import Callable, Sequence

from flip.config.schema import EvaluationSet
from flip.data.manifest.labels import MEMBER, REMEDY, LabelCounts
from flip.data.storage.retry import RetryPolicy
from flip.distributed.collectives import SINGLE_RANK, RankGroup, all_gather_json, run_on_all
from flip.evaluation.features import no_op
from flip.evaluation.images import Shards
from flip.evaluation.prompts import read_prompts
from flip.runs.errors import DataError

BATCH = 256
"""Samples that a rank reads at a time."""


def check_labels(
    sets: Sequence[EvaluationSet],
    ranks: RankGroup = SINGLE_RANK,
    retry_policy: RetryPolicy | None = None,
    progress: Callable[[], None] = no_op,
) -> None:
    """Check that every label of zero-shot sets has a class name. Collective.

    ``progress`` is called after every batch. All ranks raise ConfigError, DataError, StorageError or PermissionDenied.
    """
    for item in sets:
        if item.task == "zeroshot":
            labels = _SetLabels(item, ranks, retry_policy, progress)
            failure = run_on_all(labels.read, ranks.group)
            if failure is not None:
                raise failure.error_class(failure.text)
            labels.compare()


class _SetLabels:
    """The labels of one set, of which each rank reads a share."""

    def __init__(
        self, item: EvaluationSet, ranks: RankGroup, retry_policy: RetryPolicy | None, progress: Callable[[], None]
    ) -> None:
        self._item, self._ranks, self._retry_policy, self._progress = item, ranks, retry_policy, progress
        self._classes = 0
        self._samples = 0
        self._counts = LabelCounts()
        """Of all samples if the manifest has counts, else of this rank's share."""
        self._counted = False
        """Whether the manifest has counts."""

    def read(self) -> None:
        """Read class names and manifest, and this rank's labels if the manifest has no counts."""
        self._classes = len(read_prompts(self._item.classes).names)
        images = Shards(self._item.manifest, self._retry_policy)
        self._samples = images.count
        counts = LabelCounts.of_manifest(images.manifest)
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
        defect = total.defect(self._samples, self._classes) if total.known else ""
        if defect:
            raise DataError(f"{defect} ({self._item.classes})", self._item.manifest, remedy=REMEDY)
