"""The losses over the global batch: their formulas, learned parameters, memory and traffic.

``model.objective`` of a configuration chooses one. A new loss is a class here and a row of ``LOSSES``, or a class in a
user's file: the model gets its learned parameters, ``flip.models.tiled_loss`` computes it in tiles, plans count its
bytes, and metrics show its parameters. torch is imported where it is used, because plans need only the sizes.

Dimensions: W ranks of b pairs, B = W * b, E features. Logits are the cosines times the logit scale, (b, B) on a rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flip.common import user_classes

if TYPE_CHECKING:
    from torch import Tensor

    from flip.config import schema


class Tiles:
    """The logits of this rank's images and the texts of all ranks, some columns at a time.

    Args:
        image: (b, E) features of this rank.
        texts: (B, E) features of all ranks; this rank's own start at ``first``.
        scale: () or (1,), the factor of the cosines.
        parameters: the learned parameters of ``loss`` in the order of ``Loss.parameters``, () or (1,) each.
        tile: columns of a tile; the last one may have fewer.
        group: the ranks of all texts; None: a single rank.
        fields: name -> (b,) fp64, the numbers of this rank's samples (``data.fields``).
    """

    def __init__(
        self, loss: Loss, image: Tensor, texts: Tensor, scale: Tensor, parameters: Sequence[Tensor], first: int,
        tile: int, group: Any, fields: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        self.image = image
        self.texts = texts
        self.parameters = tuple(parameters)
        self.first = first
        self.group = group
        self.fields = fields
        self.scaled = scale * image
        """(b, E): a row times a text is a logit."""
        self._loss = loss
        self._tile = tile

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """(columns, logits (b, tile)) of each tile. The caller may overwrite the logits."""
        for start in range(0, len(self.texts), self._tile):
            columns = slice(start, start + self._tile)
            yield columns, self._loss.shift(self.scaled @ self.texts[columns].T, *self.parameters)

    @property
    def own(self) -> Tensor:
        """(b,) columns of this rank's own texts."""
        import torch

        return torch.arange(self.first, self.first + len(self.image), device=self.image.device)

    def of_all_ranks(self, values: Tensor) -> Tensor:
        """(B,) of all ranks, in the order of ``texts``, from the values (b,) of each. Collective: on several ranks an
        all-reduce of B numbers, which belongs into ``Loss.reductions``."""
        from torch import distributed

        everyone = values.new_zeros(len(self.texts))
        everyone[self.own] = values
        if self.group is not None:
            distributed.all_reduce(everyone, group=self.group)
        return everyone

    def positive_pairs(self, columns: slice, logits: Tensor) -> Tensor:
        """A view of the positive pairs' elements in the tile ``logits`` (b, tile) of these columns; may be empty."""
        low = max(self.first, columns.start)
        high = max(low, min(self.first + logits.shape[0], columns.start + logits.shape[1]))
        rows = logits[low - self.first : high - self.first]
        return rows[:, low - columns.start : high - columns.start].diagonal()


class Accuracy:
    """The text of largest logit of each of this rank's images, tile by tile."""

    def __init__(self, image: Tensor) -> None:
        import torch

        self.max = image.new_full((len(image),), -torch.inf)
        """(b,), the largest logits so far."""
        self._argmax = torch.zeros(len(image), dtype=torch.int64, device=image.device)

    def add(self, columns: slice, logits: Tensor) -> None:
        """Count the logits (b, tile) of these columns."""
        import torch

        tile_max, index = logits.max(dim=1)
        self._argmax = torch.where(tile_max > self.max, index + columns.start, self._argmax)
        self.max = torch.maximum(self.max, tile_max)

    def mean(self, own: Tensor) -> Tensor:
        """(): the share of images whose own text, column ``own`` (b,), has the largest logit."""
        return (self._argmax == own).to(self.max.dtype).mean()


class Loss(ABC):
    """One loss over the global batch: a mean over images, from tiles of logits.

    ``flip.models.tiled_loss`` computes the gradients of features and scale from those of the logits. Prove a new loss
    against its plain formula in float64, with gradients, on one and on several ranks
    (tests/flip/models/test_tiled_loss.py).
    """

    parameters: Mapping[str, str] = {}
    """Learned parameter, a scalar -> what it is, for charts. Its first value is the field of its name in ``Model``,
    flip/config/schema.py, or in ``first_values``. They are not decayed."""

    first_values: Mapping[str, float] = {}
    """First values of the learned parameters without a field in ``Model``, as those of a user's class."""

    terms: int = 1
    """Terms per image of which the loss is the mean: ``gradient`` is divided by b times this."""

    uses_fields: bool = False
    """Whether it uses ``Tiles.fields``. ``data.fields`` is refused for others, which would ignore them."""

    def shift(self, logits: Tensor, *parameters: Tensor) -> Tensor:
        """Add to logits (b, tile), in place, what does not depend on features. Default: nothing."""
        return logits

    @abstractmethod
    def forward(self, tiles: Tiles, accuracy: Accuracy) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The mean () over this rank's images, and what ``gradient`` needs of it. Each tile is added to ``accuracy``
        before it is overwritten. Called without autograd; may be collective over ``tiles.group``."""

    @abstractmethod
    def gradient(
        self, tiles: Tiles, columns: slice, logits: Tensor, saved: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The gradient (b, tile) of the logits of these columns, which may be overwritten, and the tile's part () of
        that of each learned parameter; both times b * ``terms``. ``saved``: of ``forward``."""

    def values(self, local: int, batch: int) -> int:
        """Numbers of fp32 that it stores beside tiles, features and their gradients, for b = ``local`` of B = ``batch``
        pairs."""
        return 4 * (local + batch)

    def reductions(self, batch: int) -> tuple[int, int]:
        """All-reduces of its forward pass on several ranks, and the numbers that they sum in total."""
        return 0, 0


