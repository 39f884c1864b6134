"""Tests of the weighted loss of docs/fields.md: its definition in float64, tiles, ranks, and a training from a file."""

import hashlib
import json
import os
import re
from pathlib import Path

import pytest
import torch
import webdataset
from torch import distributed

from flip import loss_kinds
from flip.common import user_classes
from flip.common.user_classes import UserClass
from flip.data.manifest.build import index
from flip.distributed import parallel
from flip.models.tiled_loss import contrastive_loss
from flip.runs.errors import ConfigError
from jobs.planning import preflight
from tests.flip.models.test_tiled_loss import dense, features
from tests.flip.training.test_user_callbacks import assert_same, configured, created, killed, trained
from tests.harness.common import metric_lines
from tests.harness.ranks import run_ranks
from tests.synthetic import caption, draw_image, encode, make_tokenizer

PAGE = Path(__file__).resolve().parents[3] / "docs/fields.md"
(TEXT,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
ENTRY = UserClass("weighted.py", "WeightedInfoNCE", hashlib.sha256(TEXT.encode()).hexdigest())
B = 24
WEIGHTS = torch.linspace(0, 3, B, dtype=torch.float64).flip(0)


def weighted():
    names = {}
    exec(TEXT, names)
    return names["WeightedInfoNCE"]()


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(loss_kinds.LOSSES, "weighted", weighted())


def definition(image, text, scale, weights):
    """The loss by its formula, with a loop."""
    logits = scale * image.double() @ text.double().T
    total = 0.0
    for i in range(len(image)):
        both = torch.logsumexp(logits[i], 0) + torch.logsumexp(logits[:, i], 0)
        total = total + weights[i] * (both / 2 - logits[i, i])
    return total / weights.sum()


def computed(image, text, scale, weights, tile):
    leaves = [x.clone().requires_grad_() for x in (image, text, scale)]
    loss, _ = contrastive_loss("weighted", *leaves, tile=tile, fields={"similarity": weights})
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("tile", [1, 7, 8, 1024])
def test_value_and_gradient_match_definition_in_any_tiles(registered, dtype, tolerance, tile):
    values = *features(B, dtype=dtype), torch.tensor([14.3], dtype=dtype)
    leaves = [x.clone().requires_grad_() for x in values]
    expected = definition(*leaves, WEIGHTS)
    references = torch.autograd.grad(expected.sum(), leaves)
    loss, *gradients = computed(*values, WEIGHTS, tile)
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for gradient, reference in zip(gradients, references, strict=True):
        assert torch.allclose(gradient.double(), reference.double(), atol=tolerance * 10)


def test_equal_weights_give_the_loss_of_clip(registered):
    values = *features(B), torch.tensor([14.3], dtype=torch.float64)
    loss, *_ = computed(*values, torch.full((B,), 0.3, dtype=torch.float64), 7)
    assert loss.item() == pytest.approx(dense(*values).item(), rel=1e-12)


def rank_main(rank, size, store):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    loss_kinds.LOSSES["weighted"] = weighted()
    own = slice(rank * B // size, (rank + 1) * B // size)
    image, text = (x[own] for x in features(B))
    calls = []
    reduce = distributed.all_reduce
    distributed.all_reduce = lambda tensor, *args, **more: calls.append(tensor.numel()) or reduce(tensor, *args, **more)
    result = computed(image, text, torch.tensor([14.3], dtype=torch.float64), WEIGHTS[own], 7)
    distributed.all_reduce = reduce
    distributed.destroy_process_group()
    return [x.tolist() for x in result], calls


def test_two_ranks_have_the_loss_and_gradient_of_one(registered, tmp_path):
    """The mean over ranks of the loss; the average of gradients, which a rank has times 2 for its own features."""
    one = computed(*features(B), torch.tensor([14.3], dtype=torch.float64), WEIGHTS, 7)
    ranks = run_ranks(rank_main, 2, 2, str(tmp_path / "store"))
    assert [calls for _, calls in ranks] == [[B, B, B]] * 2
    reductions, values = loss_kinds.LOSSES["weighted"].reductions(B)
    assert (reductions, values) == (3, 3 * B), "each all-reduce is declared"
    parts = [[torch.tensor(x, dtype=torch.float64) for x in result] for result, _ in ranks]
    losses, images, texts, scales = zip(*parts, strict=True)
    both = [sum(losses), torch.cat(images), torch.cat(texts), sum(scales)]
    for part, expected in zip(both, one, strict=True):
        assert torch.allclose(part / 2, expected, rtol=1e-12, atol=1e-13)


def written(folder):
    """A data set whose samples have weights."""
    folder.mkdir()
    (folder / "classes.json").write_text(json.dumps({"names": ["a", "b", "c", "d"], "templates": ["{}"]}))
    with webdataset.TarWriter(str(folder / "00000.tar"), mtime=0) as writer:
        for i in range(120):
            sample = {"__key__": f"{i:05d}", "png": encode(draw_image(i, 64), "png"), "txt": caption(i), "cls": i % 4}
            if i != 7:
                sample["json"] = json.dumps({"similarity": i / 120}).encode()
            writer.write(sample)
    index([str(folder / "00000.tar")], folder, chunk=4)
    make_tokenizer(folder / "tokenizer.json")
    return folder


@pytest.mark.long
def test_killed_training_with_weights_from_a_file_resumes_to_the_same_bits(tmp_path, monkeypatch):
    data = written(tmp_path / "data")
    files = tmp_path / "code" / user_classes.FOLDER
    (files / ENTRY.copy).parent.mkdir(parents=True)
    (files / ENTRY.copy).write_text(TEXT)
    monkeypatch.setenv("FLIP_SNAPSHOT", str(files.parent))

    def started(name, workers, fields=("similarity",), objective=str(ENTRY), accumulate=1):
        config = configured(data, 1)
        config.data.workers = workers
        config.data.fields = list(fields)
        config.data.max_replaced = 1.0
        config.model.objective = objective
        config.compute.accumulate = accumulate
        return created(tmp_path, name, config)

    calm = trained(started("calm", 0), files)
    dead = started("dead", 1)
    killed(dead, 6)
    assert_same(trained(dead, files), calm)
    parts = metric_lines(trained(started("parts", 0, accumulate=2), files))
    losses = [line["loss"] for line in metric_lines(calm)]
    assert [line["loss"] for line in parts] == pytest.approx(losses, rel=1e-4)
    plain = metric_lines(trained(started("plain", 0, fields=(), objective="clip"), files))
    assert plain[0]["loss"] != pytest.approx(losses[0], rel=1e-6)
    parallel.stop()


@pytest.mark.parametrize("objective", ["clip", "siglip"])
def test_losses_that_ignore_numbers_refuse_them_before_a_start(tmp_path, objective):
    config = configured(tmp_path, 1)
    config.model.objective = objective
    start = preflight.Start(config, [], None, None, tmp_path, None)
    preflight.FIELDS.look(start)
    config.data.fields = ["similarity"]
    with pytest.raises(ConfigError, match=rf"data\.fields: objective {objective} ignores them.*docs/fields\.md"):
        preflight.FIELDS.look(start)
    digest = user_classes.remember(TEXT.encode())
    config.model.objective = f"weighted.py:WeightedInfoNCE@sha256:{digest}"
    preflight.FIELDS.look(start)
