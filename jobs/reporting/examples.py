"""Test pictures with their nearest captions, and the classes that the best run confuses."""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flip.data.chunk_reader import ChunkReader
from flip.data.decode import DecodeError, encoded_image, open_image, to_rgb
from flip.data.manifest.manifest import Manifest
from flip.data.manifest.tar import SAMPLE_LIMIT
from flip.data.storage.base import is_remote
from flip.evaluation import predictions
from flip.evaluation.predictions import Predictions
from flip.monitoring.results import Outcome
from flip.runs.errors import FlipError
from flip.runs.ownership import is_mine, read_regular
from jobs.common.text import percent
from jobs.reporting import seed_groups
from jobs.reporting.document import Block, Picture, Pictures, Table, Text, heading
from jobs.reporting.seed_groups import SeedGroup

PICTURES, CAPTIONS, CLASSES = 8, 3, 8
"""Test pictures in a report, captions of each, and classes in the table."""
SIDE = 128
"""Longer side of an embedded picture, pixels."""


def examples(grouped: Sequence[SeedGroup], outcomes: Sequence[Outcome], pictures: int = PICTURES) -> list[Block]:
    """Pictures and worst classes of the best complete run with predictions, on the first set that has any."""
    for name in seed_groups.sets(outcomes):
        scored = [(score.mean, arm) for arm in grouped if (score := arm.score(name)) is not None]
        for _, arm in sorted(scored, key=lambda item: -item[0]):
            for outcome in arm.complete:
                item = next(({**outcome.result, **item} for item in outcome.evaluations if item["name"] == name), {})
                path = predictions.path_of(outcome.run, str(item.get("stage")), item.get("samples", 0), name)
                if os.path.isfile(path) and item.get("predictions"):
                    return _sections(outcome, item, path, pictures)
    return []


def _sections(outcome: Outcome, item: dict[str, Any], path: Path, pictures: int) -> list[Block]:
    try:
        predicted = predictions.read(path)
    except (OSError, ValueError) as error:
        return [Text(f"Predictions cannot be read: {error}", tone="trouble")]
    if predicted.digest != item["predictions"]:  # of an older evaluation
        return []
    return [*_pictures(outcome, item, predicted, pictures), *_worst_classes(outcome, item, predicted)]


def _pictures(outcome: Outcome, item: dict[str, Any], predicted: Predictions, most: int) -> list[Block]:
    """Pictures chosen by a hash of their names: neither the best nor the worst, and the same in every report."""
    hashes = [hashlib.sha256(str(image).encode("utf-8", "replace")).digest() for image in predicted.images]
    items, problem = [], "" if is_mine(outcome.run.path) else "the run belongs to another user"
    for i in sorted(range(len(hashes)), key=hashes.__getitem__)[:most]:
        jpeg = b""
        if not problem:
            try:
                jpeg = thumbnail(predicted.where, predicted.images[i], item.get("data"))
            except (FlipError, DecodeError, OSError, ValueError, IndexError) as error:
                problem = str(error)
        nearest = zip(predicted.classes[i, :CAPTIONS], predicted.scores[i], strict=False)
        captions = [(predicted.names[c], float(score)) for c, score in nearest]
        name = f"picture {predicted.images[i]}"
        items.append(Picture(name, predicted.names[predicted.labels[i]], captions, jpeg))
    if not items:
        return []
    words = f"{outcome.run.name} on {item['name']}: pictures chosen by a hash of their names, each with its {CAPTIONS}"
    words += " nearest captions and their cosine similarities; the right one is bold."
    words += f" Not shown: {problem}." if problem else ""
    return [heading("Test pictures"), Text(words, tone="quiet"), Pictures(items)]


def thumbnail(where: str, image: int | str, digest: str | None) -> bytes:
    """A small JPEG of an image of the manifest, or below the folder, ``where``; only local files are read.

    ``digest``: of the manifest that was scored. Raises DataError or another FlipError, DecodeError, OSError, ValueError
    or IndexError.
    """
    if is_remote(where) or (isinstance(image, str) and (os.path.isabs(image) or ".." in Path(image).parts)):
        raise ValueError("the images are not below a local folder")
    if isinstance(image, str):
        data: bytes | memoryview = read_regular(os.path.join(where, image), SAMPLE_LIMIT)
    else:
        manifest = Manifest.load(where, check=False)
        number, index = divmod(image, manifest.chunk)
        if manifest.digest != digest or not 0 <= image < manifest.samples:
            raise ValueError("the data set has changed since it was scored")
        if not all(os.path.isfile(shard) for shard, *_ in manifest.chunk_reads(number)):
            raise ValueError("the shards are not local files")
        data = encoded_image(ChunkReader().read_chunk(manifest, number)[index])
    picture, out = to_rgb(open_image(data)), io.BytesIO()
    picture.thumbnail((SIDE, SIDE))
    picture.save(out, "JPEG", quality=85)
    return out.getvalue()


def _worst_classes(outcome: Outcome, item: dict[str, Any], predicted: Predictions) -> list[Block]:
    """The classes with the lowest accuracy; of equal ones those that fewer images have among the best five, and then
    those with the highest wrong scores."""
    labels, first = predicted.labels, predicted.classes[:, 0]
    count = partial(np.bincount, minlength=len(predicted.names))
    images, right = count(labels), count(labels[first == labels])
    near = count(labels[(predicted.classes == labels[:, None]).any(axis=1)])
    score = count(labels, weights=predicted.scores[:, 0])
    some = np.flatnonzero(images > right)
    keys = (part[some] / images[some] for part in (-score, near, right))
    rows = []
    for c in some[np.lexsort(tuple(keys))][:CLASSES].tolist():
        taken = Counter(first[(labels == c) & (first != c)].tolist()).most_common(CAPTIONS)
        rows.append({
            "class": predicted.names[c], "images": str(images[c]), "right, %": percent(right[c] / images[c]),
            "among the best five, %": percent(near[c] / images[c]),
            "taken for": ", ".join(f"{predicted.names[other]} ({n})" for other, n in taken),
        })  # fmt: skip
    if not rows:
        return []
    words = f"{outcome.run.name} on {item['name']}; taken for: the most frequent wrong answers, with their numbers."
    return [heading("Worst classes"), Table(rows, long=["taken for"]), Text(words, tone="quiet")]
