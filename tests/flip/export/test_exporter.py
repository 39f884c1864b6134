"""Tests exported folders: open_clip and timm compute the same features, and flip.load returns the same weights."""

import json
import os
import shutil
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed import checkpoint as dcp

import flip
from flip.checkpoint.saver import model_state
from flip.config import merge as configuration
from flip.config.schema import Config, Data, DataSet, Evaluate, EvaluationSet, walk_fields
from flip.data import decode
from flip.data.view import EvaluationView
from flip.evaluation.encoding.encoders import ModelEncoder
from flip.evaluation.tasks.zero_shot import class_embeddings
from flip.export import exporter, format
from flip.export.load import TrainedModel
from flip.models import clip
from flip.runs import checkpoint_folder
from flip.runs.errors import ConfigError, DataError
from flip.runs.formats import FormatError
from flip.runs.rundir import RunDir, write_json, write_text
from flip.tokenizer import train_byte_pairs
from tests.flip.test_byte_pairs import PUBLISHED
from tests.synthetic import COLOURS, SHAPES, draw_image, make_tokenizer, odd_images
from tools.commands import export as command

pytestmark = pytest.mark.long

STOCK = Path(__file__).with_name("open_clip_reference.py")
RECIPES = Path(__file__).resolve().parents[3] / "sweeps" / "recipes"
TEMPLATES = ["{}", "a picture of {}", "a {} number 3"]
TEXTS = [
    "", "a red square", " A  RED\tSquare\n number 4 ", "AT&amp;amp;T &lt;b&gt;", "[PAD] [CLS] [SEP] [UNK] ##s",
    "x" * 150, " ".join(f"a blue frame {i}" for i in range(40)), "caf\u00e9 nai\u0308ve", "\u732b\u304c\u597d\u304d",
    "don't 3.5-inch", "\U0001f600 \u200b zero", "\u0130stanbul STRASSE", "nul \x00 bell \x07",
]  # fmt: skip
FILES = odd_images(64)
"""name -> encoded image: not square, transparent, 16 bits, ..."""
BROKEN = ["caf\u00c3\u00a9", "\u201cquoted\u201d it\u2019s", "\uff21\uff22"]


def configured(recipe, tokenizer, size="tiny", *settings):
    layers = []
    while recipe:
        values = configuration.read_yaml(RECIPES / f"{recipe}.yaml")
        recipe = values.pop("base", "")
        layers.insert(0, ("recipe", values))
    return configuration.merge(layers, [f"model.size={size}", f"data.tokenizer={tokenizer}", *settings])


