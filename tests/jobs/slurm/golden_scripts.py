"""Golden batch scripts: sbatch-plain.sh is whole, each other one is its difference from it, without context lines."""

import difflib
import os
import re
from pathlib import Path

GOLDEN = Path(__file__).with_name("golden")
PLAIN = GOLDEN / "sbatch-plain.sh"
HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,\d+)? @@\n")


def names():
    """Names of all golden scripts."""
    return ["plain", *sorted(path.stem.removeprefix("sbatch-") for path in GOLDEN.glob("sbatch-*.diff"))]


def golden_script(name):
    """Return the whole text of a golden script."""
    plain = PLAIN.read_text().splitlines(keepends=True)
    if name == "plain":
        return "".join(plain)
    lines = []
    done = 0
    for line in (GOLDEN / f"sbatch-{name}.diff").read_text().splitlines(keepends=True):
        if hunk := HUNK.fullmatch(line):
            first = int(hunk[1])
            if hunk[2] != "0":
                first -= 1  # a hunk without old lines names the line before it
            lines += plain[done:first]
            done = first
        elif line.startswith("-"):
            assert plain[done] == line[1:], f"sbatch-{name}.diff: sbatch-plain.sh has changed: FLIP_GOLDEN=write"
            done += 1
        else:
            lines.append(line[1:])
    return "".join([*lines, *plain[done:]])


def compare(name, text):
    """Compare a script with the golden one. FLIP_GOLDEN=write writes it."""
    if os.environ.get("FLIP_GOLDEN") == "write":
        _write(name, text)
    assert text == golden_script(name), "FLIP_GOLDEN=write updates the file; review the diff"


def _write(name, text):
    if name == "plain":
        PLAIN.write_text(text)
        return
    plain = PLAIN.read_text().splitlines(keepends=True)
    difference = difflib.unified_diff(plain, text.splitlines(keepends=True), n=0)
    (GOLDEN / f"sbatch-{name}.diff").write_text("".join(list(difference)[2:]))
