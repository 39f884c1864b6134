"""Tests with real gloo ranks that initial weights, gradients and steps match a single process at every world size."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from flip.checkpoint import saver as checkpoint
from flip.common.shutdown import CoordinatedStop
from flip.config import schema
from flip.data.loader import Batch
from flip.distributed import parallel
from flip.distributed.collectives import mean_over_ranks
from flip.models import clip
from flip.runs.rundir import RunDir
from flip.training import anomaly, grad_cache, parameter_groups
from flip.training.trainer import Trainer
from tests.flip.models.test_clip import inputs, visible
from tests.harness.sharded_models import BATCH, GPU_DEFAULTS, SEED, built, compute, launch

pytestmark = pytest.mark.long

STEPS = 3
RATE = 1e-3
CLIP = 0.1
CASES = {
    "fp32": compute(),
    "accumulated": compute(accumulate=2, recompute="selective"),
    "bf16": compute(precision="bf16"),
}


def trained(config, world, folder=None, radford=False, sharded=False):
    """Trains some steps. Returns initial and final weights, buffers, losses, and gradients of the first batch."""
    pair = built(config, world, radford=radford, sharded=sharded)
    result = {f"first.{name}": parallel.full_tensor(p).detach().clone() for name, p in pair.named_parameters()}
    result |= {f"table.{name}": buffer.clone() for name, buffer in pair.named_buffers()}
    result["held"] = torch.tensor(sum(map(bytes_of, pair.parameters())))
    # The gradient of a key bias is only rounding error, which a small eps would amplify to a full step.
    optimizer = parameter_groups.build(pair.named_parameters(), schema.Optim(eps=1e-4))
    for group in optimizer.param_groups:
        group["lr"] = RATE
    share = BATCH // world.size
    losses = []
    for t in range(STEPS):
        patches, keep, tokens = inputs(BATCH)
        fields = (visible(patches, keep), keep, tokens.roll(t, dims=1))
        shard = tuple(field[world.rank * share : (world.rank + 1) * share] for field in fields)
        statistics = grad_cache.grad_cache_backward(
            pair, shard, config.accumulate, world.device, parallel.autocast(config, world), config.loss_tile
        )
        if t == 0:
            result |= {f"gradient.{name}": parallel.full_tensor(p.grad).clone() for name, p in pair.named_parameters()}
        norm = parameter_groups.gradient_norm(pair)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(mean_over_ranks(torch.stack(statistics), world.size)[0])
    result["norms"] = torch.stack([norm, *parameter_groups.weight_norms(optimizer, world.size)]).float()
    result["losses"] = torch.stack(losses)
    with torch.no_grad(), parallel.autocast(config, world):  # a separate entry point
        result["encoded"] = pair.encode_image(inputs(BATCH)[0].to(world.device))
    parallel.reshard(pair)
    result |= {f"weight.{name}": parallel.full_tensor(p).detach().clone() for name, p in pair.named_parameters()}
    if folder:
        saver = checkpoint.Checkpointer(RunDir(folder), 1, world, keep=2)
        saver.save(
            checkpoint.model_state(pair) | checkpoint.optimizer_state(pair, optimizer), "pretrain", STEPS * BATCH
        )
    result["dtypes"] = torch.tensor([p.dtype == torch.float32 for p in pair.parameters()])
    return result


def bytes_of(parameter):
    return (parameter.to_local() if hasattr(parameter, "to_local") else parameter).nbytes


def clipped(config, world, folder=None):
    """Takes a step of the trainer without and with clipping.

    Returns the norms that it reports, the norms of the gradients that the optimiser gets, and these gradients.
    """
    share = BATCH // world.size
    result = {}
    patches, keep, tokens = inputs(BATCH)
    fields = [field[world.rank * share : (world.rank + 1) * share] for field in (visible(patches, keep), keep, tokens)]
    for limit in (0.0, CLIP):
        trainer = Trainer.__new__(Trainer)
        trainer.config = SimpleNamespace(compute=config, optim=schema.Optim(clip=limit), monitor=schema.Monitor())
        trainer.world = world
        trainer.model = built(config, world)
        trainer.samples_seen = 0
        trainer.step = 0
        trainer.coordinated_stop = CoordinatedStop(None, world.size)
        trainer.guard = anomaly.NonFiniteGuard(RunDir("unused"), 1, world.rank, spike=0.0, window=1)
        optimizer = parameter_groups.build(trainer.model.named_parameters(), trainer.config.optim)
        span = SimpleNamespace(stage=schema.Stage(samples=BATCH, batch=BATCH), start=0)
        batch = Batch(*fields, torch.arange(share), torch.zeros(share), 0, BATCH)
        _, _, norm = trainer.train_step(span, optimizer, batch)
        result |= {f"reported.{limit}": norm, f"taken.{limit}": parameter_groups.gradient_norm(trainer.model)}
        for name, parameter in trainer.model.named_parameters():
            result[f"gradient.{limit}.{name}"] = parallel.full_tensor(parameter.grad).clone()
    return result


@pytest.fixture(scope="module")
def by_world():
    """world -> case -> results."""
    return {world: dict(zip(CASES, launch(world, list(CASES.values()), trained), strict=True)) for world in (1, 2, 3)}


def farthest(actual, expected, kind):
    """The largest difference in tensors of a kind, relative to the largest value of its tensor; and its name."""
    names = [name for name in expected if name.startswith(kind)]
    return max(
        (float((actual[name] - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-6)), name)
        for name in names
    )


def distance(actual, expected, kind="gradient"):
    """The norm of the difference over all tensors of a kind, relative to the norm of ``expected``."""
    names = [name for name in expected if name.startswith(kind)]
    apart = sum(float((actual[name] - expected[name]).square().sum()) for name in names)
    return (apart / sum(float(expected[name].square().sum()) for name in names)) ** 0.5


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_initial_weights_are_bitwise_equal_at_every_world_size(by_world, world, case):
    alone = built(CASES[case], None, meta=False)
    clip.init_weights(alone, SEED)
    result = by_world[world][case]
    for name, parameter in alone.named_parameters():
        assert torch.equal(result[f"first.{name}"], parameter), name
    for name, table in alone.named_buffers():
        assert torch.equal(result[f"table.{name}"], table), name
    assert result["dtypes"].all()


def test_rank_holds_only_its_shard_of_parameters(by_world):
    total = int(by_world[1]["fp32"]["held"])
    for world in (2, 3):
        assert total / world <= int(by_world[world]["fp32"]["held"]) < 1.02 * total / world


@pytest.mark.parametrize("case", ["fp32", "accumulated"])
@pytest.mark.parametrize("world", [2, 3])
def test_sharded_training_matches_single_process(by_world, world, case):
    """The global batches are equal. fp32 sums in another order: 2e-5 of a gradient, 1e-3 of a weight after 3 steps."""
    alone = by_world[1]["fp32"]
    result = by_world[world][case]
    assert torch.allclose(result["norms"], alone["norms"], rtol=1e-3)
    assert farthest(result, alone, "gradient") < (2e-5, "")
    assert torch.allclose(result["losses"], alone["losses"], rtol=1e-5)
    assert farthest(result, alone, "weight") < (1e-3, "")


def test_sharded_recipe_clip_matches_single_process():
    """Covers the FSDP units of CUDA too. gloo sums in another order with them; the tolerance is the same."""
    cases = [CASES["fp32"], CASES["accumulated"], CASES["bf16"]]
    work = partial(trained, radford=True)
    of_cuda = [compute(device="cuda"), compute(device="cuda", accumulate=2)]
    (alone, *_, rounded) = launch(1, cases, work)
    (fp32, accumulated, bf16, *with_units_of_cuda) = launch(2, cases + of_cuda, work)
    for result in (fp32, accumulated, *with_units_of_cuda):
        assert farthest(result, alone, "first")[0] == 0
        assert farthest(result, alone, "gradient") < (2e-5, "") and farthest(result, alone, "weight") < (1e-3, "")
        assert torch.allclose(result["losses"], alone["losses"], rtol=1e-5)
    assert distance(bf16, alone) < 1.5 * distance(rounded, alone)


def test_sharded_bf16_training_is_as_close_to_fp32_as_autocast(by_world):
    """Sharded bf16 runs differ from fp32 as much as autocast does in one process, and less from each other."""
    exact = by_world[1]["fp32"]
    alone = by_world[1]["bf16"]
    rounding = distance(alone, exact)
    assert 1e-3 < rounding < 0.03
    for world in (2, 3):
        result = by_world[world]["bf16"]
        assert distance(result, exact) < 1.5 * rounding
        assert torch.allclose(result["losses"], alone["losses"], rtol=0.02)
        assert ((result["encoded"] * alone["encoded"][: len(result["encoded"])]).sum(-1) > 0.999).all()
        # The scale and the projections compute in fp32: their error is no larger than under autocast.
        for name in ("gradient.logit_scale", "gradient.image.projection.weight", "gradient.text.projection.weight"):
            assert distance(result, exact, name) < max(2 * distance(alone, exact, name), 0.02), name
    assert distance(by_world[2]["bf16"], by_world[3]["bf16"]) < rounding


def test_replicated_shards_match_single_process_and_restore(by_world, tmp_path):
    """Trains two replicas of two ranks with the defaults of GPUs. Four ranks save; this process loads."""
    (result,) = launch(4, [compute(replicate=2, **GPU_DEFAULTS)], trained, tmp_path)
    alone = by_world[1]["fp32"]
    assert int(alone["held"]) / 2 <= int(result["held"]) < 1.02 * int(alone["held"]) / 2
    assert torch.allclose(result["norms"], alone["norms"], rtol=1e-3)
    assert farthest(result, alone, "gradient") < (2e-5, "")
    assert farthest(result, alone, "weight") < (1e-3, "")
    world = parallel.start(compute())
    pair = built(compute(), world)
    saver = checkpoint.Checkpointer(RunDir(tmp_path), 1, world, keep=2)
    saver.restorer.load(saver.restorer.newest(), checkpoint.model_state(pair))
    parallel.stop()
    assert all(torch.equal(result[f"weight.{name}"], p.detach()) for name, p in pair.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    "world, fields",
    [
        (2, {}),
        (2, {"replicate": 2}),
        (4, {"accumulate": 3}),
        (4, {"replicate": 2, "accumulate": 3}),
        (4, {"replicate": 4}),
    ],
)
def test_gpu_defaults_match_single_process(by_world, world, fields):
    (result,) = launch(world, [compute(**GPU_DEFAULTS, **fields)], trained)
    assert torch.allclose(result["norms"], by_world[1]["fp32"]["norms"], rtol=1e-3)
    assert farthest(result, by_world[1]["fp32"], "gradient") < (2e-5, "")
    assert farthest(result, by_world[1]["fp32"], "weight") < (1e-3, "")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("fields", [{}, {"accumulate": 3, "recompute": "selective", "reshard": "no"}])
def test_sharding_over_single_rank_is_bitwise_equal(device, fields):
    """Uses fp32: in bf16 a single process uses autocast, but a sharded model has bf16 weights."""
    config = compute(device=device, deterministic="yes" if device == "cuda" else "no", **fields)
    try:
        plain, sharded = (launch(1, [config], partial(trained, sharded=sharded))[0] for sharded in (False, True))
    finally:
        torch.use_deterministic_algorithms(False)
    assert plain.keys() == sharded.keys()
    assert [name for name in plain if not torch.equal(plain[name], sharded[name])] == []


@pytest.mark.parametrize("world", [1, 2])
def test_trainer_clips_global_gradient_norm(world):
    """The reported norm is the one before clipping. All gradients are scaled alike, on all ranks."""
    (result,) = launch(world, [compute()], clipped)
    norm = result["reported.0.0"]
    assert norm > 10 * CLIP and norm == result["taken.0.0"] == result[f"reported.{CLIP}"]
    assert torch.isclose(result[f"taken.{CLIP}"], torch.tensor(CLIP))
    for name in [name for name in result if name.startswith("gradient.0.0.")]:
        after = result[name.replace("gradient.0.0", f"gradient.{CLIP}")]
        assert torch.allclose(after, result[name] * CLIP / norm, rtol=1e-4, atol=0), name


@pytest.mark.slow
@pytest.mark.parametrize("how", [compute(compile="yes"), compute(compile="yes", recompute="selective")])
def test_compiled_blocks_on_two_ranks_match_eager_single_process(by_world, how):
    (result,) = launch(2, [how], trained)
    alone = by_world[1]["fp32"]
    assert torch.allclose(result["norms"], alone["norms"], rtol=1e-3)
    assert farthest(result, alone, "gradient") < (2e-5, "")
    assert farthest(result, alone, "weight") < (1e-3, "")
    assert {name for name in result if "orig_mod" in name} == set()
