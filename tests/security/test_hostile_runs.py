"""A hostile or damaged run in a shared sweep stops no command that reads the others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs.outcomes import make

ROOT = Path(__file__).resolve().parents[2]
RECORDS = (
    "config.yaml", "identity.json", "status.json", "result.json", "job.json", "cancel.json", "attempts/1/start.json",
    "attempts/1/end.json", "attempts/1/cause.0.json", "attempts/1/ready.json", "metrics/1.jsonl",
    "eval/pretrain-8.json", "logs/1/node0.err",
)  # fmt: skip


@pytest.fixture
def sweep(tmp_path):
    """One sound run, and one for every record that is a FIFO nobody writes to."""
    make(tmp_path / "demo", "sound", "0.5")
    for record in RECORDS:
        run = make(tmp_path / "demo", record.replace("/", "-"), "0.5")
        path = run.path / record
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(path)
    return tmp_path / "demo"


def call(sweep, *words):
    environment = {**os.environ, "FLIP_RUNS": str(sweep.parent)}
    command = [sys.executable, str(ROOT / words[0]), *words[1:]]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_status_and_report_have_a_row_for_every_run(sweep):
    for words in (("jobs/status.py", "demo", "--json"), ("jobs/report.py", "demo", "--json")):
        done = call(sweep, *words)
        assert done.returncode == 0, done.stderr
        rows = {row["run"]: row for row in json.loads(done.stdout)}
        assert rows.keys() == {"sound", *(record.replace("/", "-") for record in RECORDS)} - {"config.yaml"}, "no run"
        assert rows["sound"]["state"] == "complete" and "Traceback" not in done.stderr


@pytest.mark.parametrize("record", RECORDS)
def test_explain_ends(sweep, record):
    done = call(sweep, "jobs/explain.py", f"demo/{record.replace('/', '-')}")
    assert "Traceback" not in done.stderr, done.stderr
