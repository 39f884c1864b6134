"""flip clean [SWEEP ...]: delete the trash, old logs, compiled code and unused snapshots. It asks first."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.common.cli import Number, Parser, add_root_option, command, confirm, note, run_command

if TYPE_CHECKING:
    from jobs.submission.cleanup import Folder, Listing

EXAMPLES = """examples:
  flip clean --dry-run                   the trash: runs that submit replaced or pruned, with sizes and ages
  flip clean quickstart --older 30       only what has not changed for 30 days
  flip clean 'scale*' --logs --compiled  old logs and compiled code of two or more sweeps
  flip clean --all --yes
Outside of the trash, checkpoints, metrics, results and records are never deleted, nor anything of a run that is active
or whose state is unknown. Folders of other users and links are left alone.
"""
DAYS = 14.0


def main(arguments: list[str] | None = None) -> int:
    help_text = "Delete folders that runs no longer need: by default, run directories in the trash. Asks first."
    parser = Parser(prog="flip clean", description=help_text, epilog=EXAMPLES)
    parser.add_argument("target", nargs="*", metavar="SWEEP", help="names of sweeps, or patterns; default: all sweeps")
    add_root_option(parser)
    kinds = parser.add_argument_group("what is deleted, one or more; default: --trash")
    kinds.add_argument("--trash", action="store_true", help="run directories in the trash")
    help_text = "logs of earlier attempts; those of the newest attempt and of the newest failed one stay"
    kinds.add_argument("--logs", action="store_true", help=help_text)
    help_text = "code that torch compiled, of complete runs, and such code that came with copies of runs"
    kinds.add_argument("--compiled", action="store_true", help=help_text)
    help_text = "snapshots of the code that no run names, if no run of the sweep is active"
    kinds.add_argument("--code", action="store_true", help=help_text)
    kinds.add_argument("--all", action="store_true", help="all of these")
    help_text = "only folders in which nothing has changed for this many days (default: %(default)g)"
    parser.add_argument("--older", type=Number(float, least=0), default=DAYS, metavar="DAYS", help=help_text)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--dry-run", action="store_true", help="list the folders, delete nothing")
    action.add_argument("--yes", action="store_true", help="do not ask for confirmation")
    args = parser.parse_args(arguments)
    return run_command(clean, args)


def clean(args: argparse.Namespace) -> int:
    from jobs.common import cluster_profile
    from jobs.common.text import size
    from jobs.submission import cleanup

    kinds = [kind for kind in cleanup.KINDS if args.all or getattr(args, kind)] or ["trash"]
    words = [word.rstrip("/") for word in args.target]
    listing = cleanup.listing(cluster_profile.roots(args.root), words, kinds, args.older)
    deleted: list[Folder] = []
    if not args.json:
        _show(listing)
    if args.dry_run or not listing.folders:
        following: list[str] = []
        if listing.folders:
            following.append(_deleting(args, kinds))
        _print_json(args, listing, deleted, following)
        return 0
    folders = _folders(listing)
    if not args.yes and not confirm(f"Delete {folders}, {size(listing.bytes)}, for good?"):
        return 0
    errors = cleanup.delete(listing.folders, args.older, deleted.append)
    note(f"deleted: {len(deleted)} of {folders}, {size(sum(folder.bytes for folder in deleted))}")
    _print_json(args, listing, deleted, [])
    for error in errors[:-1]:
        print(str(error), file=sys.stderr)
    if errors:
        raise errors[-1]
    return 0


def _show(listing: Listing) -> None:
    """Print the folders as a table, and why others stay."""
    from jobs.common.terminal import Page, TextTable, show
    from jobs.common.text import plain, size

    rows = [
        {"folder": str(folder.path), "kind": folder.kind, "size": size(folder.bytes), "days": int(folder.days)}
        for folder in listing.folders
    ]
    if rows:
        show(Page(TextTable(rows, drop=("kind",)), f"{_folders(listing)}, {size(listing.bytes)}"))
    else:
        show(f"nothing to delete. A run is first moved to the trash: {command('rm', 'SWEEP/RUN')}")
    for path, reason in listing.spared.items():
        note(f"left alone: {plain(str(path))}: {plain(reason)}")


def _folders(listing: Listing) -> str:
    number = len(listing.folders)
    if number == 1:
        return "1 folder"
    return f"{number} folders"


def _deleting(args: argparse.Namespace, kinds: Sequence[str]) -> str:
    """The command that deletes what a dry run has listed."""
    words = [*args.target, *(f"--{kind}" for kind in kinds), f"--older={args.older:g}"]
    if args.root:
        words.append(f"--root={Path(args.root).absolute()}")
    return command("clean", *words, "--yes")


def _print_json(args: argparse.Namespace, listing: Listing, deleted: list[Folder], following: list[str]) -> None:
    import json

    if not args.json:
        return
    document: dict[str, Any] = {
        "folders": [
            {
                "path": str(folder.path),
                "kind": folder.kind,
                "sweep": folder.sweep,
                "bytes": folder.bytes,
                "days": round(folder.days, 3),
                "deleted": folder in deleted,
            }
            for folder in listing.folders
        ],
        "bytes": listing.bytes,
        "left_alone": {str(path): reason for path, reason in listing.spared.items()},
        "next": following,
    }
    print(json.dumps(document, indent=1))
