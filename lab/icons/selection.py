"""Chooses the pictures of each icon set: training, classes of held-out families, retrieval, probe (pure; no files)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from flip.rng import key
from lab.icons.drawings import Drawing

SUBSET = 8
"""Purpose of the order of pictures in the counter hash (docs/contracts.md, Randomness)."""
NEAR = 0.1
"""Two pictures are near-duplicates if the root mean square difference of their shapes is below this (white is 1)."""
DRAWN = 4
"""Training families that draw a class."""
RETRIEVAL = 2000
_BLOCK = 1024
_WORD = re.compile(r"[a-z]{3}")


def different(drawings: Sequence[Drawing], held_out: Sequence[str]) -> tuple[list[Drawing], int, int]:
    """The drawings without blank pictures and copies, and the numbers of both.

    A training picture that equals a held-out one stays: it counts as a near-duplicate.
    """
    visible = [drawing for drawing in drawings if drawing.shape.min() < 255]
    first: dict[tuple[bytes, bool], Drawing] = {}
    for drawing in visible:
        first.setdefault((drawing.png, drawing.family in held_out), drawing)
    return list(first.values()), len(drawings) - len(visible), len(visible) - len(first)


def nearest(a: Sequence[Drawing], b: Sequence[Drawing]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distance of each drawing of ``a`` to the nearest of ``b``, (len(a),), and the converse, (len(b),).

    The distance is the root mean square difference of the shapes, 1 between black and white. It is the same on every
    machine: no sum of SIDE^2 products of 8-bit values reaches 2^24, so all are exact in float32.
    """
    x = np.stack([drawing.shape for drawing in a]).astype(np.float32)
    x_squares = (x**2).sum(1)[:, None]
    best = np.full(len(a), np.inf)
    converse = np.empty(len(b))
    for start in range(0, len(b), _BLOCK):
        y = np.stack([drawing.shape for drawing in b[start : start + _BLOCK]]).astype(np.float32)
        products = x @ y.T
        distances = (x_squares - products) + ((y**2).sum(1) - products)
        best = np.minimum(best, distances.min(1))
        converse[start : start + _BLOCK] = distances.min(0)
    return np.sqrt(best / x.shape[1]) / 255, np.sqrt(converse / x.shape[1]) / 255


def shuffled(drawings: Sequence[Drawing]) -> list[Drawing]:
    """The drawings in a random order, so that a beginning of it is a random subset. Other drawings do not move it."""
    keys = key(0, 0, np.array([drawing.number for drawing in drawings]), SUBSET, 0)
    return [drawings[i] for i in np.argsort(keys, kind="stable")]


def drawn_by(drawings: Iterable[Drawing]) -> dict[str, set[str]]:
    """What is drawn -> the families that draw it."""
    result: dict[str, set[str]] = defaultdict(set)
    for drawing in drawings:
        result[drawing.icon.subject].add(drawing.family)
    return result


def classes(drawings: Sequence[Drawing], training: Mapping[str, set[str]]) -> dict[str, Drawing]:
    """Classes of one family, by name: what at least DRAWN families of ``training`` draw, with the plainest drawing.

    Of two classes whose pictures are near-duplicates, the one that more families draw stays.
    """
    chosen: dict[str, Drawing] = {}
    for drawing in sorted(drawings, key=lambda d: (len(d.icon.name), d.icon.name)):
        subject = drawing.icon.subject
        if len(training.get(subject, ())) >= DRAWN and _WORD.search(subject):
            chosen.setdefault(subject, drawing)
    distinct: list[Drawing] = []
    for subject in sorted(chosen, key=lambda s: (-len(training[s]), s)):
        if not distinct or nearest([chosen[subject]], distinct)[0][0] >= NEAR:
            distinct.append(chosen[subject])
    return {drawing.icon.subject: drawing for drawing in sorted(distinct, key=lambda d: d.icon.subject)}


def pictures(drawings: Sequence[Drawing], training: Mapping[str, set[str]]) -> list[Drawing]:
    """All drawings of one family whose name training has: filled, outlined and numbered variants, rare names as well.

    A name that training does not have is left out, as nothing but chance could find it.
    """
    return [drawing for drawing in drawings if training.get(drawing.icon.subject)]


def retrieval(drawings: Sequence[Drawing], training: Mapping[str, set[str]]) -> list[Drawing]:
    """RETRIEVAL random drawings of different names, each of which training draws too."""
    chosen: dict[str, Drawing] = {}
    for drawing in shuffled(drawings):
        if training.get(drawing.icon.subject):
            chosen.setdefault(drawing.icon.subject, drawing)
    return list(chosen.values())[:RETRIEVAL]
