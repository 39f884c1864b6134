"""Programs that import nothing of the toolkit, as runs of a sweep on this machine: killed, stopped, cancelled."""

import json
import os
import signal
import sys

import pytest

from flip.files.creation import RefusedPath
from flip.runs.command_record import read_command
from jobs.host import processes
from jobs.local.supervisor import is_served
from tests.harness.command_sweep import CommandSweep, count_result

pytestmark = pytest.mark.long


@pytest.fixture
def sweep(tmp_path):
    return CommandSweep(tmp_path)


def test_killed_program_continues_from_its_newest_checkpoint(sweep):
    """Killed twice: once the program alone, once its rank. All commands show its progress from the usual files."""
    sweep.submit()
    sweep.until_saved(1)
    os.kill(sweep.program(1), signal.SIGKILL)
    sweep.until_saved(2)
    program = sweep.program(2)
    os.kill(sweep.rank(2), signal.SIGKILL)
    sweep.until_over()
    assert sweep.final() == count_result(60, 0.1)
    assert not os.path.exists(f"/proc/{program}"), "the program dies with its rank"
    causes = [cause for cause, _ in sweep.ends()]
    assert causes == ["crash", "crash", "complete"]
    run = sweep.run()
    starts = [json.loads((run.attempt(n) / "resume.json").read_text()) for n in (1, 2, 3)]
    assert starts[0] == {} and 0 < starts[1]["samples"] < starts[2]["samples"]
    first = json.loads((run.metrics / "3.jsonl").read_text().splitlines()[0])
    assert first["step"] == starts[2]["samples"] + 1
    assert sweep.state()["state"] == "complete"
    page = sweep.type("explain", "demo/demo")
    assert "a program: python3 count.py --lr 0.1 --steps 60" in page and "unknown size" not in page
    assert "it was killed by SIGKILL" in page and "useful" in page
    account = json.loads(sweep.type("status", "demo", "--goodput", "--json"))[0]
    assert account["hours"]["useful"] > account["hours"]["repeated"] > 0
    report = sweep.type("report", "demo")
    assert "complete" in report and "FLOPs" not in report


def test_stopped_program_saves_and_continues(sweep):
    """TERM of the rank reaches the program, which saves at once and ends with 75."""
    sweep.submit()
    sweep.until_saved(1)
    os.kill(sweep.rank(1), signal.SIGTERM)
    sweep.until_over()
    (first, saved), (second, _) = sweep.ends()
    assert (first, second) == ("stopped", "complete")
    last = (sweep.run().metrics / "1.jsonl").read_text().splitlines()[-1]
    assert saved == json.loads(last)["step"], "it has saved its last step, and no step is repeated"
    assert sweep.final() == count_result(60, 0.1)


def test_cancelled_program_saves_and_continues_with_retry(sweep):
    sweep.submit()
    sweep.until_saved(1)
    sweep.type("cancel", "demo", "--yes")
    sweep.until_over()
    assert sweep.state()["state"] == "cancelled"
    sweep.submit("--retry")
    sweep.until_over()
    assert [cause for cause, _ in sweep.ends()] == ["cancelled", "complete"]
    assert sweep.final() == count_result(60, 0.1)


def test_two_ranks_meet_and_continue_exactly(sweep):
    """DDP with two ranks: rank 1's program is killed, then all are stopped; the tensors equal an undisturbed run's."""
    import torch

    sweep.add("ddp.py")
    sweep.table |= {
        "command": [sys.executable, "ddp.py", "--steps", "{steps}", "--seconds", "{seconds}"],
        "set": {"steps": 40},
        "runs": {"killed": {"seconds": 0.1}, "whole": {"seconds": 0.0}},
        "resume": {"folder": "out", "pattern": "step-*.pt", "arguments": ["--resume", "{checkpoint}"]},
        "metrics": {"pattern": r"step (?P<step>\d+) loss (?P<loss>\S+)", "total": 40},
        "resources": {"processes": 2, "cpus": 1},
    }
    sweep.submit("--no-canary")
    sweep.until_saved(1, "killed")
    os.kill(sweep.program(1, "killed", rank=1), signal.SIGKILL)
    sweep.until_saved(2, "killed")
    os.kill(sweep.rank(2, "killed"), signal.SIGTERM)
    sweep.until_over()
    assert [cause for cause, _ in sweep.ends("killed")] == ["crash", "stopped", "complete"]
    last = [torch.load(sweep.run(name).path / "work/out/step-40.pt") for name in ("killed", "whole")]
    assert all(torch.equal(last[0]["model"][key], value) for key, value in last[1]["model"].items())
    lines = (sweep.run("whole").metrics / "1.jsonl").read_text().splitlines()
    assert len(lines) == 40 and json.loads(lines[-1])["loss"] < json.loads(lines[0])["loss"]


BAD_ENDS = {
    "early": ("failed", 3, "it ended with 0 at 0 of 10 (metrics.total)"),
    "forever75": ("failed", 3, "it ended with 75 without a stop request and without a new checkpoint"),
    "usage": ("failed", 1, "it ended with 2 (usage: read its log)"),
    "input": ("failed", 3, "EOFError: EOF when reading a line"),
    "data": ("failed", 1, "it ended with 65: a shard is missing"),
    "hangs": ("failed", 3, "no output, metrics or checkpoint for 0.1 min"),
    "binary": ("complete", 1, ""),
    "words": ("complete", 1, ""),
}


