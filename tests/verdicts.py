"""What must hold after faults, whatever they were: the bits, the data, the attempts."""

import torch

from flip.config.derived import stage_spans
from flip.runs.rundir import read_json
from tests.harness.common import metric_lines
from tests.harness.training_run import BATCH, INTERVAL


def check_equal(calm, storm, scores=6):
    """Weights and moments bit for bit, losses, each step once in what readers see, and so many scores: by default
    three times validation, once more at the end, and the test set."""
    for arena in (calm, storm):
        assert arena.run.result.exists(), arena.story()
        assert arena.leftovers() == ([], [])
    samples, ours = storm.weights()
    expected_samples, theirs = calm.weights()
    assert samples == expected_samples == stage_spans(calm.config)[-1].end
    assert ours.keys() == theirs.keys() and len(ours) > 50
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    reports = [
        [(line["step"], line["samples"], line["loss"]) for line in metric_lines(arena.run)] for arena in (calm, storm)
    ]
    assert reports[0] == reports[1]
    assert [step for step, _, _ in reports[0]] == list(range(1, len(reports[0]) + 1))
    found = [
        {
            (e["stage"], e["samples"], e["name"]): e["correct5"]
            for p in arena.run.eval.glob("*.json")
            for e in told_by(p)
        }
        for arena in (calm, storm)
    ]
    assert found[0] == found[1] and len(found[0]) == scores
    for score in [e for arena in (calm, storm) for p in arena.run.eval.glob("*.json") for e in told_by(p)]:
        assert score["commit"]["samples"] == score["samples"] and len(score["commit"]["digest"]) == 64


def told_by(path):
    return read_json(path)["evaluations"]


def check_data(arena, hashes):
    """The ids of every global batch are the ordered ones, and the pictures that were decoded are those of the ids."""
    order = arena.order()
    seen = set()
    for n, batches in arena.witnessed().items():
        for samples, (ids, pictures) in batches.items():
            assert ids == order.batch(samples, BATCH)[0].tolist(), (n, samples)
            assert pictures == [hashes[i] for i in ids]
            seen.add(samples)
    assert seen == set(range(0, stage_spans(arena.config)[-1].end, BATCH))


def ends(arena, upto):
    return [read_json(arena.run.attempt(n) / "end.json") for n in range(1, upto + 1)]


def price(arena):
    """Steps that a fault may cost: an interval, and one more where the newest save may still be on its way."""
    return INTERVAL * (1 + (arena.config.checkpoint.background == "yes"))


def check_attempts(arena):
    """Every attempt went on from the newest commit. A clean stop cost nothing, no fault more than its price."""
    trained, done = arena.witnessed(), 0
    for n in arena.run.attempt_numbers():
        begun = min(trained.get(n, ()), default=None)
        if begun is None:
            continue
        if n > 1:
            before = ends(arena, n - 1)[-1]
            assert begun == before["commits"], (n, arena.story())
            bound = 0 if before["code"] == 75 else price(arena) * BATCH
            assert done - begun <= bound, (n, done, begun, arena.story())
        done = max(trained[n]) + BATCH
    steps = sum(span.steps for span in stage_spans(arena.config))
    assert sum(len(batches) for batches in trained.values()) <= steps + arena.faults * price(arena)
    assert ends(arena, arena.run.newest_attempt())[-1]["action"] == "done"
