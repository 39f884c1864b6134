"""Checks of the bits, the data and the attempts of a run after faults of any kind."""

import torch

from flip.config.derived import stage_spans
from flip.runs.rundir import read_json
from tests.harness.common import metric_lines
from tests.harness.training_run import BATCH, INTERVAL, seen_hashes


def check_equal(calm, storm, scores=6):
    """Check that weights, moments and losses are equal bit for bit, that readers see each step once, and that there are
    ``scores`` scores: by default three of the validation set, one more at the end, and one of the test set."""
    for arena in (calm, storm):
        assert arena.run.result.exists(), arena.story()
        assert arena.leftovers() == ([], [])
    samples, actual = storm.weights()
    expected_samples, expected = calm.weights()
    assert samples == expected_samples == stage_spans(calm.config)[-1].end
    assert actual.keys() == expected.keys() and len(actual) > 50
    assert [name for name in actual if not torch.equal(actual[name], expected[name])] == []
    reports = [
        [(line["step"], line["samples"], line["loss"]) for line in metric_lines(arena.run)] for arena in (calm, storm)
    ]
    assert reports[0] == reports[1]
    assert [step for step, _, _ in reports[0]] == list(range(1, len(reports[0]) + 1))
    evaluations = [
        {
            (e["stage"], e["samples"], e["name"]): e["correct5"]
            for p in arena.run.eval.glob("*.json")
            for e in evaluations_of(p)
        }
        for arena in (calm, storm)
    ]
    assert evaluations[0] == evaluations[1] and len(evaluations[0]) == scores
    for score in [e for arena in (calm, storm) for p in arena.run.eval.glob("*.json") for e in evaluations_of(p)]:
        assert score["commit"]["samples"] == score["samples"] and len(score["commit"]["digest"]) == 64


def evaluations_of(path):
    return read_json(path)["evaluations"]


def check_data(arena, images):
    """Check that the ids of every global batch follow the sample order, and that the model saw of each the patches that
    its image has. ``images``: pixels per id."""
    spans = stage_spans(arena.config)
    expected = {
        samples: seen_hashes(arena.config, span, samples, images)
        for span in spans
        for samples in range(span.start, span.end, BATCH)
    }
    seen = set()
    for n, batches in arena.witnessed().items():
        for samples, trained in batches.items():
            assert trained == expected[samples], (n, samples)
            seen.add(samples)
    assert seen == expected.keys()


def check_ids(arena):
    """Check the samples of each batch as ``check_data`` does, for attempts with different numbers of ranks."""
    order = arena.order()
    seen = set()
    for n in arena.run.attempt_numbers():
        rows = witness(arena, n)
        for samples, ids in rows.items():
            assert ids == order.batch(samples, BATCH)[0].tolist(), (n, samples)
            seen.add(samples)
    assert seen == set(range(0, stage_spans(arena.config)[-1].end, BATCH))


def witness(arena, n):
    """Return samples -> ids of the global batch in attempt n, for steps that all its ranks finished."""
    arena.world = len(list((arena.run.path / "witness").glob(f"{n}.*.jsonl")))
    if arena.world:
        return {samples: ids for samples, (ids, _) in arena.witnessed_of(n).items()}
    return {}


def ends(arena, upto):
    return [read_json(arena.run.attempt(n) / "end.json") for n in range(1, upto + 1)]


def price(arena):
    """Return the steps that a fault may cost: an interval, and a second if the newest save may be incomplete."""
    return INTERVAL * (1 + (arena.config.checkpoint.background == "yes"))


def check_attempts(arena):
    """Check that attempts resume from the newest checkpoint, a clean stop costs no step, and a fault at most its
    price."""
    trained = arena.witnessed()
    done = 0
    for n in arena.run.attempt_numbers():
        start = min(trained.get(n, ()), default=None)
        if start is None:
            continue
        if n > 1:
            before = ends(arena, n - 1)[-1]
            assert start == before["commits"], (n, arena.story())
            bound = 0 if before["code"] == 75 else price(arena) * BATCH
            assert done - start <= bound, (n, done, start, arena.story())
        done = max(trained[n]) + BATCH
    steps = sum(span.steps for span in stage_spans(arena.config))
    assert sum(len(batches) for batches in trained.values()) <= steps + arena.faults * price(arena)
    assert ends(arena, arena.run.newest_attempt())[-1]["action"] == "done"
