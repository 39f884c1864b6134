"""Fetch and build the demonstration data: openly licensed image-text pairs, built once into the cache."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.common.cli import Parser

_ABOUT = """\
Fetch and build the demonstration data: pictures of some 1,400 emoji in nine sets of drawings, with
Unicode's names and keywords.

Below the cache it leaves emoji/train (six vendors), emoji/noto-v1 (validation vendor), emoji/twemoji and emoji/openmoji
(test vendors), emoji/unseen (classes that training never sees), each with its manifest, and classes.json,
tokenizer.json and LICENCES.md. The fetched packages stay in packages/; they may be deleted."""

_EXAMPLES = """\
examples:
  python tools/demo_data.py                      into FLIP_CACHE, default ~/.cache/flip; returns at once if it exists
  python tools/demo_data.py --cache /data/flip
  python tools/demo_data.py --force --json       build again from the fetched packages; print facts as JSON"""


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=_ABOUT, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="folder of the cache (default: FLIP_CACHE, else ~/.cache/flip)")
    parser.add_argument("--force", action="store_true", help="build again even if the data exists")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    arguments = parser.parse_args(argv)

    import os
    import time

    from flip.runs.errors import FlipError
    from tools.emoji_dataset import build

    cache = (arguments.cache or Path(os.environ.get("FLIP_CACHE") or "~/.cache/flip")).expanduser().absolute()
    start = time.monotonic()
    try:
        facts = None if arguments.force else build.ready(cache)
        state = "ready" if facts else "built"
        facts = facts or build.build(cache, arguments.force)
    except FlipError as error:
        print(error, file=sys.stderr)
        return error.code
    _show(cache / build.FOLDER, facts | {"state": state, "seconds": round(time.monotonic() - start, 1)}, arguments.json)
    return 0


def _show(folder: Path, facts: dict, as_json: bool) -> None:
    import json

    if as_json:
        print(json.dumps(facts | {"path": str(folder)}, indent=1, sort_keys=True))
        return
    print(f"{facts['state']}: {folder} ({facts['seconds']} s)")
    counts = facts["counts"]
    print(
        f"emoji with a name {counts['named']}, drawn by enough vendors {counts['drawn']}, "
        f"told apart {counts['distinct']}: {counts['training']} classes of training, {counts['unseen']} unseen"
    )
    for name, item in sorted(facts["sets"].items()):
        print(f"  {name:10} {item['role']:10} {item['samples']:6d} samples  {item['digest'][:12]}")


if __name__ == "__main__":
    from jobs.common.cli import quietly

    sys.exit(quietly(main))
