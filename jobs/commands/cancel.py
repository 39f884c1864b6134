"""flip cancel SWEEP | SWEEP/RUN | SWEEP/PATTERN ...: save and stop runs; they do not start again."""

import argparse

from jobs.common.cli import Parser, add_run_arguments, confirm, run_command

EXAMPLES = """examples:
  flip cancel quickstart/masked
  flip cancel 'scale/*-s1' '!scale/large*'       patterns; ! excludes runs
  flip cancel quickstart --yes --why "wrong learning rate"
On Slurm a second cancel kills jobs that are still saving.
A cancelled run keeps its checkpoints; `flip submit --sweep FILE --retry` resumes from the newest.
"""


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="flip cancel", description="Save and stop runs. They do not start again by themselves.", epilog=EXAMPLES
    )
    add_run_arguments(parser, all_runs=False)
    parser.add_argument("--yes", action="store_true", help="do not ask for confirmation")
    parser.add_argument("--why", default="", help="a reason, recorded in the run directory")
    return run_command(cancel, parser.parse_args(arguments))


def cancel(args: argparse.Namespace) -> int:
    import json

    from jobs.common.text import plain
    from jobs.submitted_runs import clusters, select

    chosen = clusters.cancellable(select.chosen(args))
    if chosen and not args.yes and not confirm(f"Cancel {', '.join(plain(run.name) for run in chosen)}?"):
        return 0
    clusters.request_cancel(chosen, args.why)
    names = [run.name for run in chosen]
    if names:
        message = f"cancelled: {', '.join(map(plain, names))}"
    else:
        message = "nothing to cancel: every run has ended"
    print(json.dumps(names) if args.json else message)
    return 0
