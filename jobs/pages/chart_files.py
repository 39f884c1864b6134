"""The files of the charts of a page: one SVG, and one PNG for documents that show no SVG."""

from collections.abc import Sequence
from pathlib import Path

from flip.files.creation import output_folder
from flip.runs.rundir import write_bytes, write_text
from jobs.pages import charts
from jobs.pages.charts import Plot
from jobs.pages.document import Block, Figure, Fold


def save(blocks: Sequence[Block], folder: Path) -> None:
    """Write every chart as NAME.svg and NAME.png below ``folder``, which is created. Raises OSError."""
    output_folder(folder)
    for block in blocks:
        for name, plot in files(block):
            write_text(folder / f"{name}.svg", charts.svg(plot))
            write_bytes(folder / f"{name}.png", charts.png(plot))


def files(block: Block) -> list[tuple[str, Plot]]:
    """(stem of its files, chart) of every chart of a figure or a folded part; other blocks have none."""
    if isinstance(block, Fold):
        return [file for inner in block.blocks for file in files(inner)]
    if not isinstance(block, Figure):
        return []
    return [(f"{_plain(block.name)}-{i}", plot) for i, plot in enumerate(block.plots, 1)]


def _plain(name: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in name)
