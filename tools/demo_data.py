"""Fetch and build the demonstration data: openly licensed image-text pairs, built once into the cache."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.common.cli import Parser, quietly, run_command

_ABOUT = """\
Fetch and build the demonstration data: pictures of about 1,400 emoji by nine vendors, with Unicode's
names and keywords.

Below the cache it leaves emoji/train (six vendors), emoji/noto-v1 (validation vendor), emoji/twemoji and emoji/openmoji
(test vendors), emoji/unseen (classes that training never sees), each with its manifest, and classes.json,
tokenizer.json and LICENCES.md. The fetched packages stay in packages/; they may be deleted."""

_EXAMPLES = """\
examples:
  python tools/demo_data.py                      into FLIP_CACHE, default ~/.cache/flip; returns at once if it exists
  python tools/demo_data.py --cache /data/flip
  python tools/demo_data.py --force --json       build again from the fetched packages; print facts as JSON"""


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=_ABOUT, epilog=_EXAMPLES)
    parser.add_argument("--cache", type=Path, help="folder of the cache (default: FLIP_CACHE, else ~/.cache/flip)")
    parser.add_argument("--force", action="store_true", help="build again even if the data exists")
    return run_command(prepare, parser.parse_args(argv))


def prepare(options: argparse.Namespace) -> int:
    import json
    import os
    import time

    from tools.emoji_dataset import build

    cache = (options.cache or Path(os.environ.get("FLIP_CACHE") or "~/.cache/flip")).expanduser().absolute()
    start_time = time.monotonic()
    facts = None if options.force else build.ready(cache)
    state = "ready" if facts else "built"
    facts = facts or build.build(cache, options.force)
    facts |= {"state": state, "seconds": round(time.monotonic() - start_time, 1), "path": str(cache / build.FOLDER)}
    print(json.dumps(facts, indent=1, sort_keys=True) if options.json else _text(facts))
    return 0


def _text(facts: dict) -> str:
    counts = facts["counts"]
    lines = [
        f"{facts['state']}: {facts['path']} ({facts['seconds']} s)",
        f"emoji with a name {counts['named']}, drawn by enough vendors {counts['drawn']}, "
        f"distinct {counts['distinct']}: {counts['training']} training classes, {counts['unseen']} unseen",
    ]
    for name, item in sorted(facts["sets"].items()):
        lines.append(f"  {name:10} {item['role']:10} {item['samples']:6d} samples  {item['digest'][:12]}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(quietly(main))
