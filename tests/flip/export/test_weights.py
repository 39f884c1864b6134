"""Tests that no export and no reader of weights drops a parameter that it does not know."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import flip
from flip.checkpoint.saver import TRAINING_ONLY, Checkpointer, model_state
from flip.config import merge as configuration
from flip.distributed.parallel import World
from flip.export import exporter, weights
from flip.runs import checkpoint_folder
from flip.runs.errors import ConfigError, DataError
from flip.runs.rundir import RunDir, write_json, write_text
from tests.flip.export.test_exporter import configured, loaded_of, randomised
from tests.flip.export.test_transformers import bpe
from tests.synthetic import make_tokenizer

WORLD = World(0, 1, torch.device("cpu"), None, None)
FORMATS = (
    ("portable", "open_clip", "native"),
    ("portable", "open_clip", "timm-tower"),
    ("paper", "open_clip", "extra-block"),
    ("clip", "transformers", ""),
)
UNKNOWN = ("temper", "image.gain", "image.blocks.0.ls1.gamma", "text.blocks.1.norm1.shift", "text.norm.scale")


def add_parameter(model, name):
    """Give the model a parameter of a name that no format knows, as an extension of the towers would."""
    owner, _, leaf = name.rpartition(".")
    module = model
    for part in filter(None, owner.split(".")):
        if not hasattr(module, part):
            module.add_module(part, torch.nn.Module())
        module = getattr(module, part)
    module.register_parameter(leaf, torch.nn.Parameter(torch.ones(8)))


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("recipe, form, variant", FORMATS)
def test_export_refuses_parameter_that_the_format_does_not_know(tmp_path, recipe, form, variant, name):
    settings = ()
    if recipe == "paper":
        settings = ("model.embed=32",)
    if recipe == "clip":
        tokenizer = bpe(tmp_path / "tokenizer.json")
    else:
        tokenizer = make_tokenizer(tmp_path / "tokenizer.json")
    config = configured(recipe, tokenizer, "tiny", *settings)
    loaded = loaded_of(config, tmp_path)
    add_parameter(loaded.model, name)
    with pytest.raises(ConfigError, match=f"parameters that the export to {form} does not know.*{name}"):
        exporter.export(loaded, tmp_path / "out", variant, form=form)
    assert not [entry for entry in os.listdir(tmp_path) if entry.startswith("out")]


def test_onnx_export_refuses_parameter_that_its_graphs_do_not_use(tmp_path):
    pytest.importorskip("onnxscript")
    loaded = loaded_of(configured("portable", make_tokenizer(tmp_path / "tokenizer.json")), tmp_path)
    add_parameter(loaded.model, "image.gain")
    with pytest.raises(ConfigError, match=r"parameters that the export to onnx does not know.*image\.gain"):
        exporter.export(loaded, tmp_path / "out", form="onnx")


@pytest.fixture
def run(tmp_path):
    """A run whose checkpoint has the parameters of its configuration and two more."""
    run = RunDir(tmp_path / "runs" / "sweep" / "extended")
    run.path.mkdir(parents=True)
    config = configured("portable", make_tokenizer(tmp_path / "tokenizer.json"))
    write_text(run.config, configuration.dump(config))
    write_json(run.identity, {"schema": 2})
    run.start_attempt({})
    model = randomised(config)
    add_parameter(model, "image.gain")
    state = model_state(model)
    state[f"{TRAINING_ONLY}weight"] = torch.zeros(2)
    saver = Checkpointer(run, 1, WORLD, keep=2)
    saver.save(state, "pretrain", 64, step=1)
    saver.wait()
    return run


def test_load_refuses_checkpoint_with_parameters_beyond_its_configuration(run):
    with pytest.raises(DataError, match=r"1 parameters that the model of its configuration lacks.*model\.image\.gain"):
        flip.load(run.path)


def test_warm_start_refuses_checkpoint_with_parameters_beyond_its_configuration(run):
    from flip.checkpoint.restorer import CheckpointRestorer
    from flip.training.conversion import load_weights

    config = configuration.read_config(run.config)
    restorer = CheckpointRestorer(run, 0, WORLD)
    newest = restorer.newest()
    with pytest.raises(DataError, match=r"1 parameters that the model of its configuration lacks.*model\.image\.gain"):
        load_weights(config, randomised(config), lambda state, left: restorer.load(newest, state, left))


def test_load_refuses_export_with_a_tensor_that_it_does_not_know(tmp_path):
    loaded = loaded_of(configured("portable", make_tokenizer(tmp_path / "tokenizer.json")), tmp_path)
    out = tmp_path / "out"
    record = exporter.export(loaded, out)
    file = out / "open_clip_model.safetensors"
    save_file(load_file(file) | {"text_gain": torch.ones(1)}, file)
    record["files"][file.name] = {"bytes": file.stat().st_size, "sha256": checkpoint_folder.sha256(file)}
    write_json(out / "export.json", record)
    with pytest.raises(ConfigError, match=r"parameters that this version does not know.*text_gain"):
        flip.load(out)


def test_tracked_state_names_what_was_not_read():
    state = weights.TrackedState({name: torch.zeros(1) for name in "abcde"})
    assert "a" in state and len(state) == 5
    assert state["b"].tolist() == [0.0]
    with pytest.raises(ConfigError, match=r"would drop them.*a, c, d and 1 more"):
        state.refuse_unread("unknown", "here", "Use another.")
    state.refuse_unread("unknown", "here", "Use another.", ("a", "c", "d", "e"))
