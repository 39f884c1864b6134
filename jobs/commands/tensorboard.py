"""flip tensorboard [SWEEP ...]: TensorBoard over runs, each under its own name."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.common.cli import Parser, add_run_arguments, note, run_command

if TYPE_CHECKING:
    from flip.runs.rundir import RunDir

EXAMPLES = """examples:
  flip tensorboard quickstart                  then open the address that it prints
  flip tensorboard masking 'batch/mask50-*'    runs of two sweeps
  flip tensorboard quickstart -- --port 7007 --bind_all    options after -- go to TensorBoard

On a cluster: ssh -L 6006:localhost:6006 LOGIN_NODE, and open http://localhost:6006 here.
"""
WARNING = (
    "TensorBoard has no password: while it runs, every user of this machine can read these runs at its address."
    " The page of `flip report` has curves too, and the permissions of its file protect it."
)
"""Neither an unguessable path, which ``ps`` shows, nor a Unix socket, which TensorBoard refuses, would protect it."""
RESCAN_SECONDS = 10.0
"""How often new runs are added."""


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="flip tensorboard",
        description="Start TensorBoard over runs, each under its own name. Runs that start later are added.",
        epilog=EXAMPLES,
        json=False,
    )
    add_run_arguments(parser)
    typed = sys.argv[1:] if arguments is None else arguments
    at = typed.index("--") if "--" in typed else len(typed)
    args = parser.parse_args(typed[:at])
    own = typed[at + 1 :]
    return run_command(lambda args: serve(args, own), args)


def serve(args: argparse.Namespace, own: Sequence[str]) -> int:
    """Run TensorBoard until it ends, or Ctrl-C or SIGTERM ends it; returns its exit code. Raises ConfigError.

    TensorBoard names a run after the folder of its events, so it gets a temporary folder of links.
    """
    import signal
    import subprocess
    import tempfile

    from flip.runs.errors import ConfigError
    from jobs.runs import select

    with tempfile.TemporaryDirectory(prefix="flip-tensorboard-") as folder:
        add(select.chosen(args), Path(folder))
        note(WARNING)
        note("Add #custom_scalars to the address that TensorBoard prints: loss, accuracy and scores come first.")
        command = [sys.executable, "-P", "-m", "tensorboard.main", "--logdir", folder]
        child = subprocess.Popen([*command, "--window_title", " ".join(args.target) or "FLIP", *own])
        signal.signal(signal.SIGTERM, lambda number, frame: child.terminate())
        try:
            while True:
                try:
                    return child.wait(RESCAN_SECONDS)
                except subprocess.TimeoutExpired:
                    with contextlib.suppress(ConfigError):  # the runs may be in the trash by now
                        add(select.chosen(args), Path(folder))
        except KeyboardInterrupt:  # the terminal sends the signal to both processes
            return 0
        finally:
            child.terminate()
            child.wait()


def add(runs: Sequence[RunDir], folder: Path) -> list[str]:
    """Link the events of runs into the folder as SWEEP/RUN, once each; returns new names."""
    from flip.files.creation import closed_folder

    added = []
    for run in runs:
        name = f"{run.sweep}/{run.name}"
        if (folder / name).is_symlink() and os.readlink(folder / name) != str(run.tensorboard):  # in another root
            root = str(run.path.parent.parent).strip("/").replace("/", "_")
            name = f"{run.sweep}@{root}/{run.name}"
        link = folder / name
        if os.path.isdir(run.tensorboard) and not link.is_symlink():  # Path.is_dir raises if it is another user's
            closed_folder(link.parent)
            link.symlink_to(run.tensorboard, target_is_directory=True)
            added.append(name)
    return added
