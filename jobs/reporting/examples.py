"""Test images with their nearest captions, and the classes that the best run confuses."""

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
from flip.data.decode import DecodeError, open_image, to_rgb
from flip.data.manifest.manifest import Manifest
from flip.data.manifest.tar import SAMPLE_LIMIT
from flip.data.sample_members import encoded_image, file_name
from flip.data.storage.base import is_remote
from flip.evaluation.metrics import predictions
from flip.evaluation.metrics.predictions import Predictions
from flip.files.creation import read_regular
from flip.files.ownership import is_mine
from flip.monitoring.results import Outcome
from flip.runs.errors import FlipError
from jobs.common.text import percent, plain
from jobs.pages.document import Block, CaptionedImage, CaptionedImages, Table, Text, heading
from jobs.reporting import seed_groups
from jobs.reporting.seed_groups import SeedGroup

IMAGES = 24
CAPTIONS = 3
CLASSES = 8
ANSWERS = 3
"""Test images in a report, captions of each, classes in the table, and wrong answers of each."""
LEAST_IMAGES = 3
"""Images of a class in the table: the accuracy of fewer says little about the class."""
SIDE = 128
"""Longer side of an embedded image, pixels."""


def examples(grouped: Sequence[SeedGroup], outcomes: Sequence[Outcome], images: int = IMAGES) -> list[Block]:
    """Images and worst classes of the best complete run with predictions, on the first set that has any."""
    for name in seed_groups.sets(outcomes):
        scored = [(score.mean, group) for group in grouped if (score := group.score(name)) is not None]
        for _, group in sorted(scored, key=lambda item: -item[0]):
            for outcome in group.complete:
                try:
                    item, predicted = read_predictions(outcome, name)
                except (OSError, ValueError) as error:
                    return [Text(f"Predictions cannot be read: {error}", tone="trouble")]
                if predicted:
                    return _sections(outcome, item, predicted, images)
    return []


def read_predictions(outcome: Outcome, name: str) -> tuple[dict[str, Any], Predictions | None]:
    """The final result on a set ({}: none), and its predictions if they are stored. Raises OSError, ValueError."""
    item = next(({**outcome.result, **item} for item in outcome.evaluations if item["name"] == name), {})
    path = predictions.path_of(outcome.run, str(item.get("stage")), item.get("samples", 0), name)
    predicted = None
    if item.get("predictions") and os.path.isfile(path):
        predicted = predictions.read(path)
    return item, predicted if predicted and predicted.digest == item["predictions"] else None  # else of an older one


def _sections(outcome: Outcome, item: dict[str, Any], predicted: Predictions, images: int) -> list[Block]:
    items, problem = choose_images(outcome, item, predicted, images, CAPTIONS)
    right, among_five = (percent(item[key]) for key in ("top1", "top5"))
    note = f"{outcome.run.name} on {item['name']}: images chosen by a hash of their names, each with its {CAPTIONS}"
    note += f" nearest captions and their cosine similarities; the right one is bold. Of all {len(predicted.images):,}"
    note += f" images {right} % are right, and {among_five} % have the right caption among the nearest five."
    if problem:
        note += f" Not shown: {problem}."
    shown: list[Block] = []
    if items:
        shown = [heading("Test images"), Text(note, tone="quiet"), CaptionedImages(items)]
    return [*shown, *_worst_classes(outcome, item, predicted)]


def choose_images(
    outcome: Outcome, item: dict[str, Any], predicted: Predictions, most: int, captions: int
) -> tuple[list[CaptionedImage], str]:
    """Images chosen by a hash of their names: neither the best nor the worst, and the same in every report.

    Also returns why they cannot be shown, if they cannot.
    """
    hashes = [hashlib.sha256(str(image).encode("utf-8", "replace")).digest() for image in predicted.images]
    items = []
    problem = ""
    if not is_mine(outcome.run.path):
        problem = "the run belongs to another user"
    for i in sorted(range(len(hashes)), key=hashes.__getitem__)[:most]:
        jpeg = b""
        title = f"image {predicted.images[i]}"
        if not problem:
            try:
                jpeg, name = thumbnail(predicted.where, predicted.images[i], item.get("data"))
                if name:
                    title += f" ({plain(name)})"
            except (FlipError, DecodeError, OSError, ValueError, IndexError) as error:
                problem = str(error)
        nearest = zip(predicted.classes[i, :captions], predicted.scores[i], strict=False)
        named = [(predicted.names[c], float(score)) for c, score in nearest]
        items.append(CaptionedImage(title, predicted.names[predicted.labels[i]], named, jpeg))
    return items, problem


def thumbnail(where: str, image: int | str, digest: str | None) -> tuple[bytes, str]:
    """A small JPEG of an image of the manifest, or below the folder, ``where``; only local files are read.

    Also returns the name of the image in the source that ``shards make`` packed; empty if that is unknown.
    ``digest``: of the manifest that was scored. Raises DataError or another FlipError, DecodeError, OSError, ValueError
    or IndexError.
    """
    if is_remote(where) or (isinstance(image, str) and (os.path.isabs(image) or ".." in Path(image).parts)):
        raise ValueError("the images are not below a local folder")
    name = ""
    if isinstance(image, str):
        data: bytes | memoryview = read_regular(os.path.join(where, image), SAMPLE_LIMIT)
    else:
        manifest = Manifest.load(where, check=False)
        number, index = divmod(image, manifest.chunk)
        if manifest.digest != digest or not 0 <= image < manifest.samples:
            raise ValueError("the data set has changed since it was scored")
        if not all(os.path.isfile(shard) for shard, *_ in manifest.chunk_reads(number)):
            raise ValueError("the shards are not local files")
        sample = ChunkReader().read_chunk(manifest, number)[index]
        data = encoded_image(sample)
        name = file_name(sample)
    pil_image = to_rgb(open_image(data))
    out = io.BytesIO()
    pil_image.thumbnail((SIDE, SIDE))
    pil_image.save(out, "JPEG", quality=85)
    return out.getvalue(), name


def _worst_classes(outcome: Outcome, item: dict[str, Any], predicted: Predictions) -> list[Block]:
    """The classes with the lowest accuracy; of equal ones those that fewer images have among the best five, and then
    those with the highest wrong scores."""
    labels = predicted.labels
    first = predicted.classes[:, 0]
    count = partial(np.bincount, minlength=len(predicted.names))
    images = count(labels)
    right = count(labels[first == labels])
    near = count(labels[(predicted.classes == labels[:, None]).any(axis=1)])
    score = count(labels, weights=predicted.scores[:, 0])
    some = np.flatnonzero((images > right) & (images >= LEAST_IMAGES))
    keys = (part[some] / images[some] for part in (-score, near, right))
    rows = []
    for c in some[np.lexsort(tuple(keys))][:CLASSES].tolist():
        taken = Counter(first[(labels == c) & (first != c)].tolist()).most_common(ANSWERS)
        rows.append({
            "class": predicted.names[c], "images": str(images[c]), "right, %": percent(right[c] / images[c]),
            "among the best five, %": percent(near[c] / images[c]),
            "taken for": ", ".join(f"{predicted.names[other]} ({n})" for other, n in taken),
        })  # fmt: skip
    if not rows:
        return []
    note = f"{outcome.run.name} on {item['name']}; taken for: the most frequent wrong answers, with their numbers."
    return [heading("Worst classes"), Table(rows, long=["taken for"]), Text(note, tone="quiet")]
