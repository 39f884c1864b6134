"""A run trained, evaluated and saved by two sharded ranks, then loaded by one process: the same numbers."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import flip
from flip import checkpoint, commit, model, parallel
from flip.config import load as configuration
from flip.config.schema import EvaluationSet
from flip.evaluate.encoder import PairEncoder
from flip.evaluate.score import DataSet, Scorer
from flip.evaluate.team import Team
from flip.exitcodes import ConfigError, DataError
from flip.rundir import RunDir, write_text
from flip.tokenizer import Tokenizer
from tests.synthetic import make_dataset, make_tokenizer, picture
from tools import predict

SEED = 4


def built(config):
    pair = model.build(config.model, config.augment, "sdpa")
    model.initialise(pair, SEED)
    return pair


def score(pair, config, world=None):
    item = EvaluationSet("synthetic", config.data.manifest, f"{config.data.manifest}/classes.json")
    encoder = PairEncoder(pair, Tokenizer(config.data.tokenizer, 32, True), config.model.image)
    team = Team(world.rank, world.size, world.control) if world else Team()
    (found,) = Scorer(encoder, 4, team).score(DataSet.of(item))
    return found


def rank_main(rank, port, path, results):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    run, config = RunDir(path), configuration.read(RunDir(path).config)
    world = parallel.start(config.compute)
    pair = parallel.place(built(config), world, config.compute)
    results.put((rank, score(pair, config, world)))
    saver = checkpoint.Checkpointer(run, 1, world, keep=2)
    saver.save(checkpoint.model_state(pair), "pretrain", 64, step=1)
    parallel.stop()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(run directory, what each rank scored). 3 shards of 5 chunks: the ranks have unequal numbers of batches."""
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
    run.begin_attempt({})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=rank_main, args=(rank, port, run.path, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = dict(results.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    return run, found


def test_two_ranks_score_what_one_scores(run):
    directory, found = run
    config = configuration.read(directory.config)
    one = score(built(config), config)
    assert one["n"] == 45
    for result in (one, found[0], found[1]):
        del result["seconds"]
    assert found[0] == found[1] == one


def test_loaded_weights_are_those_saved_in_shards(run):
    loaded = flip.load(run[0].path)
    assert len(list(loaded.source.path.glob("*.safetensors"))) == 2
    expected = dict(built(loaded.config).named_parameters())
    found = dict(loaded.pair.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@torch.no_grad()
def test_encode_and_classify(run, tmp_path):
    loaded = flip.load(str(run[0].path))
    pictures = [Image.fromarray(picture(i)) for i in range(3)]
    pictures[2].save(tmp_path / "two.png")
    images = loaded.encode_image([pictures[0], pictures[1], tmp_path / "two.png"], batch=2)
    patches = np.stack([picture(i).reshape(8, 8, 8, 8, 3).swapaxes(1, 2).reshape(64, 192) for i in range(3)])
    assert torch.allclose(images, loaded.pair.encode_image(torch.from_numpy(patches)), atol=1e-6)
    labels = ["red square", "blue stripe", "frame"]
    texts = loaded.encode_text(labels)
    assert (images.shape, texts.shape) == ((3, 48), (3, 48))
    expected = (images @ texts.T / loaded.config.model.temperature).softmax(-1)
    assert torch.allclose(loaded.classify(pictures, labels), expected, atol=1e-5)
    assert loaded.encode_text([]).shape == loaded.encode_image([]).shape == (0, 48)


def test_transparent_pictures_lie_on_white_however_they_come(run, tmp_path):
    loaded = flip.load(run[0].path)
    glass = Image.fromarray(np.dstack([picture(1), np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))]), "RGBA")
    glass.save(tmp_path / "glass.png")
    given, read = loaded.encode_image([glass, tmp_path / "glass.png"])
    assert torch.equal(given, read)
    assert not torch.allclose(given, loaded.encode_image([glass.convert("RGB")])[0], atol=2e-3)


def test_mistakes(run, tmp_path):
    loaded = flip.load(run[0].path)
    (tmp_path / "no.png").write_text("no picture")
    with pytest.raises(DataError, match=r"no.png: is no image that can be decoded\.$"):
        loaded.encode_image([tmp_path / "no.png"])
    with pytest.raises(DataError, match="cannot be read"):
        loaded.encode_image(["/nonexistent.png"])
    with pytest.raises(ConfigError, match="no run here"):
        flip.load(tmp_path)
    write_text(tmp_path / "config.yaml", run[0].config.read_text())
    with pytest.raises(ConfigError, match="no checkpoint"):
        flip.load(tmp_path)


def test_predict_prints_a_table_and_json(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FLIP_RUNS", str(run[0].path.parents[1]))
    Image.fromarray(picture(0)).save(tmp_path / "0.png")
    arguments = [str(run[0].path), str(tmp_path / "0.png"), "--labels", "red square, blue stripe"]
    assert predict.main([*arguments, "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert sum(row["probability"] for row in entry["labels"]) == pytest.approx(1.0)
    assert predict.main(arguments) == 0
    assert entry["labels"][0]["label"] in capsys.readouterr().out.splitlines()[0]
    for words, code, message in (
        ([str(tmp_path), "x.png", "--labels", "a"], 78, "Give the folder of a run"),
        ([*arguments, "--top", "0"], 78, "--top: must be at least 1"),
        ([*arguments, "--device", "tpu"], 78, "There are: cpu"),
        ([*arguments[:3], ","], 78, "at least one name"),
        (["sweep/none", "x.png", "--labels", "a"], 78, "There are: sweep/run"),
    ):
        assert predict.main(words) == code
        told = capsys.readouterr().err
        assert message in told and "JSON" not in told and told.count("\n") == 1
    assert predict.main(["sweep/run", *arguments[1:]]) == 0


def test_a_damaged_checkpoint_is_refused(run):
    """Last: it damages the run."""
    shard = sorted(commit.commits(run[0])[-1].path.glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match="checksum"):
        flip.load(run[0].path)


def test_importing_the_package_is_cheap():
    script = "import flip, sys; sys.exit('torch' in sys.modules or hasattr(flip, 'nothing'))"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).resolve().parents[2]).returncode == 0
