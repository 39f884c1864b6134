"""Small studies on real data: trainings at equal measured cost, and scaling of model, data and length."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jobs.common.cli import Parser, run_command
from jobs.common.paths import REPOSITORY

EXAMPLES = """examples:
  flip study                 train missing runs, then write docs/study.md; if interrupted, run it again
  flip study --page          write the page from the complete runs
  flip study --calibrate     measure step times again (minutes, on a quiet machine): a new study
  flip study --study cheapest   small images compared with masks: docs/cheapest.md
  flip study --plan          show the arms, their lengths and cost
  flip study --study scaling --minutes 80   train the next part of the scaling study, most important first
  flip study --study scaling --predict      predict the joint corner, before it is trained
The data: flip demo_data, for scaling: flip demo_data icons
"""


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="flip study", description=__doc__, epilog=EXAMPLES, json=False)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--calibrate", action="store_true", help="measure step times and write the calibration file")
    action.add_argument("--page", action="store_true", help="write the page from the complete runs")
    action.add_argument("--plan", action="store_true", help="show the arms and their cost; start nothing")
    action.add_argument(
        "--predict", action="store_true", help="scaling: write prediction.json; the joint corner waits for it"
    )
    about = (
        "masking: docs/study.md; cheapest (small images compared with masks): docs/cheapest.md;"
        " scaling: docs/scaling_study.md"
    )
    parser.add_argument("--study", choices=["masking", "cheapest", "scaling"], default="masking", help=about)
    how = "scaling: train for at most M minutes; the next call continues (default: until all is complete)"
    parser.add_argument("--minutes", type=float, default=float("inf"), metavar="M", help=how)
    parser.add_argument("--cluster", default="pair", metavar="NAME", help="profile (default: pair, two runs at a time)")
    docs = REPOSITORY / "docs"
    parser.add_argument("--docs", type=Path, default=docs, metavar="FOLDER", help="folder for the page and its files")
    args = parser.parse_args(arguments)
    if args.study != "scaling" and (args.predict or args.minutes != float("inf")):
        parser.error("--predict and --minutes are for --study scaling")
    return run_command(run, args)


def run(options: argparse.Namespace) -> int:
    from jobs.common.filesystem import unwritable
    from tools.studies.runner import Unfinished

    try:
        (_scaling if options.study == "scaling" else _run)(options)
    except Unfinished as error:
        print("the study is not complete; run the same command again to continue", file=sys.stderr)
        return int(error.args[0])
    except OSError as error:
        raise unwritable(error, options.docs, "Choose another --docs.") from error
    return 0


def _run(options: argparse.Namespace) -> None:
    from flip.runs import deletion
    from flip.runs.errors import ConfigError
    from flip.runs.rundir import write_json
    from jobs.common.paths import runs_root
    from tools.studies import arm_scores, masking_page, runner
    from tools.studies.definitions import STUDIES

    design = STUDIES[options.study]
    path, choices = (options.docs / design.name / name for name in ("calibration.json", "choices.json"))
    if options.calibrate:
        runner.write_calibration(design, path, options.cluster)
        deletion.delete_file(choices, missing_ok=True)
    record = runner.read_calibration(design, path)
    times = runner.seconds_per_sample(record)
    if options.calibrate or options.plan:
        print(masking_page.plan(design, times))
        return
    recorded = arm_scores.recorded(design, choices)
    if not options.page:
        runner.study(design, times, options.cluster, recorded)
    study = runner.collect(design, recorded)
    if not study.runs and (options.docs / f"{design.name}.md").exists():  # with results of another machine
        raise ConfigError("no run of this study is complete here", str(runs_root()), remedy="Train it: without --page.")
    if not recorded and study.chosen.keys() == design.arms.keys():
        write_json(choices, study.chosen)
    for written in masking_page.write(options.docs, record, study):
        print(written)


def _scaling(options: argparse.Namespace) -> None:
    from tools.studies import runner, scaling_design, scaling_page, scaling_runner

    folder = options.docs / scaling_design.NAME
    if options.calibrate:
        runner.write_calibration(scaling_design, folder / "calibration.json", options.cluster)
    study = scaling_runner.read(folder)
    if options.calibrate or options.plan:
        print(scaling_page.plan(study))
        return
    if options.predict:
        scaling_runner.predict(study)
    elif not options.page:
        study = scaling_runner.train(folder, options.cluster, 60 * options.minutes)
    for written in scaling_page.write(options.docs, scaling_runner.read(folder)):
        print(written)
