"""The prediction for each image of a zero-shot set, and its file ``<name>.predictions.jsonl``. No torch.

The first line of the file describes it: ``set`` (name of the result), ``predictions`` (the digest in the result, by
which the two are matched), ``where`` (the manifest, or the folder of the images) and ``names`` (of the classes). Each
further line is one image, in the order of the data set: ``image`` (its id in the manifest, or its path below
``where``), ``label``, and the ``classes`` that are nearest with their ``scores`` (cosine similarities), best first.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flip.evaluation.metrics.result_files import folder_of
from flip.files.creation import read_regular, run_folder
from flip.runs import records
from flip.runs.rundir import RunDir, write_text

TOP = 5
"""Classes per image."""
MAX_IMAGES = 100_000
"""Images of larger sets are left out; 50,000 images take 5 MB."""
LIMIT = 64 << 20
"""Largest file that is read, bytes."""

_ABOUT = {
    "predictions": records.EXACT.needed(), "where": records.PATH.needed(), "names": [records.TEXT],
}  # fmt: skip
_IMAGE: dict[str, Any] = {"label": records.COUNT.needed(), "classes": [records.COUNT], "scores": [records.NUMBER]}


@dataclass(frozen=True)
class Predictions:
    """Predictions for N images, the best k classes each."""

    digest: str
    where: str
    names: Sequence[str]
    images: Sequence[int | str]
    """(N,): ids in the manifest ``where``, or paths below the folder ``where``."""
    labels: NDArray[np.int64]
    """(N,)"""
    classes: NDArray[np.int64]
    """(N, k), best first."""
    scores: NDArray[np.floating[Any]]
    """(N, k)"""

    def write(self, path: Path) -> None:
        """Write the file atomically; its folder is created. Raises OSError."""
        header = {"set": path.name.partition(".predictions.")[0], "predictions": self.digest, "where": self.where}
        lines: list[dict[str, Any]] = [header | {"names": list(self.names)}]
        columns = (
            self.images,
            self.labels.tolist(),
            self.classes.tolist(),
            self.scores.astype(np.float64).round(4).tolist(),
        )
        for row in list(zip(*columns, strict=True))[:MAX_IMAGES]:
            lines.append(dict(zip(("image", "label", "classes", "scores"), row, strict=True)))
        run_folder(path.parent)
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def path_of(run: RunDir, stage: str, samples_seen: int, name: str) -> Path:
    """The file of the result ``name`` at S = ``samples_seen`` of a stage."""
    return folder_of(run, stage, samples_seen) / f"{name}.predictions.jsonl"


def read(path: Path) -> Predictions:
    """Raises OSError if the file is absent or unreadable, ValueError with its path if it is invalid."""
    try:
        first, *rest = read_regular(path, LIMIT).splitlines()
        header = records.checked(records.parse(first), _ABOUT)
        rows = [records.checked(records.parse(line), _IMAGE) for line in rest[:MAX_IMAGES]]
        images = [
            records.checked(row["image"], records.COUNT if type(row["image"]) is int else records.PATH) for row in rows
        ]
        labels, classes = (np.array([row[key] for row in rows], np.int64) for key in ("label", "classes"))
        scores = np.array([row["scores"] for row in rows], np.float64)
        if (
            classes.ndim != 2
            or classes.shape != scores.shape
            or max(labels.max(), classes.max()) >= len(header["names"])
        ):
            raise ValueError("classes, scores and names do not fit together")
    except (ValueError, KeyError, OverflowError) as error:
        raise ValueError(f"{path}: invalid predictions: {error}") from error
    return Predictions(header["predictions"], header["where"], header["names"], images, labels, classes, scores)
