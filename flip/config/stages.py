"""The arithmetic of stages (design 4.2): S, the samples seen, runs on from stage to stage."""

from __future__ import annotations

from dataclasses import dataclass

from flip.config.schema import Config, Stage


@dataclass(frozen=True)
class Span:
    """One stage on the axis of samples seen: it begins at S = ``start`` and ends at S = ``end`` after ``steps`` steps."""

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