class InfoNCE(Loss):
    """CLIP's symmetric InfoNCE: the mean of the cross-entropies image -> text and text -> image (Radford et al. 2021).

    With logits l, image i and its text have the loss (logsumexp_j l[i, j] + logsumexp_j l[j, i]) / 2 - l[i, i].
    A running log-sum-exp is kept of each row (Milakov, Gimelshein 2018) and of each column's part, which the ranks
    then combine.
    """

    terms = 2

    def forward(self, tiles: Tiles, accuracy: Accuracy) -> tuple[Tensor, tuple[Tensor, ...]]:
        rows = OnlineLogSumExp(tiles.image, len(tiles.image))
        columns = OnlineLogSumExp(tiles.image, len(tiles.texts))
        for part, logits in tiles:
            accuracy.add(part, logits)
            rows.add(slice(None), logits, accuracy.max, dim=1)
            columns.add(part, logits, logits.amax(dim=0), dim=0)
        if tiles.group is not None:
            columns.all_reduce(tiles.group)
        row = rows.value()
        column = columns.value()
        diagonal = (tiles.scaled * tiles.texts[tiles.own]).sum(dim=1)
        return ((row + column[tiles.own]) / 2 - diagonal).mean(), (row, column)

    def gradient(
        self, tiles: Tiles, columns: slice, logits: Tensor, saved: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        row, column = saved
        grad = (logits - row[:, None]).exp_() + logits.sub_(column[columns]).exp_()
        tiles.positive_pairs(columns, grad).sub_(2)
        return grad, ()

    def reductions(self, batch: int) -> tuple[int, int]:
        return 2, 2 * batch


class SigmoidLoss(Loss):
    """SigLIP's loss: the sum over all texts of -log sigmoid(+-logit), the sign being + on own pairs (Zhai et al. 2023).

    The bias is added to the scaled cosines.
    """

    parameters = {"logit_bias": "Learned bias of the logits (objective siglip)."}

    def shift(self, logits: Tensor, *parameters: Tensor) -> Tensor:
        (bias,) = parameters
        return logits.add_(bias)

    def forward(self, tiles: Tiles, accuracy: Accuracy) -> tuple[Tensor, tuple[Tensor, ...]]:
        from torch.nn.functional import logsigmoid

        total = tiles.image.new_zeros(())
        for columns, logits in tiles:
            accuracy.add(columns, logits)
            tiles.positive_pairs(columns, logits.neg_()).neg_()
            total = total - logsigmoid(logits).sum()  # softplus turns linear too early for fp64
        return total / len(tiles.image), ()

    def gradient(
        self, tiles: Tiles, columns: slice, logits: Tensor, saved: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        tiles.positive_pairs(columns, logits).neg_()
        grad = logits.sigmoid_()
        tiles.positive_pairs(columns, grad).neg_()
        return grad, (grad.sum(),)


class OnlineLogSumExp:
    """Log-sum-exp of ``n`` rows or columns, computed part by part (Milakov, Gimelshein 2018).

    ``like``: a tensor with the dtype and device of the logits. ``max`` and ``sum`` are (n,): the largest logits so far,
    and the sums of exp(logit - max).
    """

    def __init__(self, like: Tensor, n: int) -> None:
        self.max = like.new_full((n,), -float("inf"))
        self.sum = like.new_zeros(n)

    def add(self, index: slice, logits: Tensor, new_max: Tensor, dim: int) -> None:
        """Add the logits of a tile, (m, tile) or (b, m) for m elements ``index``, along ``dim``.

        ``new_max``: (m,), the maxima of these elements with the tile included.
        """
        scaled_sum = self.sum[index] * (self.max[index] - new_max).exp()
        self.sum[index] = scaled_sum + (logits - new_max.unsqueeze(dim)).exp_().sum(dim)
        self.max[index] = new_max

    def all_reduce(self, group: Any) -> None:
        """Combine over ranks. Collective."""
        from torch import distributed

        new_max = self.max.clone()
        distributed.all_reduce(new_max, distributed.ReduceOp.MAX, group=group)
        self.sum *= (self.max - new_max).exp()
        distributed.all_reduce(self.sum, group=group)
        self.max = new_max

    def value(self) -> Tensor:
        """(n,): the log-sum-exp of all parts so far."""
        return self.max + self.sum.log()


#: ``model.objective`` -> loss.
LOSSES: dict[str, Loss] = {
    "clip": InfoNCE(),
    "siglip": SigmoidLoss(),
}


def loss_kind(name: str) -> Loss:
    """The loss of ``model.objective``. Executes a user's file."""
    return user_classes.named(name, LOSSES, Loss)  # type: ignore[type-abstract]


def declared(name: str) -> Loss:
    """As ``loss_kind``, of a user's class its constants alone: for plans and exports."""
    return user_classes.declared(name, LOSSES, Loss, "clip")  # type: ignore[type-abstract]


def first_values(model: schema.Model) -> dict[str, float]:
    """Learned parameter of the loss of a model -> its first value."""
    loss = declared(model.objective)
    return {
        name: loss.first_values[name] if name in loss.first_values else getattr(model, name) for name in loss.parameters
    }


def all_parameters() -> dict[str, str]:
    """The learned parameters of all losses, with what they are."""
    return {name: text for loss in LOSSES.values() for name, text in loss.parameters.items()}
