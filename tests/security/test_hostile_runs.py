"""Tests that a hostile or damaged run in a shared sweep stops no command that reads the other runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.commands import explain, report, status
from tests.jobs.outcomes import make

ROOT = Path(__file__).resolve().parents[2]
RECORDS = (
    "config.yaml", "identity.json", "status.json", "result.json", "job.json", "cancel.json", "attempts/1/start.json",
    "attempts/1/end.json", "attempts/1/cause.0.json", "attempts/1/ready.json", "metrics/1.jsonl",
    "eval/pretrain-8.json", "logs/1/node0.err",
)  # fmt: skip


@pytest.fixture
def sweep(tmp_path):
    """Create a valid run, and for each record a run in which it is a FIFO without a writer."""
    make(tmp_path / "demo", "sound", "0.5")
    for record in RECORDS:
        run = make(tmp_path / "demo", record.replace("/", "-"), "0.5")
        path = run.path / record
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(path)
    return tmp_path / "demo"


#: Runs a command in a process of its own, and prints the most memory that it took, in bytes.
WITH_PEAK = """
import resource, subprocess, sys
code = subprocess.call([sys.executable, *sys.argv[1:]])
print("peak:", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10, file=sys.stderr)
sys.exit(code)
"""


def call(sweep, *arguments, before=()):
    environment = {**os.environ, "FLIP_RUNS": str(sweep.parent)}
    command = [sys.executable, *before, str(ROOT / arguments[0]), *arguments[1:]]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.long
def test_status_and_report_list_every_run_despite_fifos(sweep):
    for arguments in (("jobs", "status", "demo", "--json"), ("jobs", "report", "demo", "--json")):
        done = call(sweep, *arguments)
        assert done.returncode == 0, done.stderr
        rows = {row["run"]: row for row in json.loads(done.stdout)}
        assert rows.keys() == {"sound", *(record.replace("/", "-") for record in RECORDS)}
        assert rows["sound"]["state"] == "complete" and "Traceback" not in done.stderr


BULKY = (*(name for name in RECORDS if name.endswith(".json")), "checkpoints/pretrain/8-1/commit.json")


@pytest.mark.long
def test_too_large_records_are_named_and_not_read(tmp_path):
    """Each is 18 MB of empty lists; as values of Python these are 400 MB. A sound run is shown as ever."""
    make(tmp_path / "demo", "sound", "0.5")
    for record in BULKY:
        path = make(tmp_path / "demo", record.replace("/", "-"), "0.5").path / record
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"value": [' + "[]," * 6_000_000 + "[]]}")
    named = {}
    for command in ("status", "report"):
        done = call(tmp_path / "demo", "jobs", command, "demo", "--json", before=("-c", WITH_PEAK))
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        assert int(done.stderr.split("peak: ")[1]) < 400e6
        rows = {row["run"]: row for row in json.loads(done.stdout)}
        assert rows.keys() == {"sound", *(record.replace("/", "-") for record in BULKY)}
        assert rows["sound"]["state"] == "complete"
        named[command] = {run for run, row in rows.items() if "more than the limit" in (row["reason"] or "")}
    assert named["status"] >= {"status.json", "result.json"}
    assert named["report"] >= {"result.json", "attempts-1-start.json", "attempts-1-end.json"}


@pytest.mark.parametrize("record", RECORDS)
def test_explain_finishes_if_record_is_fifo(sweep, record):
    done = call(sweep, "jobs", "explain", f"demo/{record.replace('/', '-')}")
    assert "Traceback" not in done.stderr, done.stderr


WRONG = {
    "job.json": (
        '{"kind": []}', '{"kind": "slurm", "name": [], "index": {}}', '{"after": "x"}', '{"canary": 7}',
        '{"waits_for": 7}', '{"command": 7}', '{"time": "x"}', '{"uid": "x"}',
    ),
    "cancel.json": ("7", '{"who": []}'),
    "result.json": (
        '{"stage": {}, "samples": []}', '{"evaluations": 7}', '{"evaluations": [7]}', '{"evaluations": [{"name": 7}]}',
        '{"evaluations": [{"name": "a", "top1": "x"}]}', '{"evaluations": [{"name": "a", "top1": 1, "interval": 7}]}',
        '{"parameters": 7}', '{"seconds": "x"}',
    ),
    "status.json": ('{"attempt": "x", "time": "x", "samples": {}, "phase": 7}',),
    "attempts/1/start.json": ('{"time": "x"}', '{"resumes_from": "x"}', '{"after": []}'),
    "attempts/1/ready.json": ('{"time": "x"}', '{"samples": "x"}'),
    "attempts/1/end.json": ('{"action": []}', '{"time": "x"}', '{"commits": "x"}', '{"delay": "x", "exclude": 7}'),
    "attempts/1/cause.0.json": ('{"cause": []}', '{"cause": "crash", "time": "x"}'),
    "attempts/1/pids.json": ("7", "[7]", '[{"pid": "x"}]', '[{"pid": 1, "start": 7}]'),
    "eval/pretrain-8.json": ('{"stage": {}, "samples": 8, "evaluations": [7]}', '{"samples": 8, "evaluations": 7}'),
}  # fmt: skip
"""Record -> values that its readers do not expect, in addition to ``GENERAL``."""
GENERAL = ("null", "[]", "7", '"text"', "{", "{}")


@pytest.mark.long
def test_commands_survive_record_values_of_wrong_type(tmp_path, capsys):
    """Each damaged run has its own sweep."""
    cases = [(record, value) for record, values in WRONG.items() for value in (*values, *GENERAL)]
    for number, (record, value) in enumerate(cases):
        complete = record in ("result.json", "eval/pretrain-8.json")
        run = make(tmp_path / f"s{number}", "run", complete=complete, steps=None if complete else 10)
        (run.path / record).parent.mkdir(exist_ok=True)
        (run.path / record).write_text(value)
    for command, arguments in ((status, ["--json"]), (status, ["--goodput"]), (status, []), (report, ["--json"])):
        assert command.main([*arguments, "--root", str(tmp_path)]) in (0, 69), arguments
        shown = capsys.readouterr().out
        assert "--json" not in arguments or len(json.loads(shown)) == len(cases)
    for number, case in enumerate(cases):
        assert explain.main([f"s{number}/run", "--root", str(tmp_path)]) == 0, case
