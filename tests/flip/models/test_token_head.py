"""Tests of the text classification head: its loss and gradients by the plain formula, in any number of micro-batches
and ranks, in training with stages that have it and stages that do not, and in plans."""

import contextlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import flip
from flip import model_costs
from flip.checkpoint import saver
from flip.config import schema, validate
from flip.data.token_table import count_tokens
from flip.distributed import parallel
from flip.export import exporter
from flip.models import clip
from flip.models.token_head import TokenHead, TokenTargets
from flip.runs import checkpoint_folder
from flip.runs.errors import ConfigError
from flip.tokenizer import Tokenizer
from flip.traffic import step_phases
from flip.training import grad_cache, trainer
from tests.flip.data.loading import BATCH as LOADED
from tests.flip.data.loading import loader
from tests.flip.distributed.rehearsal import Counting, fake_world
from tests.flip.models.test_clip import captions, sized
from tests.flip.training.test_grad_cache import batch
from tests.flip.training.test_user_callbacks import assert_same, created, killed, state, trained
from tests.harness.common import metric_lines
from tests.harness.sharded_models import built, compute, launch
from tests.harness.training_run import BATCH, configuration
from tests.synthetic import caption, make_dataset, make_tokenizer

ROWS, WIDTH, VOCABULARY = 6, 5, 23
WEIGHT = 0.5


def targets(dtype=torch.float64, tile=7):
    """Three rows of distinct tokens, one of a token of weight 0 among others, one of that alone, one of none."""
    ids = torch.tensor([[1, 8, 22], [3, 7, -1], [0, 5, 6], [4, 2, -1], [2, -1, -1], [-1, -1, -1]], dtype=torch.int32)
    weights = torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(1), dtype=dtype) + 0.1
    weights[2] = 0
    return TokenTargets(ids, weights, tile)


def plain_loss(pooled, weight, bias, given):
    """With whole logits, and dense targets that are normalised by their sum."""
    dense = torch.zeros(len(pooled), len(weight), dtype=pooled.dtype)
    for row, ids in zip(dense, given.ids.tolist(), strict=True):
        for token in ids:
            if token >= 0:
                row[token] = given.weights[token]
    dense = F.normalize(dense, p=1, dim=1)
    return -(F.log_softmax(pooled @ weight.T + bias, dim=1) * dense).sum(dim=1).mean()


def drawn():
    generator = torch.Generator().manual_seed(0)
    shapes = (ROWS, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("tile", [1, 7, 23, 100])
def test_loss_and_gradients_are_those_of_the_plain_formula(tile):
    pooled, weight, bias = drawn()
    head = TokenHead(WIDTH, VOCABULARY).double()
    head.weight.data = weight.detach()
    head.bias.data = bias.detach()
    loss = head(pooled, targets(tile=tile))
    (3 * loss).backward()
    other, *_ = leaves = drawn()
    expected = plain_loss(*leaves, targets())
    (3 * expected).backward()
    assert torch.allclose(loss, expected, rtol=1e-14)
    for ours, theirs in ((pooled, other), (head.weight, leaves[1]), (head.bias, leaves[2])):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-12, atol=1e-15)
    assert not pooled.grad[4:].any() and pooled.grad[:4].any(dim=1).all()


def test_no_tensor_has_a_column_for_each_token():
    """But weights, biases and their gradients."""
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                value.numel() for value in (out if isinstance(out, tuple) else (out,)) if hasattr(value, "numel")
            )
            return out

    rows, tokens = 64, 4096
    head = TokenHead(2, tokens)
    pooled = torch.ones(rows, 2, requires_grad=True)
    given = TokenTargets(torch.arange(rows)[:, None].int(), torch.ones(tokens), 128)
    with Sizes():
        head(pooled, given).backward()
    assert max(sizes) <= max(rows * 128, 2 * tokens) < rows * tokens / 8


