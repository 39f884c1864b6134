"""The commands that usually follow: key ``next`` of the documents that ``--json`` prints.

Each is a command line that works in any folder. A document has them itself, or in each of its rows. Of ``explain``,
whose ``next`` has more to say, they are ``next.commands``.
"""

from collections.abc import Sequence
from pathlib import Path

from jobs.common.cli import command

OF_STATE = {
    "queued": ("explain", "cancel"),
    "running": ("explain", "logs", "cancel"),
    "waiting": ("explain", "logs", "cancel"),
    "complete": ("report",),
    "failed": ("explain", "logs"),
    "cancelled": ("explain",),
    "stopped": ("explain", "logs"),
    "unknown": ("status",),
}
"""State of a run -> commands about it. ``explain`` has the line that submits a run again."""


def of_run(folder: Path, state: str, of_complete: Sequence[str] = ()) -> list[str]:
    """Those about one run. ``of_complete``: further commands that take a complete run of its kind."""
    names = [*OF_STATE[state]]
    if state == "complete":
        names += of_complete
    return [command(name, folder.absolute()) for name in names]


def of_sweep(folder: Path, first: str) -> list[str]:
    """Those about the runs below a folder that have been submitted. ``first``: name of a run to follow, or empty."""
    folder = folder.absolute()
    lines = [command("status", folder)]
    if first:
        lines.append(command("logs", folder / first, "-f"))
    return [*lines, command("report", folder), command("tensorboard", folder)]
