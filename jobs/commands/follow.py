"""flip follow RUN: send the metrics of runs to an experiment tracker, such as Weights & Biases."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from jobs.common.cli import COUNT, INTERRUPTED, Parser, add_root_option, note, run_command

if TYPE_CHECKING:
    from flip.runs.rundir import RunDir

EXAMPLES = """examples:
  flip follow scale/large                      until the run has ended
  flip follow scale --once                     catch up with all runs of a sweep
  flip follow scale --once --project me/clip   a project for runs without monitor.wandb
  WANDB_MODE=offline flip follow scale --once  then: wandb sync runs/scale/*/trackers/wandb/from-*/wandb
Runs with monitor.wandb are followed while they train; this command is for what is left. It sends each step once.
"""


def main(arguments: list[str] | None = None) -> int:
    from flip.files.creation import close_umask
    from jobs.tracking.tracker import TRACKERS

    parser = Parser(
        prog="flip follow",
        description="Send the metrics of runs to an experiment tracker.",
        epilog=EXAMPLES,
        json=False,
    )
    parser.add_argument("target", nargs="+", help="sweeps, SWEEP/RUN, folders, or patterns; several only with --once")
    parser.add_argument("--once", action="store_true", help="send what is final now, and end")
    parser.add_argument("--tracker", default="wandb", choices=TRACKERS, help="default: wandb")
    parser.add_argument("--project", default="", help="the project there; default: monitor.TRACKER of each run")
    parser.add_argument("--attempt", type=COUNT, help=argparse.SUPPRESS)  # of the launcher: end with this attempt
    parser.add_argument("--job", action="store_true", help=argparse.SUPPRESS)  # or with its job, at SIGUSR1
    add_root_option(parser)
    args = parser.parse_args(arguments)
    close_umask()  # a tracker's package writes files into the run directory
    if args.attempt is None:
        return run_command(follow, args)
    return run_command(follow_attempt, args)


def follow(args: argparse.Namespace) -> int:
    import time

    from flip.files import current_folder
    from flip.runs.errors import ConfigError, FlipError
    from jobs.common.cluster_profile import roots
    from jobs.submitted_runs import select
    from jobs.tracking import follower

    runs = select.select_many(args.target, roots(args.root))
    current_folder.leave()
    code = 0
    if len(runs) > 1 and not args.once:
        raise ConfigError("several runs", value=len(runs), remedy="Add --once, or name one run.")
    for run in runs:
        name = f"{run.sweep}/{run.name}"
        try:
            with follower.lock(run, args.tracker) as mine:
                if not mine:
                    note(f"{name}: another follower is active and sends its metrics")
                    continue
                ended = (lambda: True) if args.once else _is_over(run)
                each = None
                try:
                    while not run.newest_attempt() and not ended():  # the first one is part of the tracker's run id
                        time.sleep(0.5)
                    if run.newest_attempt():
                        each = follower.Follower(run, args.tracker, args.project)
                        each.follow(ended)
                except KeyboardInterrupt:
                    if each is None or args.once:
                        raise
                    code = INTERRUPTED
                if each is None:
                    note(f"{name}: has not started")
                    continue
                each.close()
                note(f"{name}: up to date")
        except FlipError as error:  # the others are sent nevertheless
            print(f"{name}: {error}", file=sys.stderr)
            code = error.code
    return code


def _is_over(run: RunDir) -> Callable[[], bool]:
    """Whether the run has ended, as its scheduler says: one that waits for its requeue has not."""
    import math
    import time

    from flip.runs import lifecycle
    from jobs.submitted_runs import clusters

    over = False
    asked = -math.inf

    def is_over() -> bool:
        nonlocal over, asked
        if not over and time.monotonic() >= asked + clusters.poll_interval([run]):
            over = clusters.states([run])[run.path].state in lifecycle.ENDED
            asked = time.monotonic()
        return over

    return is_over


def follow_attempt(args: argparse.Namespace) -> int:
    """For the launcher: follow until the attempt ends, at low priority, and never for long after that.

    With ``--job`` until the owner of the job sends SIGUSR1: node agents may start further attempts in the same job.
    """
    import os
    import signal
    import threading
    from functools import partial

    from flip.files import current_folder
    from flip.runs.errors import start_logging
    from flip.runs.rundir import RunDir
    from jobs.tracking import follower

    start_logging(sys.stderr)
    os.nice(10)
    run = RunDir(args.target[0])
    current_folder.leave()
    if args.job:
        asked = threading.Event()
        signal.signal(signal.SIGUSR1, lambda *_: asked.set())
        parent = os.getppid()

        def ended() -> bool:
            return asked.is_set() or not run.path.exists() or os.getppid() != parent
    else:
        ended = partial(follower.has_ended, run, args.attempt, os.getppid())
    follower.exit_after(ended)
    with follower.lock(run, args.tracker, ended) as mine:
        if mine:
            each = follower.Follower(run, args.tracker, args.project)
            each.follow(ended)
            each.close()
    return 0