@torch.no_grad()
def randomised(config, seed=1):
    """A model in which no bias is 0, no gain is 1, and the logit scale exceeds its limit.

    A wrong or missing step of the export then changes outputs.
    """
    pair = clip.CLIPModel(config.model, config.augment, "sdpa")
    clip.init_weights(pair, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in pair.named_parameters():
        if parameter.ndim == 1 and name != "logit_scale":
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    pair.logit_scale.fill_(5.0)
    return pair


def loaded_of(config, folder, seed=1):
    record = {"stage": "pretrain", "samples": 640, "attempt": 2, "manifest": "d1ge57"}
    path = Path(folder) / "sweep" / "run" / "checkpoints" / "pretrain" / "640-2"
    return TrainedModel(randomised(config, seed), config, checkpoint_folder.SavedCheckpoint(path, record), "cpu")


class Given:
    """Inputs of both implementations: n images of twice the model's size, texts, names of up to n * n classes."""

    def __init__(self, config, texts, n):
        tower = config.model.image
        self.names = [f"{colour} {shape}" for colour in COLOURS[:n] for shape in SHAPES[:n]]
        self.texts = texts
        self.images = np.stack([draw_image(i, 2 * tower.size) for i in range(n)])
        small = tower.width <= 64  # large models get few files, to save time
        self.files = {name: FILES[name] for name in (FILES if small else ("square", "wide", "tall", "RGBA", "16 bit"))}
        view = EvaluationView.of(config)
        views = [view(image) for image in self.images]
        mean = np.float32(config.augment.mean)
        std = np.float32(config.augment.std)
        self.pixels = ((np.stack(views) / np.float32(255) - mean) / std).transpose(0, 3, 1, 2)
        self.patches = torch.from_numpy(np.stack([decode.patches(image, tower.patch) for image in views]))


def run_open_clip(folder, inputs, scratch):
    """Runs open_clip_reference.py in its own process and working directory, without hub and network; its outputs."""
    for name, data in inputs.files.items():
        (scratch / name).write_bytes(data)
    files = [str(scratch / name) for name in inputs.files]
    strings = json.dumps({"texts": inputs.texts, "names": inputs.names, "templates": TEMPLATES, "files": files})
    np.savez(scratch / "given.npz", pixels=inputs.pixels, images=inputs.images, words=strings)
    elsewhere = scratch / "elsewhere"
    elsewhere.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(elsewhere), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    arguments = [sys.executable, str(STOCK), str(folder), str(scratch / "given.npz"), str(scratch / "found.npz")]
    process = subprocess.run(arguments, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return {name: torch.from_numpy(value) for name, value in np.load(scratch / "found.npz").items()}


def near(actual, expected):
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max()) < 1e-5


def unit(features):
    return torch.nn.functional.normalize(features, dim=-1)


def scale_of(pair):
    return float(pair.logit_scale.detach().clamp(max=pair.max_logit_scale).exp())


@torch.no_grad()
def assert_same_outputs(loaded, inputs, outputs, raw=True):
    """Asserts that the outputs of the script equal those of the model. ``raw``: also features before normalisation."""
    pair = loaded.model
    tokens = torch.from_numpy(loaded.tokenizer(inputs.texts))
    reference = outputs["tokens"]
    if loaded.config.model.text.causal:  # transformers pads with the end token
        reference = reference.masked_fill(torch.arange(reference.shape[1]) > reference.argmax(dim=1, keepdim=True), 0)
    alike = (reference == tokens).all(dim=1)
    if loaded.config.model.text.repair:
        repaired = inputs.texts
    else:
        repaired = TEXTS
    assert alike.tolist() == [text in repaired for text in inputs.texts]
    image = pair.image(inputs.patches)
    text = pair.text(tokens)
    assert near(outputs["text"][alike], text[alike]) and near(unit(outputs["image"]), unit(image))
    assert near(outputs["image"], image) == raw
    assert near(outputs["logits"][:, alike] / scale_of(pair), (unit(image) @ unit(text).T)[:, alike])
    assert float(outputs["scale"]) == pytest.approx(loaded.config.model.max_logit_scale)
    pixels = torch.from_numpy(inputs.pixels)
    assert near(outputs["views"], pixels) and near(outputs["timm_views"], pixels)
    encoder = ModelEncoder(pair, loaded.tokenizer, loaded.config.model.image)
    assert near(outputs["classes"], class_embeddings(encoder, inputs.names, TEMPLATES))
    probabilities = loaded.classify([Image.fromarray(array) for array in inputs.images], inputs.names, TEMPLATES)
    assert near(outputs["scores"].softmax(-1), probabilities)
    assert torch.equal(outputs["scores"].argmax(-1), probabilities.argmax(-1))
    pair.image.projection = torch.nn.Identity()
    pooled = pair.image(inputs.patches)
    assert near(outputs["timm0"], pooled) and near(outputs["head0"], pooled) and near(outputs["timm10"], pooled)
    assert outputs["head10"].shape == (len(pooled), 10)


def assert_file_predictions(loaded, inputs, outputs, scratch, differences):
    """Asserts that open_clip's predictions for files equal those of ``loaded`` with preprocess resize_crop.

    Other exports list the differences.
    """
    probabilities = loaded.classify([scratch / name for name in inputs.files], inputs.names, TEMPLATES)
    gap = (outputs["file_scores"].softmax(-1) - probabilities).abs().amax(dim=1)
    differs = {name for name, value in zip(inputs.files, gap.tolist(), strict=True) if value > 1e-5}
    if loaded.config.evaluate.preprocess == "resize_crop":
        assert not differs
        assert torch.equal(outputs["file_scores"].argmax(-1), probabilities.argmax(-1))
        assert differences == []
        modes = [Image.open(scratch / name).mode for name in inputs.files]
        rgb = torch.tensor([mode == "RGB" for mode in modes])
        assert near(outputs["timm_file_views"][rgb], outputs["file_views"][rgb]) and rgb.sum() == 8
    else:
        if loaded.config.data.to_rgb == "flatten":
            scaled = {"16 bit"}
        else:
            scaled = set()
        assert differs >= {"wide", "tall", "RGBA"} | scaled and not differs & {"square", "equal"}
        assert ["not square" in differences[0], "transparency" in differences[1]] == [True, True]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


#: Models of 140 million weights and more are written, read and run twice.
SLOW = [pytest.mark.slow, pytest.mark.timeout(3000)]
CASES = [
    pytest.param("portable", "tiny", "native", id="tiny-portable"),
    pytest.param("portable2", "tiny", "native", id="tiny-portable2"),
    pytest.param("paper", "tiny", "extra-block", id="tiny-paper"),
    pytest.param("paper", "tiny", "timm-tower", id="tiny-paper-timm"),
    pytest.param("clip", "tiny", "native", id="tiny-clip"),
    pytest.param("clip", "tiny", "timm-tower", id="tiny-clip-timm"),
    pytest.param("portable", "B/16", "native", id="B16-portable", marks=SLOW),
    pytest.param("paper", "B/16", "extra-block", id="B16-paper", marks=SLOW),
    pytest.param("portable", "L/16", "native", id="L16-portable", marks=SLOW),
    pytest.param("paper", "L/16", "extra-block", id="L16-paper", marks=SLOW),
    pytest.param("portable", "H/14", "native", id="H14-portable", marks=SLOW),
]


@pytest.mark.parametrize("recipe, size, variant", CASES)
def test_open_clip_and_timm_match_exported_model(recipe, size, variant, tokenizer, tmp_path):
    published = recipe == "clip" and variant == "native"
    settings = []
    if published:
        settings = [f"data.tokenizer={PUBLISHED}", "evaluate.preprocess=resize_crop"]
    if recipe == "clip" and not published:
        train_byte_pairs([*TEXTS, "a blue frame"], 600, tmp_path / "byte_pairs.json")
        settings = [f"data.tokenizer={tmp_path}/byte_pairs.json"]
    loaded = loaded_of(configured(recipe, tokenizer, size, *settings), tmp_path)
    record = exporter.export(loaded, tmp_path / "made", variant)
    assert record["variant"] == variant
    text = json.loads((tmp_path / "made" / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    assert ("hf_tokenizer_name" in text) != published  # open_clip's own tokenizer needs no transformers
    folder = tmp_path / "made"
    if variant != "timm-tower":  # this variant cannot be moved
        folder = tmp_path / "else" / "where"
        folder.parent.mkdir()
        (tmp_path / "made").rename(folder)
    inputs = Given(
        loaded.config, TEXTS + (BROKEN if loaded.config.model.text.repair else []), 4 if size == "tiny" else 2
    )
    reloaded = flip.load(folder)
    restored = reloaded.model.state_dict()
    original = loaded.model.state_dict()
    assert float(restored.pop("logit_scale")) == np.float32(loaded.model.max_logit_scale)
    del original["logit_scale"]
    assert restored.keys() == original.keys()
    assert all(torch.equal(restored[name], original[name]) for name in original)
    del reloaded, restored, original
    outputs = run_open_clip(folder, inputs, tmp_path)
    assert_file_predictions(loaded, inputs, outputs, tmp_path, record["differences"])
    assert_same_outputs(loaded, inputs, outputs, raw=variant != "extra-block")


@torch.no_grad()
def test_siglip_export_with_masked_padding_matches_model(tokenizer, tmp_path):
    loaded = loaded_of(configured("siglip", tokenizer, "tiny", "model.text.padding=mask"), tmp_path)
    loaded.model.max_logit_scale = loaded.config.model.max_logit_scale = 3.0  # the parameter is 5 here, above the limit
    exporter.export(loaded, tmp_path / "made")
    inputs = Given(loaded.config, TEXTS + BROKEN, 4)
    outputs = run_open_clip(tmp_path / "made", inputs, tmp_path)
    tokens = torch.from_numpy(loaded.tokenizer(inputs.texts))
    assert torch.equal(outputs["tokens"], tokens)
    pair = loaded.model
    image = pair.image(inputs.patches)
    text = pair.text(tokens)
    assert near(outputs["text"], text) and float(outputs["bias"]) == float(pair.logit_bias)
    expected = scale_of(pair) * unit(image) @ unit(text).T + pair.logit_bias
    assert near(outputs["logits"] / scale_of(pair), expected / scale_of(pair))
    card = (tmp_path / "made" / "README.md").read_text()
    assert "padding is not seen" in card and "`logit_bias`" in card
    again = flip.load(tmp_path / "made")
    assert near(again.encode_text(inputs.texts), loaded.encode_text(inputs.texts))
    assert torch.equal(again.model.logit_bias, loaded.model.logit_bias)


def test_export_rejects_masked_padding_without_cls_token(tokenizer, tmp_path):
    config = configured("paper", tokenizer, "tiny", "model.text.padding=mask")
    with pytest.raises(ConfigError, match="empty caption"):
        exporter.export(loaded_of(config, tmp_path), tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_open_clip_config_writes_keys_with_differing_defaults(tokenizer, tmp_path):
    config = configured("portable", tokenizer, "H/14")
    vision, text = (
        format.open_clip_config(config.model, config.augment, "native", tmp_path, 1e-6)["model_cfg"][key]
        for key in ("vision_cfg", "text_cfg")
    )
    both = {"norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}}
    assert vision.items() >= ({"no_ln_pre": True, "pool_type": "avg", "head_width": 80, "layers": 32} | both).items()
    of_text = {"no_causal_mask": True, "pool_type": "first", "heads": 16, "hf_tokenizer_name": "local"}
    assert text.items() >= (of_text | both).items()
    extra = format.open_clip_config(config.model, config.augment, "extra-block", tmp_path, 1e-6)
    extra = extra["model_cfg"]["vision_cfg"]
    assert (extra["pool_type"], extra["layers"]) == ("tok", 33)


@pytest.fixture
def run(tokenizer, tmp_path):
    """A run of recipe portable with checkpoints pretrain/64-1, pretrain/64-2 and unmasked/96-2, all with other
    weights."""
    run = RunDir(tmp_path / "runs" / "sweep" / "run")
    run.path.mkdir(parents=True)
    stages = "stages=[{name: pretrain, samples: 64, batch: 8}, {name: unmasked, samples: 32, batch: 8}]"
    private = ["data.manifest=/private/shards", "evaluate.sets=[{name: a, manifest: /private/a, classes: /private/c}]"]
    private += [
        "compute.precision=bf16",
        "evaluate.sets.a.train=/private/t",
        "init.run=/private/run",
        "checkpoint.url=/private/url",
    ]
    config = configured("portable", tokenizer, "tiny", stages, *private)
    write_text(run.config, configuration.dump(config))
    write_json(run.identity, {"hash": "1den71ty", "schema": 2, "code": "c0de"})
    for seed, (stage, samples, attempt) in enumerate([("pretrain", 64, 1), ("pretrain", 64, 2), ("unmasked", 96, 2)]):
        path = checkpoint_folder.folder(run, stage, samples, attempt)
        path.mkdir(parents=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            writer = dcp.HuggingFaceStorageWriter(str(path), save_distributed=True)
            dcp.save(model_state(randomised(config, seed)), storage_writer=writer, no_dist=True)
        record = {"stage": stage, "samples": samples, "attempt": attempt, "manifest": "d1ge57", "step": samples // 8}
        checkpoint_folder.complete_checkpoint(path, record)
    run.eval.mkdir()
    score = {
        "name": "a-text",
        "task": "retrieval",
        "role": "test",
        "precision": "bf16",
        "n": 2000,
        "top1": 0.12345,
        "seconds": 3.0,
        "manifest": "/private/a",
    }
    scores = [score, score | {"name": "b", "task": "zeroshot", "precision": "fp32"}]
    write_json(run.eval / "unmasked-96.json", {"stage": "unmasked", "samples": 96, "evaluations": scores})
    return run


def weights(source, **choice):
    return flip.load(source, **choice).model.image.patch.bias


def test_export_command_exports_chosen_checkpoint(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FLIP_RUNS", str(tmp_path / "runs"))
    assert command.main(["sweep/run", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    folder = run.export / "unmasked-96"
    assert record["folder"] == str(folder) and (record["variant"], record["run"]) == ("native", "sweep/run")
    assert (record["identity"], record["code"], record["manifest"], record["step"]) == (
        "1den71ty",
        "c0de",
        "d1ge57",
        12,
    )
    assert torch.equal(weights(folder), weights(run.path)) and set(os.listdir(run.export)) == {"unmasked-96"}
    text = (folder / "README.md").read_text()
    for fact in (
        "sweep/run",
        "unmasked/96-2",
        "d1ge57",
        "1den71ty",
        "| a-text | retrieval | test | 2,000 | R@1 | 12.35% | - | - | bf16 |",
        "| b | zeroshot | test | 2,000 | top-1 | 12.35% | - | - | fp32 |",
        "not exactly that of these weights",
        "create_model_from_pretrained",
    ):
        assert fact in text
    assert not any(b"/private" in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    for typed, attempt in (("pretrain/64", 2), ("pretrain/64-1", 1)):
        out = tmp_path / "out" / str(attempt)
        assert command.main([str(run.path), "--checkpoint", typed, "--out", str(out)]) == 0
        assert f"{out}" in capsys.readouterr().out
        assert torch.equal(weights(out), weights(run.path, at=f"pretrain/64-{attempt}"))
    assert not torch.equal(weights(tmp_path / "out" / "1"), weights(tmp_path / "out" / "2"))
    assert command.main([str(folder)]) == 78  # exporting an export needs --out
    assert command.main([str(folder), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "README.md").read_text() == text
    assert torch.equal(weights(tmp_path / "again"), weights(folder))


def test_export_command_of_several_runs_can_be_repeated(run, tmp_path, capsys, monkeypatch):
    """One run has no checkpoint yet: nothing is written. Later the runs that have an export are left out."""
    monkeypatch.setenv("FLIP_RUNS", str(tmp_path / "runs"))
    second = RunDir(run.path.parent / "second")
    shutil.copytree(run.path, second.path)
    second.checkpoints.rename(second.path / "later")
    assert command.main(["sweep/*", "--json"]) == 78
    assert "no checkpoint yet" in capsys.readouterr().err and not run.export.exists()
    (second.path / "later").rename(second.checkpoints)
    assert command.main(["sweep/run"]) == 0
    capsys.readouterr()
    assert command.main(["sweep/*", "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["run"] == "sweep/second" and "run/export/unmasked-96: exists already" in output.err


def test_model_card_prefers_fp32_score_of_evaluation_job(run, tmp_path):
    """Exported weights are fp32, so the card shows the later fp32 score. Other metrics than top-1 are named."""
    (run.eval / "unmasked-96").mkdir()
    later = {"name": "a-text", "task": "retrieval", "role": "test", "n": 2000, "top1": 0.5, "precision": "fp32"}
    at = {"stage": "unmasked", "samples": 96}
    write_json(run.eval / "unmasked-96" / "first.json", at | {"job": "first", "evaluations": [later]})
    metric = {"metric": "worst_group_top5", "score": 0.326}
    streets = later | metric | {"name": "streets", "task": "zeroshot", "chance": 0.1}
    write_json(run.eval / "unmasked-96" / "second.json", at | {"job": "second", "evaluations": [streets]})
    assert command.main([str(run.path), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| streets | zeroshot | test | 2,000 | worst-group top-5 | 32.60% | - | - | fp32 |" in text
    assert "| a-text | retrieval | test | 2,000 | R@1 | 50.00% | - | - | fp32 |" in text and "12.35% | bf16" not in text
    assert "not exactly that of these weights" not in text


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_export_respects_umask(run, tmp_path, umask):
    before = os.umask(umask)
    try:
        assert command.main([str(run.path), "--out", str(tmp_path / "out" / "x")]) == 0
    finally:
        os.umask(before)
    for path in (tmp_path / "out", *(tmp_path / "out").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_refused_or_failed_export_changes_no_files(run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    assert command.main([str(run.path), "--checkpoint", "pretrain/64", "--out", str(out)]) == 0
    before = (out / "export.json").read_bytes()
    capsys.readouterr()
    for args, code, message in (
        (["--out", str(out)], 78, "an export exists already. Replace it (--replace)"),
        (["--out", str(mine), "--replace"], 78, "is no export"),
        (["--out", str(mine / "thesis.txt" / "x")], 78, "a file is where a folder must be"),
        (["--checkpoint", "pretrain/65"], 78, "There are: pretrain/64, unmasked/96."),
        (["--variant", "extra-block"], 78, "cannot hold this pooling"),
    ):
        assert command.main([str(run.path), *args]) == code
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    monkeypatch.setattr(format, "model_card", lambda *_: 1 / 0)  # fails halfway
    with pytest.raises(ZeroDivisionError):
        exporter.export(flip.load(run.path), out, replace=True)
    monkeypatch.undo()
    assert (out / "export.json").read_bytes() == before and (mine / "thesis.txt").read_text() == "mine"
    assert not run.export.exists() and {"out", "mine"} >= set(os.listdir(tmp_path)) - {"runs"}
    (out / "timm" / "notes.txt").write_text("mine")
    assert command.main([str(run.path), "--out", str(out), "--replace"]) == 78
    assert "files that no export has written, for example timm/notes.txt" in capsys.readouterr().err
    assert (out / "timm" / "notes.txt").read_text() == "mine"
    (out / "timm" / "notes.txt").unlink()
    assert command.main([str(run.path), "--out", str(out), "--replace"]) == 0
    assert json.loads((out / "export.json").read_text())["stage"] == "unmasked"
    assert {"out", "mine"} >= set(os.listdir(tmp_path)) - {"runs"}


def test_export_on_full_disk_reports_error_and_leaves_no_files(run, tmp_path):
    script = (
        "import resource, sys\n"
        "from tools.commands import export\n"
        "import flip.export.exporter\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "sys.exit(export.main(sys.argv[1:]))"
    )
    root = Path(__file__).resolve().parents[3]
    arguments = [sys.executable, "-c", script, str(run.path), "--out", str(tmp_path / "out" / "x")]
    done = subprocess.run(arguments, cwd=root, capture_output=True, text=True)
    assert done.returncode == 69 and "File too large" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_exported_configuration_contains_no_path_of_this_machine():
    config = Config(evaluate=Evaluate(sets=[EvaluationSet("small")]), data=Data(sets=[DataSet("more")]))
    for _, section, field, _ in list(walk_fields(config)):
        if "path" in field.metadata:
            setattr(section, field.name, "/home/ann/x")
    left = [key for key, _, _, value in walk_fields(exporter._strip_local_paths(config)) if value == "/home/ann/x"]
    assert not left


def test_choose_variant_rejects_variant_that_cannot_hold_model():
    config = configured("paper", "none.json", "emoji")
    with pytest.raises(ConfigError, match="Use the variant timm-tower"):
        exporter.choose_variant(config.model)
    assert exporter.choose_variant(config.model, "timm-tower") == "timm-tower"
    with pytest.raises(ConfigError, match="Use extra-block, timm-tower"):
        exporter.choose_variant(config.model, "native")


def test_load_rejects_damaged_export(run, tmp_path):
    record = exporter.export(flip.load(run.path), tmp_path / "out")
    assert set(record["files"]) | {"export.json"} == {
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    with pytest.raises(ConfigError, match="none can be chosen"):
        flip.load(tmp_path / "out", at="pretrain/64")
    shard = tmp_path / "out" / "timm" / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match="checksum"):
        flip.load(tmp_path / "out")
    shard.unlink()
    with pytest.raises(DataError, match="is missing"):
        flip.load(tmp_path / "out")
    write_json(tmp_path / "out" / "export.json", {"form": 2})
    with pytest.raises(ConfigError, match="this version reads 1"):
        flip.load(tmp_path / "out")
    for nonsense in ("{", '{"form": 1, "files": []}'):
        write_text(tmp_path / "out" / "export.json", nonsense)
        with pytest.raises(DataError, match="is invalid"):
            flip.load(tmp_path / "out")
    for partial in ("[]", "null", "{}"):
        write_text(tmp_path / "out" / "export.json", partial)
        with pytest.raises(FormatError, match="form: states no format"):
            flip.load(tmp_path / "out")
