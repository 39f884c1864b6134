"""``make figures``: the figures of the README and of docs/, drawn from real output.

- towers.svg is drawn by hand; its dark form has other colours.
- preemption.svg is a timeline of one preempted run, from preemption.json. ``--record RUN`` reads that file from a run.
- input.svg is a bar chart of the results of `make bench ONLY=stream`.
- plan.svg is the output of a dry run, as a terminal shows it.
- report_light.png and report_dark.png show the page of ``flip report``, by the headless browser that ``make browser``
  installs. ``--report`` names the folder of the sweep; without it they stay as they are.
"""

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib.input_chart import chart
from flip.runs.metric_lines import newest_line
from flip.runs.rundir import RunDir, read_record, to_json, write_bytes, write_text
from jobs.common.paths import JOBS, REPOSITORY

FOLDER = REPOSITORY / "docs" / "figures"
RESULTS = REPOSITORY / "benchmarks" / "results"
PLAN = ("submit", "masking", "--dry-run", "--cluster", "h100")
SHOWN = (
    (r"^mask50: new$", r"^  from base "),
    (r"^  stage +samples ", r"^  a step "),
    (r"^all runs$", r"^  GPU-hours of runs"),
)
"""First line, and the line after the last one, of the parts of the plan that the figure shows, in their order."""
REPORT_SIZE = {"width": 640, "height": 442}
"""Of the page of ``flip report``. README shows it in 410 pixels, where its text is still readable."""
BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")
DARK = {
    "#ffffff": "#0d1117", "#d0d7de": "#30363d", "#1f2328": "#e6edf3", "#57606a": "#9198a1", "#afb8c1": "#484f58",
    "#9cd2ff": "#2f6f9f", "#f2b53c": "#d29922", "#4f9d5b": "#347d39", "#1f6b36": "#8ddb8c", "#ddf4ff": "#0c2d4d",
    "#0969da": "#58a6ff", "#fff1cc": "#3d2e00", "#9a6700": "#d29922", "#d8dee4": "#2d333b", "#1a7f37": "#3fb950",
    "#cf222e": "#ff7b72",
}  # fmt: skip
"""Colour on a light page -> colour on a dark one."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make figures", description=__doc__.partition("\n")[0])
    parser.add_argument("--record", type=Path, help="a preempted run directory, from which preemption.json is read")
    parser.add_argument("--report", type=Path, help="folder of a sweep, whose report page is shown")
    options = parser.parse_args(arguments)
    if options.record:
        write_text(FOLDER / "preemption.json", to_json(events_of(RunDir(options.record))))
    write_text(FOLDER / "preemption.svg", timeline(json.loads((FOLDER / "preemption.json").read_text())))
    write_text(FOLDER / "input.svg", chart(json.loads((RESULTS / "stream.json").read_text(encoding="utf-8"))))
    for name in ("towers", "preemption", "input"):
        write_text(FOLDER / f"{name}_dark.svg", dark((FOLDER / f"{name}.svg").read_text(encoding="utf-8")))
    write_text(FOLDER / "plan.svg", terminal(dry_run(), "flip " + " ".join(PLAN)))
    if options.report:
        for scheme in ("light", "dark"):
            write_bytes(FOLDER / f"report_{scheme}.png", screenshot(options.report / "report.html", scheme))
    print("\n".join(str(path) for path in sorted(FOLDER.glob("*.[sp][vn]g"))))
    return 0


def dark(svg: str) -> str:
    """The drawing for a dark page."""
    return re.sub(r"#[0-9a-f]{6}\b", lambda colour: DARK[colour[0]], svg)


def events_of(run: RunDir) -> dict[str, Any]:
    """The seconds of a preempted run since its signal, from the files that its attempts left."""
    request = read_record(run.attempt(1) / "told.json") or {}
    cause = read_record(run.attempt(1) / "cause.0.json") or {}
    end = read_record(run.attempt(1) / "end.json") or {}
    start, ready = (read_record(run.attempt(2) / name) or {} for name in ("start.json", "ready.json"))
    (mark,) = run.path.glob(f"checkpoints/*/{end['commits']}-1/commit.json")
    moments = {
        "signal": request["time"], "saved": mark.stat().st_mtime, "exit": cause["time"], "requeued": end["time"],
        "started": start["time"], "ready": ready["time"],
    }  # fmt: skip
    seconds = {name: round(moment - request["time"], 2) for name, moment in moments.items()}
    total = newest_line(run)["samples"]
    return {"signal": request["signal"], "seconds": seconds, "saved": end["commits"], "total": total}


def timeline(record: dict[str, Any]) -> str:
    """The drawing of a preempted run: the first second, and the next attempt."""
    at = record["seconds"]
    saved = f"{record['saved']:,}"
    rows = [
        (at["signal"], "warn", record["signal"], "Slurm preempts the job"),
        (at["saved"], "good", "checkpoint", f"saved at sample {saved}"),
        (at["exit"], "soft", "exit 75", "stopped, not failed"),
        (at["requeued"], "soft", "requeue", "the owner of the job requeues it"),
        (at["started"], "soft", "attempt 2", "the other job has ended"),
        (at["ready"], "good", "resumed", f"continues at sample {saved}"),
    ]
    lines = []
    for i, (seconds, kind, name, text) in enumerate(rows):
        y = 34 + 36 * i
        lines.append(
            f'<circle class="{kind}" cx="86" cy="{y - 6}" r="7"/>'
            f'<text class="soft" x="70" y="{y}" text-anchor="end">{seconds:.1f} s</text>'
            f'<text class="ink name" x="106" y="{y}">{name}</text><text class="soft" x="210" y="{y}">{text}</text>'
        )
    gap = 34 + 36 * 3.5 - 6
    return _TIMELINE.format(rows="\n".join(lines), gap=gap, above=gap - 8, below=gap + 8)


_TIMELINE = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 480 234" role="img" \
aria-label="Timeline of one preempted run: signal, checkpoint, exit, requeue, next attempt.">
<style>
text {{ font: 15px system-ui, "Segoe UI", Helvetica, Arial, sans-serif }}
text.name {{ font-weight: 600 }}
.panel {{ fill: #ffffff; stroke: #d0d7de }}
.ink {{ fill: #1f2328 }}
.soft {{ fill: #57606a }}
.good {{ fill: #1a7f37 }}
.warn {{ fill: #cf222e }}
.line {{ stroke: #d0d7de; stroke-width: 3 }}
.gap {{ stroke: #ffffff; stroke-width: 5; stroke-dasharray: 4 4 }}
</style>
<rect class="panel" x="1" y="1" width="478" height="232" rx="10"/>
<path class="line" d="M86 28 V208"/>
<path class="gap" d="M86 {above} V{below}"/>
{rows}
</svg>
"""