def with_head(**fields):
    pair = clip.CLIPModel(sized("tiny", **fields), schema.Augment(), "explicit", head=True)
    clip.init_weights(pair, 3)
    return pair


def token_batch():
    ids = torch.full((12, 77), -1, dtype=torch.int32)
    ids[:, :4] = captions(12)[:, :4].sort(dim=1).values
    return grad_cache.Classification(WEIGHT, ids, torch.linspace(0.5, 2, 1000))


def gradients(pair, micro, classification):
    arguments = pair, batch(), micro, torch.device("cpu"), contextlib.nullcontext(), 64, False, classification
    statistics = grad_cache.grad_cache_backward(*arguments)
    return torch.stack(statistics), {name: p.grad for name, p in pair.named_parameters()}


@pytest.mark.long
@pytest.mark.parametrize("pool", ["patches", "class"])
def test_micro_batches_and_plain_sum_of_losses_give_the_same_gradient(pool):
    statistics, full = gradients(with_head(pool=pool), 1, token_batch())
    parts, others = gradients(with_head(pool=pool), 3, token_batch())
    without, contrastive = gradients(with_head(pool=pool), 1, None)
    assert torch.allclose(statistics, parts, rtol=1e-5) and torch.equal(statistics[:2], without)
    assert contrastive["head.weight"] is None and full["head.weight"].any()
    for name, value in full.items():
        assert torch.allclose(value, others[name], rtol=1e-3, atol=1e-6), name
        expected = contrastive[name]
        if name.startswith("text.") or name == "logit_scale":
            assert torch.allclose(value, expected, rtol=1e-4, atol=1e-7), name
    assert not torch.allclose(full["image.patch.weight"], contrastive["image.patch.weight"], rtol=0.01)


def sharded_gradients(config, world, folder=None):
    """Loss and gradients of this rank's part of the batch, averaged over ranks by FSDP."""
    pair = built(config, world, head=True)
    share = 12 // world.size
    own = slice(world.rank * share, (world.rank + 1) * share)
    fields = tuple(field[own] for field in batch())
    given = token_batch()
    given = given._replace(ids=given.ids[own])
    grad_cache.grad_cache_backward(
        pair, fields, config.accumulate, world.device, parallel.autocast(config, world), 64, False, given
    )
    return {name: parallel.full_tensor(p.grad).clone() for name, p in pair.named_parameters()}


@pytest.mark.long
def test_ranks_give_the_gradient_of_a_single_process():
    (alone,) = launch(1, [compute()], sharded_gradients)
    for result in launch(2, [compute(), compute(accumulate=2, recompute="block")], sharded_gradients):
        for name, value in alone.items():
            assert torch.allclose(result[name], value, rtol=1e-3, atol=2e-6), name


# -- data -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("loaded")
    make_tokenizer(root / "tokenizer.json")
    return make_dataset(root / "shards", 203, 5, size=32, classes=7, chunk=2)


def test_loader_ships_distinct_tokens_of_whole_captions_only_if_asked(original):
    def take(**fields):
        batches = loader(original, **fields).batches(0, LOADED, "0.5", "0.5", targets=77)
        result = next(batches)
        batches.close()
        return result

    assert next(loader(original).batches(0, LOADED, "0.5")).targets is None
    alone = take()
    assert (alone.targets.shape, alone.targets.dtype, alone.tokens.shape[1]) == ((LOADED, 77), torch.int32, 4)
    halves = [take(rank=rank, world=2, workers=2) for rank in range(2)]
    assert torch.equal(alone.targets, torch.cat([half.targets for half in halves]))
    tokenizer = Tokenizer(str(original.parent / "tokenizer.json"), 77, False)
    for id, row in zip(alone.ids.tolist(), alone.targets.tolist(), strict=True):
        known = [sorted(set(tokenizer([line])[0].tolist()) - {0}) for line in caption(id).split("\n")]
        assert [token for token in row if token >= 0] in known


