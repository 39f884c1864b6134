"""Tests of classes of the user in a submission: their files go with the code, and make no other run."""

import hashlib
import json
import os
import re

import pytest

from flip.config.identity import identity
from flip.config.merge import read_config
from flip.runs.rundir import RunDir, read_json, write_json
from jobs.submission import snapshot, start_runs
from tests.flip.training.test_user_classes import FILE as FOUR_CLASSES
from tests.harness.common import ROOT, metric_lines, run_script, wait_until

FILE = "class GradNoise:\n    every = {every}\n\n    def step(self, view):\n        pass\n"
FAILS = """

class Fails:
    every = 1

    def step(self, view):
        return 1 / 0
"""


def checksum(file):
    return f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"


@pytest.mark.long
def test_edited_callback_makes_no_other_run_and_started_run_keeps_its_copy(desk, typed, monkeypatch):
    monkeypatch.setattr(start_runs, "take", snapshot.take)
    file = desk.folder / "my_metric.py"
    entry = "my_metric.py:GradNoise"
    file.write_text(FILE.format(every=1))
    sweep = desk.text.replace("mask: 0.5}", f'mask: 0.5, monitor.callbacks: ["{entry}"]}}')
    code, out, err = typed(sweep=sweep)
    assert code == 0 and typed.started == ["half", "whole"], err
    run = RunDir(desk.runs / "demo" / "half")
    config = read_config(run.config)
    stored = read_json(run.identity)
    assert config.monitor.callbacks == [entry] and stored["user_files"] == {"my_metric.py": checksum(file)}
    assert "user_files" not in read_json(RunDir(desk.runs / "demo" / "whole").identity)
    copy = run.path.parent / ".code" / stored["code"] / "user_files" / "my_metric.py"
    assert copy.read_bytes() == file.read_bytes()
    config.monitor.callbacks = []
    assert stored["hash"] == identity(config, "")["hash"], "callbacks are no part of the identity"

    file.write_text(FILE.format(every=2))
    code, out, err = typed(sweep=sweep)
    assert code == 0 and "changed" not in out, err
    after = read_json(run.identity)
    # Not yet started.
    assert after["hash"] == stored["hash"]
    assert after["user_files"] == {"my_metric.py": checksum(file)}

    run.start_attempt({})
    write_json(run.path / "job.json", {"kind": "local", "uid": os.geteuid(), "token": "x"})
    started = file.read_bytes()
    file.write_text(FILE.format(every=3) + FAILS)
    more = sweep.replace(f'["{entry}"]', f'["{entry}", "my_metric.py:Fails"]')
    code, out, err = typed("--only", "half", sweep=more)
    assert code == 0 and typed.started == ["half"], err
    assert "half continues with its code, which does not have my_metric.py:Fails" in out
    assert read_json(run.identity) == after and read_config(run.config).monitor.callbacks == [entry]
    assert (run.path.parent / ".code" / after["code"] / "user_files" / "my_metric.py").read_bytes() == started
    assert typed("--only", "half", sweep=desk.text)[0] == 0
    assert read_config(run.config).monitor.callbacks == [], "the sweep file names none any more"


@pytest.mark.parametrize(
    "change, code, message",
    [
        (lambda file: file.unlink(), 78, "monitor.callbacks: no such file"),
        (lambda file: file.write_text("class Other:\n    pass\n"), 78, "no such class"),
        (lambda file: file.chmod(0o666), 77, "the file of monitor.callbacks is not trusted"),
        (lambda file: file.parent.chmod(0o777), 77, "every user may write to it"),
    ],
)
def test_submit_refuses_wrong_or_untrusted_callback(desk, typed, change, code, message):
    file = desk.folder / "mine" / "my_metric.py"
    file.parent.mkdir()
    file.write_text(FILE.format(every=1))
    setting = "monitor.callbacks=[mine/my_metric.py:GradNoise]"
    assert typed("--dry-run", setting)[0] == 0
    change(file)
    refused, out, err = typed(setting)
    assert refused == code and message in err and not typed.there(), err


