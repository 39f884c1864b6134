"""Tests that the examples of docs/sweeps.md can be planned and yield the runs that the page states."""

import json
import re
from pathlib import Path

import pytest

from jobs.commands.submit import main

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "sweeps.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```\n(?:\nMakes (.*?)\.\n)?", PAGE, re.DOTALL)


@pytest.mark.parametrize("number", range(1, len(BLOCKS)))
def test_sweeps_page_example_plans_stated_runs(number, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FLIP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PATH", "/nowhere")  # no Slurm
    text, stated = BLOCKS[number]
    path = tmp_path / "example.yaml"
    path.write_text(BLOCKS[0][0] + text, encoding="utf-8")
    assert main(["--sweep", str(path), "--dry-run", "--json"]) == 0, capsys.readouterr().err
    plan = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in plan["runs"]] == re.findall(r"`([^`]+)`", stated)
    assert {run["action"] for run in plan["runs"]} == {"new"}


def test_sweeps_page_states_runs_of_every_example():
    assert len(BLOCKS) == PAGE.count("```yaml") == PAGE.count("\nMakes ") + 1
