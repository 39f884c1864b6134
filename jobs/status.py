"""python jobs/status.py [SWEEP | SWEEP/RUN | DIR]: where every run stands, from the run directories and the cluster."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Python puts a script's folder first in sys.path, where jobs/tensorboard.py would hide the package of that name.
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if Path(path or ".").resolve() != HERE)]

from jobs.common.cli import Parser, add_root_option, quietly

EXAMPLES = """examples:
  python jobs/status.py                      every sweep below RUNS_ROOT
  python jobs/status.py quickstart           one sweep
  python jobs/status.py quickstart/mask50    one run
  python jobs/status.py quickstart --watch   redrawn until all runs have ended; Ctrl-C leaves them going
  python jobs/status.py --goodput            what the time of the runs went to
  python jobs/status.py --root /data/runs --json
exit code: 0, or 69 if the state of every run is unknown (Slurm does not answer, or files cannot be read); with --watch
that of the worst run
"""


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        description="Where every run stands.", epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", help="a sweep, sweep/run or a folder; default: all")
    add_root_option(parser)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--watch", action="store_true", help="go on until all have ended; the exit code says how")
    kind.add_argument("--goodput", action="store_true", help="useful, repeated and lost time, and what would help")
    parser.add_argument("--json", action="store_true", help="one JSON list on standard output")
    args = parser.parse_args(arguments)
    if args.watch and args.json:
        parser.error("--watch is for people: ask for --json as often as you like")
    from flip.runs.errors import COMPLETE, STORAGE, FlipError
    from jobs.common.cluster_profile import roots
    from jobs.runs import select

    try:
        runs = select.select(args.what, roots(args.root))
    except FlipError as error:
        print(error, file=sys.stderr)
        return error.code
    if args.watch:
        from jobs.common.cli import again
        from jobs.reporting.status import watch

        return watch([run.path for run in runs], sys.stdout, again=again())
    if args.goodput:
        from jobs.reporting import goodput

        sums = goodput.of_runs(runs)
        print(json.dumps(goodput.as_dict(sums), indent=1) if args.json else goodput.render(sums))
        return 0
    from jobs.reporting.status import render, table

    rows = table(runs)
    print(json.dumps(rows, indent=1) if args.json else render(rows))
    return STORAGE if all(row["state"] == "unknown" for row in rows) else COMPLETE


if __name__ == "__main__":
    sys.exit(quietly(main))
