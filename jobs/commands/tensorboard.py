"""flip tensorboard [SWEEP ...]: TensorBoard over runs, each under its own name."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

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
EVENTS = "tfevents"
"""Part of the name of each file of events."""
TENSORBOARD = "tensorboard"
"""Name of ``RunDir.tensorboard``."""


class _Parser(Parser):
    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized"):
            message += f"; options of TensorBoard follow after --: {self.prog} -- --port 7007"
        super().error(message)


def main(arguments: list[str] | None = None) -> int:
    parser = _Parser(
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
    """Run TensorBoard until it ends, or SIGTERM ends it; returns its exit code. Raises ConfigError, KeyboardInterrupt.

    TensorBoard names a run after the folder of its events, so it gets a temporary folder of links.
    """
    import signal
    import subprocess
    import tempfile

    from flip.files import current_folder
    from flip.runs.errors import ConfigError
    from jobs.submitted_runs import select

    with tempfile.TemporaryDirectory(prefix="flip-tensorboard-") as folder, RunLinks(Path(folder)) as links:
        links.add(select.chosen(args))
        note(WARNING)
        command = [sys.executable, "-P", "-m", "tensorboard.main", "--logdir", folder]
        command += ["--window_title", " ".join(args.target) or "FLIP", *own]
        # TensorBoard inherits the blocked signal: Ctrl-C ends this command, which then ends TensorBoard.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        child = subprocess.Popen(command, cwd=current_folder.NEUTRAL)
        signal.signal(signal.SIGTERM, lambda number, frame: child.terminate())
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            while True:
                try:
                    return child.wait(RESCAN_SECONDS)
                except subprocess.TimeoutExpired:
                    with contextlib.suppress(ConfigError):  # the runs may be in the trash by now
                        links.add(select.chosen(args))
        finally:
            child.terminate()
            child.wait()


class RunLinks:
    """Runs below a folder as SWEEP/RUN, each once. A context: it closes the files that it has opened.

    An own run that no other user can exchange is a link to its folder of events. Of any other run only files of events
    are linked, each to the open file that was checked: a folder of another user may lead to a private one, and a
    ``projector_config.pbtxt`` in it would name files that TensorBoard shows. A run behind a link that another user can
    have put there is left out: the link may lead to private runs of this user.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sources: dict[str, Path] = {}
        self._opened = contextlib.ExitStack()
        self._reported: set[str] = set()

    def __enter__(self) -> RunLinks:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def add(self, runs: Sequence[RunDir]) -> list[str]:
        """Add the events that are new since the last call; returns the names of new runs."""
        added = []
        for run in runs:
            if not os.path.isdir(run.tensorboard):  # Path.is_dir raises if it is another user's
                continue
            place = self._follow(run)
            if place is None:
                continue
            name = self._name(run)
            if name not in self._sources:
                added.append(name)
                self._sources[name] = run.tensorboard
                self._add_folder(place, self._folder / name)
            if not (self._folder / name).is_symlink():
                self._add_files(place, self._folder / name)
        return added

    def _follow(self, run: RunDir) -> Path | None:
        """The folder to which the path of a run leads; None, with a line once per link, if it is left out."""
        from flip.files.ownership import follow
        from jobs.common.text import plain

        try:
            place, reason = follow(run.path)
        except OSError:  # it was moved meanwhile
            return None
        if not reason:
            return Path(place)
        if reason not in self._reported:
            self._reported.add(reason)
            note(plain(f"{reason}; the runs behind it are left out"))
        return None

    def _name(self, run: RunDir) -> str:
        name = f"{run.sweep}/{run.name}"
        if self._sources.get(name, run.tensorboard) == run.tensorboard:
            return name
        root = str(run.path.parent.parent).strip("/").replace("/", "_")  # a run of this name in another root
        return f"{run.sweep}@{root}/{run.name}"

    def _add_folder(self, place: Path, link: Path) -> None:
        from flip.files.creation import closed_folder

        closed_folder(link.parent)
        if _is_closed(place):
            link.symlink_to(place / TENSORBOARD, target_is_directory=True)
        else:
            closed_folder(link)

    def _add_files(self, place: Path, folder: Path) -> None:
        for name, number in _open_events(place, folder):
            self._opened.callback(os.close, number)
            link = folder / name
            link.symlink_to(f"/proc/{os.getpid()}/fd/{number}")


def _is_closed(place: Path) -> bool:
    """Whether the run is the user's, and no other user can exchange it or put a link into its folder of events."""
    from flip.files.ownership import exposures, why_untrusted

    try:
        return not why_untrusted(place) and not why_untrusted(place / TENSORBOARD) and not exposures(place)
    except OSError:
        return False


def _open_events(place: Path, folder: Path) -> Iterator[tuple[str, int]]:
    """(name, descriptor) of each file of events that ``folder`` lacks, without links and files of other owners.

    ``place``: folder of the run, a path without links (``ownership.follow``).
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW
    with contextlib.ExitStack() as opened, contextlib.suppress(OSError):  # it is a link, or cannot be read
        top = os.open(place, flags)
        opened.callback(os.close, top)
        if os.readlink(f"/proc/self/fd/{top}") != str(place):  # a folder above is a link by now
            return
        owner = os.fstat(top).st_uid
        inner = os.open(TENSORBOARD, flags, dir_fd=top)
        opened.callback(os.close, inner)
        for name in sorted(os.listdir(inner)):
            if EVENTS not in name or (folder / name).is_symlink():
                continue
            number = _open_file(inner, name, owner)
            if number is not None:
                yield name, number


def _open_file(place: int, name: str, owner: int) -> int | None:
    """The descriptor of a regular file of the owner in an open folder; None if it is another or cannot be read."""
    import stat

    try:
        number = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place)
    except OSError:
        return None
    info = os.fstat(number)
    if stat.S_ISREG(info.st_mode) and info.st_uid == owner:
        return number
    os.close(number)
    return None
