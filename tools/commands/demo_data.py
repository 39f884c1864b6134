"""Fetch and build the demonstration data: openly licensed image-text pairs, built once into the cache."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.common.cli import Parser, run_command

if TYPE_CHECKING:
    from tools.demo_datasets.output import DemoData

_ABOUT = """\
Fetch and build the demonstration data below the cache: images of 64 px with captions, held-out test sets with their
classes, a manifest each, tokenizer.json, LICENCES.md and done.json (counts and digests).

About 1,400 emoji in nine sets of drawings by six makers, with Unicode's names and keywords; a minute.
        train (six sets), noto-v1 (validation), twemoji and openmoji (test), unseen (classes that
        training never sees), classes.json

An interrupted build continues when the command is repeated. The fetched packages stay in packages/; they may be
deleted."""

_EXAMPLES = """\
examples:
  flip demo_data                      into FLIP_CACHE, default ~/.cache/flip; at once if they exist
  flip demo_data --cache /data/flip
  flip demo_data --force --json       build again from the fetched packages; print facts as JSON"""


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="flip demo_data", description=_ABOUT, epilog=_EXAMPLES)
    add_build_options(parser)
    return run_command(prepare, parser.parse_args(argv))


def prepare(options: argparse.Namespace) -> int:
    from tools.demo_datasets.emoji.build import DATA

    return build(DATA, options)


def add_build_options(parser: argparse.ArgumentParser) -> None:
    """Add --cache and --force, which ``build`` reads."""
    parser.add_argument("--cache", type=Path, help="folder of the cache (default: FLIP_CACHE, else ~/.cache/flip)")
    parser.add_argument("--force", action="store_true", help="build again even if the data exists")


def build(data: DemoData, options: argparse.Namespace) -> int:
    """Build a data set unless it is ready, and print its facts."""
    import json
    import time

    from flip.common.cache import cache_root

    if options.cache:
        cache = options.cache.expanduser().absolute()
    else:
        cache = cache_root()
    start_time = time.monotonic()
    record = None
    if not options.force:
        record = data.ready(cache / data.name)
    state = "ready" if record else "built"
    record = record or data.build(cache, options.force)
    record |= {"state": state, "seconds": round(time.monotonic() - start_time, 1), "path": str(cache / data.name)}
    print(json.dumps(record, indent=1, sort_keys=True) if options.json else _text(record))
    return 0


def _text(record: dict) -> str:
    lines = [f"{record['state']}: {record['path']} ({record['seconds']} s)"]
    lines.append(", ".join(f"{name} {count:,}" for name, count in record["counts"].items()))
    for name, item in sorted(record["sets"].items()):
        lines.append(f"  {name:12} {item['role']:10} {item['samples']:7,d} samples  {item['digest'][:12]}")
    for family, item in record.get("leakage", {}).items():
        before, after = (f"{100 * item[key]:.1f} %" for key in ("near_before", "near_after"))
        lines.append(f"  {family}: {before} of its images had a near-duplicate in training, now {after}")
    return "\n".join(lines)
