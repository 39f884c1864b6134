"""Tests of make audit: the summary of pip-audit's report, and the error if the report is missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flip.runs.errors import StorageError
from lab.audit import summary

ROOT = Path(__file__).resolve().parents[2]
GOOD = {"name": "numpy", "version": "2.0", "vulns": []}
BAD = {"name": "jinja2", "version": "2.10", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.10.1"]}, {"id": "CVE-2"}]}
UNKNOWN = {"name": "torch", "skip_reason": "not found"}


def test_summary_lists_vulnerabilities_and_skipped_packages():
    assert summary({"dependencies": [GOOD]}) == (["1 of 1 packages looked up: no known vulnerabilities"], 0)
    lines, count = summary({"dependencies": [GOOD, BAD, UNKNOWN]})
    assert count == 2
    assert lines == [
        "jinja2 2.10: PYSEC-1, fixed in 2.10.1",
        "jinja2 2.10: CVE-2, fixed in no release yet",
        "not looked up, the index does not have these releases: torch",
        "2 of 3 packages looked up: 2 known vulnerabilities",
    ]


@pytest.mark.parametrize("packages", [[UNKNOWN], []])
def test_summary_raises_error_if_no_package_is_looked_up(packages):
    with pytest.raises(StorageError, match="could be looked up"):
        summary({"dependencies": packages})


@pytest.mark.parametrize(
    "packages, code, words",
    [
        ("absent", 78, "make audit"),
        (None, 69, "no route to host"),
        ([UNKNOWN], 69, "none of 1"),
        ([BAD], 1, "PYSEC-1"),
        ([GOOD], 0, "1 of 1"),
    ],
)
def test_audit_command_exit_code_depends_on_report(tmp_path, packages, code, words):
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"dependencies": packages}))
    copied = f"import shutil, sys; shutil.copy({str(report)!r}, sys.argv[sys.argv.index('--output') + 1])"
    texts = {
        None: "import sys; sys.exit('no route to host')",
        "absent": "import sys; sys.exit('No module named pip_audit')",
    }
    (tmp_path / "pip_audit.py").write_text(copied if isinstance(packages, list) else texts[packages])
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", "lab.audit"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code and words in done.stdout + done.stderr
