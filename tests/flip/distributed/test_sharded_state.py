"""Tests of what each rank holds, saves and loads of a sharded model."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule

from flip import model_costs
from flip.checkpoint import saver as checkpoint
from flip.checkpoint.safetensors_io import CheckpointFiles
from flip.config import schema
from flip.distributed import parallel
from flip.models import clip
from flip.runs.errors import StorageError
from flip.runs.rundir import RunDir
from flip.training import grad_cache, parameter_groups
from flip.training.conversion import copy_weights, load_weights
from tests.flip.models.test_clip import inputs, sized, visible
from tests.harness.sharded_models import BATCH, SEED, built, compute, launch


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
    patches, keep, tokens = inputs(BATCH // world.size)
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
    optimizer = parameter_groups.build(pair.named_parameters(), schema.Optim())
    state = checkpoint.model_state(pair) | checkpoint.optimizer_state(pair, optimizer)
    checkpoint.Checkpointer(RunDir(folder), 1, world, keep=2).save(state, "pretrain", BATCH)
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
    saver.save(checkpoint.model_state(pair), "pretrain", BATCH)
    saved = SimpleNamespace(model=sized("tiny", radford=True), augment=schema.Augment())
    load_weights(saved, larger, partial(saver.restorer.load, saver.restorer.newest()))
    return {name: parallel.full_tensor(parameter).clone() for name, parameter in larger.named_parameters()}


@pytest.mark.long
def test_device_memory_predicts_bytes_held_between_micro_batches():
    """FSDP holds the gradient and the weights of the entire model between micro-batches, for any number of ranks."""
    cases = [compute(accumulate=n, precision=precision) for n in (2, 3) for precision in ("fp32", "bf16")]
    for config, result in zip(cases, launch(2, cases, held_bytes), strict=True):
        plan = model_costs.device_memory(sized("tiny"), config, config.accumulate, "0.5", 2)
        most = plan["gradients"] + plan["gathered"]
        between, within = (int(result[kind].sum()) for kind in ("between", "within"))
        assert 0.9 * most < between <= most, (result, plan)
        assert within < 1.05 * most, (result, plan)  # the plan omits biases, and counts activations separately
        assert result["between"].tolist() == [pytest.approx(plan["gathered"], rel=0.3), plan["gradients"]]


@pytest.mark.long
def test_restore_opens_all_headers_on_single_rank_only(tmp_path):
    """Rank 0 opens both files once for their headers. Each rank then opens its own file for weights and for moments.
    Rank 1 also opens the file of rank 0, which holds the step counts."""
    (result,) = launch(2, [compute()], restored, tmp_path)
    assert result["opened"].tolist() == [[2 + 1 + 1, 1], [1 + 2, 1]]


@pytest.mark.long
@torch.no_grad()
def test_sharded_model_starts_from_checkpoint_with_other_patch_size(tmp_path):
    """Two ranks load weights that keep their shape by shard, and convert patch weights and learned positions."""
    config = compute()
    (result,) = launch(2, [config], converted, tmp_path)
    saved, expected = (built(config, None, meta=False, radford=True, patch=patch) for patch in (8, 16))
    clip.init_weights(saved, SEED)
    for parameter in saved.parameters():
        parameter.mul_(2)
    copy_weights(saved, expected)
    for name, value in expected.named_parameters():  # resampling patch weights rounds differently with other threads
        tolerance = 1e-5 if name == "image.patch.weight" else 0
        assert torch.allclose(result[name], value, rtol=0, atol=tolerance), name


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
