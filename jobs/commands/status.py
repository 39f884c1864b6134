"""flip status [SWEEP | SWEEP/RUN | PATTERN | DIR ...]: state of runs, from the run directories and the
cluster."""

import argparse
import json
import sys

from jobs.common.cli import Parser, add_run_arguments, run_command

EXAMPLES = """examples:
  flip status                      every sweep below RUNS_ROOT
  flip status quickstart           one sweep
  flip status quickstart/masked 'scale/*-s1'    one run, and those that match a pattern
  flip status quickstart --watch   redrawn until all runs have ended; Ctrl-C does not stop them
  flip status --goodput            how the runs spent their time
  flip status --root /data/runs --json
exit code: 0, or 69 if the state of every run is unknown (Slurm does not answer, or files cannot be read); with --watch
that of the worst run
"""


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="flip status", description="Show state and progress of runs.", epilog=EXAMPLES)
    add_run_arguments(parser)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--watch", action="store_true", help="redraw until all runs have ended; the exit code is that of the worst run"
    )
    kind.add_argument(
        "--goodput", action="store_true", help="show useful, repeated and lost time, and the setting to change"
    )
    args = parser.parse_args(arguments)
    if args.watch and args.json:
        parser.error("--watch cannot be combined with --json")
    return run_command(status, args)


def status(args: argparse.Namespace) -> int:
    from flip.runs.errors import COMPLETE, STORAGE
    from jobs.common import trust
    from jobs.common.terminal import show
    from jobs.reporting.status import render, table, watch
    from jobs.submitted_runs import select

    runs = select.chosen(args)
    if args.watch:
        return watch([run.path for run in runs], sys.stdout)
    if args.goodput:
        from jobs.reporting import goodput

        sums = goodput.of_runs(runs)
        if args.json:
            print(json.dumps(goodput.as_dict(sums), indent=1))
        else:
            show(goodput.render(sums))
        return COMPLETE
    if not args.quiet:
        for text in trust.warnings(dict.fromkeys(run.path.parent for run in runs)):
            print(text, file=sys.stderr)
    rows = table(runs)
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        show(render(rows, runs))
    if all(row["state"] == "unknown" for row in rows):
        return STORAGE
    return COMPLETE
