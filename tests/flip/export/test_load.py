"""Tests flip.load and prediction: one process loads a run that two sharded ranks evaluated and saved."""

import ast
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import flip
from flip.checkpoint import saver as checkpoint
from flip.config import merge as configuration
from flip.config.schema import EvaluationSet
from flip.distributed import parallel
from flip.distributed.collectives import RankGroup
from flip.evaluation.datasets.catalog import ResolvedDataset
from flip.evaluation.encoding.encoders import ModelEncoder
from flip.evaluation.evaluator import Evaluator
from flip.export.load import TrainedModel
from flip.models import clip
from flip.runs import checkpoint_folder
from flip.runs.errors import ConfigError, DataError
from flip.runs.rundir import RunDir, write_text
from flip.tokenizer import Tokenizer
from tests.harness.ranks import run_ranks
from tests.synthetic import draw_image, make_dataset, make_tokenizer
from tools.commands import predict

SEED = 4


def built(config):
    pair = clip.CLIPModel(config.model, config.augment, "sdpa")
    clip.init_weights(pair, SEED)
    return pair


def score(pair, config, world=None):
    item = EvaluationSet("synthetic", config.data.manifest, f"{config.data.manifest}/classes.json")
    encoder = ModelEncoder(pair, Tokenizer(config.data.tokenizer, 32, True), config.model.image)
    if world:
        ranks = RankGroup(world.rank, world.size, world.control_group)
    else:
        ranks = RankGroup()
    (result,) = Evaluator(encoder, 4, ranks).score(ResolvedDataset.from_config(item))
    return result


