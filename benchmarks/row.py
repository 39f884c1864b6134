"""A line of the table of results."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SIGNS = {">=": operator.ge, "<=": operator.le, "<": operator.lt, "=": operator.eq}
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Row:
    """``ratio``: of ours to the peer's, as they stand there; ``spread``: its least and most over rounds."""

    what: str
    ours: str
    peer: str = ""
    ratio: float | None = None
    spread: tuple[float, float] | None = None
    goal: str = ""
    reached: bool | None = None
    """None where nothing is asked, or nothing was measured."""

    @property
    def figure(self) -> str:
        """What it comes to: the ratio, or what ours took."""
        if self.ratio is None:
            return self.ours
        return number(self.ratio) + (f" ({number(self.spread[0])} to {number(self.spread[1])})" if self.spread else "")


def number(value: float) -> str:
    """Three significant digits, or a whole number."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(found: Mapping[str, Any], scale: float = 1.0) -> tuple[float, float] | None:
    """Least and most of what a script wrote, None where it did not."""
    if isinstance(found.get("least"), float | int):
        return found["least"] * scale, found["most"] * scale
    return None


def goal(value: float, sign: str, limit: float, unit: str = "") -> dict[str, Any]:
    """The two fields of a row that is to reach something."""
    return {"goal": f"{sign} {limit:g}{unit}", "reached": bool(SIGNS[sign](value, limit))}


def limited(what: str, found: Mapping[str, Any], peer: str = "") -> Row:
    """Seconds beside their own ``limit``."""
    least, most = spread(found) or (found["seconds"], found["seconds"])
    ours = f"{number(found['seconds'])} s ({number(least)} to {number(most)})"
    return Row(what, ours, peer, **goal(found["seconds"], "<", found["limit"], " s"))
