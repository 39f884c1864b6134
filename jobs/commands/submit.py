"""flip submit SWEEP: check a sweep, show its cost, start the runs that are missing."""

import argparse
import errno
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.common import first_process
from jobs.common.cli import INDEX, Parser, add_sweep_arguments, discard_output, note, run_command

if TYPE_CHECKING:
    from jobs.submission.submission import Submission

END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, the end of a container or pod, and the end of a terminal."""
EXAMPLES = """examples:
  flip submit quickstart --cluster local --watch
  flip submit model_scaling --dry-run
  flip submit quickstart --only 'mask*' data.workers=2 stages.pretrain.samples=1e5
  flip submit quickstart --seeds 0 1 2
  flip submit my.yaml --changed fork --prune --dry-run
The same command again starts only what is missing; with --watch it returns to running runs.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="flip submit",
        description="Submit the runs of a sweep that are missing. Complete and running runs are left alone.",
        epilog=EXAMPLES,
    )
    add_sweep_arguments(parser)
    parser.add_argument(
        "--cluster", metavar="NAME", help="profile: a name in sweeps/clusters or a .yaml file; default: the sweep's"
    )
    parser.add_argument(
        "--root",
        metavar="DIR",
        help="folder of run directories; default: runs_root of the profile, FLIP_RUNS, else ./runs",
    )
    parser.add_argument(
        "--only", metavar="PATTERN", help="submit only runs whose name matches one of the shell patterns that follow"
    )
    parser.add_argument("--seeds", type=INDEX, nargs="+", metavar="N", help="start every run once per seed")
    parser.add_argument("--dry-run", action="store_true", help="show the plan, its cost and all checks; write nothing")
    _add_options_of_existing_runs(parser)
    parser.add_argument(
        "--no-canary",
        action="store_true",
        help="start all runs at once, without a first run (canary) for each kind of resources",
    )
    parser.add_argument(
        "--watch", action="store_true", help="show progress until all runs have ended; Ctrl-C does not stop the runs"
    )
    parser.add_argument(
        "--foreground", action="store_true",
        help="--watch, but Ctrl-C, SIGTERM or a closed terminal stops the runs: they save a checkpoint, and the command"
        " ends with code 75; with --retry it continues them",
    )  # fmt: skip
    parser.add_argument("--yes", action="store_true", help="do not ask for confirmation")
    parser.add_argument(
        "--script", action="store_true", help="with --dry-run: show the batch script for each kind of resources"
    )
    return parser


def _add_options_of_existing_runs(parser: argparse.ArgumentParser) -> None:
    """Options for runs that exist already."""
    parser.add_argument("--retry", action="store_true", help="restart failed and cancelled runs, with the current code")
    parser.add_argument(
        "--changed",
        choices=["keep", "extend", "fork", "restart", "data"],
        help="what to do with runs whose configuration has changed: keep, extend (continue as NAME-v2 from the newest"
        " checkpoint), fork (start as NAME-v2), restart (move the old run to the trash first; asks), data (continue"
        " with the new data set, if nothing else changed); default: refuse",
    )
    parser.add_argument(
        "--take-over",
        action="store_true",
        help="let renamed, moved or copied runs that start delete the checkpoints at checkpoint.url that they have"
        " inherited, as retention allows; asks",
    )
    parser.add_argument(
        "--prune",
        action="store_true",
        help="cancel runs that are no longer in the sweep and move them to the trash; asks",
    )
    parser.add_argument(
        "--allow-prune-majority", "--prune-most", action="store_true", dest="prune_most",
        help="--prune, even if that removes more than half of the runs",
    )  # fmt: skip


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with exit code 2 if an option would have no effect, or if two options contradict each other."""
    if args.script and not args.dry_run:
        parser.error("--script shows the batch scripts of a dry run: add --dry-run")
    if (args.watch or args.foreground) and (args.json or args.dry_run):
        option = "--watch" if args.watch else "--foreground"
        other = "--json" if args.json else "--dry-run"
        parser.error(f"{option} cannot be combined with {other}")
    args.watch = args.watch or args.foreground
    more = [word for word in args.overrides if "=" not in word]
    if args.only is not None and more:  # names after the first pattern; a setting has a =
        args.only = " ".join([args.only, *more])
        args.overrides = [word for word in args.overrides if "=" in word]


def main(arguments: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(arguments)
    check_options(parser, args)
    if args.foreground and first_process.is_first():
        return first_process.run_below(lambda: run_command(submit, args), END_SIGNALS)
    return run_command(submit, args)


def submit(args: argparse.Namespace) -> int:
    from jobs.reporting.status import watch
    from jobs.submission.request import SubmitOptions
    from jobs.submission.submission import Submission

    submission = Submission(SubmitOptions.of(args))
    if args.foreground:
        return in_foreground(submission)
    code, watched = submission.run()
    if watched is None:
        return code
    return watch(watched, sys.stdout)


class EndRequested(BaseException):
    """A signal asks this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number
        """The exit code of a process that this signal ends, as a shell shows it."""


def in_foreground(submission: "Submission") -> int:
    """Submit, and show the runs until they have ended. Returns the exit code.

    The first of END_SIGNALS, or a terminal or pipe that takes no more output, cancels the runs. They save and end, and
    the command returns after them: 75 if they can be started again. A second signal ends the command only.
    """
    from jobs.reporting.status import watch

    for number in END_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _raise_end)
    try:
        try:
            code, watched = submission.run()
            if watched is None:
                return code
            return watch(watched, sys.stdout)
        except (EndRequested, OSError) as reason:
            runs = [path for path in submission.managed if path.exists()]
            if not runs or not _ends_foreground(reason):
                raise
            return _stop_runs(runs, reason)
    except EndRequested as last:
        _write("interrupted")
        return last.code


def _raise_end(number: int, _frame: object) -> None:
    raise EndRequested(number)


def _ends_foreground(reason: BaseException) -> bool:
    """Whether a signal was received, or the output is closed. Other errors, such as of a file, say nothing about it."""
    if isinstance(reason, OSError):
        return reason.filename is None and reason.errno in (errno.EPIPE, errno.EIO)
    return isinstance(reason, EndRequested)


def _stop_runs(paths: Sequence[Path], reason: BaseException) -> int:
    """Cancel the runs and wait for their end. Returns the exit code of the command."""
    from flip.runs.lifecycle import ENDED
    from flip.runs.rundir import RunDir
    from jobs.reporting.outcomes import outcomes, terminal_page
    from jobs.submitted_runs.clusters import poll_interval, request_cancel, states, worst_exit_code

    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # an error of the terminal may have come before it
    _write("cancelled: the runs save a checkpoint and end; to continue them, submit with --retry")
    runs = [RunDir(path) for path in paths]
    state_by_run = states(runs)
    request_cancel([run for run in runs if state_by_run[run.path].state not in ENDED], f"submit --foreground: {reason}")
    while any(state_by_run[run.path].state not in ENDED for run in runs):
        time.sleep(poll_interval(runs))
        state_by_run = states(runs)
    _write(str(terminal_page(outcomes(runs))))
    return worst_exit_code((run, state_by_run[run.path].state) for run in runs)


def _write(line: str) -> None:
    """Write a note. An output that is closed gets nothing any more."""
    try:
        note(line)
    except OSError:
        discard_output()
