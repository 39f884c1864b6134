"""Tests of continuing a run with other settings: the printed entry of the sweep file, and plans without the commit."""

import json
import re

import pytest

from flip.runs import commit
from flip.runs.rundir import RunDir
from jobs.commands import submit
from tests.jobs.runs import test_resubmit

desk = test_resubmit.desk

COOLDOWN = """
  cooldown: {{init: {{run: half, samples: {samples}, extend: true}}, stages.pretrain.samples: 96}}
"""


def save(run, samples):
    """A commit as a training leaves it; its tensors are not read by a submission."""
    folder = commit.folder(run, "pretrain", samples, 1)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    commit.commit(folder, {"stage": "pretrain", "samples": samples, "attempt": 1})


@pytest.mark.parametrize("setting", ["stages.pretrain.base_lr=1e-3", "resources.processes=2", "optim.beta2=0.98"])
def test_printed_entry_continues_changed_run(desk, capsys, setting):
    assert desk("mine.yaml") == ["half"]
    run = RunDir(desk.folder / "runs" / "other" / "half")
    assert submit.main(["mine.yaml", setting]) == 78
    assert "half-more" not in capsys.readouterr().err, "without a commit there is nothing to continue"
    save(run, 16)
    save(run, 32)
    assert submit.main(["mine.yaml", setting]) == 78
    (entry,) = re.findall(r"by: (half-more: .*)$", capsys.readouterr().err, re.MULTILINE)
    assert submit.main(["mine.yaml", setting, "--dry-run"]) == 78
    assert f"\n  {entry}\n" in capsys.readouterr().out, "the plan has the entry, too"
    assert "data.lanes: 16" in entry, "the lanes stay"
    text = (desk.folder / "mine.yaml").read_text()
    (desk.folder / "mine.yaml").write_text(text.replace("runs: {half: }", f"runs:\n  {entry}"))
    assert desk("mine.yaml", setting) == ["half-more"]


def test_no_entry_for_change_that_cannot_be_continued(desk, capsys):
    assert desk("mine.yaml") == ["half"]
    save(RunDir(desk.folder / "runs" / "other" / "half"), 32)
    assert submit.main(["mine.yaml", "model.embed=32"]) == 78
    assert "half-more" not in capsys.readouterr().err


def test_plan_names_newest_commit_if_run_cannot_start_yet(desk, capsys):
    assert desk("mine.yaml") == ["half"]
    save(RunDir(desk.folder / "runs" / "other" / "half"), 16)
    text = (desk.folder / "mine.yaml").read_text().replace("runs: {half: }", "runs:\n  half:")
    (desk.folder / "mine.yaml").write_text(text + COOLDOWN.format(samples=32))
    assert submit.main(["mine.yaml", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "new, cannot start yet" in shown and "will start" not in shown
    assert "no commit at S = 32 yet, its newest commit is at S = 16 of stage pretrain" in shown
    assert submit.main(["mine.yaml", "--dry-run", "--json"]) == 0
    assert [run["starts"] for run in json.loads(capsys.readouterr().out)["runs"]] == [True, False]


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_missing_relative_tokenizer_is_named_as_such(desk, capsys, dry):
    assert desk("mine.yaml") == ["half"]
    save(RunDir(desk.folder / "runs" / "other" / "half"), 32)
    text = (desk.folder / "mine.yaml").read_text().replace("runs: {half: }", "runs:\n  half:")
    (desk.folder / "mine.yaml").write_text(text + COOLDOWN.format(samples=32))
    assert submit.main(["mine.yaml", "--only", "cooldown", "data.tokenizer=my/tokenizer.json", *dry]) == 78
    error = capsys.readouterr().err
    assert f"{desk.folder}/my/tokenizer.json: data.tokenizer: no such file" in error
    assert "relative path" in error and "not the tokenizer of the run" not in error


def test_plan_refuses_commit_that_will_never_exist(desk, capsys):
    assert desk("mine.yaml") == ["half"]
    save(RunDir(desk.folder / "runs" / "other" / "half"), 48)
    text = (desk.folder / "mine.yaml").read_text().replace("runs: {half: }", "runs:\n  half:")
    (desk.folder / "mine.yaml").write_text(text + COOLDOWN.format(samples=32))
    assert submit.main(["mine.yaml", "--dry-run"]) == 78
    assert "no commit at S = 32" in capsys.readouterr().err
