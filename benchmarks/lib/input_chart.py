"""The bar chart of the README: samples/s of one core, from object storage to masked batches, beside other loaders."""

from collections.abc import Mapping
from typing import Any
from xml.sax.saxutils import escape

SET = "256 px"
MEASURED = "S3 to batch on one core"
PIPELINES = {
    "ours, mask 0.75": "FLIP, mask 75 %",
    "ours, mask 0.5": "FLIP, mask 50 %",
    "ours, mask 0": "FLIP, no mask",
    "LitData": "LitData",
    "webdataset + s3fs whole": "webdataset + s3fs",
    "mosaicml-streaming": "mosaicml-streaming",
    "SPDL": "SPDL",
    "Energon": "Energon",
    "open_clip": "open_clip",
}
"""Name in stream.json -> label of its bar, from the top."""
TITLE = "Samples per second on one core"
NOTE = "synthetic 256 px JPEGs from an S3 server on the same machine"
WIDTH = 720
LABELS = 240
"""Pixels of the drawing left of the bars."""
ROW = 36
BAR = 24
TOP = 78
VALUE = 70
"""Pixels right of the longest bar, for its number."""
STYLE = """text { font: 20px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
.title { font-weight: 600 }
.soft { fill: #57606a; font-size: 18px }
.panel { fill: #ffffff; stroke: #d0d7de }
.ours { fill: #0969da }
.other { fill: #afb8c1 }"""


def chart(stream: Mapping[str, Any]) -> str:
    """The chart as SVG for a light page. ``stream``: the content of results/stream.json."""
    rates = {row["pipeline"]: row["samples_per_s"] for row in stream["sets"][SET]["measured"][MEASURED]}
    height = TOP + ROW * len(PIPELINES) + 14
    longest = max(rates[name] for name in PIPELINES)
    words = ", ".join(f"{label} {rates[name]:,.0f}" for name, label in PIPELINES.items())
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(f"{TITLE}: {words}")}">',
        f"<style>\n{STYLE}\n</style>",
        f'<rect class="panel" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
        f'<text class="title" x="20" y="34">{escape(TITLE)}</text>',
        f'<text class="soft" x="20" y="60">{escape(NOTE)}</text>',
    ]
    for i, (name, label) in enumerate(PIPELINES.items()):
        top = TOP + ROW * i
        length = (WIDTH - LABELS - VALUE - 20) * rates[name] / longest
        kind = "ours" if name.startswith("ours") else "other"
        base = top + BAR - 5
        lines += [
            f'<text x="{LABELS - 12}" y="{base}" text-anchor="end">{escape(label)}</text>',
            f'<rect class="{kind}" x="{LABELS}" y="{top}" width="{length:.1f}" height="{BAR}" rx="2"/>',
            f'<text x="{LABELS + length + 8:.1f}" y="{base}">{rates[name]:,.0f}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"
