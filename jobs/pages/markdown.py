"""A report as Markdown. Its charts are files (jobs/pages/chart_files.py)."""

import re
from collections.abc import Sequence
from html import escape

from jobs.common.text import plain as visible
from jobs.pages.chart_files import files
from jobs.pages.document import Block, CaptionedImage, CaptionedImages, Figure, Fold, Table, Text


def markdown(blocks: Sequence[Block], figures: str = "") -> str:
    """The report; ``figures``: path of the folder of figures, relative to the file; empty: figures are only named."""
    return "\n\n".join(_block(block, figures) for block in blocks) + "\n"


def plain(text: str) -> str:
    """Text on one line, with Markdown and HTML escaped."""
    return re.sub(r"([\\`*_{}\[\]#|~$])", r"\\\1", escape(visible(" ".join(text.split())), quote=False))


def _block(block: Block, figures: str) -> str:
    if isinstance(block, Fold):
        return "\n\n".join([f"**{plain(block.summary)}**", *(_block(inner, figures) for inner in block.blocks)])
    if isinstance(block, CaptionedImages):
        return _table(Table([_image(item) for item in block.items], text=["verdict", "nearest captions"]))
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Figure):
        return _figure(block, figures)
    return _text(block)


def _text(block: Text) -> str:
    if block.level:
        return f"{'#' * block.level} {plain(block.text)}"
    if block.tone == "headline":
        return f"**{plain(block.text)}**"
    if block.tone in ("note", "trouble"):
        return f"> {plain(block.text)}"
    return plain(block.text)


def _table(block: Table) -> str:
    heads = list(block.rows[0])
    left = {heads[0], *block.long, *block.text}
    lines = [heads, ["---" if head in left else "--:" for head in heads]]
    lines += [[str(row[head]) for head in heads] for row in block.rows]
    cells = [[cell if i == 1 else plain(cell) for cell in line] for i, line in enumerate(lines)]
    for head, rows in block.best.items():
        for i in rows:
            cells[i + 2][heads.index(head)] = f"**{cells[i + 2][heads.index(head)]}**"
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _image(item: CaptionedImage) -> dict[str, str]:
    captions = ", ".join(f"{caption} {score:.2f}" for caption, score in item.captions)
    return {"image": item.name, "verdict": item.verdict, "nearest captions": captions}


def _figure(block: Figure, figures: str) -> str:
    images = [f"![{plain(plot.summary)}]({figures}/{name}.svg)" for name, plot in files(block)]
    return "\n".join([*(images if figures else []), *([""] if figures else []), plain(block.caption)])
