"""Parameter groups of the optimiser, the learning rate as a function of samples, and norms of gradients and weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from flip.config import schema
from flip.distributed.parallel import full_tensor, local, replica_of
from flip.optimizer_kinds import KIND, is_block_matrix, optimizer_kind

PART = 2**27
"""Elements whose norms are computed together; their copies take twice 4 bytes each."""

NORMS = ("norm", "q_norm", "k_norm")
"""Starts of the names of LayerNorms."""


def uses_weight_decay(name: str, decay_logit_scale: bool) -> bool:
    """All parameters except biases, gains of LayerNorm, positions, and those of losses."""
    if name == "logit_scale":
        return decay_logit_scale
    owner, _, leaf = name.rpartition(".")
    if not owner:  # of the loss
        return False
    return leaf not in ("bias", "positions") and not owner.rpartition(".")[2].startswith(NORMS)


def build(named_parameters: Iterable[tuple[str, nn.Parameter]], optim: schema.Optim) -> torch.optim.Optimizer:
    """The optimiser of all parameters, those with weight decay in the first group, those without in the last.

    An optimiser with ``others`` gets the matrices of blocks in a group before these. ``set_learning_rate`` sets the
    rate before each step. AdamW updates a group by one fused kernel, also of DTensors.

    Raises ConfigError if the optimiser cannot train these parameters, and RuntimeError if its torch optimiser does not
    obey ``found_inf``.
    """
    kind = optimizer_kind(optim.name)
    rest = kind.others or optim.name
    matrices = {"params": list[nn.Parameter](), "weight_decay": optim.weight_decay, KIND: optim.name}
    decayed = {"params": list[nn.Parameter](), "weight_decay": optim.weight_decay, KIND: rest}
    undecayed = {"params": list[nn.Parameter](), "weight_decay": 0.0, KIND: rest}
    groups: list[dict[str, Any]] = [decayed, undecayed]
    if kind.others:
        groups.insert(0, matrices)
    for name, parameter in named_parameters:
        if not parameter.requires_grad:  # of a locked tower
            continue
        if kind.others and is_block_matrix(name, parameter.ndim):
            group: dict[str, Any] = matrices
        elif uses_weight_decay(name, optim.decay_logit_scale):
            group = decayed
        else:
            group = undecayed
        group["params"].append(parameter)
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    optimizer = kind.build(groups, optim, fused)
    if fused and not getattr(optimizer, "_step_supports_amp_scaling", False):  # torch's own ones set it if fused
        what = f"{optim.name}: its torch optimiser does not obey found_inf"
        raise RuntimeError(f"{what}: see OptimizerKind in flip/optimizer_kinds.py, and set _step_supports_amp_scaling")
    return optimizer


def learning_rate(stage: schema.Stage, position: int) -> float:
    """The rate of the step that starts after ``position`` samples of this stage.

    Linear from 0 over ``warmup`` samples to base_lr * batch / 256 (Goyal et al. 2017), then by ``schedule``: cosine to
    0 (Loshchilov & Hutter 2017), or constant but for the last ``cooldown`` samples. The decay of schedule wsd is
    1 - sqrt (Haegele et al. 2024, arXiv 2405.18392). The curve is evaluated in the middle of the step, so that neither
    the first nor the last step has a rate of 0.
    """
    peak = stage.base_lr * stage.batch / 256
    middle = position + stage.batch / 2
    if middle < stage.warmup:
        return peak * middle / stage.warmup
    end = -(-stage.samples // stage.batch) * stage.batch
    if stage.schedule == "cosine":
        progress = min((middle - stage.warmup) / max(end - stage.warmup, 1), 1.0)
        return peak * (1 + math.cos(math.pi * progress)) / 2
    left = max(end - middle, 0.0)
    if left >= stage.cooldown:
        return peak
    return peak * (1 - math.sqrt(1 - left / stage.cooldown))


def set_learning_rate(optimizer: torch.optim.Optimizer, stage: schema.Stage, position: int) -> float:
    """Set the rate of the next step in all groups and return it."""
    rate = learning_rate(stage, position)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def gradient_norm(model: nn.Module) -> Tensor:
    """The 2-norm () of all gradients, the same on all ranks; not finite if a gradient is not. Collective if sharded."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return full_tensor(torch.nn.utils.get_total_norm(gradients))


@torch.no_grad()
def weight_norms(optimizer: torch.optim.Optimizer, world_size: int) -> tuple[Tensor, Tensor]:
    """2-norms of all weights and of their change in the last step, both () on the device. Collective if sharded.

    The change is computed from the optimiser's moments, so that no copy of the weights is needed.
    """
    weights = list[Tensor]()
    changes = list[Tensor]()
    scales = list[float]()
    for group in optimizer.param_groups:
        kind = optimizer_kind(group[KIND])
        parameters = [parameter for parameter in group["params"] if optimizer.state[parameter]]
        for part in _parts(parameters):
            after = [local(parameter) for parameter in part]
            states = (optimizer.state[parameter] for parameter in part)
            moments = [{name: local(value) for name, value in state.items()} for state in states]
            # fp64, so that diverging weights show as large numbers, not as an overflow
            weights += torch._foreach_norm(after, 2, torch.float64)
            changes += kind.change_norms(part, after, moments, group)
            scales += [replica_of(parameter)[1] ** -0.5 for parameter in part]  # each replica counts
    norms = torch.stack([torch.stack(weights), torch.stack(changes)])
    squares = (norms * torch.tensor(scales, dtype=norms.dtype, device=norms.device)).square().sum(dim=1)
    if world_size > 1:
        distributed.all_reduce(squares)
    of_weights, of_changes = squares.sqrt().unbind()
    return of_weights, of_changes


def _parts(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parts of at most PART elements on this rank, or single parameters: a part is copied as a whole."""
    part = list[nn.Parameter]()
    elements = 0
    for parameter in parameters:
        count = local(parameter).numel()
        if part and elements + count > PART:
            yield part
            part = []
            elements = 0
        part.append(parameter)
        elements += count
    if part:
        yield part
