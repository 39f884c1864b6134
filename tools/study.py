"""A small study on real data: masked against unmasked training at equal measured cost, with paired seeds."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

EXAMPLES = """examples:
  python tools/study.py                 train missing runs, then write docs/study.md; run it again to continue
  python tools/study.py --page          write the page from the complete runs
  python tools/study.py --calibrate     measure step times again (minutes, on a quiet machine): a new study
  python tools/study.py --plan          show the arms, their lengths and cost
The data: python tools/demo_data.py
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--calibrate", action="store_true", help="measure step times, write them to the calibration file")
    one.add_argument("--page", action="store_true", help="write the page from the runs that are complete")
    one.add_argument("--plan", action="store_true", help="show the arms and what they cost, start nothing")
    parser.add_argument("--cluster", default="pair", metavar="NAME", help="profile (default: pair, two runs at a time)")
    parser.add_argument("--docs", type=Path, metavar="FOLDER", help="folder for study.md and study/ (default: docs)")
    options = parser.parse_args(arguments)
    from flip.runs.errors import FlipError
    from tools.masking_study.runner import ROOT, Unfinished

    docs = options.docs or ROOT / "docs"
    try:
        return _do(options, docs)
    except Unfinished as error:
        print("the study is not done; the same command goes on", file=sys.stderr)
        return int(error.args[0])
    except FlipError as error:
        print(error, file=sys.stderr)
        return error.code
    except OSError as error:
        print(f"{error.filename or docs}: {error.strerror}", file=sys.stderr)
        return 77 if isinstance(error, PermissionError) else 69


def _do(options: argparse.Namespace, docs: Path) -> int:
    from flip.runs.rundir import write_json
    from tools.masking_study import calibration, paired_stats, runner, study_page
    from tools.masking_study.design import ROUNDS

    kept, choices = docs / "study" / "calibration.json", docs / "study" / "choices.json"
    if options.calibrate:
        before = calibration.machine()
        timed = runner.calibrate(options.cluster)
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, calibration.record(timed, before))
        choices.unlink(missing_ok=True)
    found = calibration.read(kept)
    times = calibration.times(found)
    if options.calibrate or options.plan:
        print(study_page.plan(times))
        return 0
    recorded = paired_stats.recorded(choices)
    if not options.page:
        runner.study(times, options.cluster, recorded)
    there = runner.collect(recorded)
    if not recorded and all(one.name in there.chosen for each in ROUNDS for one in each.arms):
        write_json(choices, there.chosen)
    for path in study_page.write(docs, found, there):
        print(path)
    return 0


if __name__ == "__main__":
    from jobs.common.cli import quietly

    sys.exit(quietly(main))
