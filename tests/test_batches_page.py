"""Tests that the examples of docs/batches.md run: they stop, and continue with other workers and another world size."""

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import flip
from tests.harness.ranks import run_ranks
from tests.synthetic import caption, make_dataset, make_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "batches.md").read_text(encoding="utf-8")
LOOP, OPEN_CLIP, PIPELINE = re.findall(r"```python\n(.*?)```\n", PAGE, re.DOTALL)
STOP = 17
STEPS = 25
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
"""A model of open_clip."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "data"
    make_dataset(folder / "manifest", 203, 5, size=48, fmt="jpg", chunk=2)
    make_tokenizer(folder / "tokenizer.json")
    return folder


@pytest.fixture
def place(data, tmp_path, monkeypatch):
    (tmp_path / "data").symlink_to(data)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_loop_on_page_has_40_lines():
    assert len([line for line in LOOP.splitlines() if line.strip()]) <= 40


# -- the loop ---------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_loop_continues_with_other_workers_and_world_size(place):
    """Samples and views are equal; losses, too, up to the order in which two ranks add float64."""
    expected = run(1, STEPS, workers=0)
    assert len({step["loss"] for step in expected}) == STEPS
    (place / "checkpoint.pt").unlink()

    started = start_as_script(STOP, workers=1)
    assert started == [step["loss"] for step in expected[:STOP]]
    checkpoint = (place / "checkpoint.pt").read_bytes()

    for world, workers in ((2, 1), (1, 3)):
        (place / "checkpoint.pt").write_bytes(checkpoint)
        continued = run(world, STEPS - STOP, workers)
        for step, other in zip(continued, expected[STOP:], strict=True):
            assert step["samples"] == other["samples"] and step["views"] == other["views"]
            assert step["loss"] == pytest.approx(other["loss"], rel=0 if world == 1 else 1e-12)


def start_as_script(steps, workers):
    """Return the losses of the loop as a user starts it: without ``if __name__ == "__main__"``, and with workers."""
    Path("train.py").write_text(LOOP, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WORKERS": str(workers)}
    command = [sys.executable, "train.py", str(steps)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [float(line.split()[1]) for line in done.stdout.splitlines()]


def run(world, steps, workers):
    """Return samples, views and loss of the global batches of the loop with so many ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    parts = run_ranks(loop, world, world, steps, workers, port)
    return [
        {
            "samples": sum((part["samples"] for part in ranks), []),
            "views": sum((part["views"] for part in ranks), []),
            "loss": ranks[0]["loss"],
        }
        for ranks in zip(*parts, strict=True)
    ]


def loop(rank, world, steps, workers, port):
    """Execute the loop as one rank."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ["WORKERS"] = str(workers)
    sys.argv = ["train.py", str(steps)]
    delivered = []
    made = flip.batches

    def recorded(*arguments, **named):
        stream = made(*arguments, **named)
        following = type(stream).__next__
        type(stream).__next__ = lambda own: delivered.append(seen(batch := following(own))) or batch
        return stream

    flip.batches = recorded
    losses = []
    exec(compile(LOOP, "train.py", "exec"), {"__name__": "__main__", "print": lambda _, loss: losses.append(loss)})
    if world > 1:
        torch.distributed.destroy_process_group()
    return [step | {"loss": loss} for step, loss in zip(delivered, losses, strict=True)]


def seen(batch):
    """Return samples and views of a batch as plain values."""
    samples = list(zip(batch.ids.tolist(), batch.epochs.tolist(), strict=True))
    fields = zip(batch.patches, batch.keep_indices, batch.tokens, strict=True)
    views = [hashlib.sha256(b"".join(field.numpy().tobytes() for field in row)).hexdigest() for row in fields]
    return {"samples": samples, "views": views}


# -- open_clip --------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_open_clip_continues_with_samples_that_follow(place):
    first = run_ranks(open_clip_epochs, 1, ["--name", "first"])[0]
    rest = ["--name", "second", "--resume", "logs/first/checkpoints/epoch_1.pt"]
    second = run_ranks(open_clip_epochs, 1, rest)[0]
    assert len(first["ids"]) == 4 and first["ids"][2:] == second["ids"]
    weights = [torch.load(f"logs/{name}/checkpoints/epoch_2.pt", weights_only=False) for name in ("first", "second")]
    assert weights[0]["state_dict"].keys() == weights[1]["state_dict"].keys()
    for name, value in weights[0]["state_dict"].items():
        assert torch.equal(value, weights[1]["state_dict"][name]), name


def open_clip_epochs(rank, arguments):
    """Train a tiny model of open_clip by the program on the page, and return the ids of each batch."""
    import open_clip

    # its program reads CSV files with pandas, which the package does not require
    sys.modules.setdefault("pandas", types.ModuleType("pandas"))
    Path("tiny-test.json").write_text(json.dumps(TINY), encoding="utf-8")
    open_clip.add_model_config("tiny-test.json")
    ids = []
    made = flip.batches

    def recorded(*positional, **named):
        assert named["size"] == 32 and named["batch"] == 64
        stream = made(*positional, **named)
        following = type(stream).__next__
        type(stream).__next__ = lambda own: ids.append((batch := following(own)).ids.tolist()) or batch
        return stream

    flip.batches = recorded
    sys.argv = [
        "train_open_clip.py", "--dataset-type", "webdataset", "--train-data", "data/manifest", "--model", "tiny-test",
        "--train-num-samples", "130", "--batch-size", "64", "--epochs", "2", "--workers", "0", "--warmup", "1",
        "--device", "cpu", "--precision", "fp32", "--save-frequency", "1", *arguments,
    ]  # fmt: skip
    exec(compile(OPEN_CLIP, "train_open_clip.py", "exec"), {"__name__": "__main__"})
    return {"ids": ids}


def test_tokens_of_published_byte_pairs_are_those_of_open_clip(place):
    import open_clip

    tokenize = open_clip.get_tokenizer("ViT-B-32")
    vocabulary = open_clip.tokenizer.default_bpe()
    with_texts = flip.batches("data/manifest", batch=64)
    with_tokens = flip.batches("data/manifest", batch=64, tokenizer=vocabulary)
    assert torch.equal(next(with_tokens).tokens.long(), tokenize(next(with_texts).texts))


# -- webdataset -------------------------------------------------------------------------------------------------------


def test_pipeline_on_page_yields_samples_of_batches(place):
    names = {}
    exec(PIPELINE, names)
    images, texts, keys, epochs = next(iter(names["pipeline"]))
    batch = next(flip.batches("data/manifest", batch=64))
    assert list(map(int, keys)) == batch.ids.tolist() and list(epochs) == batch.epochs.tolist()
    assert list(texts) == [caption(int(key)) for key in keys]
    assert np.asarray(images[0]).shape == (48, 48, 3)