def test_weights_of_tokens_are_their_rarity_over_captions(original, tmp_path):
    path = str(original.parent / "tokenizer.json")
    tokenizer = Tokenizer(path, 64, prepend_cls=False)
    table = count_tokens(tokenizer, ["a red red circle", "a blue circle", "a dot"], parts_of_speech=False)
    ids = {word: int(tokenizer([word])[0][0]) for word in ("a", "red", "circle")}
    rarities = table.rarities()
    assert [rarities[ids[word]] for word in ids] == pytest.approx([0, np.log(4 / 2), np.log(4 / 3)])
    assert rarities[table.counts.index(0)] == pytest.approx(np.log(4))


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = make_dataset(tmp_path_factory.mktemp("data"), samples=120, shards=2, chunk=4, classes=4)
    make_tokenizer(folder / "tokenizer.json")
    tokenizer = Tokenizer(str(folder / "tokenizer.json"), 77, prepend_cls=False)
    lines = [line for i in range(120) for line in caption(i).split("\n")]
    count_tokens(tokenizer, lines, False).write(folder / "table.json")
    return folder


def configured(data, *weights):
    """Stages of four steps with these weights of the head."""
    config = configuration(data, world=1, samples=(4, 4))
    config.data.workers = 0
    config.data.token_table = str(data / "table.json")
    config.evaluate.sets = config.evaluate.sets[:1]
    config.checkpoint.samples = 2 * BATCH
    first = config.stages[0]
    config.stages = [replace(first, name=f"s{i}", classification=weight) for i, weight in enumerate(weights)]
    return config


@pytest.fixture(scope="module")
def calm(data, tmp_path_factory):
    return trained(created(tmp_path_factory.mktemp("calm"), "calm", configured(data, 0.5, 0, 1)), None)


@pytest.mark.long
@pytest.mark.parametrize("step", [3, 9])  # in stages with the head, the second one of which draws a new head
def test_stopped_run_ends_with_the_same_bits(data, tmp_path, calm, monkeypatch, step):
    run = created(tmp_path, "stopped", configured(data, 0.5, 0, 1))
    original_step = trainer.Trainer.train_step

    def interrupted(self, *args):
        if self.attempt == 1 and self.step == step:
            self.flag.set("signal SIGTERM")
        return original_step(self, *args)

    monkeypatch.setattr(trainer.Trainer, "train_step", interrupted)
    trained(run, None, attempts=2)
    expected, actual = state(calm), state(run)
    assert actual.keys() == expected.keys() and any("head.weight" in name for _, name in actual)
    assert [key for key in actual if not torch.equal(actual[key], expected[key])] == []


@pytest.mark.long
def test_killed_run_ends_with_the_same_bits(data, tmp_path, calm):
    """Killed in the last stage: the head and its moments come from the checkpoint before."""
    run = created(tmp_path, "killed", configured(data, 0.5, 0, 1))
    killed(run, 11)
    assert not run.result.exists() and checkpoint_folder.checkpoints(run)
    assert_same(trained(run, None), calm)


@pytest.mark.long
def test_only_stages_with_weight_have_a_head(calm):
    lines = metric_lines(calm)
    losses = [line.get("classification_loss") for line in lines]
    assert [loss is None for loss in losses] == 4 * [False] + 4 * [True] + 4 * [False]
    for new in (losses[0], losses[8]):
        assert new == pytest.approx(np.log(1000), rel=0.02), "a new head predicts nothing"
    for saved in checkpoint_folder.checkpoints(calm):
        model = flip.load(calm.path, at=f"{saved.stage}/{saved.samples_seen}").model
        assert model.head is None


@pytest.mark.long
def test_export_has_names_and_shapes_of_a_model_without_head(data, calm, tmp_path):
    run = trained(created(tmp_path, "without", configured(data, 0, 0, 0)), None)
    shapes = []
    for number, each in enumerate((calm, run)):
        out = tmp_path / f"export{number}"
        exporter.export(flip.load(each.path), out)
        from safetensors.torch import load_file

        shapes.append(
            {path.name: {k: v.shape for k, v in load_file(path).items()} for path in out.glob("*.safetensors")}
        )
        assert np.isfinite(flip.load(out).encode_text("a red circle").numpy()).all()
    assert shapes[0] == shapes[1] and shapes[0]


