"""Scores among the lines of an evaluation, and a program that is scored after its end."""

import json

import pytest

from flip.runs.errors import DataError
from jobs.runtime.program_evaluation import ScoreLines
from tests.harness.command_sweep import CommandSweep


def scores(pattern, *lines):
    source = ScoreLines(pattern)
    for line in lines:
        source.on_line(line)
    return [(score["name"], score["top1"]) for score in source.scores()]


def test_scores_are_lines_of_json_or_match_the_pattern():
    assert scores("", "{no json", '{"name": "a", "score": 0.25}', '{"loss": 3}', '{"name": "a", "score": 0.5}') == [
        ("a", 0.5)
    ]
    pattern = r"(?P<name>\w+)-top1: (?P<score>[\d.]+)"
    assert scores(pattern, "Eval imagenet-top1: 0.1250", '{"name": "a", "score": 1}') == [("imagenet", 0.125)]


def test_no_score_and_one_that_is_no_share_are_errors():
    with pytest.raises(DataError, match="has printed no score"):
        scores("", "accuracy 0.5")
    for bad in ("12.5", "NaN", '"high"'):
        with pytest.raises(DataError, match="a share, from 0 to 1"):
            scores("", f'{{"name": "a", "score": {bad}}}')


@pytest.mark.long
def test_failed_evaluation_starts_again_without_the_program(tmp_path):
    """The program counts once; its evaluation fails once, and its score is in the report."""
    sweep = CommandSweep(tmp_path)
    sweep.add("score.py")
    sweep.table["command"] = ["python3", "count.py", "--lr", "{lr}", "--steps", "20", "--seconds", "0.01"]
    sweep.table["metrics"]["total"] = 20
    sweep.table["evaluate"] = {"command": ["python3", "score.py", "{checkpoint}"]}
    sweep.submit()
    sweep.until_over()
    assert [cause for cause, _ in sweep.ends()] == ["crash", "complete"]
    assert "evaluate: it ended with 1: RuntimeError: no luck at first" in sweep.reason(1)
    assert not (sweep.run().attempt(2) / "resume.json").exists(), "the program does not start again"
    (row,) = json.loads(sweep.type("report", "demo", "--json"))
    assert (row["state"], row["samples"]) == ("complete", 20)
    assert "50.0" in sweep.type("report", "demo"), "its score"