def rank_main(rank, path):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", FLIP_STORE=f"{path}.store")
    run = RunDir(path)
    config = configuration.read_config(RunDir(path).config)
    world = parallel.start(config.compute)
    pair = parallel.apply_parallelism(built(config), world, config.compute)
    result = score(pair, config, world)
    saver = checkpoint.Checkpointer(run, 1, world, keep=2)
    saver.save(checkpoint.model_state(pair), "pretrain", 64, step=1)
    parallel.stop()
    return result


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(run directory, scores of each rank). 3 shards of 5 chunks: the ranks have unequal numbers of batches."""
    root = tmp_path_factory.mktemp("runs")
    data = make_dataset(root / "data", samples=45, shards=3, classes=7, chunk=9)
    make_tokenizer(root / "tokenizer.json")
    run = RunDir(root / "sweep" / "run")
    run.path.mkdir(parents=True)
    settings = [
        "model.size=tiny", "stages=[{name: pretrain, samples: 64, batch: 8}]", f"data.manifest={data}",
        f"data.tokenizer={root}/tokenizer.json", "compute.threads=1", "compute.device=cpu", "compute.precision=fp32",
    ]  # fmt: skip
    write_text(run.config, configuration.dump(configuration.merge([], settings)))
    run.start_attempt({})
    return run, run_ranks(rank_main, 2, run.path)


@pytest.mark.long
def test_evaluator_on_two_ranks_matches_single_process(run):
    directory, scores = run
    config = configuration.read_config(directory.config)
    single = score(built(config), config)
    assert single["n"] == 45
    for result in (single, scores[0], scores[1]):
        del result["seconds"]
    assert scores[0] == scores[1] == single


@pytest.mark.long
def test_load_restores_weights_saved_in_shards(run):
    loaded = flip.load(run[0].path)
    assert len(list(loaded.source.path.glob("*.safetensors"))) == 2
    expected = dict(built(loaded.config).named_parameters())
    parameters = dict(loaded.model.named_parameters())
    assert parameters.keys() == expected.keys()
    assert all(torch.equal(parameters[name], expected[name]) for name in expected)


@pytest.mark.long
@torch.no_grad()
def test_encode_and_classify_match_model_outputs(run, tmp_path):
    loaded = flip.load(str(run[0].path))
    pil_images = [Image.fromarray(draw_image(i)) for i in range(3)]
    pil_images[2].save(tmp_path / "two.png")
    images = loaded.encode_image([pil_images[0], pil_images[1], tmp_path / "two.png"], batch=2)
    patches = np.stack([draw_image(i).reshape(8, 8, 8, 8, 3).swapaxes(1, 2).reshape(64, 192) for i in range(3)])
    assert torch.allclose(images, loaded.model.encode_image(torch.from_numpy(patches)), atol=1e-6)
    labels = ["red square", "blue stripe", "frame"]
    texts = loaded.encode_text(labels)
    assert (images.shape, texts.shape) == ((3, 48), (3, 48))
    expected = (images @ texts.T / loaded.config.model.temperature).softmax(-1)
    assert torch.allclose(loaded.classify(pil_images, labels), expected, atol=1e-5)
    assert loaded.encode_text([]).shape == loaded.encode_image([]).shape == (0, 48)


@pytest.mark.long
def test_encode_image_flattens_transparency_for_images_and_files_alike(run, tmp_path):
    loaded = flip.load(run[0].path)
    glass = Image.fromarray(np.dstack([draw_image(1), np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))]), "RGBA")
    glass.save(tmp_path / "glass.png")
    from_image, from_file = loaded.encode_image([glass, tmp_path / "glass.png"])
    assert torch.equal(from_image, from_file)
    assert not torch.allclose(from_image, loaded.encode_image([glass.convert("RGB")])[0], atol=2e-3)


@pytest.fixture(scope="module")
def loaded(run):
    return flip.load(run[0].path)


@pytest.mark.long
def test_single_input_is_encoded_as_batch_of_size_1(loaded, tmp_path):
    image = Image.fromarray(draw_image(1))
    image.save(tmp_path / "a.png")
    pixels = np.asarray(image)
    expected = loaded.encode_image([image])
    assert expected.shape == (1, 48)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    for source in (
        image, str(tmp_path / "a.png"), tmp_path / "a.png", pixels, tensor, tensor / 255, (tensor / 255).double(),
        [image], (tmp_path / "a.png",), pixels[None], tensor[None], iter([image]), loaded.preprocess(image),
    ):  # fmt: skip
        assert torch.equal(loaded.encode_image(source), expected)
    assert torch.equal(loaded.encode_text("a frog"), loaded.encode_text(["a frog"]))
    assert loaded.encode_text("a frog").shape == (1, 48)
    both = loaded.classify(image, ["frog", "square"], "a {}")
    assert both.shape == (1, 2) and torch.equal(both, loaded.classify([image], ["frog", "square"], ["a {}"]))
    assert loaded.classify(image, "frog").tolist() == [[1.0]]


@pytest.mark.long
def test_encode_image_accepts_mixed_input_types_and_sizes(loaded, tmp_path):
    """One call takes images of other sizes than the model's."""
    arrays = [draw_image(i, 96)[:, : 96 - 7 * i] for i in range(4)]
    Image.fromarray(arrays[0]).save(tmp_path / "0.png")
    mixed = [tmp_path / "0.png", Image.fromarray(arrays[1]), arrays[2], torch.from_numpy(arrays[3]).permute(2, 0, 1)]
    assert torch.equal(loaded.encode_image(mixed, batch=3), loaded.encode_image(arrays, batch=3))
    stack = np.stack([draw_image(i, 96) for i in range(3)])
    tensors = torch.from_numpy(stack).permute(0, 3, 1, 2)
    assert torch.equal(loaded.encode_image(stack, batch=2), loaded.encode_image(list(stack), batch=2))
    assert torch.equal(loaded.encode_image(tensors, batch=2), loaded.encode_image(list(stack), batch=2))


@pytest.mark.long
@pytest.mark.parametrize(
    "given, message",
    [
        (np.zeros((4, 4, 4), np.uint8), "an array of shape (4, 4, 4) and dtype uint8"),
        (np.zeros((4, 4), np.uint8), "an array of shape (4, 4)"),
        (np.zeros((4, 4, 3)), "dtype float64"),
        (np.zeros((0, 4, 3), np.uint8), "shape (0, 4, 3)"),
        (torch.zeros(4, 4, 3), "a tensor of shape (4, 4, 3) and dtype float32"),
        (torch.full((3, 4, 4), 2.0), "values from 2 to 2"),
        (torch.full((3, 4, 4), torch.nan), "values from nan to nan"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "dtype int64"),
        (7, "int"),
        ([None], "NoneType"),
        (b"bytes", "bytes"),
    ],
)
def test_encode_image_rejects_invalid_input_with_short_message(loaded, given, message):
    with pytest.raises(DataError, match=re.escape(message)) as error:
        loaded.encode_image(given)
    assert "\n" not in str(error.value) and "(3, height, width)" in str(error.value)


@pytest.mark.long
@pytest.mark.parametrize("given", [7, [7], b"bytes", None])
def test_encode_text_rejects_input_that_is_not_text(loaded, given):
    with pytest.raises(DataError, match="is no text"):
        loaded.encode_text(given)


