"""Tests that the figures of the README exist, fit the code that draws them, and are read from a real run."""

import json
import os
import re
import subprocess
import sys

import pytest

from flip.runs.rundir import RunDir
from lab.documentation import figures
from tests.harness.common import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def read(name: str) -> str:
    return (figures.FOLDER / name).read_text(encoding="utf-8")


def test_every_figure_of_the_readme_exists_with_a_text():
    shown = re.findall(r'(?:src|srcset)="([^"]+)"', README)
    assert len(shown) == 4 and all((ROOT / name).is_file() for name in shown)
    assert all(re.search(r'alt="[^"]{20,}"', tag) for tag in re.findall(r"<img [^>]*>", README))


def test_readme_has_two_screens():
    """A pair of figures of this width fits side by side, and each on a phone."""
    text = README.partition("```bibtex")[0]
    assert len(re.sub(r"<!--.*?-->|<[^>]+>", "", text).split()) <= 700, "move a part to docs/"
    assert re.findall(r'<img [^>]*width="(\d+)"', README) == ["410", "410"]
    assert len(re.findall("^## ", README, re.MULTILINE)) <= 3, "a heading takes 77 pixels"


def test_parts_of_a_plan_are_taken_in_their_order():
    lines = [
        "mask0: new", "  stage     samples  steps", "  pretrain  1  2", "  a step  1", "",
        "\x1b[1mmask50: new\x1b[0m", "  from base  x", "  stage     samples  steps", "  pretrain  3  4", "  a step  2",
        "", "all runs", "  total", "  GPU-hours of runs",
    ]  # fmt: skip
    shown = ["\x1b[1mmask50: new\x1b[0m", "  stage     samples  steps", "  pretrain  3  4", "", "all runs", "  total"]
    assert figures.parts_of("\n".join(lines)) == "\n".join(shown)
    with pytest.raises(SystemExit, match="change SHOWN"):
        figures.parts_of("\n".join(lines[:-1]))


def test_drawings_have_dark_forms_and_the_timeline_is_that_of_the_record():
    assert read("preemption.svg") == figures.timeline(json.loads(read("preemption.json"))), "run `make figures`"
    assert read("input.svg") == figures.chart(json.loads((figures.RESULTS / "stream.json").read_text()))
    for name in ("towers", "preemption", "input"):
        assert read(f"{name}_dark.svg") == figures.dark(read(f"{name}.svg")), "run `make figures`"


def test_drawings_load_nothing_from_a_network():
    for path in figures.FOLDER.glob("*.svg"):
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/", "")
        assert "http" not in text and "<script" not in text, path


def test_events_are_read_from_the_files_of_a_preempted_run(tmp_path):
    run = RunDir(tmp_path)
    cause = {"cause": "stopped", "code": 75, "rank": 0, "time": 1000.5}
    files = {
        "attempts/1/told.json": {"signal": "SIGUSR2", "time": 1000.0}, "attempts/1/cause.0.json": cause,
        "attempts/1/end.json": {"commits": 640, "time": 1001.0}, "attempts/2/start.json": {"time": 1020.0},
        "attempts/2/ready.json": {"time": 1025.25}, "checkpoints/pretrain/640-1/commit.json": {},
        "metrics/2.jsonl": {"samples": 1280, "step": 20},
    }  # fmt: skip
    for name, record in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(record) + "\n")
    os.utime(tmp_path / "checkpoints/pretrain/640-1/commit.json", (1000.25, 1000.25))
    found = figures.events_of(run)
    seconds = {"signal": 0.0, "saved": 0.25, "exit": 0.5, "requeued": 1.0, "started": 20.0, "ready": 25.25}
    assert found == {"signal": "SIGUSR2", "seconds": seconds, "saved": 640, "total": 1280}


@pytest.mark.long
def test_figure_of_the_plan_shows_the_numbers_of_today():
    """Of the dry run on this machine: steps and GPU-hours are calculated, so they are the same everywhere."""
    text = re.sub(r"<[^>]+>|&#160;", " ", read("plan.svg"))
    command = ["submit", "masking", "--dry-run", "--cluster", "h100", "--json"]
    line = [sys.executable, str(ROOT / "jobs"), *command]
    plan = json.loads(subprocess.run(line, capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    for run in plan["runs"]:
        numbers = (run["name"], f"{run['cost']['gpu_hours']:,.0f}", f"{run['cost']['steps']:,}")
        assert all(number in text for number in numbers), "run `make figures`"