@pytest.mark.long
def test_run_logs_example_of_the_page_from_its_copy_and_shows_failed_class(desk):
    """The file is replaced before the run starts to train."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (setting,) = re.findall(r"```yaml\nset:\n(.*?)```", page, re.DOTALL)
    assert "every = 100" in example
    file = desk.folder / "my_metric.py"
    file.write_text(example.replace("every = 100", "every = 1") + FAILS)
    setting = setting.replace('GradNoise"', 'GradNoise", "my_metric.py:Fails"').rstrip()
    desk.sweep.write_text(desk.text.replace("  compute:", f"{setting}\n  compute:"))
    done = desk.submit("--only", "half", "monitor.log_every=1")
    assert done.returncode == 0, done.stderr
    file.write_text("raise SystemExit\n")
    run = RunDir(desk.runs / "demo" / "half")
    wait_until(run.result.exists, "the end of the run", 240)
    lines = metric_lines(run)
    assert len(lines) == 3 and all(line["callback"]["GradNoise/noise"] > 0 for line in lines)
    shown = run_script("jobs", "status", "demo", "--json", cwd=desk.folder, runs=desk.runs)
    (row,) = json.loads(shown.stdout)
    assert row["state"] == "complete" and "Fails is disabled" in row["reason"] and "GradNoise" not in row["reason"]


OPTIMIZER = """
from flip.optimizer_kinds import AdamW


class Mine(AdamW):
    \"\"\"{text}\"\"\"
"""


@pytest.mark.long
def test_class_that_changes_results_is_pinned_and_an_edit_makes_another_run(desk, typed, monkeypatch):
    monkeypatch.setattr(start_runs, "take", snapshot.take)
    file = desk.folder / "mine.py"
    file.write_text(OPTIMIZER.format(text="One."))
    argv = ("--only", "half", "optim.name=mine.py:Mine")
    code, out, err = typed(*argv)
    assert code == 0 and typed.started == ["half"], err
    run = RunDir(desk.runs / "demo" / "half")
    first = read_config(run.config).optim.name
    assert first == f"mine.py:Mine@{checksum(file)}"
    stored = read_json(run.identity)
    (copy,) = stored["user_files"]
    path = run.path.parent / ".code" / stored["code"] / "user_files" / copy
    assert path.read_bytes() == file.read_bytes()

    run.start_attempt({})
    file.write_text(OPTIMIZER.format(text="Two."))
    code, out, err = typed(*argv)
    assert code == 78 and "optim.name" in out + err and not typed.started
    code, out, err = typed(*argv, "--changed", "keep")
    assert code == 0 and typed.started == ["half"], err
    assert read_config(run.config).optim.name == first, "the run keeps its file"
    code, out, err = typed(*argv, "--changed", "fork")
    assert code == 0, err
    (fork,) = (path for path in run.path.parent.glob("half*") if path.name != "half")
    assert read_config(fork / "config.yaml").optim.name == f"mine.py:Mine@{checksum(file)}"


@pytest.mark.long
def test_run_executes_its_copy_in_ranks_and_loader_processes(desk):
    """The file is replaced before the run starts to train. The plan has not executed it."""
    file = desk.folder / "mine.py"
    file.write_text(FOUR_CLASSES)
    settings = {
        "optim.name": "mine.py:Lion", "model.objective": "mine.py:Margin", "augment.steps": "[mine.py:Erase]",
        "stages.pretrain.text_mask": "0.5", "stages.pretrain.text_masking": "mine.py:Backwards", "data.workers": 1,
    }  # fmt: skip
    planned = desk.submit("--only", "half", "--dry-run", *(f"{key}={value}" for key, value in settings.items()))
    assert planned.returncode == 0 and "mine.py:Lion, sha256" in planned.stdout, planned.stdout + planned.stderr
    done = desk.submit("--only", "half", *(f"{key}={value}" for key, value in settings.items()))
    assert done.returncode == 0, done.stderr
    file.write_text("raise SystemExit\n")
    run = RunDir(desk.runs / "demo" / "half")
    wait_until(run.result.exists, "the end of the run", 240)
    assert read_json(run.result)["samples"] > 0
    assert "margin" in metric_lines(run)[-1]
