"""python jobs/tensorboard.py [SWEEP ...]: TensorBoard over runs, each under its own name."""

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

EXAMPLES = """examples:
  python jobs/tensorboard.py quickstart                  then open the address that it prints
  python jobs/tensorboard.py masking 'batch/mask50-*'    runs of two sweeps
  python jobs/tensorboard.py quickstart -- --port 7007 --bind_all    options after -- go to TensorBoard

On a cluster: ssh -L 6006:localhost:6006 LOGIN_NODE, and open http://localhost:6006 here.
"""
RESCAN_SECONDS = 10.0
"""How often new runs are added."""


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        description="Start TensorBoard over runs, each under its own name. Runs that start later are added.",
        epilog=EXAMPLES,
        json=False,
    )
    parser.add_argument("target", nargs="*", help="sweeps, SWEEP/RUN, patterns as for cancel, or folders; default: all")
    add_root_option(parser)
    typed = sys.argv[1:] if arguments is None else arguments
    at = typed.index("--") if "--" in typed else len(typed)
    args, own = parser.parse_args(typed[:at]), typed[at + 1 :]
    return run_command(lambda args: serve(args.target, args.root, own), args)


def serve(targets: Sequence[str], root: str | None, own: Sequence[str]) -> int:
    """Run TensorBoard until it ends, or Ctrl-C or SIGTERM ends it; returns its exit code. Raises ConfigError.

    TensorBoard names a run after the folder of its events, so it gets a temporary folder of links.
    """
    import signal
    import subprocess
    import tempfile

    from flip.runs.errors import ConfigError

    with tempfile.TemporaryDirectory(prefix="flip-tensorboard-") as folder:
        add(_runs(targets, root), Path(folder))
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder]
        child = subprocess.Popen([*command, "--window_title", " ".join(targets) or "FLIP", *own])
        signal.signal(signal.SIGTERM, lambda number, frame: child.terminate())
        try:
            while True:
                try:
                    return child.wait(RESCAN_SECONDS)
                except subprocess.TimeoutExpired:
                    with contextlib.suppress(ConfigError):  # the runs may be in the trash by now
                        add(_runs(targets, root), Path(folder))
        except KeyboardInterrupt:  # the terminal sends the signal to both processes
            return 0
        finally:
            child.terminate()
            child.wait()


def _runs(targets: Sequence[str], root: str | None) -> list[RunDir]:
    from jobs.common.cluster_profile import roots
    from jobs.runs import select

    return select.select_many(targets, roots(root)) if targets else select.select(None, roots(root))


def add(runs: Sequence[RunDir], folder: Path) -> list[str]:
    """Link the events of runs into the folder, once each; returns the new names: RUN, or SWEEP/RUN of several
    sweeps."""
    several = len({run.path.parent for run in runs}) > 1
    added = []
    for run in runs:
        name = f"{run.sweep}/{run.name}" if several else run.name
        link = folder / name
        if run.tensorboard.is_dir() and not link.is_symlink():
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(run.tensorboard, target_is_directory=True)
            added.append(name)
    return added


if __name__ == "__main__":
    sys.exit(quietly(main))
