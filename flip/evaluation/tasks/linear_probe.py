"""The linear probe: multinomial logistic regression on image features, by L-BFGS, on rank 0.

    minimise over W (classes, E) and b (classes,):  sum_i -log softmax(W x_i + b)[y_i] + |W|^2 / (2 * C)

This is the objective of scikit-learn's LogisticRegression; b is not penalised. Sums over fixed tiles in float64 do not
depend on memory or world size. A fit ends at a gradient of ``TOLERANCE``.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flip.evaluation.encoding.features import no_op
from flip.evaluation.metrics.measures import accuracy, check_finite, digest_of_predictions, rank_of_target
from flip.rng import key
from flip.runs.errors import DataError

log = logging.getLogger(__name__)

C_VALUES = (0.1, 1.0, 10.0, 100.0, 1e3, 1e4)
"""Values of C to choose from, weakest fit first."""
HELD_OUT = 10
"""One in this many training images is held out to choose C."""
TILE = 16384
TOLERANCE = 1e-6
"""Largest component of the gradient at which a fit has converged, relative to that at W = b = 0."""
ITERATIONS = 1000
"""Limit of a fit; the result of one that reaches it before TOLERANCE has a note."""


class Probe(NamedTuple):
    """``weight`` (classes, E) and ``bias`` (classes,), float64; ``converged``: whether the fit reached TOLERANCE."""

    weight: Tensor
    bias: Tensor
    converged: bool = False

    def scores(self, features: Tensor) -> Tensor:
        """(n, E) -> (n, classes)."""
        return features.to(self.weight) @ self.weight.T + self.bias


def fit(
    features: Tensor, labels: Tensor, classes: int, C: float, start: Probe | None = None,
    progress: Callable[[], None] = no_op,
) -> Probe:  # fmt: skip
    """The minimum, searched from ``start`` (default: zero). Features (N, E), labels (N,), on one device.

    Features share a large mean and vary in few directions. L-BFGS therefore works in coordinates V = W basis^-1, in
    which the curvature is about equal in all directions, with b at the mean feature: tens of iterations, not thousands.
    """
    mean = features.mean(dim=0, dtype=torch.float64)
    basis = _basis(features, mean, classes, C)
    parameters = [torch.zeros(classes, n, dtype=torch.float64, device=features.device) for n in (len(basis), 1)]
    gradients = [torch.zeros_like(value) for value in parameters]
    for value, gradient in zip(parameters, gradients, strict=True):
        value.grad = gradient

    def weights() -> Probe:
        weight = parameters[0] @ basis
        return Probe(weight, parameters[1][:, 0] - weight @ mean)

    def loss() -> float:
        """The objective; writes its gradient to ``gradients``."""
        weight, bias = (value.requires_grad_() for value in weights()[:2])
        penalty = weight.square().sum() / (2 * C * len(features))
        penalty.backward()
        total = float(penalty.detach())
        for first in range(0, len(features), TILE):
            rows = slice(first, first + TILE)
            scores = Probe(weight, bias).scores(features[rows])
            part = torch.nn.functional.cross_entropy(scores, labels[rows], reduction="sum") / len(features)
            part.backward()
            total += float(part.detach())
        assert weight.grad is not None and bias.grad is not None
        gradients[0].copy_((weight.grad - bias.grad[:, None] * mean) @ basis.T)
        gradients[1].copy_(bias.grad[:, None])
        progress()
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


def _basis(features: Tensor, mean: Tensor, classes: int, C: float) -> Tensor:
    """(E, E): the inverse square root of the objective's curvature in W, with equal probabilities for all classes."""
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=features.device)
    for part in features.split(TILE):
        centred = part.to(mean) - mean
        covariance += centred.T @ centred
    spread, directions = torch.linalg.eigh(covariance / len(features))
    curvature = spread.clamp(min=0) * (classes - 1) / classes**2 + 1 / (C * len(features))
    return (directions / curvature.sqrt()).T


def choose(
    features: Tensor, labels: Tensor, classes: int, values: Sequence[float] = C_VALUES,
    progress: Callable[[], None] = no_op,
) -> float:  # fmt: skip
    """The C with most correct answers on a tenth of the training images, drawn by the counter hash; ties: the smallest.

    With too few images to hold any out: the last but one.
    """
    held_out = torch.from_numpy(key(0, np.arange(len(labels)), 0) % HELD_OUT == 0)
    if not 0 < int(held_out.sum()) < len(labels):
        return values[-2]
    best = values[0]
    most = -1
    probe = None
    for C in values:
        probe = fit(features[~held_out], labels[~held_out], classes, C, probe, progress)
        if not probe.converged:
            log.warning("the fit with C = %g, one of the values to choose from, did not converge", C)
        correct = int((probe.scores(features[held_out]).argmax(dim=1) == labels[held_out]).sum())
        if correct > most:
            best = C
            most = correct
    return best


def probe(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], name: str, device: torch.device | str = "cpu",
    C: float = 0.0, progress: Callable[[], None] = no_op,
) -> dict[str, Any]:  # fmt: skip
    """Fit on ``train`` and score ``test``, each (features (n, E), labels (n,)); C 0: ``choose`` it.

    The result has a note if the fit did not converge or the chosen C is the smallest or largest of C_VALUES. Raises
    DataError if a class of the test images has no training image, Diverged if a feature is not finite.
    """
    for features, _ in (train, test):
        check_finite(features, name)
    if not len(train[1]) or not len(test[1]) or min(int(train[1].min()), int(test[1].min())) < 0:
        raise DataError("a probe needs images with labels from 0 on", name)
    classes = int(train[1].max()) + 1
    absent = sorted(set(test[1].tolist()) - set(train[1].tolist()))
    if absent:
        raise DataError("classes of the test images have no training image", name, absent[:5])
    features = train[0].to(device)
    labels = train[1].to(device)
    given = C
    C = C or choose(features, labels, classes, progress=progress)
    fitted = fit(features, labels, classes, C, progress=progress)
    scores = torch.cat([fitted.scores(part.to(device)).cpu() for part in test[0].split(TILE)])
    result = accuracy(rank_of_target(scores, test[1]), (1, 5), 1 / len(set(train[1].tolist())))
    summary: dict[str, Any] = {"classes": classes, "cost": C, "C": C, "converged": fitted.converged}
    if notes := list(_notes(fitted.converged, C, not given)):
        summary["note"] = "; ".join(notes)
        log.warning("%s: %s", name, summary["note"])
    return result | summary | {"predictions": digest_of_predictions(scores.argmax(dim=1))}


def _notes(converged: bool, C: float, chosen: bool) -> Iterator[str]:
    if not converged:
        yield f"the probe did not converge within {ITERATIONS:,} iterations: give a smaller C with --probe-c"
    side = {C_VALUES[0]: "smallest", C_VALUES[-1]: "largest"}.get(C)
    if chosen and side:
        yield f"C = {C:g} is the {side} that was tried, and one beyond it may be better: give it with --probe-c"
