"""The optimisers: what each stores per parameter, what that takes of memory, and how it changed the weights.

``optim.name`` of a configuration chooses one. A new optimiser is a class here and a row of ``OPTIMIZERS``, or a class
in a user's file: training builds it, checkpoints save and restore its moments, plans count their bytes, and metrics
show its last change. torch is imported where it is used, because plans need only the sizes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flip.common import user_classes
from flip.config import schema
from flip.runs.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Key of a torch optimiser's parameter groups: the name of its kind.
KIND = "kind"


class OptimizerKind(ABC):
    """One kind of optimiser.

    Its torch optimiser changes neither weights nor moments in a step for which its attribute ``found_inf``, a tensor
    (), is 1 (flip.training.anomaly), and says so by ``_step_supports_amp_scaling = True``, as GradScaler asks. torch's
    own do both if they are fused.
    """

    moment_bytes: int
    """Bytes of its moments for one parameter, without what it stores once per tensor."""

    others: str = ""
    """The row of ``OPTIMIZERS`` for all parameters but the matrices of blocks. Empty: this one updates all."""

    @abstractmethod
    def build(self, groups: list[dict[str, Any]], optim: schema.Optim, fused: bool) -> torch.optim.Optimizer:
        """The torch optimiser of parameter groups, which have their weight decay. The learning rate is set later.

        Raises ConfigError if it cannot train these parameters.
        """

    @abstractmethod
    def first_moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """Name -> value before the first step of all that it stores for a parameter: of its shape, or ().

        Checkpoints use the names. The values must lead to the same first step as a state that is empty.
        """

    @abstractmethod
    def last_change(
        self, after: list[Tensor], moments: Sequence[Mapping[str, Tensor]], group: Mapping[str, Any]
    ) -> list[Tensor]:
        """w - w' of the last step, from the weights w' after it: few kernels for all parameters of one group.

        ``after`` and ``moments``: this rank's parts, by parameter; the result has the shapes of ``after``. ``group``:
        the parameter group, with the learning rate of the step.
        """

    def change_norms(
        self, parameters: Sequence[Tensor], after: list[Tensor], moments: Sequence[Mapping[str, Tensor]],
        group: Mapping[str, Any],
    ) -> Sequence[Tensor]:  # fmt: skip
        """2-norms () in fp64 of this rank's parts of the last change, of parameters whose parts are ``after``."""
        import torch

        return torch._foreach_norm(self.last_change(after, moments, group), 2, torch.float64)

    def matrix_flops(self, rows: int, columns: int) -> int:
        """FLOPs of the update of a matrix of a block that are worth counting: those of matrix products."""
        return 0


class AdamW(OptimizerKind):
    """AdamW; weight decay is multiplied by the learning rate (Loshchilov & Hutter 2019)."""

    moment_bytes = 8

    def build(self, groups: list[dict[str, Any]], optim: schema.Optim, fused: bool) -> torch.optim.Optimizer:
        import torch

        return torch.optim.AdamW(groups, lr=0.0, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=fused)

    def first_moments(self, parameter: Tensor) -> dict[str, Tensor]:
        import torch

        return {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }

    def last_change(
        self, after: list[Tensor], moments: Sequence[Mapping[str, Tensor]], group: Mapping[str, Any]
    ) -> list[Tensor]:
        """With a = lr * m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) the step was w' = (1 - lr * decay) * w - a, hence
        w - w' = (a + lr * decay * w') / (1 - lr * decay)."""
        import torch

        rate = group["lr"]
        decay = group["lr"] * group["weight_decay"]
        corrections = [1 - beta ** moments[0]["step"] for beta in group["betas"]]  # all have taken the same steps
        root = torch._foreach_div([each["exp_avg_sq"] for each in moments], corrections[1])
        torch._foreach_sqrt_(root)
        torch._foreach_add_(root, group["eps"])
        change = torch._foreach_div([each["exp_avg"] for each in moments], corrections[0])
        torch._foreach_div_(change, root)
        torch._foreach_mul_(change, rate)
        if decay:
            torch._foreach_add_(change, after, alpha=decay)
            torch._foreach_div_(change, 1 - decay)
        return list(change)


