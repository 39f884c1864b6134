"""A report as one self-contained HTML page without scripts or requests; readable on phones and on paper."""

import re
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from pathlib import Path

from jobs.pages import charts
from jobs.pages.document import Block, CaptionedImage, CaptionedImages, Figure, Fold, Table, Text, anchor

INTERVAL = re.compile(r"(\([\d.]+-[\d.]+\))")
_DARK_CHARTS = " ".join(f"--c{light[1:]}: {dark};" for light, dark in charts.DARK.items())
STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8").replace("DARK", _DARK_CHARTS)
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render(name: str, blocks: Sequence[Block]) -> str:
    """The page of the blocks; every text is escaped. Its contents follow the first paragraphs."""
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
    )
    headings = [block for block in blocks if isinstance(block, Text) and block.level == 2]
    if headings:
        first = blocks.index(headings[0])
    else:
        first = len(blocks)
    parts = [*map(_block, blocks[:first]), _contents(headings), *map(_block, blocks[first:])]
    return head + "\n".join(parts) + "\n</main>\n</body>\n</html>\n"


def _contents(headings: Sequence[Text]) -> str:
    links = "".join(f'<li><a href="#{_id(block)}">{escape(block.text)}</a></li>' for block in headings)
    return f'<nav aria-label="Contents"><ul>{links}</ul></nav>'


def _id(block: Text) -> str:
    return escape(block.anchor or anchor(block.text))


def _block(block: Block) -> str:
    if isinstance(block, Fold):
        inner = "\n".join(map(_block, block.blocks))
        return f"<details><summary>{escape(block.summary)}</summary>\n{inner}\n</details>"
    if isinstance(block, CaptionedImages):
        return f'<ul class="images">{"".join(map(_image, block.items))}</ul>'
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Figure):
        return _figure(block)
    return _text(block)


def _text(block: Text) -> str:
    if block.level:
        id = ""
        if block.level > 1:
            id = f' id="{_id(block)}"'
        return f"<h{block.level}{id}>{escape(block.text)}</h{block.level}>"
    kinds = {"": [], "trouble": ["bad"]}.get(block.tone, [block.tone])
    return f"<p{_class(kinds)}>{escape(block.text)}</p>"


def _table(block: Table) -> str:
    heads = list(block.rows[0])
    kinds = {head: [kind for kind in ("long", "text") if head in getattr(block, kind)] for head in heads}
    columns = "".join(f'<th scope="col"{_class(kinds[head])}>{escape(head)}</th>' for head in heads)
    lines = []
    for i, row in enumerate(block.rows):
        first = _cell(str(row[heads[0]]))
        if block.links and block.links[i]:
            first = f'<a href="#{escape(block.links[i])}">{first}</a>'
        cells = f'<th scope="row">{first}</th>'
        for head in heads[1:]:
            best = i in block.best.get(head, ())
            mark = ""
            if best:
                mark = ' <abbr title="best of the column">\u2605</abbr>'
            cells += f"<td{_class([*kinds[head], *(['best'] if best else [])])}>{_cell(str(row[head]))}{mark}</td>"
        lines.append(f"<tr{_class(['trouble'] if i < len(block.trouble) and block.trouble[i] else [])}>{cells}</tr>")
    # tabindex: a region that scrolls is reachable by keyboard
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(f"table by {heads[0]}")}"><table>\n'
        f"<thead><tr>{columns}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody></table></div>"
    )


def _class(names: Sequence[str]) -> str:
    if names:
        return f' class="{" ".join(names)}"'
    return ""


def _cell(text: str) -> str:
    """Keep short cells, and intervals in longer ones, on one line, also in print."""
    if len(text) <= 12:
        if " " in text or "-" in text[1:]:
            return f'<span class="nb">{escape(text)}</span>'
        return escape(text)
    return INTERVAL.sub(r'<span class="nb">\1</span>', escape(text))


def _image(item: CaptionedImage) -> str:
    source = f"data:image/jpeg;base64,{b64encode(item.jpeg).decode()}"
    image = ""
    if item.jpeg:
        image = f'<img src="{source}" alt="{escape(f"{item.name}: {item.label}")}">'
    texts = [(f"<b>{escape(text)}</b>" if text == item.label else escape(text), score) for text, score in item.captions]
    lines = "".join(f"<li>{text} {score:.2f}</li>" for text, score in texts)
    kinds = ["image"]
    if item.is_right:
        kinds.append("right")
    return (
        f"<li{_class(kinds)}>{image}<div><b>{escape(item.verdict)}</b><ol>{lines}</ol>"
        f'<span class="quiet">{escape(item.name)}</span></div></li>'
    )


def _figure(block: Figure) -> str:
    """A large chart has a second form for narrow screens."""
    forms = [(False, "small")]
    layout = "charts"
    if any(plot.large for plot in block.plots):
        layout = "charts large"
        forms = [(False, "full"), (True, "narrow")]
    drawn = "".join(
        charts.inline(charts.svg(plot, small)).replace("<svg ", f'<svg class="{kind}" ', 1)
        for plot in block.plots
        if not plot.empty
        for small, kind in forms
    )
    drawn = drawn or '<p class="quiet">Nothing to draw yet.</p>'
    caption = f"<figcaption>{escape(block.caption)}</figcaption>"
    return f'<figure><div class="{layout}">{drawn}</div>{caption}</figure>'
