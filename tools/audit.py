"""List known vulnerabilities of the packages in this environment, using pip-audit (``make audit``)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
from collections.abc import Mapping
from typing import Any

FOUND = 1
"""Exit code if a vulnerability is known."""
REMEDY = "Try again where the index of Python packages and its advisories can be reached."


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="List known vulnerabilities of the packages in this environment.",
        epilog="exit codes: 0 none known, 1 some known, 69 the package index could not be reached",
    )
    parser.parse_args(arguments)
    from flip.runs.errors import FlipError

    try:
        lines, found = judged(asked())
    except FlipError as error:
        print(error, file=sys.stderr)
        return error.code
    print("\n".join(lines))
    return FOUND if found else 0


def asked() -> dict[str, Any]:
    """The report of pip-audit. Raises StorageError where it did not get as far as to write one."""
    import json
    import subprocess
    import sysconfig
    import tempfile

    from flip.runs.errors import StorageError

    with tempfile.TemporaryDirectory(prefix="flip-audit-") as folder:
        report = Path(folder) / "report.json"
        words = ["--path", sysconfig.get_paths()["purelib"], "--format", "json", "--output", str(report)]
        done = subprocess.run(
            [sys.executable, "-m", "pip_audit", "--progress-spinner", "off", *words],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        try:
            found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            said = done.stderr.strip().splitlines()[-1:] or [f"it ended with {done.returncode}"]
            raise StorageError(f"the audit came to nothing: {said[0][:300]}", "pip-audit", remedy=REMEDY) from error
        return found


def judged(report: Mapping[str, Any]) -> tuple[list[str], int]:
    """What to tell, and how many vulnerabilities there are. Raises StorageError where no package could be looked up:
    pip-audit calls that none found."""
    from flip.runs.errors import StorageError

    packages = report["dependencies"]
    skipped = [one["name"] for one in packages if "skip_reason" in one]
    looked = [one for one in packages if "skip_reason" not in one]
    if not looked:
        what = f"none of {len(packages)} packages could be looked up"
        raise StorageError(what, "pip-audit", remedy=REMEDY)
    lines, found = [], 0
    for one in looked:
        for flaw in one["vulns"]:
            found += 1
            mended = ", ".join(flaw.get("fix_versions") or []) or "no release yet"
            lines.append(f"{one['name']} {one['version']}: {flaw['id']}, mended in {mended}")
    if skipped:
        lines.append(f"not looked up, the index does not have these releases: {', '.join(sorted(skipped))}")
    lines.append(f"{len(looked)} of {len(packages)} packages looked up: {found or 'no'} known vulnerabilities")
    return lines, found


if __name__ == "__main__":
    from jobs.common.cli import quietly

    sys.exit(quietly(main))
