"""What sweeps of trainings can, for programs: canary, changed runs, forks, prune, mixed sweeps, and the helper."""

import json
import os
import shutil
import signal

import pytest
import yaml

from tests.harness.command_sweep import CommandSweep
from tests.harness.common import ROOT

pytestmark = pytest.mark.long


@pytest.fixture
def sweep(tmp_path):
    return CommandSweep(tmp_path)


def test_canary_fork_and_prune(sweep):
    (sweep.folder / "own.yaml").write_text("kind: local\ncanary: 5\n")
    words = ["python3", "count.py", "--lr", "{lr}", "--steps", "20", "--seconds", "0.05"]
    sweep.table |= {"cluster": "own.yaml", "command": words, "grid": {"lr": [0.1, 0.2]}}
    sweep.table["metrics"]["total"] = 20
    assert "canary: lr0.1 starts first; after 5 steps: lr0.2" in sweep.submit()
    sweep.until_over()
    assert sweep.state("lr0.2")["state"] == "complete"
    words[5] = "30"
    sweep.table["metrics"]["total"] = 30
    assert "holds another configuration" in sweep.submit(code=78)
    assert "nothing to start" in sweep.submit("--changed", "keep")
    sweep.submit("--changed", "fork", "--only", "lr0.1")
    sweep.until_over()
    assert sweep.state("lr0.1-v2")["samples"] == 30 and sweep.state("lr0.1")["samples"] == 20
    sweep.table["grid"] = {"lr": [0.1, 0.3]}
    sweep.submit("--changed", "keep", "--prune", "--only", "lr0.2")
    assert not sweep.run("lr0.2").path.exists() and sweep.run("lr0.1").path.exists()


def test_program_without_metrics_is_no_canary(sweep):
    (sweep.folder / "own.yaml").write_text("kind: local\ncanary: 5\n")
    sweep.table |= {"cluster": "own.yaml", "grid": {"lr": [0.1, 0.2]}}
    del sweep.table["metrics"]
    text = sweep.submit()
    sweep.type("cancel", "demo", "--yes")
    sweep.until_over()
    assert "canary:" not in text


def test_trainings_and_programs_share_a_sweep_and_its_report(sweep, data):
    entry = {key: value for key, value in sweep.table.items() if key not in ("set", "code")}
    entry["command"] = ["python3", "count.py", "--lr", "{lr}", "--steps", "20", "--seconds", "0.05"]
    entry |= {"code": "code", "grid": {"lr": [0.1, 0.2]}, "metrics": {"file": "metrics.jsonl", "total": 20}}
    settings = {
        "model": {"size": "tiny"},
        "data": {"manifest": str(data), "tokenizer": f"{data}/tokenizer.json", "workers": 0, "block": 1},
        "stages": [{"name": "pretrain", "samples": 48, "batch": 16}],
        "compute": {"threads": 1},
    }
    runs = {"half": {"stages.pretrain.mask": 0.5}, "whole": {"stages.pretrain.mask": 0}}
    sweep.table = {"set": settings, "runs": runs, "commands": {"other": entry}}
    sweep.submit("--no-canary")
    sweep.until_over()
    rows = json.loads(sweep.type("report", "demo", "--json"))
    assert [row["run"] for row in rows] == ["half", "whole", "other-lr0.1", "other-lr0.2"]
    assert [row["samples"] for row in rows] == [48, 48, 20, 20]
    assert [row["set.lr"] for row in rows] == [None, None, 0.1, 0.2]
    assert "half" in (page := sweep.type("report", "demo")) and "other-lr0.1" in page
    about = [json.loads(sweep.type("explain", f"demo/{name}", "--json"))["about"] for name in ("half", "other-lr0.1")]
    assert [each["differs"] for each in about] == [{"stages.pretrain.mask": "0.5"}, {"set.lr": 0.1}]
    accounts = json.loads(sweep.type("status", "demo", "--goodput", "--json"))
    useful = {account["name"]: account["hours"]["useful"] for account in accounts}
    assert {"half", "whole", "other-lr0.1", "other-lr0.2"} <= useful.keys()
    assert all(hours > 0 for hours in useful.values())


def test_debug_refuses_a_program(sweep):
    sweep.table["command"] += ["--seconds", "0.01"]
    (sweep.folder / "demo.yaml").write_text(yaml.safe_dump(sweep.table, sort_keys=False))
    assert "this run executes a program" in sweep.type("debug", "--run", "demo", "demo.yaml", code=78)


def test_helper_needs_nothing_but_its_file(sweep):
    shutil.copy(ROOT / "sweeps/programs/run_helper.py", sweep.code)
    sweep.add("helped.py")
    resume = {"folder": "out", "pattern": "step-*"}
    text = yaml.safe_dump({"command": ["python3", "helped.py"], "code": "code", "resume": resume})
    sweep.table = yaml.safe_load(text)
    sweep.submit()
    sweep.until_saved(1)
    os.kill(sweep.rank(1), signal.SIGTERM)
    sweep.until_saved(2)
    os.kill(sweep.program(2), signal.SIGKILL)
    sweep.until_over()
    assert [cause for cause, _ in sweep.ends()] == ["stopped", "crash", "complete"]
    row = sweep.state()
    assert (row["state"], row["step"]) == ("complete", 50)
