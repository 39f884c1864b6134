"""flip report [SWEEP | SWEEP/RUN | PATTERN | DIR ...]: results as table, page, Markdown, CSV, JSON and
figures, also of running sweeps."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.common.cli import INDEX, Parser, add_run_arguments, run_command

if TYPE_CHECKING:
    from flip.monitoring.results import Outcome
    from jobs.pages.document import Block

EXAMPLES = """examples:
  flip report quickstart                     table, and runs/quickstart/report.html
  flip report quickstart --folder results    the page, report.md, results.csv, figures as SVG and PNG
  flip report quickstart --markdown -        for an issue or a chat
  flip report runs/quickstart --csv results.csv
  flip report quickstart --out ~/page.html
  flip report --json                         every run below RUNS_ROOT
"""


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="flip report", description="Show results of runs and write a report.", epilog=EXAMPLES)
    add_run_arguments(parser)
    parser.add_argument("--csv", metavar="FILE", help="one line per run; - for standard output")
    parser.add_argument("--markdown", metavar="FILE", help="the report as Markdown; - for standard output")
    parser.add_argument("--table", metavar="T", default="", help="a table of the paper (1a ... 8) to compare with")
    parser.add_argument("--folder", metavar="DIR", help="write page, Markdown, CSV and figures; the folder is created")
    parser.add_argument("--images", type=INDEX, metavar="N", default=12, help="test images on the page (default: 12)")
    default = "report.html in the folder of the runs, or in the cache if that belongs to another user"
    parser.add_argument("--out", metavar="FILE", help=f"the HTML page; default: {default}")
    args = parser.parse_args(arguments)
    _check_options(parser, args)
    return run_command(report, args)


def _check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with exit code 2 if two outputs go to standard output, or if an option would have no effect."""
    streams = {"--json": args.json, "--csv -": args.csv == "-", "--markdown -": args.markdown == "-"}
    chosen = [name for name, is_given in streams.items() if is_given]
    if len(chosen) > 1:
        parser.error(f"{' and '.join(chosen)} both write to standard output: choose one")
    files = {"--folder": args.folder, "--out": args.out}
    if chosen and chosen != ["--markdown -"]:
        files |= {"--markdown": args.markdown, "--table": args.table}
    ignored = [name for name, value in files.items() if value]
    if chosen and ignored:
        parser.error(f"{', '.join(ignored)}: no effect with {chosen[0]}, which writes no page")


def report(args: argparse.Namespace) -> int:
    import json
    import time

    from jobs.common.cluster_profile import roots
    from jobs.common.terminal import show
    from jobs.pages.html import render
    from jobs.pages.markdown import markdown
    from jobs.reporting.outcomes import csv_text, outcomes, rows, terminal_page
    from jobs.reporting.report import findings, title
    from jobs.submitted_runs import select

    for name in (args.csv, args.out, args.markdown):
        _check_folder(name)
    results = outcomes(select.chosen(args))
    if args.json:
        print(json.dumps(_with_next_commands(results), indent=1))
    if args.csv:
        _save(args.csv, csv_text(rows(results)))
    if args.json or args.csv == "-":
        return 0
    blocks = findings(results, time.time(), args.table, args.images)
    if args.markdown:
        _save(args.markdown, markdown(blocks))
    if args.markdown == "-":
        return 0
    show(terminal_page(results, args.table))
    page = render(title(results), blocks)
    if args.folder:
        _write_folder(Path(args.folder).expanduser(), page, results, blocks)
    folders = {outcome.run.path.parent for outcome in results}
    target = args.out or _own_folder(folders.pop() if len(folders) == 1 else roots(args.root)[0]) / "report.html"
    _save(str(target), page)
    print(f"\npage: {Path(target).expanduser()}")
    return 0


def _with_next_commands(results: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The rows of the runs for --json."""
    from jobs.reporting.outcomes import rows
    from jobs.workloads import submitted

    document = rows(results)
    for outcome, row in zip(results, document, strict=True):
        row["next"] = submitted.of_run(outcome.run).next_commands(outcome.state)
    return document


def _own_folder(folder: Path) -> Path:
    """The folder, or if it belongs to another user, a folder in the private cache, which is created.

    Another user may have prepared links in their folder. Raises PermissionDenied or StorageError.
    """
    from flip.common.cache import cache_root
    from flip.files.creation import closed_folder, private_folder
    from flip.files.ownership import is_mine
    from jobs.common.filesystem import writing

    folder = folder.resolve()
    if is_mine(folder):
        return folder
    with writing(folder, "Name a file with --out."):
        own = private_folder(cache_root() / f"reports-{os.geteuid()}") / folder.relative_to(folder.anchor)
        closed_folder(own)
    return own


def _write_folder(folder: Path, page: str, results: Sequence[Outcome], blocks: Sequence[Block]) -> None:
    """Write report.html, report.md, results.csv and figures/ into the folder."""
    from jobs.common.filesystem import writing
    from jobs.pages.chart_files import save
    from jobs.pages.markdown import markdown
    from jobs.reporting.outcomes import csv_text, rows

    with writing(folder, "Name another folder with --folder."):
        save(blocks, folder / "figures")
    _save(str(folder / "report.html"), page)
    _save(str(folder / "report.md"), markdown(blocks, "figures"))
    _save(str(folder / "results.csv"), csv_text(rows(results)))


def _check_folder(target: str | None) -> None:
    """Raise ConfigError if the folder of an output file does not exist, before anything is printed."""
    from flip.runs.errors import ConfigError

    path = Path(target or "-").expanduser().absolute()
    if target not in (None, "-") and path.is_dir():
        raise ConfigError("a folder, where a file is written", str(path), remedy="Name a file, or use --folder.")
    if target not in (None, "-") and path.parent.exists() and not path.parent.is_dir():
        remedy = f"{path.parent} is a file: name another place."
        raise ConfigError("not in a folder", str(path), remedy=remedy)
    if target not in (None, "-") and not path.parent.is_dir():
        raise ConfigError("its folder does not exist", str(path), remedy=f"Create it: mkdir -p {path.parent}")


def _save(target: str, content: str) -> None:
    """Write to standard output (-) or atomically to a file. Raises PermissionDenied or StorageError."""
    from flip.runs.rundir import write_text
    from jobs.common.filesystem import unwritable
    from jobs.common.text import plain_lines

    if target == "-":
        print(plain_lines(content), end="")
        return
    path = Path(target).expanduser()
    try:
        write_text(path, content)
    except OSError as error:
        plain = OSError(error.errno, error.strerror)  # without the temporary file's name
        raise unwritable(plain, path, "Name another file with --out or --csv.") from error
