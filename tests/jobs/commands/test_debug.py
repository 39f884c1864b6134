"""``debug`` runs a copy of a run; warm starts and extended runs start from the checkpoint of another run."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

import flip
from flip.checkpoint.remote import local_copy
from flip.config.merge import read_config
from flip.runs import checkpoint_folder
from flip.runs.errors import StorageError
from flip.runs.rundir import RunDir, read_json
from flip.training.conversion import resample_patch_embed
from jobs.commands import debug
from tests.harness.command_line import JobsCommandLine
from tests.harness.common import metric_lines
from tests.jobs.outcomes import wanted
from tests.synthetic import make_dataset, make_tokenizer

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = make_dataset(tmp_path_factory.mktemp("data"), samples=128, shards=2, size=64)
    make_tokenizer(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def desk(tmp_path_factory, data):
    """A command line with a complete run ``base``."""
    command_line = JobsCommandLine(tmp_path_factory.mktemp("desk"), data)
    command_line.type("submit", "--watch")
    return command_line


def weights(run, samples, kind="model."):
    state = {}
    (checkpoint,) = [candidate for candidate in checkpoint_folder.checkpoints(run) if candidate.samples_seen == samples]
    with local_copy(checkpoint) as folder:
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                names = [name for name in tensors.keys() if name.startswith(kind)]  # noqa: SIM118
                state |= {name: tensors.get_tensor(name) for name in names}
    return state


def test_debug_resumes_copy_from_checkpoint_and_leaves_run_untouched(desk):
    before = desk.tree()
    (desk.run("base").checkpoints / "pretrain" / "48-1").rename(desk.folder / "aside")
    (desk.run("base").result).rename(desk.folder / "result")
    try:
        output = desk.type("debug", "--run", "base")
    finally:
        (desk.folder / "aside").rename(desk.run("base").checkpoints / "pretrain" / "48-1")
        (desk.folder / "result").rename(desk.run("base").result)
    after = desk.tree()
    assert {path: after[path] for path in before if path.is_file()} == {p: t for p, t in before.items() if p.is_file()}
    assert before.keys() == after.keys()
    copy = RunDir(output.split("a scratch copy: ")[1].splitlines()[0])
    assert "S = 32 of 48, 1 ranks" in output and read_json(copy.result)["samples"] == 48
    assert not str(copy.path).startswith(str(desk.runs))


def test_debug_shows_traceback_of_failing_run_and_refuses_unknown_run(desk):
    output = desk.type("debug", "--run", "base", "--fresh", "stages.pretrain.base_lr=1e38", code=76)
    assert "Traceback" in output and "Diverged" in output
    assert "no run of the sweep matches" in desk.type("debug", "--run", "other", code=78)


def test_debug_calls_classes_of_the_user_from_a_snapshot(desk):
    text = "class Mine:\n    every, values = 1, ('x',)\n\n    def step(self, view):\n        return {'x': view.step}\n"
    (desk.folder / "mine.py").write_text(text)
    output = desk.type("debug", "--run", "base", "--fresh", "monitor.callbacks=[mine.py:Mine]")
    copy = RunDir(output.split("a scratch copy: ")[1].splitlines()[0])
    assert [line["callback"] for line in metric_lines(copy)] == [{"Mine/x": float(n)} for n in (1, 2, 3)]
    (file,) = copy.path.parent.glob(".code/*/user_files/mine.py")
    assert file.read_text() == text


def test_debug_names_missing_folder_for_the_copy(tmp_path):
    args = SimpleNamespace(out=str(tmp_path / "absent"), fresh=True)
    with pytest.raises(StorageError, match="absent.*No such file or directory.*Name another folder with --out"):
        debug.scratch(wanted("a"), RunDir(tmp_path / "demo" / "a"), args)


@pytest.mark.parametrize(
    "words, tasks", [("2(x3),1", [2, 2, 2, 1]), ("8", [8]), ("1(x2)", [1, 1]), ("4,2(x2)", [4, 2, 2])]
)
def test_allocation_parses_slurm_tasks_per_node(words, tasks):
    assert debug.allocation({"SLURM_JOB_ID": "5", "SLURM_TASKS_PER_NODE": words}) == tasks
    assert debug.allocation({"SLURM_TASKS_PER_NODE": words}) == []


def test_branch_starts_with_weights_of_other_run(desk):
    runs = """runs:
  base: {}
  branch: {init: {run: base, samples: 32}, stages.pretrain.base_lr: 0}
