"""``explain``: the page about a run in every state, also from damaged or hostile files."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from flip.runs import attempts
from flip.runs.restart_policy import EndFacts
from flip.runs.rundir import RunDir, read_json, write_json
from jobs.commands import explain
from jobs.common import cli
from jobs.reporting import outcomes as results
from jobs.reporting import run_details
from jobs.reporting.status import render, table
from jobs.submitted_runs import clusters
from tests.jobs.outcomes import make

ROOT = Path(__file__).resolve().parents[3]
HOSTILE = "a\x1b]0;owned\x07\x1b[2J\u202eb<script>"


@pytest.fixture
def place(tmp_path):
    """Two runs of a sweep that was submitted to Slurm; no attempt has started."""
    for name, mask in (("mask50", "0.5"), ("mask75", "0.75")):
        run = make(tmp_path / "demo", name, mask, steps=0, complete=False)
        record = {"kind": "slurm", "cluster": "far", "site": "far", "name": "demo.77aa", "token": "77aa", "index": 0}
        (tmp_path / "demo" / ".code" / "c0de").mkdir(parents=True, exist_ok=True)
        snapshot = str(tmp_path / "demo" / ".code" / "c0de")
        record["command"] = ["jobs/submit.py", "--sweep", "/a b/demo.yaml", "--only", name]
        write_json(run.path / "job.json", {**record, "after": 0, "snapshot": snapshot, "time": 0.0})
    return tmp_path


def attempt(run, cause, code, state="RUNNING", lines=()):
    n = attempts.start_attempt(run, {"nodes": "n[1-2]", "job": "57_0"})
    folder = run.open_logs(n)
    (folder / "node0.err").write_text("".join(f"{line}\n" for line in lines))
    run.write_cause(n, 0, cause, code, f"why {cause}")
    attempts.end_attempt(run, n, EndFacts(code, state))


def queue(commands, *rows):
    commands("squeue", "printf '%s\\n' " + " ".join(f"'demo.77aa|0|57_0|{row}'" for row in rows))
    commands("scontrol", "echo 'ClusterName = far'")


def test_explain_describes_run_waiting_for_third_attempt(place, commands, monkeypatch):
    run = RunDir(place / "demo" / "mask50")
    attempt(run, "crash", 70, lines=["first", "", *(f"line {i}" for i in range(9)), "RuntimeError: boom"])
    attempt(run, "crash", 70, lines=["RuntimeError: boom again"])
    for n, release in ((1, "2.12.0"), (2, "2.13.0")):
        run.record_ready(n, 0, {"python": "3.11.7", "packages": {"torch": release}})
    queue(commands, "PENDING||Priority|2026-11-25T14:00:00")
    read = Mock(wraps=run_details.read_run)
    monkeypatch.setattr(run_details, "read_run", read)
    details = run_details.explain(run)
    assert [call.split()[0] for call in commands.calls()] == ["squeue"], "a single query of Slurm"
    assert read.call_count == 1, "of other runs the settings alone"
    assert details["about"]["size"] == "tiny" and details["about"]["samples"] == 12_800
    assert details["about"]["differs"] == {"stages.pretrain.mask": "0.5"}
    assert details["code"]["digest"] == "c0de" and details["code"]["present"]
    assert (details["state"]["state"], details["state"]["restarts"]) == ("waiting", 1)
    assert details["evidence"]["lines"] == ["RuntimeError: boom again"] and details["evidence"]["code"] == 70
    assert [(a["attempt"], a["cause"], a["action"], a["where"]) for a in details["attempts"]] == [
        (1, "crash", "requeue", "n[1-2]"), (2, "crash", "requeue", "n[1-2]"),
    ]  # fmt: skip
    assert details["incidents"] == [{"cause": "crash", "total": 2, "without_commit": 2, "limit": 3}]
    assert details["next"]["estimate"] == "2026-11-25T14:00:00" and details["next"]["command"] is None
    shown = explain.page(details)
    for text in (
        "mask 0.5",
        "c0de",
        "waiting",
        "RuntimeError: boom again",
        "Slurm expects 2026-11-25T14:00:00",
        "attempt 2 ran in another environment: torch 2.12.0 -> 2.13.0",
    ):
        assert text in shown
    assert json.loads(json.dumps(details)) == details


def test_explain_shows_bottleneck_and_anomalies(place, commands):
    run = RunDir(place / "demo" / "mask50")
    queue(commands, "RUNNING||None|N/A")
    assert (run_details.explain(run)["verdict"], run_details.explain(run)["anomalies"]) == (None, [])
    run.metrics.mkdir(exist_ok=True)
    line = {"step": 1, "samples": 8, "loss": 1.0, "verdict": "input-bound: data-wait is 41 % of the time"}
    (run.metrics / "1.jsonl").write_text(json.dumps(line) + "\n")
    run.anomalies.mkdir()
    for name in ("1-9.0", "1-9.1", "2-10.0", "2-10.1", "2-9.0", "notes"):
        (run.anomalies / f"{name}.json").write_text("{}")
    (run.anomalies / "2-11.0.json.tmp.7").write_text("{")
    details = run_details.explain(run)
    assert details["anomalies"] == [f"anomalies/{name}.json" for name in ("1-9.0", "2-9.0", "2-10.0")]
    shown = explain.page(details)
    assert "input-bound: data-wait is 41 %" in shown and "3, the last one: anomalies/2-10.0.json" in shown


def test_explain_suggests_retry_for_failed_run_and_nothing_if_complete(place, commands):
    run = RunDir(place / "demo" / "mask50")
    attempt(run, "config", 78, lines=["wrong"])
    queue(commands)
    details = run_details.explain(run)
    assert details["state"]["state"] == "failed"
    words = "--sweep", "/a b/demo.yaml", "--only", "mask50", "--root", place, "--retry"
    assert details["next"]["command"] == cli.command("submit", *words)
    assert details["incidents"] == [{"cause": "config", "total": 1, "without_commit": 1, "limit": 1}]
    write_json(run.result, {"run": "mask50", "samples": 12_800, "seconds": 1.0})
    assert run_details.explain(run)["next"]["what"] == "nothing: it has finished"
    queue(commands, "PENDING||Priority|N/A")
    (place / "demo" / "mask50" / "result.json").unlink()
    assert run_details.explain(run)["next"]["estimate"] is None


def test_reason_of_diverged_run_stands_once_and_leads_to_a_change(place, commands):
    """The same configuration would diverge again, so --retry is no remedy. No checkpoint is named that does not
    exist."""
    run = RunDir(place / "demo" / "mask50")
    attempt(run, "diverged", 76)
    queue(commands)
    details = run_details.explain(run)
    assert details["state"]["state"] == "failed" and details["next"]["command"].endswith("--changed fork")
    assert "change its learning rate or warm-up" in details["next"]["what"]
    shown = explain.page(details)
    assert shown.count(details["evidence"]["reason"]) == 1 and "newest checkpoint:" not in shown
    attempt(run, "crash", 70)
    details = run_details.explain(run)
    assert "without a checkpoint to resume from" in details["next"]["what"]


def test_explain_shows_end_of_retry_delay(place, commands, monkeypatch):
    run = RunDir(place / "demo" / "mask50")
    attempt(run, "storage", 69)
    queue(commands, "PENDING||BeginTime|N/A")
    details = run_details.explain(run)
    assert details["next"]["not_before"] == pytest.approx(read_json(run.attempt(1) / "end.json")["time"] + 30)
    assert "not before 20" in explain.page(details)


def test_error_is_shown_in_place_of_lines_that_follow_it(tmp_path):
    (tmp_path / "log").write_text(
        "Traceback (most recent call last):\n  File x\n    y\nRuntimeError: boom\n\n" + "USDT: probe 0x1\n" * 9
    )
    assert run_details.last_lines(tmp_path / "log") == [
        "Traceback (most recent call last):", "  File x", "    y", "RuntimeError: boom",
    ]  # fmt: skip
    (tmp_path / "log").write_text("step 1\n" + "USDT: probe 0x1\n" * 9)
    assert run_details.last_lines(tmp_path / "log") == ["USDT: probe 0x1"] * 5


def test_finished_run_has_no_cause_and_no_running_job(place, commands):
    run = RunDir(place / "demo" / "mask50")
    n = attempts.start_attempt(run, {"nodes": "n1", "job": "57_0"})
    run.write_cause(n, 0, "complete", 0, "complete")
    write_json(run.result, {"run": "mask50", "samples": 12_800, "seconds": 1.0})
    attempts.end_attempt(run, n, EndFacts(0, "RUNNING"))
    queue(commands)
    shown = explain.page(run_details.explain(run))
    assert "attempt 1: done: it is complete" in shown and "exit code 0\n" in shown
    assert "because of complete" not in shown and "RUNNING" not in shown
    assert "complete: complete" not in shown


def test_last_lines_reads_huge_log_from_end(tmp_path):
    with open(tmp_path / "log", "wb") as file:
        file.truncate(1 << 40)  # a sparse file
        file.seek(0, os.SEEK_END)
        file.write(b"\nthe end\n")
    assert run_details.last_lines(tmp_path / "log")[-1] == "the end"


def test_explain_selects_log_of_root_cause_node(place):
    run = RunDir(place / "demo" / "mask50")
    folder = run.open_logs(attempts.start_attempt(run, {}))
    for name in ("node0.err", "node1.out", "job.err"):
        (folder / name).write_text(name)
    assert [run_details._log(run, 1, node).name for node in (0, 1)] == ["node0.err", "job.err"]


def test_explain_reports_damaged_files_without_exception(place, commands):
    run = RunDir(place / "demo" / "mask50")
    queue(commands, "RUNNING|n1|None|N/A")
    run.status.write_text("{")
    assert "status.json: not JSON" in explain.page(run_details.explain(run))
    run.identity.write_text("{")
    (run.path / "job.json").write_text("{")
    assert "unknown" in explain.page(run_details.explain(run))


def test_commands_escape_control_characters_in_names_and_logs(place, commands, capsys):
    run = make(place / "demo", HOSTILE, steps=0, complete=False)
    attempt(run, "crash", 70, lines=[HOSTILE])
    for shown in (explain.page(run_details.explain(run)), render(table([run]))):
        assert "\\x1b[2J" in shown and "\\u202e" in shown
        assert all(c.isprintable() or c == "\n" for c in shown)
    for command in (["status"], ["report", "--out", str(place / "page.html")], ["cancel", "demo/nothing"]):
        line = [sys.executable, str(ROOT / "jobs"), command[0], "--root", str(place), *command[1:]]
        done = subprocess.run(line, capture_output=True, text=True)
        assert all(c.isprintable() or c == "\n" for c in done.stdout + done.stderr), command
    assert "<script" not in (place / "page.html").read_text()


def test_explain_command_prints_page_for_each_run_without_slurm(place):
    line = [sys.executable, str(ROOT / "jobs"), "explain", "--root", str(place)]
    environment = {**os.environ, "PATH": "/nowhere"}
    done = subprocess.run([*line, "demo/mask50"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "unknown: Slurm does not answer" in done.stdout, done.stderr
    done = subprocess.run([*line, "demo"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.count("\ndiffers ") == 2, "a page for each run"


def test_job_states_read_expected_start_from_squeue(place, commands):
    queue(commands, "PENDING||Priority|2026-11-25T14:00:00")
    run = RunDir(place / "demo" / "mask50")
    assert clusters.states([run])[run.path].starts == "2026-11-25T14:00:00"


@pytest.mark.parametrize("kind", ["local", "slurm"])
def test_run_with_damaged_result_is_not_complete(place, commands, kind):
    """Every command names the file. ``explain`` still shows the attempts and how to restore the result."""
    run = RunDir(place / "demo" / "mask50")
    write_json(run.path / "job.json", {**read_json(run.path / "job.json"), "kind": kind})
    attempt(run, "complete", 0)
    run.result.write_text('{"run": "mask50", "sam')
    run.status.write_text("\0\0")
    queue(commands)
    details = run_details.explain(run)
    assert details["state"]["state"] == "failed"
    assert [item["attempt"] for item in details["attempts"]] == [1]
    shown = explain.page(details)
    assert "Delete it and submit again" in shown and "no attempt has started" not in shown
    (row,) = table([run])
    (outcome,) = results.outcomes([run])
    assert outcome.state == row["state"] == details["state"]["state"]
    for text in (shown, row["reason"], results.terminal_page([outcome])):
        assert "result.json: not JSON" in text and "status.json: not JSON" in text


@pytest.mark.parametrize("cause", ["", "storage"])
def test_explain_shows_newest_attempt_if_end_was_not_recorded(place, commands, cause):
    """This happens if the supervisor is killed: it recorded the end of attempt 1 but not of attempt 2."""
    run = RunDir(place / "demo" / "mask50")
    write_json(run.path / "job.json", {**read_json(run.path / "job.json"), "kind": "local"})
    attempt(run, "crash", 70, lines=["RuntimeError: the first"])
    n = attempts.start_attempt(run, {"host": "here"})
    (run.open_logs(n) / "node0.err").write_text("the newest\n")
    if cause:
        run.write_cause(n, 0, cause, 69, "the bucket is away")
    details = run_details.explain(run)
    assert details["state"]["state"] == "stopped" and details["evidence"]["attempt"] == n
    assert details["evidence"]["lines"] == ["the newest"] and details["evidence"]["action"] is None
    shown = explain.page(details)
    assert "attempt 2: nothing yet" in shown and "| the newest" in shown and "the first" not in shown
    expected = "storage: rank 0: the bucket is away" if cause else "node: ended unseen"
    assert f"the next start would decide requeue, because of {expected}" in shown
    write_json(run.path / "job.json", {**read_json(run.path / "job.json"), "kind": "slurm", "site": "another"})
    queue(commands)
    details = run_details.explain(run)
    # Attempt 2 may still be running.
    assert details["state"]["state"] == "unknown"
    assert details["evidence"]["attempt"] == 1