def test_programs_that_misbehave(sweep):
    """Each end has its cause and its limit; none restarts for ever, and none counts as complete too early."""
    sweep.add("misbehaves.py")
    sweep.table |= {
        "command": ["python3", "misbehaves.py", "{case}", "a b", "line\nbreak", "$HOME"],
        "set": {},
        "runs": {case: {"case": case} for case in BAD_ENDS},
        "resume": {"folder": "out", "pattern": "never-*"},
        "metrics": {"pattern": r"step (?P<step>\d+)", "total": 10},
        "stop": {"hang_minutes": 0.1},
    }
    sweep.submit("--no-canary")
    sweep.until(lambda: not is_served(sweep.runs / "demo"), "the end of all", 400)
    for case, (state, number, reason) in BAD_ENDS.items():
        row = sweep.state(case)
        assert (row["state"], row["attempts"]) == (state, number), case
        assert reason in sweep.reason(number, case)
    assert "resume.pattern 'never-*' matches nothing below" in sweep.reason(3, "early")


def test_edit_of_the_code_does_not_reach_a_submitted_run(sweep):
    sweep.submit()
    sweep.until_saved(1)
    sweep.write("count.py", "raise SystemExit('edited')")
    os.kill(sweep.program(1), signal.SIGKILL)
    sweep.until_over()
    assert sweep.final() == count_result(60, 0.1)


CHANGES_ITSELF = """
import os, pathlib
if os.environ["RUN_ATTEMPT"] == "1":
    pathlib.Path("new").write_text("raise SystemExit('edited')")
    os.replace("new", "count.py")
"""


def test_program_that_replaces_its_own_code_starts_again_with_the_submitted_one(sweep):
    sweep.write("count.py", CHANGES_ITSELF + (sweep.code / "count.py").read_text())
    sweep.submit()
    sweep.until_saved(1)
    os.kill(sweep.program(1), signal.SIGKILL)
    sweep.until_over()
    assert sweep.final() == count_result(60, 0.1)
    work = sweep.run().path / "work"
    assert (work / "count.py").is_symlink() and "edited" in (work / "count.py.changed-1").read_text()
    assert (work / "count.py").stat().st_mode & 0o222 == 0, "the copied code is read-only"


def test_program_that_ignores_the_stop_signal_is_killed_and_continues(sweep):
    (sweep.folder / "own.yaml").write_text("kind: local\nsignal_seconds: 3\n")
    text = (sweep.code / "count.py").read_text()
    sweep.write("count.py", text.replace("lambda *_: stop.append(True)", "signal.SIG_IGN"))
    sweep.table |= {"cluster": "own.yaml"}
    sweep.table["command"] += ["--seconds", "0.5"]
    sweep.submit()
    sweep.until_saved(1)
    program = sweep.program(1)
    sweep.type("cancel", "demo", "--yes")
    sweep.until_over()
    sweep.until(lambda: processes.has_ended(processes.read_stat(program)[1]), "the end of the program", 10)
    assert sweep.state()["state"] == "cancelled" and 0 < sweep.ends()[0][1] < 60


def test_program_of_a_missing_interpreter_is_named(sweep):
    (sweep.code / "run.sh").write_text("#!/opt/none/bin/python\n")
    sweep.table["command"] = ["./run.sh", "{lr}"]
    sweep.submit()
    sweep.until_over()
    assert sweep.state()["attempts"] == 1 and "it ended with 127" in sweep.reason(1)


def test_files_that_the_program_writes_are_not_copied(sweep):
    """Checkpoints of a start by hand would be linked, and the program would save into its copied code."""
    (sweep.code / "out").mkdir()
    (sweep.code / "out" / "step-60.json").write_text("[60, 'of another run']")
    (sweep.code / "metrics.jsonl").write_text('{"step": 60}')
    sweep.table["command"] += ["--seconds", "0.01"]
    sweep.submit()
    sweep.until_over()
    assert sweep.final() == count_result(60, 0.1)
    assert not (sweep.run().path / "work" / "out").is_symlink()


def test_other_commands_leave_files_of_a_program_alone(sweep):
    sweep.table["command"] += ["--seconds", "0.01"]
    sweep.submit()
    sweep.until_over()
    folder = str(sweep.run().path)
    assert "executes a program" in sweep.type("export", folder, code=78)
    assert "executes a program" in sweep.type("evaluate", "demo/demo", code=78)
    sweep.type("rm", "demo/demo", "--yes")
    text = sweep.type("clean", "demo", "--older", "0", "--yes")
    assert "holds files of a program" in text
    assert len(list(sweep.runs.glob(".trash/*/demo/demo/work/out/final"))) == 1


def test_command_json_of_another_user_is_not_executed(sweep):
    """It has the rule of job.json: a file that others may write to is refused."""
    sweep.submit()
    sweep.until_saved(1)
    (sweep.run().path / "command.json").chmod(0o666)
    os.kill(sweep.rank(1), signal.SIGKILL)
    sweep.until_over()
    with pytest.raises(RefusedPath):
        read_command(sweep.run())
    assert sweep.run().newest_attempt() == 1, "no attempt starts"
    sweep.submit()
    sweep.until_over()
    assert sweep.state()["state"] == "complete", "a submission writes it anew"
