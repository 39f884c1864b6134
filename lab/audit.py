"""List known vulnerabilities of the packages in this environment, using pip-audit (make audit)."""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.common.cli import Parser, run_command, run_main

EXAMPLES = """examples:
  python -m lab.audit --json

It needs pip-audit, which `make audit` installs.
exit codes: 0 no known vulnerability, 1 known vulnerabilities, 69 the package index could not be reached
"""
VULNERABLE = 1
"""Exit code if a package has a known vulnerability."""
REMEDY = "Run it on a machine that reaches the Python package index and its advisories."


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m lab.audit", description=__doc__, epilog=EXAMPLES)
    return run_command(audit, parser.parse_args(arguments))


def audit(options: argparse.Namespace) -> int:
    report = pip_audit_report()
    lines, count = summary(report)
    print(json.dumps(report, indent=1) if options.json else "\n".join(lines))
    if count:
        return VULNERABLE
    return 0


def pip_audit_report() -> dict[str, Any]:
    """Run pip-audit and return its report. Raises StorageError if it wrote none."""
    import subprocess
    import sysconfig
    import tempfile

    from flip.runs.errors import ConfigError, StorageError

    with tempfile.TemporaryDirectory(prefix="flip-audit-") as folder:
        path = Path(folder) / "report.json"
        options = ["--path", sysconfig.get_paths()["purelib"], "--format", "json", "--output", str(path)]
        command = [sys.executable, "-P", "-m", "pip_audit", "--progress-spinner", "off", *options]
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        try:
            report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            if "No module named pip_audit" in done.stderr:
                raise ConfigError(
                    "pip-audit is not installed", remedy="Run `make audit`, which installs it."
                ) from error
            reason = done.stderr.strip().splitlines()[-1:] or [f"it ended with {done.returncode}"]
            raise StorageError(f"the audit failed: {reason[0][:300]}", "pip-audit", remedy=REMEDY) from error
        return report


def summary(report: Mapping[str, Any]) -> tuple[list[str], int]:
    """Lines to print, and the number of vulnerabilities.

    Raises StorageError if no package could be looked up, which pip-audit reports as no vulnerabilities.
    """
    from flip.runs.errors import StorageError

    packages = report["dependencies"]
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    checked = [package for package in packages if "skip_reason" not in package]
    if not checked:
        raise StorageError(f"none of {len(packages)} packages could be looked up", "pip-audit", remedy=REMEDY)
    lines = [
        f"{package['name']} {package['version']}: {vulnerability['id']}, fixed in "
        + (", ".join(vulnerability.get("fix_versions") or []) or "no release yet")
        for package in checked
        for vulnerability in package["vulns"]
    ]
    count = len(lines)
    if skipped:
        lines.append(f"not looked up, the index does not have these releases: {', '.join(sorted(skipped))}")
    lines.append(f"{len(checked)} of {len(packages)} packages looked up: {count or 'no'} known vulnerabilities")
    return lines, count


if __name__ == "__main__":
    sys.exit(run_main(main))
