"""Tests of continuing a run with other settings: ``--changed extend``, and plans without the checkpoint."""

import json

import pytest

from flip.config.merge import read_config
from flip.runs import checkpoint_folder
from flip.runs.rundir import RunDir, write_json
from jobs.commands import submit
from tests.jobs.submitted_runs import test_resubmit

desk = test_resubmit.desk

COOLDOWN = """
  cooldown: {{init: {{run: half, samples: {samples}, extend: true}}, stages.pretrain.samples: 96}}
"""


def desk_file(desk, entry):
    """Write the sweep file with this entry for its run."""
    text = (desk.folder / "mine.yaml").read_text()
    (desk.folder / "mine.yaml").write_text(text.replace("{half: }", f"{{half: {entry}}}"))


def save(run, samples):
    """A checkpoint as a training leaves it; its tensors are not read by a submission."""
    folder = checkpoint_folder.folder(run, "pretrain", samples, 1)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    checkpoint_folder.complete_checkpoint(folder, {"stage": "pretrain", "samples": samples, "attempt": 1})


@pytest.mark.parametrize("setting", ["stages.pretrain.base_lr=1e-3", "resources.processes=2", "optim.beta2=0.98"])
def test_changed_run_is_extended_with_its_new_values(desk, capsys, setting):
    """The new run continues from the newest checkpoint; later submissions find it, with and without the option."""
    assert desk("mine.yaml") == ["half"]
    runs = desk.folder / "runs" / "other"
    save(RunDir(runs / "half"), 16)
    save(RunDir(runs / "half"), 32)
    write_json(runs / "half" / "cancel.json", {})
    key, _, value = setting.partition("=")
    desk_file(desk, f"{{{key}: {value}, stages.pretrain.mask: 0.75}}")
    assert submit.main(["mine.yaml"]) == 78
    assert "extend (a new run continues from its newest checkpoint" in capsys.readouterr().err
    assert submit.main(["mine.yaml", "--changed", "extend", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"note: extends {runs / 'half'} from S = 32 of stage pretrain" in shown
    assert "note: changes stages.pretrain.mask: '0.5' -> '0.75'" in shown
    assert desk("mine.yaml", "--changed", "extend") == ["half-v2"]
    config = read_config(runs / "half-v2" / "config.yaml")
    assert (config.init.run, config.init.samples, config.init.extend) == (str(runs / "half"), 32, True)
    assert config.data.lanes == read_config(runs / "half" / "config.yaml").data.lanes == 16
    assert config.stages[0].mask == "0.75"
    for more in ([], ["--changed", "extend"]):
        assert desk("mine.yaml", *more) == ["half-v2"], "it has no job, so it starts again: in its own directory"
    assert not (runs / "half-v3").exists()


def test_extended_run_is_extended_again(desk):
    assert desk("mine.yaml") == ["half"]
    runs = desk.folder / "runs" / "other"
    save(RunDir(runs / "half"), 16)
    write_json(runs / "half" / "cancel.json", {})
    assert desk("mine.yaml", "stages.pretrain.base_lr=1e-3", "--changed", "extend") == ["half-v2"]
    save(RunDir(runs / "half-v2"), 32)
    write_json(runs / "half-v2" / "cancel.json", {})
    assert desk("mine.yaml", "stages.pretrain.base_lr=2e-3", "--changed", "extend") == ["half-v3"]
    config = read_config(runs / "half-v3" / "config.yaml")
    assert (config.init.run, config.init.samples) == (str(runs / "half-v2"), 32)
    assert desk("mine.yaml", "stages.pretrain.base_lr=1e-3", "--retry") == ["half-v2"]


def test_run_that_may_go_on_is_not_extended(desk, capsys):
    """Both would train: a supervisor starts all stopped runs of its sweep."""
    assert desk("mine.yaml") == ["half"]
    save(RunDir(desk.folder / "runs" / "other" / "half"), 32)
    assert submit.main(["mine.yaml", "stages.pretrain.base_lr=1e-3", "--changed", "extend"]) == 78
    error = capsys.readouterr().err
    assert "and is stopped" in error and "flip cancel SWEEP/half" in error
    assert not (desk.folder / "runs" / "other" / "half-v2").exists()


@pytest.mark.parametrize(
    "setting, checkpoints, why",
    [
        ("model.embed=32", (32,), "an extended run cannot change model.embed"),
        ("stages.pretrain.base_lr=1e-3", (), "it has no checkpoint"),
    ],
)
def test_plan_says_why_changed_run_cannot_be_extended(desk, capsys, setting, checkpoints, why):
    assert desk("mine.yaml") == ["half"]
    for samples in checkpoints:
        save(RunDir(desk.folder / "runs" / "other" / "half"), samples)
    for more in ([], ["--changed", "extend"]):
        assert submit.main(["mine.yaml", setting, *more]) == 78
        assert f"It cannot be extended: {why}" in capsys.readouterr().err


def test_plan_names_newest_checkpoint_if_run_cannot_start_yet(desk, capsys):
    assert desk("mine.yaml") == ["half"]
    save(RunDir(desk.folder / "runs" / "other" / "half"), 16)
    text = (desk.folder / "mine.yaml").read_text().replace("runs: {half: }", "runs:\n  half:")
    (desk.folder / "mine.yaml").write_text(text + COOLDOWN.format(samples=32))
    assert submit.main(["mine.yaml", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "new, cannot start yet" in shown and "will start" not in shown
    assert "no checkpoint at S = 32 yet, its newest checkpoint is at S = 16 of stage pretrain" in shown
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


def test_plan_refuses_checkpoint_that_will_never_exist(desk, capsys):
    assert desk("mine.yaml") == ["half"]
    save(RunDir(desk.folder / "runs" / "other" / "half"), 48)
    text = (desk.folder / "mine.yaml").read_text().replace("runs: {half: }", "runs:\n  half:")
    (desk.folder / "mine.yaml").write_text(text + COOLDOWN.format(samples=32))
    assert submit.main(["mine.yaml", "--dry-run"]) == 78
    assert "no checkpoint at S = 32" in capsys.readouterr().err
