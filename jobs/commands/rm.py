"""flip rm RUN ...: move runs to the trash, from which `flip clean` deletes them. It asks first."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.common.cli import Parser, add_run_arguments, command, confirm, note, run_command

if TYPE_CHECKING:
    from jobs.submission.removal import Removal

EXAMPLES = """examples:
  flip rm quickstart/masked --dry-run      sizes, and what would happen
  flip rm 'scale/*-s1' '!scale/large*'     patterns; ! excludes runs
  flip rm quickstart --yes
  flip clean quickstart --older 0          then: delete them for good, which frees the disk
Until then a run can be restored, by the command that is printed. Its checkpoints in object storage cannot be moved:
they are deleted at once, after the question. Active runs, and runs whose checkpoints others need, are left alone.
"""


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="flip rm", description="Move runs to the trash. Asks first.", epilog=EXAMPLES)
    add_run_arguments(parser, all_runs=False)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--dry-run", action="store_true", help="list the runs, move nothing")
    action.add_argument("--yes", action="store_true", help="do not ask for confirmation")
    return run_command(rm, parser.parse_args(arguments))


def rm(args: argparse.Namespace) -> int:
    from jobs.submission import removal
    from jobs.submission.render import trashed
    from jobs.submitted_runs import select

    removals, spared = removal.plan(select.chosen(args))
    if not args.json:
        _show(removals, spared)
    if args.dry_run or not removals:
        _print_json(args, removals, spared, [])
        return 0
    if not args.yes and not confirm(_question(removals)):
        return 0
    errors = removal.remove(removals)
    for each in removals:
        if each.target:
            note(trashed(each.run.path, each.target, replaced=False))
    following = _following(removals)
    if following:
        note(f"to delete them for good: {following[0]}")
    _print_json(args, removals, spared, following)
    for error in errors[:-1]:
        print(str(error), file=sys.stderr)
    if errors:
        raise errors[-1]
    return 0


def _question(removals: Sequence[Removal]) -> str:
    from jobs.common.text import counted, size

    total = size(sum(each.bytes for each in removals))
    text = f"Move {counted(len(removals), 'run')}, {total}, to the trash"
    checkpoints = sum(len(each.checkpoints) for each in removals)
    if checkpoints:
        remote = size(sum(each.remote_bytes for each in removals))
        text += f", and delete {counted(checkpoints, 'checkpoint')}, {remote}, in object storage for good"
    return f"{text}?"


def _following(removals: Sequence[Removal]) -> list[str]:
    """The command that deletes the moved runs."""
    moved = [each.run.path for each in removals if each.target]
    lines = []
    for root in dict.fromkeys(path.parent.parent for path in moved):
        sweeps = dict.fromkeys(path.parent.name for path in moved if path.parent.parent == root)
        lines.append(command("clean", *sweeps, "--older", "0", "--root", root.absolute()))
    return lines


def _show(removals: Sequence[Removal], spared: Mapping[Path, str]) -> None:
    """Print the runs as a table, and why others stay."""
    from jobs.common.terminal import Page, TextTable, show
    from jobs.common.text import plain, size

    rows = []
    for each in removals:
        row = {"run": f"{each.run.sweep}/{each.run.name}", "size": size(each.bytes)}
        if each.checkpoints:
            row |= {"remote checkpoints": str(len(each.checkpoints)), "their size": size(each.remote_bytes)}
        rows.append(row)
    if rows:
        show(Page(TextTable(rows)))
    else:
        show("nothing to move to the trash")
    for path, reason in spared.items():
        note(f"left alone: {plain(str(path))}: {plain(reason)}")


def _print_json(
    args: argparse.Namespace, removals: Sequence[Removal], spared: Mapping[Path, str], following: list[str]
) -> None:
    import json

    if not args.json:
        return
    document: dict[str, Any] = {
        "runs": [
            {
                "sweep": each.run.sweep,
                "run": each.run.name,
                "bytes": each.bytes,
                "remote_checkpoints": len(each.checkpoints),
                "remote_bytes": each.remote_bytes,
                "trash": str(each.target) if each.target else None,
            }
            for each in removals
        ],
        "left_alone": {str(path): reason for path, reason in spared.items()},
        "next": following,
    }
    print(json.dumps(document, indent=1))
