"""A report as one self-contained HTML page without scripts or requests; readable on phones and on paper."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from jobs.reporting import charts
from jobs.reporting.document import Block, Figure, Table, Text

INTERVAL = re.compile(r"(\([\d.]+-[\d.]+\))")
STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; color: #1a1a1a; background: #fff;
  margin: 0 auto; padding: 1rem clamp(1rem, 3vw, 2rem); max-width: 76rem; overflow-wrap: break-word; }
h1 { font-size: 1.55rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-top: .7rem; border-top: 1px solid #e2e2e2; }
p { max-width: 52rem; margin: .6rem 0; }
.quiet, figcaption { color: #555; font-size: .88rem; }
.wide { overflow-x: auto; -webkit-overflow-scrolling: touch; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .55rem; border-bottom: 1px solid #e2e2e2; text-align: right; white-space: nowrap;
  vertical-align: top; }
th { border-bottom: 2px solid #888; font-weight: 600; vertical-align: bottom; }
th.text, td.text, th:first-child, td:first-child, th.long { text-align: left; }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; }
td.long { white-space: normal; min-width: 18rem; max-width: 44rem; text-align: left; overflow-wrap: anywhere; }
tr.trouble td:first-child { box-shadow: inset 4px 0 #d55e00; padding-left: .9rem; }
figure { margin: .8rem 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: .6rem 1.2rem; }
.charts > svg { width: 100%; height: auto; }
.legend { list-style: none; padding: 0; margin: .3rem 0; display: flex; flex-wrap: wrap; gap: .15rem 1.1rem;
  font-size: .88rem; }
.legend svg.key { width: 34px; height: 14px; vertical-align: middle; }
.charts text { font-family: system-ui, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif !important; }
.note, .bad { border-left: 4px solid #0072b2; padding: .3rem .8rem; background: #f2f7fb; }
.bad { border-color: #d55e00; background: #fdf4ee; }
@media (max-width: 40rem) { body { padding: .6rem .8rem; } th, td { padding: .3rem .5rem; }
  td.long { min-width: 14rem; }
  td:first-child { min-width: 6.5rem; max-width: 9rem; white-space: normal; overflow-wrap: break-word; } }
@page { margin: 14mm; }
@media print { body { max-width: none; font-size: 9.5pt; padding: 0; } .wide { overflow: visible; }
  table { font-size: 6.8pt; } th, td { padding: .12rem .25rem; white-space: normal; } .nb { white-space: nowrap; }
  td.long { min-width: 0; } th:first-child, td:first-child { position: static; }
  .charts { grid-template-columns: repeat(2, 1fr); gap: .3rem .9rem; } :root { font-size: 12px; }
  figure, tr { break-inside: avoid; } h2 { break-after: avoid; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


def render(name: str, blocks: Sequence[Block]) -> str:
    """The page of the blocks; every text is escaped."""
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
    )
    return head + "\n".join(map(_block, blocks)) + "\n</body>\n</html>\n"


def _block(block: Block) -> str:
    if isinstance(block, Table):
        return _table(block)
    return _figure(block) if isinstance(block, Figure) else _text(block)


def _text(block: Text) -> str:
    if block.level:
        return f"<h{block.level}>{escape(block.words)}</h{block.level}>"
    kind = {"": "", "quiet": ' class="quiet"', "note": ' class="note"', "trouble": ' class="bad"'}[block.tone]
    return f"<p{kind}>{escape(block.words)}</p>"


def _table(block: Table) -> str:
    heads = list(block.rows[0])
    kinds = {head: f' class="{kind}"' for kind in ("long", "text") for head in getattr(block, kind)}
    lines = ["<tr>" + "".join(f"<th{kinds.get(head, '')}>{escape(head)}</th>" for head in heads) + "</tr>"]
    for i, row in enumerate(block.rows):
        marked = ' class="trouble"' if i < len(block.trouble) and block.trouble[i] else ""
        columns = "".join(f"<td{kinds.get(head, '')}>{_cell(str(row[head]))}</td>" for head in heads)
        lines.append(f"<tr{marked}>{columns}</tr>")
    # tabindex: a region that scrolls is reachable by keyboard
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="table"><table>\n'
        + "\n".join(lines)
        + "\n</table></div>"
    )


def _cell(text: str) -> str:
    """Keep short cells, and intervals in longer ones, on one line, also in print."""
    if len(text) <= 12:
        return f'<span class="nb">{escape(text)}</span>' if " " in text or "-" in text[1:] else escape(text)
    return INTERVAL.sub(r'<span class="nb">\1</span>', escape(text))


def _figure(block: Figure) -> str:
    empty = '<p class="quiet">Nothing to draw yet.</p>'
    drawn = "\n".join(empty if plot.empty else charts.inline(charts.svg(plot)) for plot in block.plots)
    names = "".join(f"<li>{charts.key(style)} {escape(name)}</li>" for name, style in block.names)
    caption = f"<figcaption>{escape(block.caption)}</figcaption>"
    return f'<figure><div class="charts">{drawn}</div><ul class="legend">{names}</ul>{caption}</figure>'