class Images(torch.utils.data.Dataset):
    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return 5

    def __getitem__(self, i):
        return self.transform(Image.fromarray(draw_image(i, 64 + 8 * i)))


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
def test_preprocess_is_picklable_and_works_in_data_loader(loaded, workers):
    transform = pickle.loads(pickle.dumps(loaded.preprocess))
    batches = list(torch.utils.data.DataLoader(Images(transform), batch_size=2, num_workers=workers))
    assert [(batch.shape, batch.dtype) for batch in batches[:1]] == [((2, 3, 64, 64), torch.uint8)]
    expected = loaded.encode_image([Image.fromarray(draw_image(i, 64 + 8 * i)) for i in range(5)])
    assert torch.allclose(torch.cat([loaded.encode_image(batch) for batch in batches]), expected, atol=1e-6)


@pytest.mark.long
def test_load_and_encode_image_reject_missing_run_checkpoint_or_image(run, tmp_path):
    loaded = flip.load(run[0].path)
    (tmp_path / "no.png").write_text("no image")
    with pytest.raises(DataError, match=r"no.png: is no image that can be decoded\.$"):
        loaded.encode_image([tmp_path / "no.png"])
    with pytest.raises(ConfigError, match="cannot be read"):
        loaded.encode_image(["/nonexistent.png"])
    with pytest.raises(ConfigError, match="no run here"):
        flip.load(tmp_path)
    write_text(tmp_path / "config.yaml", run[0].config.read_text())
    with pytest.raises(ConfigError, match="no checkpoint"):
        flip.load(tmp_path)


@pytest.mark.long
def test_predict_command_prints_table_and_json_and_rejects_mistakes(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FLIP_RUNS", str(run[0].path.parents[1]))
    Image.fromarray(draw_image(0)).save(tmp_path / "0.png")
    arguments = [str(run[0].path), str(tmp_path / "0.png"), "--labels", "red square, blue stripe"]
    assert predict.main([*arguments, "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert sum(row["probability"] for row in entry["labels"]) == pytest.approx(1.0)
    assert predict.main(arguments) == 0
    assert entry["labels"][0]["label"] in capsys.readouterr().out.splitlines()[0]
    for args, code, message in (
        ([str(tmp_path), "x.png", "--labels", "a"], 78, "Give the folder of a run"),
        ([*arguments, "--top", "0"], 78, "--top: must be at least 1"),
        ([*arguments, "--device", "tpu"], 78, "There are: cpu"),
        ([*arguments[:3], ","], 78, "--labels: needs at least one label"),
        (["sweep/none", "x.png", "--labels", "a"], 78, "There are: sweep/run"),
    ):
        assert predict.main(args) == code
        error = capsys.readouterr().err
        assert message in error and "JSON" not in error and error.count("\n") == 1
    assert predict.main(["sweep/run", *arguments[1:]]) == 0


@pytest.mark.long
def test_load_rejects_damaged_checkpoint(run, tmp_path):
    copy = RunDir(shutil.copytree(run[0].path, tmp_path / "run"))
    shard = sorted(checkpoint_folder.checkpoints(copy)[-1].path.glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match="checksum"):
        flip.load(copy.path)


def test_package_import_does_not_load_torch():
    script = "import flip, sys; dir(flip); sys.exit('torch' in sys.modules or hasattr(flip, 'nothing'))"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).resolve().parents[3]).returncode == 0


def test_package_declares_its_public_names_and_types():
    assert {"__version__", "load", "read_runs", "submit"} <= set(dir(flip))
    assert re.fullmatch(r"\d+\.\d+\.\d+", flip.__version__)
    assert typing.get_type_hints(flip.load)["return"] is TrainedModel
    tree = ast.parse(Path(flip.__file__).read_text())
    declared = [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert set(flip.__all__) - {"__version__"} <= set(declared), "type checkers and editors complete these names"
    assert Path(flip.__file__).with_name("py.typed").is_file()


def test_model_and_error_are_short_in_a_notebook(loaded, tmp_path):
    """IPython shows what ``_render_traceback_`` returns in place of the frames of a traceback."""
    shown = repr(loaded)
    assert shown.startswith("<TrainedModel ") and str(loaded.source.path) in shown and "on cpu" in shown
    with pytest.raises(ConfigError) as raised:
        flip.load(tmp_path / "absent")
    (line,) = raised.value._render_traceback_()
    assert line.startswith(f"ConfigError: {tmp_path}/absent: no such folder")


def test_classify_reports_images_after_each_batch(loaded):
    calls = []
    pil_images = [Image.new("RGB", (8, 8))] * 70
    loaded.classify(pil_images, ["a", "b"], progress=lambda done, total: calls.append((done, total)))
    assert calls == [(64, 70), (70, 70)]