"""
    output = desk.type("submit", "--watch", runs=runs)
    assert "branch: complete" in output
    actual = weights(desk.run("branch"), 48)
    expected = weights(desk.run("base"), 32)
    assert actual.keys() == expected.keys() and all((actual[name] == expected[name]).all() for name in actual)
    # From S = 0.
    assert [checkpoint.samples_seen for checkpoint in checkpoint_folder.checkpoints(desk.run("branch"))] == [
        16,
        32,
        48,
    ]
    # The branch is complete.
    assert list(desk.run("base").pins.iterdir())
    assert not checkpoint_folder.pinned(desk.run("base"))
    assert read_config(desk.run("branch").config).init.run == str(desk.run("base").path)
    assert "nothing to start" in desk.type("submit", runs=runs), "the run is unchanged"


def test_extended_run_equals_longer_run(desk):
    runs = """runs:
  long: {stages: {unmasked: {samples: 32, batch: 16, mask: 0, base_lr: 0.01}}}
  extended: {stages: {unmasked: {samples: 32, batch: 16, mask: 0, base_lr: 0.01}}, init: {run: base, extend: true}}
"""
    desk.type("submit", "--watch", runs=runs)
    assert [checkpoint.samples_seen for checkpoint in checkpoint_folder.checkpoints(desk.run("extended"))] == [64, 80]
    for kind in ("model.", "optim."):
        reference, extended = (weights(desk.run(name), 80, kind) for name in ("long", "extended"))
        assert reference and all((reference[name] == extended[name]).all() for name in reference)
    assert read_json(desk.run("extended").result)["steps"] == 5


def test_branch_of_export_resamples_patches_and_needs_export_until_checkpoint(desk):
    """Each of two ranks initializes its part. The run then resumes without the export; a new run is refused."""
    export = desk.folder / "made"
    desk.call("export", "demo/base", "--out", export)
    runs = f"""runs:
  base: {{}}
  coarse: {{init: {{export: {export}}}, model.image.patch: 16, stages.pretrain.base_lr: 0, resources.processes: 2}}
"""
    assert "coarse: complete" in desk.type("submit", "--watch", runs=runs)
    run = desk.run("coarse")
    base_parameters = dict(flip.load(desk.run("base").path).model.named_parameters())
    for name, parameter in flip.load(run.path).model.named_parameters():
        if name == "image.patch.weight":  # resampled again with the threads of this process
            assert torch.allclose(parameter, resample_patch_embed(base_parameters[name].detach(), 16), atol=1e-6)
        else:
            assert torch.equal(parameter, base_parameters[name]), name
    first, *_, last = checkpoint_folder.checkpoints(run)
    assert first.record["parent"] == str(export)
    assert f"export {export}" in desk.call("explain", "demo/coarse")
    run.result.unlink()
    checkpoint_folder.remove(last.path)
    export.rename(desk.folder / "moved")
    assert "coarse: complete" in desk.type("submit", "--watch", runs=runs)
    assert [checkpoint.samples_seen for checkpoint in checkpoint_folder.checkpoints(run)] == [
        16,
        32,
        48,
    ]
    assert run.newest_attempt() == 2
    shutil.rmtree(run.path)
    assert "init.export: no such export" in desk.type("submit", runs=runs, code=78)


def test_submit_refuses_branch_if_checkpoint_disappears_after_plan(desk):
    runs = "runs:\n  lost: {init: {run: base, samples: 16}}\n"
    plan = json.loads(desk.type("submit", "--dry-run", "--json", runs=runs))
    assert plan["runs"][0]["action"] == "new"
    path = desk.run("base").checkpoints / "pretrain" / "16-1"
    path.rename(desk.folder / "gone")
    try:
        assert "no checkpoint at S = 16" in desk.type("submit", runs=runs, code=78)
    finally:
        (desk.folder / "gone").rename(path)
