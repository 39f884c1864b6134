"""The linear probe: multinomial logistic regression on image features, by L-BFGS, on rank 0.

    minimise over W (C, E) and b (C,):  sum_i -log softmax(W x_i + b)[y_i] + |W|^2 / (2 * cost)

as scikit-learn's LogisticRegression writes it (its ``C`` is ``cost``; b is not held down). Sums are over fixed tiles in
float64, so neither memory nor the world size moves them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flip.data.order import key
from flip.evaluate.embed import nothing
from flip.evaluate.verdict import fingerprint, finite, places, verdict
from flip.exitcodes import DataError

COSTS = (0.1, 1.0, 10.0, 100.0, 1e3, 1e4)
"""What ``cost`` is chosen from, weakest fit first."""
HELD_OUT = 10
"""One of so many training images chooses the cost."""
TILE = 16384
ITERATIONS = 1000


class Probe(NamedTuple):
    """``weight`` (C, E) and ``bias`` (C,), float64."""

    weight: Tensor
    bias: Tensor

    def scores(self, features: Tensor) -> Tensor:
        """(n, E) -> (n, C)."""
        return features.to(self.weight) @ self.weight.T + self.bias


def fit(
    features: Tensor, labels: Tensor, classes: int, cost: float, start: Probe | None = None,
    tell: Callable[[], None] = nothing,
) -> Probe:  # fmt: skip
    """The minimum, from ``start`` (default: zero). Features (N, E), labels (N,), on one device."""
    zeros = torch.zeros(classes, features.shape[1] + 1, dtype=torch.float64, device=features.device)
    first = start or Probe(zeros[:, :-1], zeros[:, -1])
    parameters = [value.clone().requires_grad_() for value in first]
    solver = torch.optim.LBFGS(
        parameters, max_iter=ITERATIONS, tolerance_grad=1e-7, tolerance_change=1e-11, history_size=10,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> float:
        solver.zero_grad()
        weight, bias = parameters
        penalty = weight.square().sum() / (2 * cost * len(features))
        penalty.backward()
        whole = float(penalty.detach())
        for at in range(0, len(features), TILE):
            scores = Probe(weight, bias).scores(features[at : at + TILE])
            part = torch.nn.functional.cross_entropy(scores, labels[at : at + TILE], reduction="sum") / len(features)
            part.backward()
            whole += float(part.detach())
        tell()
        return whole

    solver.step(loss)
    return Probe(*(value.detach() for value in parameters))


def choose(
    features: Tensor, labels: Tensor, classes: int, costs: Sequence[float] = COSTS, tell: Callable[[], None] = nothing
) -> float:
    """The cost that is right most often on a tenth of the training images, drawn by the counter hash; of equal ones the
    least. Too few images to hold any out: the last but one."""
    held = torch.from_numpy(key(0, np.arange(len(labels)), 0) % HELD_OUT == 0)
    if not 0 < int(held.sum()) < len(labels):
        return costs[-2]
    best, right, probe = costs[0], -1, None
    for cost in costs:
        probe = fit(features[~held], labels[~held], classes, cost, probe, tell)
        found = int((probe.scores(features[held]).argmax(dim=1) == labels[held]).sum())
        best, right = (cost, found) if found > right else (best, right)
    return best


def probe(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], name: str, device: torch.device | str = "cpu",
    cost: float = 0.0, tell: Callable[[], None] = nothing,
) -> dict[str, Any]:  # fmt: skip
    """Fit on ``train`` and score ``test``, each (features (n, E), labels (n,)): a verdict, classes, cost, predictions.

    ``cost`` 0: ``choose``. Raises DataError where the test images have a class that no training image has, Diverged
    where a feature is not finite.
    """
    for features, _ in (train, test):
        finite(features, name)
    if not len(train[1]) or not len(test[1]) or min(int(train[1].min()), int(test[1].min())) < 0:
        raise DataError("a probe needs images with labels from 0 on", name)
    classes = int(train[1].max()) + 1
    absent = sorted(set(test[1].tolist()) - set(train[1].tolist()))
    if absent:
        raise DataError("classes of the test images have no training image", name, absent[:5])
    features, labels = train[0].to(device), train[1].to(device)
    cost = cost or choose(features, labels, classes, tell=tell)
    found = fit(features, labels, classes, cost, tell=tell)
    scores = torch.cat([found.scores(part.to(device)).cpu() for part in test[0].split(TILE)])
    result = verdict(places(scores, test[1]), (1, 5), 1 / len(set(train[1].tolist())))
    return result | {"classes": classes, "cost": cost, "predictions": fingerprint(scores.argmax(dim=1))}