class Muon(OptimizerKind):
    """Muon for the matrices of blocks, with updates of AdamW's size, so that its learning rate and decay fit; AdamW for
    the rest (Jordan et al. 2024; Liu et al., arXiv 2502.16982).
    """

    moment_bytes = 4
    others = "adamw"

    def build(self, groups: list[dict[str, Any]], optim: schema.Optim, fused: bool) -> torch.optim.Optimizer:
        from flip.muon import MuonAdamW

        matrices = [group for group in groups if optimizer_kind(group[KIND]) is self]
        if not any(group["params"] for group in matrices):
            remedy = "Use optim.name: adamw."
            raise ConfigError("the model has no matrices in blocks, which muon updates", "optim.name", "muon", remedy)
        rest = [group for group in groups if optimizer_kind(group[KIND]) is not self]
        adamw = OPTIMIZERS[self.others].build(rest, optim, fused)
        return MuonAdamW(matrices, adamw, optim.momentum, self.first_moments)  # type: ignore[arg-type]

    def first_moments(self, parameter: Tensor) -> dict[str, Tensor]:
        import torch

        return {"momentum_buffer": torch.zeros_like(parameter)}

    def last_change(
        self, after: list[Tensor], moments: Sequence[Mapping[str, Tensor]], group: Mapping[str, Any]
    ) -> list[Tensor]:
        """Not known from the moments alone: ``change_norms`` returns what the step has stored."""
        raise NotImplementedError

    def change_norms(
        self, parameters: Sequence[Tensor], after: list[Tensor], moments: Sequence[Mapping[str, Tensor]],
        group: Mapping[str, Any],
    ) -> Sequence[Tensor]:  # fmt: skip
        from flip.muon import CHANGES

        return [group[CHANGES][parameter] for parameter in parameters]

    def matrix_flops(self, rows: int, columns: int) -> int:
        """Of five Newton-Schulz iterations: A = X X^T, A A, and a product with X; s x l is the shape with s <= l."""
        short, long = sorted((rows, columns))
        return 5 * (4 * short**2 * long + 2 * short**3)


#: ``optim.name`` -> optimiser.
OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": AdamW(),
    "muon": Muon(),
}


def optimizer_kind(name: str) -> OptimizerKind:
    """The optimiser of ``optim.name``. Executes a user's file."""
    return user_classes.named(name, OPTIMIZERS, OptimizerKind)  # type: ignore[type-abstract]


def declared(name: str) -> OptimizerKind:
    """As ``optimizer_kind``, of a user's class its constants alone: for plans."""
    return user_classes.declared(name, OPTIMIZERS, OptimizerKind, "adamw")  # type: ignore[type-abstract]


def is_block_matrix(name: str, dimensions: int) -> bool:
    """Whether a parameter is a matrix of a block, which an optimiser with ``others`` updates itself."""
    return ".blocks." in name and dimensions == 2


def _group_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    return next(group for group in optimizer.param_groups if any(each is parameter for each in group["params"]))


def moments_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Name -> value of all that the optimiser stores for a parameter. Creates them before the first step.

    Raises RuntimeError if they are not those that its kind declares: the next attempt could not restore them.
    """
    import torch

    name = _group_of(optimizer, parameter)[KIND]
    kind = optimizer_kind(name)
    state = optimizer.state[parameter]
    if not state:
        state.update(kind.first_moments(parameter))
    declared = kind.first_moments(torch.empty(parameter.shape, device="meta"))  # only names and shapes
    shapes = {name: getattr(value, "shape", None) for name, value in state.items()}
    if shapes != {name: value.shape for name, value in declared.items()}:
        raise RuntimeError(
            f"{name} stores {', '.join(state)}, but first_moments of its class declares {', '.join(declared)}"
        )
    return dict(state)
