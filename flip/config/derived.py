"""The arithmetic of stages, ranks and patches (docs/contracts.md): S, the samples seen, runs on from stage to stage."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from flip.config.schema import Config, ImageTower, Stage, TextTower


@dataclass(frozen=True)
class Span:
    """One stage on the axis of samples seen: from S = ``start`` to S = ``end`` in ``steps`` steps."""

    stage: Stage
    start: int
    end: int
    steps: int


def spans(config: Config) -> list[Span]:
    """The stages in order. steps = ceil(samples / batch), end = start + steps * batch: a last step is never cut."""
    found: list[Span] = []
    start = 0
    for stage in config.stages:
        steps = -(-stage.samples // stage.batch)
        found.append(Span(stage, start, start + steps * stage.batch, steps))
        start = found[-1].end
    return found


def world(config: Config) -> int:
    """W, the number of ranks."""
    return config.resources.nodes * config.resources.processes


def patches(image: ImageTower) -> int:
    """P, patches of an image."""
    return (image.size // image.patch) ** 2


def kept(image: ImageTower, mask: str) -> int:
    """K = floor(P * (1 - mask)), in exact arithmetic."""
    return int(patches(image) * (1 - Fraction(mask)))


def positions(text: TextTower, mask: str) -> int:
    """Positions of a caption that a text mask leaves, likewise."""
    return int(text.length * (1 - Fraction(mask)))
