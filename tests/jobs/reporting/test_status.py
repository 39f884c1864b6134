"""Tests of the status command and of watching runs: output, Ctrl-C and exit codes."""

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flip.runs.lifecycle import RunState
from flip.runs.rundir import RunDir, write_json
from jobs.common.cli import command
from jobs.common.terminal import TextTable, show
from jobs.reporting import status as run_status
from tests.harness.common import make_run
from tests.harness.terminal import Terminal, golden

ROOT = Path(__file__).resolve().parents[3]


GOLDEN = Path(__file__).parent / "golden"
HOSTILE = "[red]\x1b[2J"
MISSING = (
    "stage",
    "samples",
    "total",
    "step",
    "steps",
    "loss",
    "accuracy",
    "phase",
    "cluster",
    "samples_per_second",
    "eta_seconds",
)


def row(name, state, attempts=1, hours=0.0, reason="", **fields):
    spent = {"attempts": attempts, "restarts": attempts - 1, "wall_seconds": 3600 * hours, "gpu_hours": 8 * hours}
    identity = {"sweep": "masking", "run": name, "state": state, "reason": reason, "progress_time": None}
    return {**dict.fromkeys(MISSING), **identity, **spent, **fields}


def progress(samples, loss, speed=None):
    remaining = None
    if speed is not None:
        remaining = (12_800_000_000 - samples) / speed
    step = samples // 65_536
    fields = {"samples": samples, "total": 12_800_000_000, "step": step, "progress_time": 1e9 - 75}
    fields |= {"loss": loss, "accuracy": 1 / (1 + loss)}
    return {**fields, "stage": "pretrain", "samples_per_second": speed, "eta_seconds": remaining}


CRASH = f"CUDA error: device-side assert triggered {HOSTILE}; three crashes without a checkpoint"
ROWS = [
    row("mask50-16k-seed0", "complete", 3, 61.2, **progress(12_800_000_000, 0.71)),
    row("mask50-16k-seed1", "running", 2, 40.0, phase="training", **progress(8_300_000_000, 0.912, 61_000)),
    row("mask50-64k-seed0", "running", 1, 0.02, phase="starting"),
    row("mask75-16k-seed0", "failed", 3, 12.5, CRASH, **progress(2_100_000_000, 1.73)),
    row(f"mask75-{HOSTILE}", "waiting", 7, 22.0, "storage: 503 Slow Down; starts again 60 s after that"),
    row("mask75-64k-seed0", "queued", 0, 0, "waits for its canary mask50-64k-seed0"),
    row("mask75-64k-seed1", "queued", 0),
    row("clip-16k-seed0", "cancelled", 1, 3.4, "cancelled by ann: not needed", **progress(500_000_000, 2.5)),
    row("clip-64k-seed0", "stopped", 1, 1.0, "no supervisor is running: submit again"),
    row("clip-64k-seed1", "unknown", 1, 0.5, "status.json: holds no mapping"),
]


