"""Tests with real gloo ranks that initial weights, gradients and steps match a single process at every world size."""

import contextlib
import dataclasses
import datetime
import os
import tempfile
from contextlib import nullcontext
from functools import partial
from multiprocessing import util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import distributed, nn
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from flip import costs
from flip.checkpoint import saver as checkpoint
from flip.checkpoint.safetensors_io import CheckpointFiles
from flip.config import schema
from flip.data.loader import Batch
from flip.distributed import parallel
from flip.distributed.collectives import mean_over_ranks
from flip.distributed.shutdown import CoordinatedStop
from flip.models import clip
from flip.runs.errors import StorageError
from flip.runs.rundir import RunDir
from flip.training import anomaly, grad_cache
from flip.training import optimizer as optim
from flip.training.conversion import copy_weights, load_weights
from flip.training.trainer import Trainer
from tests.flip.models.test_clip import inputs, sized, visible
from tests.harness.ranks import run_ranks

pytestmark = pytest.mark.long

B = 12
STEPS = 3
SEED = 3
RATE = 1e-3
CLIP = 0.1


def compute(**fields):
    defaults = {"device": "cpu", "precision": "fp32", "attention": "explicit", "threads": 1, "deterministic": "no"}
    return schema.Compute(**defaults | fields)


def built(config, world, meta=True, radford=False, sharded=False, patch=8, head=False):
    """Builds a CLIP model. ``sharded``: shards it even over a single rank."""
    model = sized("tiny", radford=radford)
    model.image.patch = patch
    with torch.device("meta" if meta else "cpu"):
        pair = clip.CLIPModel(model, schema.Augment(), config.attention, config.recompute, head)
    if not meta:
        return pair
    if sharded:
        parallel._shard(pair, config, init_device_mesh(world.device.type, (1,)))
    parallel.apply_parallelism(pair, world, config)
    clip.init_weights(pair, SEED)
    parallel.check_initialised(pair)
    return pair


def trained(config, world, folder=None, radford=False, sharded=False):
    """Trains some steps. Returns initial and final weights, buffers, losses, and gradients of the first batch."""
    pair = built(config, world, radford=radford, sharded=sharded)
    result = {f"first.{name}": parallel.full_tensor(p).detach().clone() for name, p in pair.named_parameters()}
    result |= {f"table.{name}": buffer.clone() for name, buffer in pair.named_buffers()}
    result["held"] = torch.tensor(sum(map(bytes_of, pair.parameters())))
    # The gradient of a key bias is only rounding error, which a small eps would amplify to a full step.
    optimizer = optim.build(pair.named_parameters(), schema.Optim(eps=1e-4))
    for group in optimizer.param_groups:
        group["lr"] = RATE
    share = B // world.size
    losses = []
    for t in range(STEPS):
        patches, keep, tokens = inputs(B)
        fields = (visible(patches, keep), keep, tokens.roll(t, dims=1))
        shard = tuple(field[world.rank * share : (world.rank + 1) * share] for field in fields)
        statistics = grad_cache.grad_cache_backward(
            pair, shard, config.accumulate, world.device, parallel.autocast(config, world), config.loss_tile
        )
        if t == 0:
            result |= {f"gradient.{name}": parallel.full_tensor(p.grad).clone() for name, p in pair.named_parameters()}
        norm = optim.gradient_norm(pair)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(mean_over_ranks(torch.stack(statistics), world.size)[0])
    result["norms"] = torch.stack([norm, *optim.weight_norms(optimizer, world.size)]).float()
    result["losses"] = torch.stack(losses)
    with torch.no_grad(), parallel.autocast(config, world):  # a separate entry point
        result["encoded"] = pair.encode_image(inputs(B)[0].to(world.device))
    parallel.reshard(pair)
    result |= {f"weight.{name}": parallel.full_tensor(p).detach().clone() for name, p in pair.named_parameters()}
    if folder:
        saver = checkpoint.Checkpointer(RunDir(folder), 1, world, keep=2)
        saver.save(checkpoint.model_state(pair) | checkpoint.optimizer_state(pair, optimizer), "pretrain", STEPS * B)
    result["dtypes"] = torch.tensor([p.dtype == torch.float32 for p in pair.parameters()])
    return result