def dry_run() -> str:
    """The output of the dry run, with its colours, in an empty folder of runs."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": "112", "FLIP_RUNS": f"{folder}/runs"}
        environment |= {"FLIP_CACHE": f"{folder}/cache"}
        line = [sys.executable, str(JOBS), *PLAN]
        done = subprocess.run(line, env=environment, cwd=folder, capture_output=True, text=True, check=True)
    return parts_of(done.stdout)


def parts_of(plan: str) -> str:
    """The parts of a plan that ``SHOWN`` names, with an empty line before the last one."""
    lines = plan.splitlines()
    parts = []
    end = 0
    for first, after in SHOWN:
        start = position(first, lines, end)
        end = position(after, lines, start)
        parts.append("\n".join(lines[start:end]).rstrip())
    return "\n".join([*parts[:-1], "", parts[-1]])


def position(pattern: str, lines: Sequence[str], start: int) -> int:
    """Number of the first line from ``start`` on that the pattern fits, colours aside."""
    for number in range(start, len(lines)):
        if re.search(pattern, re.sub(r"\x1b\[[\d;]*m", "", lines[number])):
            return number
    raise SystemExit(
        f"the plan has no line {pattern!r} after line {start}: change SHOWN in lab/documentation/figures.py"
    )


def terminal(output: str, command: str) -> str:
    """Text with the colours of a terminal as a figure of a terminal, without fonts from a network."""
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=112, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.from_ansi(f"\x1b[32m$\x1b[0m {command}\n\n{output}"), soft_wrap=True)
    svg = console.export_svg(title="", unique_id="plan")
    svg = re.sub(r"\s*@font-face \{[^}]*\}|\s*<!-- Generated.*?-->", "", svg)
    return svg.replace("Fira Code", "ui-monospace, Menlo, Consolas")


def screenshot(page: Path, scheme: str) -> bytes:
    """The upper part of a page in the headless browser."""
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        raise SystemExit("no browser: run `make browser`")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        context = browser.new_context(viewport=REPORT_SIZE, device_scale_factor=1.5, color_scheme=scheme)  # type: ignore[arg-type]
        view = context.new_page()
        view.goto(page.resolve().as_uri())
        figure = view.screenshot()
        browser.close()
    return figure


if __name__ == "__main__":
    sys.exit(main())
