"""The baselines without a model, at 16 x 16 pixels: a test picture gets the class of the nearest training picture, or
that of a linear classifier on random features (`PROBE`).

``python -m lab.study --baseline`` computes them for each training set and each zero-shot set of a study and writes
docs/NAME/baseline.json. A training picture has a class if one of its captions is a prompt of that class; pictures
without a class of the set are left out, as a model chooses among the classes of the set, too.

The file also has, for each set, the share of test pictures with a near-duplicate in training: the check of the icons
(docs/icons.md), which compares grey shapes without margins, at its limit and at twice the limit.
"""

from __future__ import annotations

import io
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flip.files.creation import output_folder
from flip.runs.errors import ConfigError
from flip.runs.rundir import read_json, sorted_glob, write_json
from lab.icons import drawings
from lab.studies.engine.answers import pack
from lab.studies.engine.study import Study

Array = NDArray[np.float32]

SIDE = 16
NEAR = 0.1
"""Root mean square difference of shapes below which two pictures are near-duplicates, as in docs/icons.md."""
BLOCK = 4096
FILE = "baseline.json"
REMEDY = "Make it: flip demo_data, or python -m lab.icons."
PROBE = "probe"
"""The method of a row of the classifier. Rows of the nearest picture have none, as in older files."""
FEATURES = 2048
RIDGE = 10.0
"""Of the probe: positive parts of random projections of the pixels, and the penalty of the squared weights."""
WHAT = (
    "top-1 of the class of the nearest training picture at 16 x 16 pixels, by the root mean square difference; colour:"
    " of the RGB pictures; shape: of the grey pictures without margins, the darkest part black; near, near_2x: share of"
    " test pictures with a near-duplicate in training, at the limit of docs/icons.md and at twice the limit; probe:"
    f" instead, ridge regression ({RIDGE:g}) of the classes on {FEATURES} random features, positive parts of random"
    " projections of the pixels"
)
BY = ("colour", "shape")


@dataclass(frozen=True)
class Reduced:
    """(N, 16 * 16 * 3) thumbnails, 0..1; (N, 256) shapes, 0..1; captions or, of test sets, the label of each; keys."""

    thumbnails: Array
    shapes: Array
    captions: Sequence[Sequence[str]]
    labels: NDArray[np.int64]
    keys: Sequence[str]


def write(study: Study, docs: Path, cache: Path) -> Path:
    """Compute the baseline of all training sets of a study on all of its test sets; returns the file.

    It is written after each training set, with the former rows of the sets that follow. Raises ConfigError if a data
    set is absent.
    """
    tests = study.test_sets()
    shown = {test.name: read(cache / test.folder) for test in tests}
    path = docs / study.name / FILE
    rows = []
    trained = study.training_sets()
    left = [row for row in (read_json(path) or {}).get("sets", ()) if row["train"] in trained]
    for name, folder in trained.items():
        learned = read(cache / folder)
        fitted: dict[tuple[bytes, str], PixelProbe] = {}
        for test in tests:
            classes = read_json(cache / test.classes)
            if classes is None:
                raise ConfigError("the class names are absent", str(cache / test.classes), remedy=REMEDY)
            known = labels(learned, classes)
            distances = near(learned, shown[test.name])
            for by in BY:
                row = {"train": name, "set": test.name, "by": by}
                rows.append(row | score(learned, known, shown[test.name], by) | distances)
                same = known.tobytes(), by
                if same not in fitted:  # several test sets may have the same classes
                    fitted[same] = fit(learned, known, by)
                rows.append(row | {"method": PROBE} | probe(fitted[same], shown[test.name], by) | distances)
        left = [row for row in left if row["train"] != name]
        output_folder(path.parent)
        moment = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
        write_json(path, {"what": WHAT, "sets": [*rows, *left], "time": moment})
    return path


def read(folder: Path) -> Reduced:
    """The pictures of a data set of `flip demo_data`. Raises ConfigError if it is absent."""
    thumbnails = []
    shapes = []
    captions = []
    labels = []
    keys = []
    for key, files in _samples(folder):
        thumbnail, shape = _reduced(files["png"])
        thumbnails.append(thumbnail)
        shapes.append(shape)
        captions.append(files["txt"].decode("utf-8").splitlines())
        labels.append(int(files.get("cls", b"-1")))
        keys.append(key)
    if not keys:
        raise ConfigError("the data set is absent", str(folder), remedy=REMEDY)
    return Reduced(np.stack(thumbnails), np.stack(shapes), captions, np.array(labels), keys)