def bytes_of(parameter):
    return (parameter.to_local() if hasattr(parameter, "to_local") else parameter).nbytes


def held_bytes(config, world, folder=None):
    """Returns the bytes that FSDP holds in addition to the shards of this rank.

    ``between``: between micro-batches. ``within``: the maximum at the end of the backward pass of any block.
    """
    pair = built(config, world)
    seen = {"between": [], "within": []}
    last = grad_cache._set_last_micro_batch
    units = [unit._get_fsdp_state()._fsdp_param_group for unit in pair.modules() if isinstance(unit, FSDPModule)]
    parameters = [parameter for unit in units if unit for parameter in unit.fsdp_params]

    def note(kind):
        weights = [parameter._unsharded_param for parameter in parameters if hasattr(parameter, "_unsharded_param")]
        sums = [
            parameter.unsharded_accumulated_grad
            for parameter in parameters
            if parameter.unsharded_accumulated_grad is not None
        ]
        grads = [*sums, *(weight.grad for weight in weights if weight.grad is not None)]
        sizes = sum(weight.untyped_storage().nbytes() for weight in weights), sum(grad.nbytes for grad in grads)
        seen[kind].append(sizes)

    for block in (*pair.image.blocks, *pair.text.blocks):
        block.register_full_backward_hook(lambda *_: note("within"))
    grad_cache._set_last_micro_batch = lambda *args: (note("between"), last(*args))
    patches, keep, tokens = inputs(B // world.size)
    grad_cache.grad_cache_backward(
        pair, (visible(patches, keep), keep, tokens), config.accumulate, world.device, nullcontext()
    )
    grad_cache._set_last_micro_batch = last
    return {kind: torch.tensor(max(pairs, key=sum)) for kind, pairs in seen.items()}


def restored(config, world, folder):
    """Saves on all ranks and loads again. Returns per rank: number of opened files, whether all values are equal.

    Then damages the files and checks that loading fails on every rank.
    """
    opened = []
    read = CheckpointFiles.read
    pair = built(config, world)
    optimizer = optim.build(pair.named_parameters(), schema.Optim())
    state = checkpoint.model_state(pair) | checkpoint.optimizer_state(pair, optimizer)
    checkpoint.Checkpointer(RunDir(folder), 1, world, keep=2).save(state, "pretrain", B)
    expected = {name: parallel.local(tensor).clone() for name, tensor in state.items()}
    for tensor in state.values():
        parallel.local(tensor).fill_(-1)
    saver = checkpoint.Checkpointer(RunDir(folder), 1, world, keep=2)
    newest = saver.restorer.newest()
    CheckpointFiles.read = lambda files, name, *bounds: opened.append(name) or read(files, name, *bounds)
    saver.restorer.load(newest, checkpoint.model_state(pair))
    saver.restorer.load(newest, checkpoint.optimizer_state(pair, optimizer))
    is_equal = all(torch.equal(parallel.local(state[name]), tensor) for name, tensor in expected.items())
    seen = torch.tensor([len(opened), is_equal])
    distributed.barrier()
    if world.is_rank0:
        for file in newest.path.glob("*.safetensors"):
            file.write_bytes(b"rot")
    distributed.barrier()
    saver = checkpoint.Checkpointer(RunDir(folder), 1, world, keep=2)
    with pytest.raises(StorageError, match="this checkpoint cannot be read: .* ends before byte"):
        saver.restorer.load(newest, checkpoint.model_state(pair))
    together = [torch.empty_like(seen) for _ in range(world.size)]
    distributed.all_gather(together, seen)
    return {"opened": torch.stack(together)}


@torch.no_grad()
def converted(config, world, folder):
    """Saves a model on all ranks. Returns the weights of a model with larger patches that starts from it."""
    pair, larger = (built(config, world, radford=True, patch=patch) for patch in (8, 16))
    for parameter in pair.parameters():
        parameter.mul_(2)
    saver = checkpoint.Checkpointer(RunDir(folder), 1, world, keep=2)
    saver.save(checkpoint.model_state(pair), "pretrain", B)
    saved = SimpleNamespace(model=sized("tiny", radford=True), augment=schema.Augment())
    load_weights(saved, larger, partial(saver.restorer.load, saver.restorer.newest()))
    return {name: parallel.full_tensor(parameter).clone() for name, parameter in larger.named_parameters()}


def clipped(config, world, folder=None):
    """Takes a step of the trainer without and with clipping.

    Returns the norms that it reports, the norms of the gradients that the optimiser gets, and these gradients.
    """
    share = B // world.size
    result = {}
    patches, keep, tokens = inputs(B)
    fields = [field[world.rank * share : (world.rank + 1) * share] for field in (visible(patches, keep), keep, tokens)]
    for limit in (0.0, CLIP):
        trainer = Trainer.__new__(Trainer)
        trainer.config = SimpleNamespace(compute=config, optim=schema.Optim(clip=limit))
        trainer.world = world
        trainer.model = built(config, world)
        trainer.samples_seen = 0
        trainer.step = 0
        trainer.coordinated_stop = CoordinatedStop(None, world.size)
        trainer.guard = anomaly.NonFiniteGuard(RunDir("unused"), 1, world.rank, spike=0.0, window=1)
        optimizer = optim.build(trainer.model.named_parameters(), trainer.config.optim)
        span = SimpleNamespace(stage=schema.Stage(samples=B, batch=B), start=0)
        _, _, norm = trainer.train_step(span, optimizer, Batch(*fields, torch.arange(share), 0, None))
        result |= {f"reported.{limit}": norm, f"taken.{limit}": optim.gradient_norm(trainer.model)}
        for name, parameter in trainer.model.named_parameters():
            result[f"gradient.{limit}.{name}"] = parallel.full_tensor(parameter.grad).clone()
    return result


def rank_main(rank, size, store, cases, folder, work):
    """Runs ``work`` for each case on this rank. Any unpickling of data from other ranks fails, in torch's code too."""
    distributed_c10d._unpickler = None
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), FLIP_STORE=store)
    world = parallel.start(cases[0])
    outputs = [work(config, world, folder) for config in cases]
    distributed.barrier()
    parallel.stop()
    if rank == 0:
        return [{name: value.numpy() for name, value in output.items()} for output in outputs]
    return None