@pytest.fixture
def terminal(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(time, "time", lambda: 1e9)


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_status_matches_golden_file_on_terminal(terminal, columns):
    with Terminal(columns, 50) as screen:
        show(run_status.render(ROWS), screen.file)
        golden(GOLDEN / f"status-{columns}.txt", screen.close().text())
        assert not screen.wrapped


@pytest.mark.parametrize("lines", [10, 50])
@pytest.mark.parametrize("columns", [40, 80, 200])
def test_watch_matches_golden_file_on_terminal(terminal, columns, lines):
    with Terminal(columns, lines) as screen:
        with run_status._live(screen.file) as draw:
            draw(ROWS[:3])
            draw(ROWS)
        golden(GOLDEN / f"watch-{columns}x{lines}.txt", screen.close().text())
        assert not screen.wrapped and screen.cursor


def test_status_matches_golden_file_on_pipe_without_escapes(terminal):
    text = run_status.render(ROWS)
    golden(GOLDEN / "status-piped.txt", text)
    assert "\x1b" not in text and "three crashes without a checkpoint" in text


def test_row_sums_wall_time_and_gpu_hours_over_attempts(tmp_path, monkeypatch):
    run = make_run(tmp_path / "sweep" / "run")
    write_json(run.path / "job.json", {"shape": {"nodes": 2, "gpus": 4}, "after": 0})
    for n, (start, end) in enumerate([(1000, 4600), (5000, None), (9000, None)], 1):
        run.attempt(n).mkdir(parents=True)
        write_json(run.attempt(n) / "start.json", {"attempt": n, "time": start})
        if end:
            write_json(
                run.attempt(n) / "end.json",
                {
                    "attempt": n,
                    "code": 75,
                    "time": end,
                    "action": "requeue",
                    "cause": "stopped",
                    "reason": "",
                    "delay": 0,
                    "commits": 0,
                    "committed": True,
                    "observed": True,
                },
            )
    monkeypatch.setattr(time, "time", lambda: 12_600.0)
    row = run_status.row(run, RunState("running", 3))
    # The second attempt has neither an end nor metrics.
    assert (row["wall_seconds"], row["gpu_hours"], row["attempts"]) == (7200, 16.0, 3)
    run.metrics.mkdir()
    lines = [{"step": 1, "samples": 8, "time": 6000}, {"step": 2, "samples": 16, "time": 6800}]
    (run.metrics / "2.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run_status.row(run, RunState("running", 3))["wall_seconds"] == 9000, "it counts up to its last metrics"
    (run.metrics / "2.jsonl").unlink()
    write_json(run.status, {"attempt": 3, "time": 10_800.0})
    # The newest attempt counts up to its last status; what is known of earlier ones is not read again.
    assert run_status.row(run, RunState("unknown", 3))["wall_seconds"] == 7200
    write_json(run.path / "job.json", {"shape": {"nodes": 2, "gpus": 4}, "after": 0, "time": 1.0})
    assert run_status.row(run, RunState("unknown", 3))["wall_seconds"] == 5400, "another run may be in its place"


def test_reason_of_last_end_is_shown_until_run_is_submitted_again(tmp_path):
    run = make_run(tmp_path / "sweep" / "run")
    run.attempt(1).mkdir(parents=True)
    end = {"attempt": 1, "action": "stop", "cause": "cancelled", "reason": "cancelled by ada", "delay": 0}
    write_json(run.attempt(1) / "end.json", end | {"code": 75, "time": 1.0, "commits": 0, "committed": True})
    for after, state, reason in (
        (0, "cancelled", "cancelled by ada"), (0, "queued", "cancelled by ada"), (1, "queued", ""), (1, "running", ""),
    ):  # fmt: skip
        write_json(run.path / "job.json", {"shape": {"nodes": 1, "gpus": 0}, "after": after})
        assert run_status.row(run, RunState(state, 1))["reason"] == reason


def test_position_of_ended_run_is_that_of_its_newest_checkpoint(tmp_path):
    """The steps after the last logged one are saved on a cancel, but their position is in no metric line."""
    run = make_run(tmp_path / "sweep" / "run")
    run.attempt(1).mkdir(parents=True)
    write_json(run.status, {"attempt": 1, "samples": 1920, "step": 15, "total": 12_800, "accuracy": 0.25})
    end = {"attempt": 1, "action": "stop", "cause": "cancelled", "reason": "cancelled", "code": 75, "delay": 0}
    end |= {"commits": 2176, "committed": True}
    write_json(run.attempt(1) / "end.json", end)
    shown = run_status.row(run, RunState("cancelled", 1))
    assert (shown["samples"], shown["step"]) == (2176, None)
    (table,) = [part for part in run_status.render([shown]).parts if not isinstance(part, str)]
    assert table.rows[0]["samples"] == "2,176 / 12,800" and table.rows[0]["batch acc."] == "25.0 %"
    assert run_status.row(run, RunState("running", 2))["samples"] == 1920, "a new attempt has its own position"
    write_json(run.attempt(1) / "end.json", {**end, "commits": 1280})
    assert run_status.row(run, RunState("failed", 1))["samples"] == 1920, "steps after the newest checkpoint"


def test_watch_distinguishes_runs_of_same_name_in_two_sweeps(terminal):
    rows = [row("a", "queued", 0), {**row("a", "queued", 0), "sweep": "other"}]
    lines = io.StringIO()
    with run_status._live(lines) as draw:
        draw(rows)
        draw(rows)
    assert lines.getvalue() == "masking/a: queued\nother/a: queued\n"


@pytest.mark.long
def test_watch_returns_worst_exit_code_on_file_and_terminal(field, terminal):
    good = field.run("good", total=2)
    bad = field.run("bad", attempts={"1": {"0": "diverge"}})
    cancelled = field.run("left")
    write_json(cancelled.cancel, {"who": "me", "why": "", "time": 0})
    field.submit(good, bad)
    lines = io.StringIO()
    assert run_status.watch([good.path, cancelled.path, bad.path], lines, poll=0.05) == 76
    output = lines.getvalue()
    assert "good: complete" in output and "bad: failed" in output and "as asked" in output
    assert "\x1b" not in output
    with Terminal(100) as screen:
        assert run_status.watch([good.path], screen.file) == 0
        assert "━" * 20 in screen.close().text() and b"\x1b[2K" in screen.raw


@pytest.mark.long
def test_status_command_adapts_output_to_terminal_and_pipe(field, terminal):
    field.run("[red]run")
    command = (sys.executable, ROOT / "jobs", "status", field.sweep)
    with Terminal(40, 10) as screen:
        assert screen.start(*command, cwd=ROOT).wait(30) == 0
        assert "[red]run" in screen.close().text() and not screen.wrapped and b"\x1b[" in screen.raw
    with Terminal(40, 10) as screen:
        assert screen.start(*command, "--watch", cwd=ROOT).wait(30) == 75
        assert "1 stopped" in screen.close().text() and screen.cursor
    script = (
        "import sys; from jobs.commands.status import main; main(sys.argv[3:])\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'rich']"
    )
    done = subprocess.run([sys.executable, "-c", script, *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "[red]run  stopped" in done.stdout and "\x1b" not in done.stdout, done.stderr


@pytest.mark.long
def test_watch_returns_at_once_if_no_supervisor_manages_run(field):
    assert run_status.watch([field.run().path], io.StringIO()) == 75


@pytest.mark.long
def test_watch_interrupt_leaves_run_running(field):
    run = field.run(total=10_000, step=0.1)
    field.submit(run)
    # Restores SIGINT as in a terminal: tests in the background inherit it ignored, and so would the command.
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from jobs.reporting.status import watch; sys.exit(watch([sys.argv[1]]))"
    )
    watcher = subprocess.Popen([sys.executable, "-c", script, run.path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    field.until_moving(run, 1)
    assert "run: " in watcher.stdout.readline(), "the watch command has started"
    watcher.send_signal(signal.SIGINT)
    output, _ = watcher.communicate(timeout=20)
    assert watcher.returncode == 130
    assert command("status", run.path, "--watch") in output
    assert "Traceback" not in output
    time.sleep(0.3)
    assert field.state(run) == "running" and run.newest_attempt() == 1


def test_table_of_evaluations_has_no_columns_of_progress(tmp_path):
    run = RunDir(tmp_path / "demo" / "a")
    job = RunDir(tmp_path / "demo" / ".evaluate" / "a-1")
    for each in (run, job):
        each.path.mkdir(parents=True)
    shown = [
        part
        for part in run_status.render(run_status.table([run, job]), [run, job]).parts
        if isinstance(part, TextTable)
    ]
    columns = [set(table.rows[0]) for table in shown]
    assert columns[0] - columns[1] == {"stage", "samples", "step", "loss", "batch acc.", "samples/s", "ETA"}