def nearest(a: Array, b: Array) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For each row of ``a`` the index of the nearest row of ``b``, the first of equals, and their distance."""
    best = np.full(len(a), np.inf)
    index = np.zeros(len(a), np.int64)
    squares = (a.astype(np.float64) ** 2).sum(1)
    for start in range(0, len(b), BLOCK):
        part = b[start : start + BLOCK]
        distances = squares[:, None] + (part.astype(np.float64) ** 2).sum(1) - 2 * (a @ part.T).astype(np.float64)
        here = distances.argmin(1)
        value = distances[np.arange(len(a)), here]
        closer = value < best
        index[closer] = start + here[closer]
        best[closer] = value[closer]
    return index, np.sqrt(np.maximum(best, 0) / a.shape[1])


def labels(learned: Reduced, classes: Mapping[str, Any]) -> NDArray[np.int64]:
    """(N,) the class of each training picture, by a caption that is a prompt of the class; -1: none."""
    prompts = {t.format(name): i for i, name in enumerate(classes["names"]) for t in ("{}", *classes["templates"])}
    return np.array([next((prompts[line] for line in lines if line in prompts), -1) for lines in learned.captions])


def score(learned: Reduced, known: NDArray[np.int64], shown: Reduced, by: str) -> dict[str, Any]:
    """Top-1 of the nearest training picture that has a class, and the answers."""
    usable = known >= 0
    index, _ = nearest(_pixels(shown, by), _pixels(learned, by)[usable])
    return _answers(known[usable][index], shown, int(usable.sum()))


@dataclass(frozen=True)
class PixelProbe:
    """A linear classifier on positive parts of random projections (D, F) of pixels with this mean and deviation."""

    mean: Array
    deviation: float
    projections: Array
    biases: Array
    classes: NDArray[np.int64]
    weights: Array
    """(F, C), of the classes."""
    pictures: int
    """From which it was fitted."""

    def named(self, pixels: Array) -> NDArray[np.int64]:
        """The class of each picture."""
        return self.classes[(self.features(pixels) @ self.weights).argmax(axis=1)]

    def features(self, pixels: Array) -> Array:
        return np.maximum((pixels - self.mean) / self.deviation @ self.projections + self.biases, 0)


def fit(learned: Reduced, known: NDArray[np.int64], by: str) -> PixelProbe:
    """Ridge regression of the classes of the training pictures that have one."""
    usable = known >= 0
    pixels = _pixels(learned, by)[usable]
    random = np.random.default_rng(0)
    side = pixels.shape[1]
    classes, targets = np.unique(known[usable], return_inverse=True)
    probe = PixelProbe(
        mean=pixels.mean(axis=0),
        deviation=max(float(pixels.std()), 1e-6),
        projections=(random.standard_normal((side, FEATURES)) / np.sqrt(side)).astype(np.float32),
        biases=random.uniform(-1, 1, FEATURES).astype(np.float32),
        classes=classes,
        weights=np.zeros((FEATURES, len(classes)), np.float32),
        pictures=len(pixels),
    )
    squares = RIDGE * np.eye(FEATURES, dtype=np.float32)
    sums = np.zeros((len(classes), FEATURES), np.float32)
    for start in range(0, len(pixels), BLOCK):
        part = probe.features(pixels[start : start + BLOCK])
        squares += part.T @ part
        np.add.at(sums, targets[start : start + BLOCK], part)
    return replace(probe, weights=np.linalg.solve(squares, sums.T))


def probe(fitted: PixelProbe, shown: Reduced, by: str) -> dict[str, Any]:
    """Top-1 of a linear classifier on random features of the pixels, and the answers."""
    return _answers(fitted.named(_pixels(shown, by)), shown, fitted.pictures)


def _pixels(pictures: Reduced, by: str) -> Array:
    if by == "colour":
        return pictures.thumbnails
    return pictures.shapes


def _answers(named: NDArray[np.int64], shown: Reduced, pictures: int) -> dict[str, Any]:
    right = named == shown.labels
    return {"pictures": pictures, "top1": float(right.mean()), "n": len(right)} | pack(shown.keys, right)


def near(learned: Reduced, shown: Reduced) -> dict[str, float]:
    """Shares of test pictures with a near-duplicate in training, whatever its class."""
    _, distance = nearest(shown.shapes, learned.shapes)
    return {
        "near": round(float((distance < NEAR).mean()), 4),
        "near_2x": round(float((distance < 2 * NEAR).mean()), 4),
    }


def _samples(folder: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, extension -> content) of each sample, in order."""
    for path in sorted_glob(folder, "*.tar"):
        with tarfile.open(path) as tar:
            key = ""
            files: dict[str, bytes] = {}
            for member in tar:
                name, _, extension = member.name.partition(".")
                content = tar.extractfile(member)
                assert content is not None
                if name != key and files:
                    yield key, files
                    files = {}
                key = name
                files[extension] = content.read()
            if files:
                yield key, files


def _reduced(png: bytes) -> tuple[Array, Array]:
    from PIL import Image

    picture = Image.open(io.BytesIO(png)).convert("RGB")
    small = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX)).reshape(-1)
    shape = drawings.shape(np.asarray(picture.convert("L")))
    return (small / 255).astype(np.float32), (shape / 255).astype(np.float32)