def launch(size, cases, folder=None, work=trained):
    """Runs ``work`` in ``size`` processes (in this one if ``size`` is 1). Returns the result of rank 0 per case."""
    if size == 1:
        world = parallel.start(cases[0])
        try:
            return [work(config, world) for config in cases]
        finally:
            parallel.stop()
    if folder:
        RunDir(folder).start_attempt({})
    with tempfile.TemporaryDirectory() as place:
        outputs, *_ = run_ranks(rank_main, size, size, f"{place}/store", cases, folder, work)
    return [{name: torch.from_numpy(value) for name, value in output.items()} for output in outputs]


GPU_DEFAULTS = {"reshard": "no", "loss_tile": 4096}
"""Values to which ``auto`` resolves on CUDA. ``replicate`` resolves to the number of nodes."""

CASES = {
    "fp32": compute(),
    "accumulated": compute(accumulate=2, recompute="selective"),
    "bf16": compute(precision="bf16"),
}


@pytest.fixture(scope="module")
def by_world():
    """world -> case -> results."""
    return {world: dict(zip(CASES, launch(world, list(CASES.values())), strict=True)) for world in (1, 2, 3)}


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
    (alone, *_, rounded) = launch(1, cases, work=work)
    (fp32, accumulated, bf16, *with_units_of_cuda) = launch(2, cases + of_cuda, work=work)
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
    (result,) = launch(4, [compute(replicate=2, **GPU_DEFAULTS)], tmp_path)
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
    (result,) = launch(world, [compute(**GPU_DEFAULTS, **fields)])
    assert torch.allclose(result["norms"], by_world[1]["fp32"]["norms"], rtol=1e-3)
    assert farthest(result, by_world[1]["fp32"], "gradient") < (2e-5, "")
    assert farthest(result, by_world[1]["fp32"], "weight") < (1e-3, "")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("fields", [{}, {"accumulate": 3, "recompute": "selective", "reshard": "no"}])
