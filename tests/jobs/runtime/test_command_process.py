"""Programs that import nothing of the toolkit, as runs of a sweep on this machine: killed, stopped, cancelled."""

import json
import os
import signal
import sys

import pytest

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
