"""python jobs/tensorboard.py [SWEEP ...]: TensorBoard over runs, each by its own name."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: jobs/ must not be on the path, where tensorboard.py hides the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.common.cli import Parser, add_root_option, quietly, run_command

if TYPE_CHECKING:
    from flip.runs.rundir import RunDir
    from jobs.runs.select import Roots

EXAMPLES = """examples:
  python jobs/tensorboard.py quickstart                  then open the address that it prints
  python jobs/tensorboard.py masking 'batch/mask50-*'    runs of two sweeps
  python jobs/tensorboard.py quickstart -- --port 7007 --bind_all    what stands after -- is TensorBoard's own

On a cluster: ssh -L 6006:localhost:6006 LOGIN_NODE, and open http://localhost:6006 here.
"""
AGAIN = 10.0
"""Seconds after which runs that have begun since are added."""


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        description="TensorBoard over runs, each by its own name; runs that begin later are added.", epilog=EXAMPLES
    )
    parser.add_argument("what", nargs="*", help="sweeps, sweep/run, patterns as of cancel, or folders; default: all")
    add_root_option(parser)
    typed = sys.argv[1:] if arguments is None else arguments
    at = typed.index("--") if "--" in typed else len(typed)
    args, own = parser.parse_args(typed[:at]), typed[at + 1 :]
    from jobs.common.cluster_profile import roots

    return run_command(lambda: serve(args.what, roots(args.root), own))


def serve(what: Sequence[str], root: Roots, own: Sequence[str]) -> int:
    """Until it ends, or Ctrl-C or SIGTERM ends it: its exit code. Raises ConfigError where no run is meant.

    TensorBoard calls a run by the folder of its events: a folder of links to them is all that it is shown.
    """
    import signal
    import subprocess
    import tempfile

    from flip.runs.errors import ConfigError

    with tempfile.TemporaryDirectory(prefix="flip-tensorboard-") as folder:
        add(_runs(what, root), Path(folder))
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder]
        child = subprocess.Popen([*command, "--window_title", " ".join(what) or "FLIP", *own])
        signal.signal(signal.SIGTERM, lambda number, frame: child.terminate())
        try:
            while True:
                try:
                    return child.wait(AGAIN)
                except subprocess.TimeoutExpired:
                    with contextlib.suppress(ConfigError):  # what was meant went to the trash meanwhile
                        add(_runs(what, root), Path(folder))
        except KeyboardInterrupt:  # the terminal's signal went to both
            return 0
        finally:
            child.terminate()
            child.wait()


def _runs(what: Sequence[str], root: Roots) -> list[RunDir]:
    from jobs.runs import select

    return select.select_many(what, root) if what else select.select(None, root)


def add(runs: Sequence[RunDir], folder: Path) -> list[str]:
    """Link the events of runs that have begun into the folder, once each: the names that are new.

    A run is called by its name, and where several sweeps are shown, SWEEP/RUN.
    """
    several = len({run.path.parent for run in runs}) > 1
    made = []
    for run in runs:
        name = f"{run.sweep}/{run.name}" if several else run.name
        link = folder / name
        if run.tensorboard.is_dir() and not link.is_symlink():
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(run.tensorboard, target_is_directory=True)
            made.append(name)
    return made


if __name__ == "__main__":
    sys.exit(quietly(main))