def test_sharding_over_single_rank_is_bitwise_equal(device, fields):
    """Uses fp32: in bf16 a single process uses autocast, but a sharded model has bf16 weights."""
    config = compute(device=device, deterministic="yes" if device == "cuda" else "no", **fields)
    try:
        plain, sharded = (launch(1, [config], work=partial(trained, sharded=sharded))[0] for sharded in (False, True))
    finally:
        torch.use_deterministic_algorithms(False)
    assert plain.keys() == sharded.keys()
    assert [name for name in plain if not torch.equal(plain[name], sharded[name])] == []


@pytest.mark.parametrize(
    "split, expected",
    [
        (lambda split_ranks, timeout, backend: (backend, split_ranks), "cuda:nccl"),
        (lambda split_ranks, timeout: None, "enumerated"),  # before torch 2.13
    ],
)
def test_mesh_splits_nccl_alone_if_torch_can(monkeypatch, split, expected):
    monkeypatch.setattr(distributed, "split_group", split)
    monkeypatch.setattr(
        distributed, "new_subgroups_by_enumeration", lambda ranks, timeout: (("enumerated", ranks), None)
    )
    monkeypatch.setattr(parallel.DeviceMesh, "from_group", lambda groups, *_, **__: groups)
    monkeypatch.setattr(parallel, "check_group", lambda *_: None)
    groups = parallel._mesh(parallel.World(0, 4, torch.device("cuda"), None, None), 2)
    assert groups == [(expected, [[0, 2], [1, 3]]), (expected, [[0, 1], [2, 3]])]


def test_start_turns_tf32_off():
    torch.set_float32_matmul_precision("high")
    try:
        assert launch(1, [compute()], work=lambda *_: torch.get_float32_matmul_precision()) == ["highest"]
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("device, expected", [("cpu", []), ("cuda", [True])])
def test_separate_reductions_sets_own_group_on_cuda_only(device, expected):
    calls = []
    world = parallel.World(0, 2, torch.device(device), None, None)
    model = nn.Linear(1, 1)
    parallel.separate_reductions(model, world)  # no effect: the model is not sharded, or torch is older
    model.set_separate_reduce_scatter_group = lambda: calls.append(True)
    parallel.separate_reductions(model, world)
    assert calls == expected and callable(FSDPModule.set_separate_reduce_scatter_group)


def reduction_groups(_, world):
    """Number of process groups after each of three models, which sum gradients in a group of their own."""
    counts = []
    like = None
    for _ in range(3):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model.scale = nn.Parameter(torch.ones(1))
        if like:
            mesh = like[0].weight.device_mesh
        else:
            mesh = init_device_mesh("cpu", (world.size,))
        for unit in (*model, model):
            fully_shard(unit, mesh=mesh)
        parallel.separate_reductions(model, dataclasses.replace(world, device=torch.device("cuda")), like)
        counts.append(len(distributed_c10d._world.pg_names))
        like = model
    return counts


@pytest.mark.skipif(not hasattr(FSDPModule, "set_separate_reduce_scatter_group"), reason="needs torch 2.13")
def test_model_of_next_stage_uses_the_process_groups_of_the_last(monkeypatch):
    monkeypatch.setattr(parallel, "check_group", lambda *_: None)  # there is no GPU
    (counts,) = launch(1, [compute()], work=reduction_groups)
    assert len(set(counts)) == 1


def test_device_memory_predicts_bytes_held_between_micro_batches():
    """FSDP holds the gradient and the weights of the entire model between micro-batches, for any number of ranks."""
    cases = [compute(accumulate=n, precision=precision) for n in (2, 3) for precision in ("fp32", "bf16")]
    for config, result in zip(cases, launch(2, cases, work=held_bytes), strict=True):
        plan = costs.device_memory(sized("tiny"), config, config.accumulate, "0.5", 2)
        most = plan["gradients"] + plan["gathered"]
        between, within = (int(result[kind].sum()) for kind in ("between", "within"))
        assert 0.9 * most < between <= most, (result, plan)
        assert within < 1.05 * most, (result, plan)  # the plan omits biases, and counts activations separately
        assert result["between"].tolist() == [pytest.approx(plan["gathered"], rel=0.3), plan["gradients"]]


