"""Fetch and build the icon set: openly licensed drawings with their names, built once into the cache."""

from __future__ import annotations

import argparse
import sys

from jobs.common.cli import Parser, run_command, run_main
from tools.commands.demo_data import add_build_options, build

_ABOUT = """\
Fetch and build the data of the scaling study below the cache: images of 64 px with captions, held-out test sets with
their classes, a manifest each, tokenizer.json, LICENCES.md and done.json (counts and digests).

Drawings of 222 icon sets, 308,000 of them to train on, with their names; 15 minutes of a core.
        train, train-1of8 and train-1of64 (nested random subsets), bi (validation family), tabler-all, carbon-all and
        game-icons-all (test families; without -all: an image per class), retrieval, probe

An interrupted build continues when the command is repeated. The fetched packages stay in packages/; they may be
deleted."""

_EXAMPLES = """\
examples:
  python -m lab.icons                    into FLIP_CACHE, default ~/.cache/flip; at once if they exist
  python -m lab.icons --cache /data/flip
  python -m lab.icons --force --json     build again from the fetched packages; print facts as JSON"""


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m lab.icons", description=_ABOUT, epilog=_EXAMPLES)
    add_build_options(parser)
    return run_command(prepare, parser.parse_args(arguments))


def prepare(options: argparse.Namespace) -> int:
    from lab.icons.build import DATA

    return build(DATA, options)


if __name__ == "__main__":
    sys.exit(run_main(main))
