"""python jobs/submit.py --sweep FILE: check, show the cost, start what is not there yet."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script: jobs/ must not be on the path, where tensorboard.py hides the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.common.cli import Parser, again, quietly, run_command

EXAMPLES = """examples:
  python jobs/submit.py --sweep sweeps/quickstart.yaml --cluster local --watch
  python jobs/submit.py --sweep sweeps/model_scaling.yaml --dry-run
  python jobs/submit.py --sweep sweeps/quickstart.yaml --only 'mask*' data.workers=2 stages.pretrain.samples=1e5
  python jobs/submit.py --sweep sweeps/quickstart.yaml --seeds 0 1 2
  python jobs/submit.py --sweep my.yaml --changed fork --prune --dry-run
The same command again starts only what is missing; with --watch it comes back to runs that go on.
"""


def parser() -> argparse.ArgumentParser:
    made = Parser(
        description="Submit a sweep: check it, show what it costs, start what is not there yet.", epilog=EXAMPLES
    )
    made.add_argument("--sweep", required=True, metavar="FILE", help="the sweep file, or its name in sweeps/")
    made.add_argument("--cluster", metavar="NAME", help="profile in sweeps/clusters; default: the sweep's")
    made.add_argument("--only", metavar="PATTERN", help="only runs whose names match, as in a shell")
    made.add_argument("--seeds", type=int, nargs="+", metavar="N", help="every run once per seed")
    made.add_argument("--dry-run", action="store_true", help="check and show, start nothing, write nothing")
    made.add_argument("--retry", action="store_true", help="start failed and cancelled runs again, with today's code")
    made.add_argument(
        "--changed",
        choices=["keep", "fork", "restart", "data"],
        help="what to do with runs whose directory holds another configuration: keep, fork (start as NAME-v2), restart"
        " (move the old run to the trash first; asks), data (go on with the new data set, if nothing else changed);"
        " default: refuse",
    )
    made.add_argument(
        "--prune", action="store_true", help="cancel runs that the sweep no longer has and move them to the trash; asks"
    )
    made.add_argument(
        "--allow-prune-majority", "--prune-most", action="store_true", dest="prune_most",
        help="--prune, even if that removes more than half of the runs",
    )  # fmt: skip
    made.add_argument("--no-canary", action="store_true", help="start all at once: no first run of a shape goes ahead")
    made.add_argument("--watch", action="store_true", help="stay and show progress; Ctrl-C leaves the runs going")
    made.add_argument("--yes", action="store_true", help="do not ask, whatever it costs")
    made.add_argument(
        "--script", action="store_true", help="with --dry-run: show the batch scripts, one per shape of resources"
    )
    made.add_argument("--json", action="store_true", help="the plan as JSON on standard output")
    made.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings on top of the sweep's")
    return made


def check_options(made: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with exit code 2 if an option would have no effect, or if two options contradict each other."""
    if args.script and not args.dry_run:
        made.error("--script shows the batch scripts of a dry run: add --dry-run")
    if args.watch and (args.json or args.dry_run):
        made.error(f"--watch cannot be combined with {'--json' if args.json else '--dry-run'}")


def main(arguments: list[str] | None = None) -> int:
    made = parser()
    args = made.parse_args(arguments)
    check_options(made, args)
    return run_command(lambda: submit(args))


def submit(args: argparse.Namespace) -> int:
    from jobs.submission.submission import Submission, SubmitOptions

    code, watched = Submission(SubmitOptions(**vars(args))).run()
    if watched is None:
        return code
    from jobs.reporting.status import watch

    return watch(watched, sys.stdout, again=again())


if __name__ == "__main__":
    sys.exit(quietly(main))