def test_restore_opens_all_headers_on_single_rank_only(tmp_path):
    """Rank 0 opens both files once for their headers. Each rank then opens its own file for weights and for moments.
    Rank 1 also opens the file of rank 0, which holds the step counts."""
    (result,) = launch(2, [compute()], tmp_path, work=restored)
    assert result["opened"].tolist() == [[2 + 1 + 1, 1], [1 + 2, 1]]


@torch.no_grad()
def test_sharded_model_starts_from_checkpoint_with_other_patch_size(tmp_path):
    """Two ranks load weights that keep their shape by shard, and convert patch weights and learned positions."""
    config = compute()
    (result,) = launch(2, [config], tmp_path, work=converted)
    saved, expected = (built(config, None, meta=False, radford=True, patch=patch) for patch in (8, 16))
    clip.init_weights(saved, SEED)
    for parameter in saved.parameters():
        parameter.mul_(2)
    copy_weights(saved, expected)
    for name, value in expected.named_parameters():  # resampling patch weights rounds differently with other threads
        tolerance = 1e-5 if name == "image.patch.weight" else 0
        assert torch.allclose(result[name], value, rtol=0, atol=tolerance), name


@pytest.mark.parametrize("world", [1, 2])
def test_trainer_clips_global_gradient_norm(world):
    """The reported norm is the one before clipping. All gradients are scaled alike, on all ranks."""
    (result,) = launch(world, [compute()], work=clipped)
    norm = result["reported.0.0"]
    assert norm > 10 * CLIP and norm == result["taken.0.0"] == result[f"reported.{CLIP}"]
    assert torch.isclose(result[f"taken.{CLIP}"], torch.tensor(CLIP))
    for name in [name for name in result if name.startswith("gradient.0.0.")]:
        after = result[name.replace("gradient.0.0", f"gradient.{CLIP}")]
        assert torch.allclose(after, result[name] * CLIP / norm, rtol=1e-4, atol=0), name


@pytest.mark.slow
@pytest.mark.parametrize("how", [compute(compile="yes"), compute(compile="yes", recompute="selective")])
def test_compiled_blocks_on_two_ranks_match_eager_single_process(by_world, how):
    (result,) = launch(2, [how])
    alone = by_world[1]["fp32"]
    assert torch.allclose(result["norms"], alone["norms"], rtol=1e-3)
    assert farthest(result, alone, "gradient") < (2e-5, "")
    assert farthest(result, alone, "weight") < (1e-3, "")
    assert {name for name in result if "orig_mod" in name} == set()


@pytest.mark.slow
def test_compiled_block_compiles_every_sequence_length():
    """By default torch compiles 8 shapes and runs further ones eagerly. A process that starts later would then compute
    different bits."""
    torch._dynamo.reset()  # other tests may have compiled blocks of these shapes in this process
    torch._dynamo.utils.counters.clear()
    world = parallel.World(0, 1, torch.device("cpu"), None, None)
    with torch.device("meta"):
        pair = clip.CLIPModel(sized("tiny"), schema.Augment(), "explicit")
    parallel.apply_parallelism(pair, world, compute(compile="yes"))
    clip.init_weights(pair, SEED)
    block = pair.image.blocks[0]
    width = pair.image.blocks[0].norm1.weight.shape[0]
    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for length in range(3, 12):
            block(torch.zeros(2, length, width))
        compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        with torch.compiler.set_stance("force_eager"):
            block(torch.zeros(2, 20, width))
    assert compiled >= 9 and torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


def connected(rank, size, store):
    """Start with copies of the weights; return the steps with a short limit, and the timeouts of all groups."""
    steps = []

    @contextlib.contextmanager
    def connecting(what):
        steps.append(what)
        yield

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), FLIP_STORE=store)
    world = parallel.start(compute(), 30.0, connecting=connecting)
    parallel._mesh(world, 2)
    groups = [*distributed_c10d._world.pg_map]
    timeouts = {group._get_backend(torch.device("cpu")).options._timeout for group in groups}
    parallel.stop()
    return steps, sorted(timeouts), world.timeout


def test_every_group_is_connected_within_short_limit_and_has_timeout_of_world(tmp_path):
    """A group with another timeout would end a step that is slow, before the watchdog names it."""
    results = run_ranks(connected, 4, 4, str(tmp_path / "store"))
    for steps, timeouts, timeout in results:
        assert timeouts == [timeout, 6 * timeout] == [datetime.timedelta(minutes=35), datetime.timedelta(minutes=210)]
        ends = [step.rpartition(" group")[2] for step in steps]
        assert ends[:3] == [" of training", " of flags and counts", " of saves"]
        assert ends[3:] == ["s of copies of the weights", "s of shards of the weights"]


