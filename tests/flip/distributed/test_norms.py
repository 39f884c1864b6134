import math

import pytest
import torch

from flip.distributed import norms
from tests.flip.training.test_anomaly import Training


def norm(tensors):
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def test_norms_are_those_of_what_the_step_did(tmp_path):
    training = Training(tmp_path)
    for _ in range(3):
        before = [p.detach().clone() for p in training.pair.parameters()]
        training.go()
        after = [p.detach() for p in training.pair.parameters()]
        weights, change = norms.of_weights(training.optimizer, 1)
        assert float(weights) == pytest.approx(norm(after), rel=1e-6)
        moved = [new.double() - old.double() for new, old in zip(after, before, strict=True)]
        assert float(change) == pytest.approx(norm(moved), rel=1e-4)
        gradients = [p.grad for p in training.pair.parameters()]
        assert float(norms.of_gradients(training.pair)) == pytest.approx(norm(gradients), rel=1e-6)


def test_a_gradient_that_is_not_finite_shows(tmp_path):
    training = Training(tmp_path)
    training.go()
    training.pair.image.patch.weight.grad[0, 0] = float("nan")
    assert not torch.isfinite(norms.of_gradients(training.pair))
