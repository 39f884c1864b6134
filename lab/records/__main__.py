"""The record page: the fewest core-seconds with which a recipe reaches a fixed accuracy."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from jobs.common.cli import Parser, run_command, run_main
from jobs.common.paths import REPOSITORY

EXAMPLES = """examples:
  python -m lab.records                  write docs/records.md from docs/records
  python -m lab.records --measure NAME   train a run of sweeps/records.yaml with five new seeds; write its row and page
"""


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m lab.records", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--measure", metavar="NAME", help="measure this run of sweeps/records.yaml")
    parser.add_argument("--cluster", default="pair", metavar="NAME", help="profile (default: pair, two runs at a time)")
    docs = REPOSITORY / "docs"
    parser.add_argument("--docs", type=Path, default=docs, metavar="FOLDER", help="folder for the page and its rows")
    return run_command(run, parser.parse_args(arguments))


def run(options: argparse.Namespace) -> int:
    from jobs.common.filesystem import unwritable
    from lab.records import page, rows

    written = []
    try:
        if options.measure:
            from lab.records.measure import measure
            from lab.studies.engine.training import Unfinished

            try:
                row = measure(options.measure, options.docs, options.cluster)
            except Unfinished as error:
                print("the row is not complete; run the same command again to continue", file=sys.stderr)
                return int(error.args[0])
            written.append(str(rows.write(options.docs / "records", row)))
        written.append(str(page.write(options.docs)))
    except OSError as error:
        raise unwritable(error, options.docs, "Choose another --docs.") from error
    print(json.dumps({"written": written}) if options.json else "\n".join(written))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