def test_timeout_of_collectives_covers_compilation():
    assert parallel.collective_timeout(2.0) == datetime.timedelta(minutes=25)


@pytest.mark.parametrize("hang_minutes, minutes", [(20.0, 25.0), (0.0, 1445.0)])
def test_collectives_wait_longer_than_watchdog_and_longest_read(hang_minutes, minutes):
    world = parallel.start(compute(), hang_minutes)
    parallel.stop()
    assert world.timeout == datetime.timedelta(minutes=minutes)


def test_nccl_monitor_waits_longer_than_watchdog_unless_user_chose(monkeypatch):
    monkeypatch.setenv("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", "60")  # restored after the test
    parallel.delay_nccl_monitor(datetime.timedelta(minutes=25))
    assert os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] == "60"
    monkeypatch.delenv("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC")
    parallel.delay_nccl_monitor(datetime.timedelta(minutes=25))
    assert os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] == "1500"


def test_stay_on_loopback_keeps_interface_set_by_user(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "")  # restored after the test
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    parallel.stay_on_loopback()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0" and os.environ["NCCL_SOCKET_IFNAME"].startswith("=lo")


@pytest.mark.parametrize(
    "given", [{"LOCAL_WORLD_SIZE": "1"}, {}, {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}]
)
def test_open_store_is_that_of_torch_for_several_hosts_and_torchrun(given, monkeypatch):
    store = distributed.HashStore()
    monkeypatch.setattr(distributed, "rendezvous", lambda url, rank, size, timeout: iter([(store, rank, size)]))
    for name in ("FLIP_STORE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert parallel.open_store(1, 2, datetime.timedelta(seconds=1)) is store
    assert store.timeout == datetime.timedelta(seconds=1)


def test_check_initialised_reports_unset_parameters_and_buffers():
    world = parallel.World(0, 1, torch.device("cpu"), None, None)
    with torch.device("meta"):
        pair = clip.CLIPModel(sized("tiny"), schema.Augment(), "sdpa")
    parallel.apply_parallelism(pair, world, compute())
    with pytest.raises(RuntimeError, match="was never initialised"):
        parallel.check_initialised(pair)
    clip.init_weights(pair, SEED)
    parallel.check_initialised(pair)
    with torch.device("meta"):
        pair.image.register_buffer("forgotten", torch.zeros(3))
    with pytest.raises(RuntimeError, match="image.forgotten"):
        parallel.check_initialised(pair)
    del pair.image.forgotten
    pair.text.extra = nn.Parameter(torch.tensor([1.0, torch.nan]))
    with pytest.raises(RuntimeError, match="text.extra"):
        parallel.check_initialised(pair)


@pytest.mark.parametrize("prepared", [False, True])
def test_compile_caches_use_private_folders(tmp_path, monkeypatch, prepared):
    """Torch loads pickles and shared objects from these caches, so a folder that another user prepared is not used."""
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if prepared:  # a symlink has the same effect as another owner, and needs no root
        (tmp_path / "other").mkdir()
        (tmp_path / f"flip-compile-{os.geteuid()}").symlink_to(tmp_path / "other")
    parallel.set_compile_caches()
    places = [Path(os.environ[name]) for name in names]
    folder = places[0].parent.parent
    assert places == [places[0].parent / part for part in ("inductor", "triton")]
    assert folder.parent == (Path(util.get_temp_dir()) if prepared else tmp_path)
    assert folder.stat().st_mode & 0o777 == 0o700 and not folder.is_symlink()
    monkeypatch.setenv(names[0], "/mine")
    monkeypatch.delenv(names[1])
    parallel.set_compile_caches(tmp_path / "run" / "compiled")
    assert os.environ[names[0]] == "/mine" and Path(os.environ[names[1]]).parents[1] == tmp_path / "run" / "compiled"
    assert (tmp_path / "run" / "compiled").stat().st_mode & 0o777 == 0o700