def test_bad_input_is_refused(data):
    config = configured(data, 0.5)
    config.data.samples = 120
    config.data.block = 1
    config.resources.hours = 1
    validate.validate(config)
    config.data.token_table = ""
    with pytest.raises(
        ConfigError, match=r"stages.s0.classification: needs the counts of tokens, but data.token_table"
    ):
        validate.validate(config)
    config.stages[0].classification = -1.0
    with pytest.raises(ConfigError, match="classification"):
        validate.validate(config)
    config = configured(data, 0.5)
    config.data.tokenizer = str(make_tokenizer(data / "other.json", ["other words"]))
    with pytest.raises(ConfigError, match="is the table of another tokenizer"):
        trainer.token_weights(config)


# -- plans ------------------------------------------------------------------------------------------------------------


def test_plan_counts_the_head():
    model = sized("L/16")
    model.text.vocabulary = 49_408
    config = schema.Config(model=model)
    plain = schema.Stage(samples=1 << 20, batch=1024, mask="0")
    stage = replace(plain, classification=1.0)
    pair = with_head()
    assert model_costs.head_parameters(sized("tiny")) == sum(p.numel() for p in pair.head.parameters())
    flops = [model_costs.stage_flops(config, each) for each in (plain, stage)]
    assert flops[1] - flops[0] == 6 * 1024 * 49_408
    assert flops[1] / flops[0] - 1 == pytest.approx(0.00077, rel=0.15)  # as published, with texts of 77 tokens
    memory = [model_costs.stage_memory(config, each) for each in (plain, stage)]
    assert memory[1]["total"] - memory[0]["total"] == memory[1]["head"] > 16 * model_costs.head_parameters(model)
    sizes = [model_costs.state_bytes(replace(config, stages=[each])) for each in (plain, stage)]
    assert sizes[1] - sizes[0] == 12 * model_costs.head_parameters(model)
    small = with_head()
    optimizer = trainer.parameter_groups.build(small.named_parameters(), schema.Optim())
    state = saver.model_state(small) | saver.optimizer_state(small, optimizer)
    saved = sum(value.nbytes for name, value in state.items() if ".head." in name and value.dim())
    assert saved == 12 * model_costs.head_parameters(sized("tiny"))


@pytest.mark.long
@pytest.mark.parametrize("accumulate, reshard", [(1, "yes"), (3, "yes"), (2, "no")])
def test_traffic_of_the_head_is_that_of_a_traced_step(accumulate, reshard):
    config = compute(accumulate=accumulate, reshard=reshard)
    counts = []
    for head in (False, True):
        with fake_world(4) as world:
            pair = clip.CLIPModel(sized("tiny"), schema.Augment(), "explicit", head=head)
            clip.init_weights(pair, 3)
            parallel.apply_parallelism(pair, world, config)
            given = token_batch() if head else None
            with Counting() as counting:
                grad_cache.grad_cache_backward(
                    pair, batch(), accumulate, world.device, contextlib.nullcontext(), 64, False, given
                )
        counts.append((counting.collectives, counting.bytes))
    planned, size = Counter(), Counter()
    for head, sign in ((True, 1), (False, -1)):
        for phase in step_phases(sized("tiny"), config, 12, 4, head=head):
            for each in phase.collectives:
                planned[f"{each.kind}s of {each.ranks}"] += sign * phase.times * each.calls
                size[f"{each.kind}s of {each.ranks}"] += sign * phase.times * each.bytes
    for kind in ("gathers of 4", "scatters of 4"):
        assert counts[1][0][kind] - counts[0][0][kind] == planned[kind]
        assert counts[1][1][kind] - counts[0][1][kind] == pytest.approx(size[kind], rel=0.02)
