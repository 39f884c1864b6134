"""Small studies on real data: trainings at equal measured cost, and scaling of model, data and length."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from jobs.common.cli import AMOUNT, Parser, run_command, run_main
from jobs.common.paths import REPOSITORY

EXAMPLES = """examples:
  python -m lab.study                 train missing runs, then write docs/study.md; if interrupted, run it again
  python -m lab.study --page          write the page from the results
  python -m lab.study --calibrate     measure step times again (minutes, on a quiet machine): a new study
  python -m lab.study --study cheapest   small images compared with masks: docs/cheapest.md
  python -m lab.study --plan          show the missing runs and their cost
  python -m lab.study --again mine    train it a second time, with the same lengths and learning rates, into mine/
  python -m lab.study --study scaling --minutes 80   train the next part of the scaling study, most important first
  python -m lab.study --study scaling --baseline     the nearest training image in place of a model; no training
  python -m lab.study --study scaling --predict      predict the joint corner, before it is trained
The data: flip demo_data, for scaling: python -m lab.icons
"""
_STUDY = re.compile(r"^STUDY = ", re.MULTILINE)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m lab.study", description=__doc__, epilog=EXAMPLES, json=False)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--calibrate", action="store_true", help="measure step times and write the calibration file")
    action.add_argument("--page", action="store_true", help="write the page from the results")
    action.add_argument("--plan", action="store_true", help="show the missing runs and their cost; start nothing")
    action.add_argument(
        "--baseline",
        action="store_true",
        help="classify by the nearest training image at 16 x 16 pixels; no training",
    )
    action.add_argument(
        "--predict", action="store_true", help="write prediction.json; predicted runs wait for it (scaling)"
    )
    how = "train it again (all runs that are not in FLIP_RUNS), with the same lengths; its page goes to FOLDER"
    action.add_argument("--again", type=Path, metavar="FOLDER", help=how)
    help_text = "a file of lab/studies (default: masking)"
    parser.add_argument("--study", choices=studies(), default="masking", help=help_text)
    how = "train for at most M minutes; the next call continues (default: until all is complete)"
    parser.add_argument("--minutes", type=AMOUNT, default=float("inf"), metavar="M", help=how)
    parser.add_argument("--cluster", default="pair", metavar="NAME", help="profile (default: pair, two runs at a time)")
    docs = REPOSITORY / "docs"
    parser.add_argument("--docs", type=Path, default=docs, metavar="FOLDER", help="folder for the page and its files")
    return run_command(run, parser.parse_args(arguments))


def studies() -> list[str]:
    """Names of the studies: the files in lab/studies with an object STUDY."""
    paths = sorted((REPOSITORY / "lab" / "studies").glob("*.py"))
    return [path.stem for path in paths if _STUDY.search(path.read_text(encoding="utf-8"))]


def run(options: argparse.Namespace) -> int:
    from jobs.common.filesystem import unwritable
    from lab.studies.engine.training import Unfinished

    try:
        _run(options)
    except Unfinished as error:
        print("the study is not complete; run the same command again to continue", file=sys.stderr)
        return int(error.args[0])
    except BrokenPipeError:
        raise  # the reader of the output has gone; the folder can be written
    except OSError as error:
        raise unwritable(error, options.docs, "Choose another --docs.") from error
    return 0


def _run(options: argparse.Namespace) -> None:
    from importlib import import_module

    from flip.runs.rundir import write_json
    from lab.studies.engine import page, training
    from lab.studies.engine.study import read

    study = import_module(f"lab.studies.{options.study}").STUDY
    docs = options.docs
    if options.calibrate:
        training.calibrate(study, docs, options.cluster)
    if options.calibrate or options.plan:
        print(page.plan(read(study, docs)))
        return
    if options.again:
        training.again(study, docs, options.again)
        docs = options.again
    if options.baseline:
        from flip.common.cache import cache_root
        from lab.studies.engine import baseline

        print(baseline.write(study, docs, cache_root()))
    elif options.predict:
        results = read(study, docs)
        write_json(results.folder / "prediction.json", study.predict(results))
    elif options.page:
        training.collect(study, docs)
    else:
        training.train(study, docs, options.cluster, 60 * options.minutes)
    for written in page.write(docs, study, read(study, docs)):
        print(written)


if __name__ == "__main__":
    sys.exit(run_main(main))
