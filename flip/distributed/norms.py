"""Global 2-norms of a model's gradients, weights, and of what a step changed in them. Collective where sharded."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn

from flip.distributed import parallel
from flip.distributed.parallel import local


def of_gradients(pair: nn.Module) -> Tensor:
    """() over the gradients of all parameters; the same on all ranks. Not finite where one of them is not."""
    gradients = [parameter.grad for parameter in pair.parameters() if parameter.grad is not None]
    return parallel.whole(torch.nn.utils.get_total_norm(gradients))


@torch.no_grad()
def of_weights(optimizer: torch.optim.AdamW, world: int) -> tuple[Tensor, Tensor]:
    """(norm of all weights, norm of their change in the step just taken), both () on the device.

    The change is read back from AdamW's state, so that no copy of the weights is held: with a = lr * m / (1 - b1^t) /
    (sqrt(v / (1 - b2^t)) + eps) the step was w' = (1 - lr * decay) * w - a, hence w = (w' + a) / (1 - lr * decay).
    """
    weights, changes = [], []
    for group in optimizer.param_groups:
        (beta1, beta2), rate = group["betas"], group["lr"]
        decay = rate * group["weight_decay"]
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                continue
            after, step = local(parameter), state["step"]
            root = (local(state["exp_avg_sq"]) / (1 - beta2**step)).sqrt_().add_(group["eps"])
            change = (local(state["exp_avg"]) / (1 - beta1**step)).div_(root).mul_(rate)
            if decay:
                change += decay * (after + change) / (1 - decay)
            # in fp64: weights that run away are to be seen on their way, not as an overflow
            held = parallel.copies(parameter) ** -0.5
            weights.append(held * torch.linalg.vector_norm(after, dtype=torch.float64))
            changes.append(held * torch.linalg.vector_norm(change, dtype=torch.float64))
    squares = torch.stack([torch.stack(weights), torch.stack(changes)]).square().sum(dim=1)
    if world > 1:
        distributed.all_reduce(squares)
    weight, change = squares.sqrt().unbind()
    return weight, change
