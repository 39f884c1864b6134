"""The speed at which a core prepares samples for GPUs: a table by images, view, mask and kernel, assumed or measured.

`flip doctor --measure` measures rows. The assumed ones are a file of the same form, which ``benchmarks/core_speeds.py``
writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from flip.runs.errors import ConfigError
from jobs.planning.measurement import REMEDY, Measurement, read_measurement

FIXED_COST = 51.0
"""Microseconds of a sample without pixels: tar headers, draws, masks, tokens, prefetch. An estimate: the cost of images
that are smaller than all of a table is on the line from here to its smallest ones."""
ROW = "input"
"""Kind of the rows of a measurement that have speeds of a core."""


@dataclass(frozen=True)
class Images:
    """The images of a data set. ``markers``: with verified restart markers. ``stated``: by its manifest.

    ``kernel``: the share that the visible-patch kernel takes.
    """

    short: int
    markers: bool
    stated: bool
    weight: float = 1.0
    kernel: float = 1.0


@dataclass(frozen=True)
class SpeedRow:
    """Microseconds of a core for a sample: images with a shorter side of ``short`` pixels, views of ``size``."""

    short: int
    markers: bool
    size: int
    mask: float
    kernel: bool
    microseconds: float


ASSUMED_FILE = Path(__file__).with_name("assumed_speeds.yaml")  # JSON, which is YAML: jobs get a copy of the code
"""The speeds that plans assume: JPEGs of quality 95 in local files, views of 224 px with patches of 16 px and crops of
half to all of the area. Written by ``benchmarks/core_speeds.py``. From object storage a sample takes 20 to 40 us more
(the stage read of ``benchmarks/stream.py``)."""


class SpeedTable:
    """Rows of measurements, and where they come from in words."""

    def __init__(self, rows: Sequence[SpeedRow], origin: str) -> None:
        self.rows = rows
        self.origin = origin

    def microseconds(self, images: Images, size: int, mask: float, kernel: bool) -> float:
        """The cost of a sample: of the nearest view size, linear in the mask and in the pixels between rows.

        An image without pixels costs ``FIXED_COST``. Beyond the largest images the last line continues.
        """
        rows = self._like(kernel, images.markers)
        nearest = min({row.size for row in rows}, key=lambda measured_size: abs(measured_size - size))
        rows = [row for row in rows if row.size == nearest]
        sides = sorted({row.short for row in rows})
        pixels = [0, *(side**2 for side in sides)]
        costs = [FIXED_COST, *(_at_mask(mask, [row for row in rows if row.short == side]) for side in sides)]
        wanted = images.short**2
        if wanted > pixels[-1]:
            slope = (costs[-1] - costs[-2]) / (pixels[-1] - pixels[-2])
            return costs[-1] + slope * (wanted - pixels[-1])
        return float(np.interp(wanted, pixels, costs))

    def _like(self, kernel: bool, markers: bool) -> list[SpeedRow]:
        """The rows with this kernel and markers; if there are none, those that come nearest and are not faster."""
        for choice in ((kernel, kernel and markers), (kernel, False), (False, False)):
            rows = [row for row in self.rows if (row.kernel, row.markers) == choice]
            if rows:
                return rows
        return list(self.rows)


def table_in(measurement: Measurement, where: str, origin: str) -> SpeedTable:
    """The speeds that a measurement has. ``where``: its file. Raises ConfigError if they are damaged or missing."""
    rows = []
    for row in measurement.kind(ROW):
        rows += rows_of(row.values.get("rows"), where)
    return SpeedTable(rows, origin)


@cache
def assumed_table() -> SpeedTable:
    """The table that plans use until a site has measured its own."""
    measurement = read_measurement(str(ASSUMED_FILE))
    processor = measurement.machine.processor
    origin = f"assumed speeds of a core of {processor}, which `flip doctor --measure` replaces"
    return table_in(measurement, str(ASSUMED_FILE), origin)


def rows_of(records: Any, where: str) -> list[SpeedRow]:
    """The rows that a file holds as mappings. Raises ConfigError if they are damaged, or if there is none."""
    try:
        rows = [_row(record) for record in records]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError("no table of speeds", where, repr(error), REMEDY) from error
    if not rows or not all(row.short > 0 and row.microseconds > 0 for row in rows):
        raise ConfigError("no table of speeds", where, "rows", REMEDY)
    return rows


def _at_mask(mask: float, rows: Sequence[SpeedRow]) -> float:
    """Linear in the mask between rows, constant outside."""
    points = sorted((row.mask, row.microseconds) for row in rows)
    return float(np.interp(mask, [point[0] for point in points], [point[1] for point in points]))


def _row(record: dict[str, Any]) -> SpeedRow:
    return SpeedRow(
        int(record["short"]),
        bool(record["markers"]),
        int(record["size"]),
        float(record["mask"]),
        bool(record["kernel"]),
        float(record["microseconds"]),
    )
