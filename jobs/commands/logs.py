"""flip logs SWEEP/RUN ...: output of the ranks of an attempt."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.common.cli import COUNT, INDEX, Parser, add_run_arguments, run_command

if TYPE_CHECKING:
    import codecs
    from collections.abc import Iterator, Sequence

    from flip.runs.rundir import RunDir

EXAMPLES = """examples:
  flip logs quickstart/masked              standard output of the newest attempt
  flip logs quickstart/masked --err -f     follow its standard error, through requeues, until the run is over
  flip logs quickstart/masked --attempt 1 --node 0
  flip logs 'quickstart/*' -f              several runs; a line names the file that follows
Control characters are escaped. `--json` prints the paths of the files, which contain the original bytes.
"""
POLL = 0.5


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="flip logs", description="Show the output of the ranks of an attempt.", epilog=EXAMPLES)
    add_run_arguments(parser, all_runs=False)
    parser.add_argument("-f", "--follow", action="store_true", help="print new output until the run has ended")
    parser.add_argument("--attempt", type=COUNT, help="default: the newest")
    parser.add_argument(
        "--node", type=INDEX, metavar="I", help="only node I (0, 1, ...); default: all nodes and the batch script"
    )
    parser.add_argument("--err", action="store_true", help="show standard error instead of standard output")
    args = parser.parse_args(arguments)
    if args.json and args.follow:
        parser.error("--follow has no effect with --json, which lists the paths of the logs")
    return run_command(logs, args)


def logs(args: argparse.Namespace) -> int:
    import json

    from flip.runs.errors import ConfigError
    from jobs.submitted_runs import select

    runs = select.chosen(args)
    paths = [path for run in runs for path in files(run, args.attempt, args.err, args.node)]
    if args.json:
        print(json.dumps([str(path) for path in paths], indent=1))
        return 0
    if not (args.follow and args.attempt is None) and not paths:
        numbers = ", ".join(str(n) for run in runs[:1] for n in run.attempt_numbers()) or "none"
        what = "no logs of that attempt" + ("" if args.node is None else f" from node {args.node}")
        raise ConfigError(what, str(runs[0].logs), args.attempt, f"Attempts begun: {numbers}.")
    follow(runs, args.attempt, args.err, args.follow, args.node)
    return 0


def files(run: RunDir, attempt: int | None, err: bool, node: int | None = None) -> list[Path]:
    """Paths of the logs of an attempt (None: the newest): of the batch job and each node, or only of ``node``.

    For None also those of batch scripts that failed since, before they started an attempt.
    """
    from jobs.slurm.start_problems import start_logs

    folder = run.logs / str(_newest_attempt(run) if attempt is None else attempt)
    kind = "err" if err else "out"
    if node is not None:
        return sorted(folder.glob(f"node{node}.{kind}"))
    failed = []
    if attempt is None:
        failed = start_logs(run, kind)
    return [*sorted(folder.glob(f"job.{kind}")), *sorted(folder.glob(f"node*.{kind}")), *failed]


def _newest_attempt(run: RunDir) -> int:
    from flip.runs.errors import PermissionDenied

    try:
        return run.newest_attempt()
    except PermissionError as error:
        remedy = f"Ask its owner for read permission, or exclude it: '!{run.sweep}/{run.name}'."
        raise PermissionDenied("may not be read", str(run.path), remedy=remedy) from error


def follow(runs: Sequence[RunDir], attempt: int | None, err: bool, on: bool, node: int | None = None) -> None:
    """Print the logs; with ``on`` until the attempts have ended, or if ``attempt`` is None the runs.

    Control characters are escaped.
    """
    import codecs
    import itertools
    import time

    from jobs.common.text import plain, plain_lines
    from jobs.submitted_runs.clusters import poll_interval

    read: dict[Path, int] = {}
    decoders: dict[Path, codecs.IncrementalDecoder] = {}
    begun = {run.path: _newest_attempt(run) for run in runs}
    over = not on
    asked = float("-inf")
    shown = Path()
    while True:
        if on and time.monotonic() >= asked + poll_interval(runs):  # before reading: the last lines are not missed
            over = _over(runs, attempt)
            asked = time.monotonic()
        present = []
        for run in runs:
            newest = _newest_attempt(run)  # the attempts before it have ended: their last lines are there
            if attempt is not None:
                present += [(run, path) for path in files(run, attempt, err, node)]
            else:
                present += [
                    (run, path) for n in range(begun[run.path], newest + 1) for path in files(run, n, err, node)
                ]
                present += [(run, path) for path in files(run, None, err, node) if (run, path) not in present]
            begun[run.path] = newest
        for run, path in present:
            decoder = decoders.setdefault(path, codecs.getincrementaldecoder("utf-8")("backslashreplace"))
            for block in itertools.chain([b""] * (path not in read), _blocks(path, read.get(path, 0))):
                if path != shown and (on or len(runs) > 1):
                    name = os.path.relpath(path, run.path if len(runs) == 1 else run.path.parent.parent)
                    print(f"==> {plain(name)} <==", flush=True)
                read[path] = read.get(path, 0) + len(block)
                shown = path
                text = plain_lines(decoder.decode(block).replace("\r\n", "\n").expandtabs())
                sys.stdout.buffer.write(text.encode("utf-8"))
            sys.stdout.flush()
        if over:
            if not on and not any(read.values()):
                _report_empty(attempt or runs[0].newest_attempt(), err)
            return
        time.sleep(POLL)


def _blocks(path: Path, start: int) -> Iterator[bytes]:
    """The bytes of a log from ``start`` on. Raises PermissionDenied, StorageError, or DataError if it is no file."""
    from flip.files.creation import open_regular
    from flip.runs.errors import DataError, PermissionDenied, StorageError

    try:
        with open_regular(path) as file:
            file.seek(start)
            while block := file.read(1 << 20):
                yield block
    except PermissionError as error:
        raise PermissionDenied("may not be read", str(path), remedy="Ask its owner for read permission.") from error
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror}", str(path)) from error
    except ValueError as error:
        raise DataError("is not a regular file", str(path)) from error


def _report_empty(attempt: int, err: bool) -> None:
    if err:
        kind = "error"
        hint = "without --err: output"
    else:
        kind = "output"
        hint = "--err shows errors"
    print(f"standard {kind} of attempt {attempt} is empty; {hint}, flip status progress", file=sys.stderr)


def _over(runs: Sequence[RunDir], attempt: int | None) -> bool:
    from flip.runs.lifecycle import ENDED
    from jobs.submitted_runs.clusters import states

    newest = [run for run in runs if attempt in (None, run.newest_attempt())]
    return all(state.state in ENDED for state in states(newest).values())
