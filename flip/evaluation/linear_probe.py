"""The linear probe: multinomial logistic regression on image features, by L-BFGS, on rank 0.

    minimise over W (C, E) and b (C,):  sum_i -log softmax(W x_i + b)[y_i] + |W|^2 / (2 * cost)

as scikit-learn's LogisticRegression writes it (its ``C`` is ``cost``; b is not penalised). Sums are over fixed tiles in
float64, so neither memory nor the world size moves them. A fit ends at a gradient of ``TOLERANCE``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flip.evaluation.features import nothing
from flip.evaluation.metrics import fingerprint, finite, places, verdict
from flip.rng import key
from flip.runs.errors import DataError

log = logging.getLogger(__name__)

COSTS = (0.1, 1.0, 10.0, 100.0, 1e3, 1e4)
"""What ``cost`` is chosen from, weakest fit first."""
HELD_OUT = 10
"""One of so many training images chooses the cost."""
TILE = 16384
TOLERANCE = 1e-6
"""Largest component of the gradient at which a fit has converged, relative to that at W = b = 0."""
ITERATIONS = 1000
"""Limit of a fit; one that reaches it before TOLERANCE has not converged, and its result says so."""


class Probe(NamedTuple):
    """``weight`` (C, E) and ``bias`` (C,), float64; ``converged``: whether the fit reached TOLERANCE."""

    weight: Tensor
    bias: Tensor
    converged: bool = False

    def scores(self, features: Tensor) -> Tensor:
        """(n, E) -> (n, C)."""
        return features.to(self.weight) @ self.weight.T + self.bias


def fit(
    features: Tensor, labels: Tensor, classes: int, cost: float, start: Probe | None = None,
    tell: Callable[[], None] = nothing,
) -> Probe:  # fmt: skip
    """The minimum, from ``start`` (default: zero). Features (N, E), labels (N,), on one device.

    L-BFGS works in coordinates V = W basis^-1 in which the objective is about equally curved in all directions, and
    with b taken at the mean feature: neither moves the minimum, and features of encoders, which share a large mean and
    vary in few directions, need tens of iterations where they needed thousands.
    """
    mean = features.mean(dim=0, dtype=torch.float64)
    basis = _basis(features, mean, classes, cost)
    parameters = [torch.zeros(classes, n, dtype=torch.float64, device=features.device) for n in (len(basis), 1)]
    gradients = [torch.zeros_like(value) for value in parameters]
    for value, gradient in zip(parameters, gradients, strict=True):
        value.grad = gradient

    def weights() -> Probe:
        weight = parameters[0] @ basis
        return Probe(weight, parameters[1][:, 0] - weight @ mean)

    def loss() -> float:
        """The objective; leaves its gradient in ``gradients``."""
        weight, bias = (value.requires_grad_() for value in weights()[:2])
        whole = weight.square().sum() / (2 * cost * len(features))
        whole.backward()
        total = float(whole.detach())
        for at in range(0, len(features), TILE):
            scores = Probe(weight, bias).scores(features[at : at + TILE])
            part = torch.nn.functional.cross_entropy(scores, labels[at : at + TILE], reduction="sum") / len(features)
            part.backward()
            total += float(part.detach())
        assert weight.grad is not None and bias.grad is not None
        gradients[0].copy_((weight.grad - bias.grad[:, None] * mean) @ basis.T)
        gradients[1].copy_(bias.grad[:, None])
        tell()
        return total

    def steepness() -> float:
        loss()
        return max(float(gradient.abs().max()) for gradient in gradients)

    tolerance = TOLERANCE * steepness()
    if start is not None:
        parameters[0].copy_(torch.linalg.solve(basis.T, start.weight.T).T)
        parameters[1].copy_((start.bias + start.weight @ mean)[:, None])
    solver = torch.optim.LBFGS(
        parameters, max_iter=ITERATIONS, tolerance_grad=tolerance, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    solver.step(loss)
    return weights()._replace(converged=steepness() <= tolerance)


def _basis(features: Tensor, mean: Tensor, classes: int, cost: float) -> Tensor:
    """(E, E): the inverse square root of the objective's curvature in W, with equal probabilities for all classes."""
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=features.device)
    for part in features.split(TILE):
        centred = part.to(mean) - mean
        covariance += centred.T @ centred
    spread, directions = torch.linalg.eigh(covariance / len(features))
    curvature = spread.clamp(min=0) * (classes - 1) / classes**2 + 1 / (cost * len(features))
    return (directions / curvature.sqrt()).T


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
        if not probe.converged:
            log.warning("the fit at C = %g, one of those to choose from, did not converge", cost)
        found = int((probe.scores(features[held]).argmax(dim=1) == labels[held]).sum())
        best, right = (cost, found) if found > right else (best, right)
    return best


def probe(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], name: str, device: torch.device | str = "cpu",
    cost: float = 0.0, tell: Callable[[], None] = nothing,
) -> dict[str, Any]:  # fmt: skip
    """Fit on ``train`` and score ``test``, each (features (n, E), labels (n,)).

    Returns a verdict with classes, predictions, cost and C (equal), converged, and a note if the fit did not converge
    or the chosen C is the smallest or largest of COSTS. ``cost`` 0: ``choose``. Raises
    DataError where the test images have a class that no training image has, Diverged where a feature is not finite.
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
    given, cost = cost, cost or choose(features, labels, classes, tell=tell)
    found = fit(features, labels, classes, cost, tell=tell)
    scores = torch.cat([found.scores(part.to(device)).cpu() for part in test[0].split(TILE)])
    result = verdict(places(scores, test[1]), (1, 5), 1 / len(set(train[1].tolist())))
    about: dict[str, Any] = {"classes": classes, "cost": cost, "C": cost, "converged": found.converged}
    if notes := list(_doubts(found.converged, cost, not given)):
        about["note"] = "; ".join(notes)
        log.warning("%s: %s", name, about["note"])
    return result | about | {"predictions": fingerprint(scores.argmax(dim=1))}


def _doubts(converged: bool, cost: float, chosen: bool) -> Iterator[str]:
    if not converged:
        yield f"the probe did not converge within {ITERATIONS:,} iterations: give a smaller C with --probe-c"
    if chosen and cost in (COSTS[0], COSTS[-1]):
        side = "smallest" if cost == COSTS[0] else "largest"
        yield f"C = {cost:g} is the {side} that was tried, and one beyond it may be better: give it with --probe-c"
