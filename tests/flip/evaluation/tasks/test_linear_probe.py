"""Tests the linear probe against scikit-learn's logistic regression on the same features."""

from functools import partial

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import normalize

from flip.config.schema import EvaluationSet
from flip.evaluation.datasets.catalog import ResolvedDataset
from flip.evaluation.encoding.features import FeatureCache
from flip.evaluation.evaluator import Evaluator
from flip.evaluation.tasks import linear_probe as probing
from flip.evaluation.tasks.linear_probe import choose, fit, probe
from flip.runs.errors import DataError
from tests.synthetic import make_dataset


def clouds(count, classes=6, width=16, seed=0, noise=0.5):
    """Features of norm 1 around one centre per class, with overlap, and their labels."""
    centres = normalize(torch.randn(classes, width, generator=torch.Generator().manual_seed(99)), dim=1)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    drawn = centres[labels] + noise * torch.randn(count, width, generator=generator)
    return normalize(drawn, dim=1), labels


@pytest.mark.parametrize("cost", [0.1, 3.0, 300.0])
def test_probe_matches_scikit_learn_logistic_regression(cost, monkeypatch):
    monkeypatch.setattr(probing, "TILE", 150)  # a fit spans several tiles
    train = clouds(400)
    test = clouds(500, seed=1)
    reference = LogisticRegression(C=cost, solver="lbfgs", tol=1e-9, max_iter=5000)
    reference.fit(train[0].double().numpy(), train[1].numpy())
    fitted = fit(*train, 6, cost)
    shift = reference.intercept_.mean()  # softmax ignores an offset common to all classes
    assert np.allclose(fitted.weight.numpy(), reference.coef_, atol=2e-4 * np.abs(reference.coef_).max())
    assert np.allclose(fitted.bias.numpy() - fitted.bias.numpy().mean(), reference.intercept_ - shift, atol=2e-3)
    predicted = fitted.scores(test[0]).argmax(dim=1).numpy()
    assert np.array_equal(predicted, reference.predict(test[0].double().numpy()))
    result = probe(train, test, "synthetic", C=cost)
    assert result["correct1"] == int((predicted == test[1].numpy()).sum())
    assert result["top1"] == pytest.approx(reference.score(test[0].double().numpy(), test[1].numpy()))
    assert (result["n"], result["classes"], result["cost"]) == (500, 6, cost) and 0.5 < result["top1"] < 1


def narrow(count, seed, classes=6, width=32):
    """Features with norm 1, a large common mean and little spread in most directions, as encoders give, and labels."""
    common = torch.Generator().manual_seed(99)
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(width, generator=common)
    scales = torch.logspace(0, -4, width)
    centres = 0.02 * scales * torch.randn(classes, width, generator=common)
    labels = torch.randint(classes, (count,), generator=generator)
    return normalize(
        mean + centres[labels] + 0.1 * scales * torch.randn(count, width, generator=generator), dim=1
    ), labels


@pytest.mark.parametrize("cost", [1.0, 1e4])
def test_fit_converges_on_features_with_little_spread(cost):
    train = narrow(1000, seed=0)
    test = narrow(600, seed=1)
    reference = LogisticRegression(C=cost, solver="newton-cg", tol=1e-9, max_iter=1000)
    reference.fit(train[0].double().numpy(), train[1].numpy())
    fitted = fit(*train, 6, cost)
    assert fitted.converged
    assert np.allclose(fitted.weight.numpy(), reference.coef_, atol=1e-4 * np.abs(reference.coef_).max())
    predicted = fitted.scores(test[0]).argmax(dim=1).numpy()
    assert np.array_equal(predicted, reference.predict(test[0].double().numpy()))
    warm = fit(*train, 6, cost, start=fit(*train, 6, 10.0))
    assert warm.converged and torch.allclose(warm.weight, fitted.weight, atol=1e-4 * float(fitted.weight.abs().max()))
    result = probe(train, test, "narrow", C=cost)
    assert (result["converged"], result["C"], "note" in result) == (True, cost, False)


def test_probe_notes_missing_convergence_and_cost_at_edge_of_range(monkeypatch, caplog):
    train = clouds(400)
    test = clouds(300, seed=1)
    monkeypatch.setattr(probing, "ITERATIONS", 2)
    result = probe(train, test, "synthetic", C=100.0)
    assert not result["converged"] and "synthetic: the probe did not converge within 2 iterations" in caplog.text
    assert "smaller C with --probe-c" in result["note"]
    monkeypatch.undo()
    for costs, side in (((1e-4, 1e-3, 1e-2), "C = 0.01 is the largest"), ((1e3, 1e4, 1e5), "C = 1000 is the smallest")):
        monkeypatch.setattr(probing, "C_VALUES", costs)
        monkeypatch.setattr(probing, "choose", partial(choose, values=costs))
        result = probe(train, test, "synthetic")
        assert result["converged"] and result["note"].startswith(side) and result["note"] in caplog.text
        assert result["C"] == result["cost"] == costs[-1 if side.endswith("largest") else 0]
    assert "note" not in probe(train, test, "synthetic", C=costs[0]), "the probe adds no note if the caller sets C"


def test_choose_selects_cost_on_held_out_samples():
    features, labels = clouds(600, noise=1.5)
    chosen = choose(features, labels, 6)
    assert chosen < max(probing.C_VALUES)  # with such noise, the largest C overfits
    assert probe((features, labels), clouds(300, seed=1, noise=1.5), "x")["cost"] == chosen
    assert choose(features[:2], labels[:2], 6) == probing.C_VALUES[-2]


def test_probe_rejects_missing_training_classes_and_negative_labels():
    train = clouds(50, classes=3)
    features, labels = clouds(50)
    with pytest.raises(DataError, match=r"no training image.*\[3, 4, 5\]"):
        probe(train, (features, labels), "x")
    with pytest.raises(DataError, match="labels from 0 on"):
        probe((features, labels - 1), (features, labels), "x")


def test_probe_of_shards_reuses_and_repairs_cached_features(encoder, data, tmp_path, monkeypatch):
    other = make_dataset(tmp_path / "train", samples=80, shards=2, classes=7, seed=5)
    item = ResolvedDataset.from_config(EvaluationSet("squares", str(data), task="probe", train=str(other)))
    cache = FeatureCache(tmp_path / "cache", "model")
    (first,) = Evaluator(encoder, 16, cache=cache, C=1.0).score(item)
    assert (first["name"], first["n"], first["train"]["n"]) == ("squares-probe", 50, 80)
    assert first["train"]["data"] != first["data"]
    assert len(list(cache.folder.iterdir())) == 2
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "image", None)  # features come from the cache
        (again,) = Evaluator(encoder, 16, cache=cache, C=1.0).score(item)
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    for path in cache.folder.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    (repaired,) = Evaluator(encoder, 16, cache=cache, C=1.0).score(item)
    assert {**repaired, "seconds": 0} == {**first, "seconds": 0}
    another = FeatureCache(tmp_path / "cache", "another")
    Evaluator(encoder, 16, cache=another, C=1.0).score(item)
    assert len(list(another.folder.iterdir())) == 2


def test_probe_on_its_own_training_images_has_a_note(encoder, data):
    item = ResolvedDataset.from_config(EvaluationSet("squares", str(data), task="probe", train=str(data)))
    (score,) = Evaluator(encoder, 16, C=1.0).score(item)
    assert "fitted on the images that it scores" in score["note"]
