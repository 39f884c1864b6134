"""Tests of the study: equal cost, fair trials, paired differences and intervals, and the page of synthetic results."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from flip.config.yaml_io import dump_yaml
from flip.monitoring.results import Outcome
from flip.runs.errors import ConfigError
from flip.runs.rundir import RunDir, write_json
from jobs.reporting import paired
from jobs.reporting.document import Table
from jobs.sweeps.sweep_file import load
from tests.harness.common import wait_until
from tools.studies import arm_scores, design, masking_page, runner
from tools.studies.definitions import CHEAPEST, MASKING
from tools.studies.design import SEEDS
from tools.studies.runner import Study

ROOT = Path(__file__).resolve().parents[3]
TIMES = {
    "mask 0, batch 128": 1.5e-3,
    "mask 0.5, batch 128": 1e-3,
    "mask 0.75, batch 128": 0.7e-3,
    "mask 0.75, batch 64": 0.8e-3,
    "mask 0.75, batch 256": 0.65e-3,
}
ARMS = list(MASKING.arms.values())
ROUNDS = MASKING.rounds
TIMES_OF_ALL = TIMES | {"mask 0, batch 128, 24 px, 8 tokens": 0.6e-3}
CALIBRATION = {
    "machine": {"processor": "Abacus", "cores": 2, "load": 0.1},
    "time": "2026-01-01 00:00",
    "work": {work: {"seconds": seconds} for work, seconds in TIMES.items()},
}


def outcome(folder: Path, name: str, samples: int = 1280, **top1: float) -> Outcome:
    """Return a complete run."""
    evaluations = [{"name": key, "top1": value, "role": "test"} for key, value in top1.items()]
    result = {"samples": samples, "seconds": 3.0, "steps": 10, "evaluations": evaluations}
    return Outcome(RunDir(folder / name), "complete", result=result)


def study_with(folder: Path, rounds: int = 3, gains: dict[str, float] | None = None) -> Study:
    """Return a study with ``rounds`` rounds.

    twemoji scores 0.2 + the arm's gain + 0.01 per seed. The middle trial is the best.
    """
    study = Study(MASKING)
    for study_round in ROUNDS[:rounds]:
        for arm in study_round.arms:
            for i, peak in enumerate(arm.peaks):
                study.trials[arm.trial(peak)] = outcome(folder, arm.trial(peak), validation=0.1 + 0.1 * (i == 1))
        study.choose(study_round)
        for arm in study_round.arms:
            for seed in SEEDS:
                top1 = 0.2 + (gains or {}).get(arm.name, 0.0) + 0.01 * seed
                scores = {"validation": top1, "twemoji": top1, "openmoji": 0.02}
                study.runs[arm.run(seed)] = outcome(folder, arm.run(seed), **scores)
    return study


# -- the design --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", [*ARMS, CHEAPEST.arms["clipa"]], ids=lambda arm: arm.name)
def test_arms_have_equal_cost_up_to_part_of_batch(one: design.Arm) -> None:
    parts = design.stages(one, one.peaks[0], TIMES_OF_ALL)
    assert abs(design.cost(one, TIMES_OF_ALL, parts) - one.seconds) <= len(parts) * one.batch * 1.5e-3 / 2
    assert [part["base_lr"] * one.batch / 256 for part in parts.values()] == pytest.approx(
        [one.peaks[0], one.peaks[0] * design.FULL_RATE][: len(parts)]
    )
    for part in parts.values():
        assert part["samples"] % one.batch == 0 and 0 < part["warmup"] < part["samples"] / 10


def test_small_image_stage_comes_first_with_planned_share_of_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm = CHEAPEST.arms["clipa"]
    parts = design.stages(arm, 1e-3, TIMES_OF_ALL)
    assert list(parts) == ["pretrain", "full"] and "image" not in parts["full"]
    small = design.cost(arm, TIMES_OF_ALL, parts, parts["pretrain"]["samples"])
    assert small == pytest.approx(0.8 * arm.seconds, rel=0.01)
    path = tmp_path / "cheapest.yaml"
    path.write_text(dump_yaml(CHEAPEST.runs(CHEAPEST.rounds[0], TIMES_OF_ALL, dict.fromkeys(CHEAPEST.arms, 1e-3))))
    monkeypatch.setenv("FLIP_CACHE", str(tmp_path / "cache"))
    run = next(run for run in load(path, [], None, None).runs if run.name == "clipa")
    sizes = [(stage.image.size, stage.text.length) for stage in run.config.stages]
    assert sizes == [(24, 8), (None, None)] and run.config.model.image.size == 48
    assert len(CHEAPEST.calibration()["runs"]) == 4


@pytest.mark.parametrize("plan", [MASKING, CHEAPEST], ids=lambda plan: plan.name)
def test_design_has_equal_trials_per_arm_and_three_seeds(plan: design.StudyDesign) -> None:
    assert len(SEEDS) >= 3 and design.TRIAL_SEED not in SEEDS
    for study_round in plan.rounds:
        assert len({arm.peaks for arm in study_round.arms}) == 1, "all arms have the same learning rates"
    assert {name for _, *both in plan.compared for name in both} <= plan.arms.keys()
    assert plan.core_seconds() / 120 < 90, "minutes on two cores; start-up and evaluation come on top"


def test_sweeps_load_and_trials_see_only_validation_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials use only the validation vendor. Runs of the tuning round start from runs of equal seed."""
    monkeypatch.setenv("FLIP_CACHE", str(tmp_path / "cache"))
    chosen = {arm.name: arm.peaks[1] for arm in ARMS}
    for study_round in ROUNDS:
        for sweep, seeds in (
            (MASKING.trials(study_round, TIMES, chosen), {9}),
            (MASKING.runs(study_round, TIMES, chosen), set(SEEDS)),
        ):
            path = tmp_path / f"{sweep['name']}.yaml"
            path.write_text(dump_yaml(sweep), encoding="utf-8")
            runs = load(path, [], None, None).runs
            assert {run.config.seed for run in runs} == seeds
            roles = {item.role for run in runs for item in run.config.evaluate.sets}
            assert roles == ({"validation"} if seeds == {9} else {"validation", "test"})
            assert len(runs) == len(study_round.arms) * (3 if seeds == {9} else len(SEEDS))
            assert all(bool(run.config.init.run) == (study_round.name == "tuning") for run in runs)
    branch = MASKING.runs(ROUNDS[1], TIMES, chosen)["runs"]["mask75-masked-s2"]
    assert branch["init"] == {"run": "study_arms/mask75-s2", "stage": "pretrain"} and branch["seed"] == 2


# -- the calibration ---------------------------------------------------------------------------------------------------


def timed(folder: Path, name: str, sample_seconds: list[float]) -> Outcome:
    """Return a calibration run with a metric line per 128 samples, of ``sample_seconds`` seconds per sample."""
    run = RunDir(folder / name)
    seconds = 9.0
    lines = []
    for i, value in enumerate([0.0, *sample_seconds], 1):
        seconds += 128 * value
        lines.append({"step": i, "samples": 128 * i, "cpu_seconds": seconds})
    run.metrics.mkdir(parents=True)
    (run.metrics / "1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return Outcome(run, "complete")


def test_calibration_is_median_of_intervals_after_warmup(tmp_path: Path) -> None:
    """The first steps are slow and do not count. noisy returns both runs of the work with uneven times."""
    runs = [
        timed(tmp_path, "m0-b128", [0.9, 0.9] + 5 * [0.002]),
        timed(tmp_path, "m0-b128-s1", [0.9, 0.9] + 5 * [0.004]),
    ]
    runs += [timed(tmp_path, name, [0.9, 0.9] + 5 * [0.001]) for name in ("m0.5-b128", "m0.5-b128-s1")]
    measured = runner.measured(MASKING, runs)
    assert measured["mask 0, batch 128"] == {"seconds": 0.003, "quartiles": [0.002, 0.004], "intervals": 10}
    assert [noisy_run.run.name for noisy_run in runner.noisy(MASKING, runs)] == ["m0-b128", "m0-b128-s1"]


def test_read_calibration_rejects_missing_or_incomplete_file(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    with pytest.raises(ConfigError, match="there is no calibration"):
        runner.read_calibration(MASKING, path)
    write_json(path, CALIBRATION | {"work": {}})
    with pytest.raises(ConfigError, match="lacks a kind of work"):
        runner.read_calibration(MASKING, path)
    write_json(path, CALIBRATION)
    assert runner.seconds_per_sample(runner.read_calibration(MASKING, path)) == TIMES


# -- choice and pairs --------------------------------------------------------------------------------------------------


def test_choose_prefers_best_validation_score_then_smallest_rate(tmp_path: Path) -> None:
    arm = ROUNDS[0].arms[0]
    trials = {
        arm.trial(peak): outcome(tmp_path, arm.trial(peak), validation=v, twemoji=t)
        for peak, v, t in zip(arm.peaks, (0.2, 0.3, 0.3), (0.9, 0.1, 0.2), strict=True)
    }
    assert arm_scores.choose(arm, trials) == (arm.peaks[1], dict(zip(arm.peaks, (0.2, 0.3, 0.3), strict=True)))
    del trials[arm.trial(arm.peaks[0])]
    with pytest.raises(ConfigError, match="no score yet"):
        arm_scores.choose(arm, trials)


def test_recorded_choices_override_new_trials(tmp_path: Path) -> None:
    """If two trials are almost equal, another processor could choose differently; the record prevents that."""
    choices = {arm.name: arm.peaks[0] for arm in ARMS}
    path = tmp_path / "choices.json"
    assert arm_scores.recorded(MASKING, path) == {}
    write_json(path, choices)
    study = Study(MASKING, arm_scores.recorded(MASKING, path))
    trials = study_with(tmp_path).trials
    study.trials |= trials
    for study_round in ROUNDS:
        study.choose(study_round)
    assert study.chosen == choices
    (table,) = (block for block in masking_page._trials(study) if isinstance(block, Table))
    assert all(f"(these trials: {arm.peaks[1]:g})" in str(table.rows[i]["chosen"]) for i, arm in enumerate(ARMS))
    for wrong in ({"clip": 0.1}, choices | {"clip": 0.1}, [1]):
        write_json(path, wrong)
        with pytest.raises(ConfigError, match="the chosen learning rates cannot be read"):
            arm_scores.recorded(MASKING, path)
    recorded = arm_scores.recorded(MASKING, Path(__file__).resolve().parents[3] / "docs" / "study" / "choices.json")
    assert recorded.keys() == choices.keys()


def test_difference_compares_runs_of_equal_seeds() -> None:
    """Differences of 1, 2, 3 points: mean 2, s = 1, t(2) = 4.303, half-width 4.303 / sqrt(3) = 2.484."""
    difference = paired.difference({0: 0.11, 1: 0.22, 2: 0.33, 7: 0.9}, {2: 0.30, 0: 0.10, 1: 0.20})
    assert difference is not None and list(difference.each) == [0, 1, 2]
    assert (difference.mean, difference.low, difference.high) == pytest.approx((2.0, 2 - 2.4843, 2 + 2.4843), abs=1e-3)
    assert difference.verdict == "undecided"
    assert paired.difference({0: 0.1, 1: 0.2}, {0: 0.1, 1: 0.2}) is None
    scores = {seed: 0.2 + 0.001 * seed for seed in range(3)}
    less = paired.difference(dict.fromkeys(range(3), 0.1), scores)
    equal = paired.difference(scores, scores)
    assert less is not None and less.verdict == "less"
    assert equal is not None and equal.verdict == "undecided"


@pytest.mark.parametrize("recorded", [True, False])
def test_study_trains_compared_runs_first_if_learning_rates_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: bool
) -> None:
    """Compared runs come first, so that a study that stops early has its table. A new study needs trials first."""
    trained: dict[str, dict[str, Outcome]] = {}

    def submit(sweep: dict[str, Any], profile: str) -> None:
        if profile == "stopped" and len(trained) == 4:
            raise runner.Unfinished(75)
        trained[sweep["name"]] = {name: outcome(tmp_path, name, validation=0.1, twemoji=0.2) for name in sweep["runs"]}

    monkeypatch.setattr(runner, "submit", submit)
    monkeypatch.setattr(runner, "outcomes", lambda sweep: trained.get(sweep, {}))
    chosen = {}
    if recorded:
        chosen = {arm.name: arm.peaks[1] for arm in ARMS}
    with pytest.raises(runner.Unfinished):
        runner.study(MASKING, TIMES, "stopped", chosen)
    names = ["arms", "tuning", "batch"]
    first = [f"study_{name}" for name in names] + ["study_arms_trials"]
    assert list(trained) == (first if recorded else ["study_arms_trials", "study_arms", *_both("tuning")])
    collected = runner.collect(MASKING, chosen)
    complete = {arm.run(seed) for arm in ARMS for seed in SEEDS if recorded or arm.after or arm in ROUNDS[0].arms}
    assert collected.runs.keys() == complete and len(collected.trials) == (9 if recorded else 21)
    runner.study(MASKING, TIMES, "on", chosen)
    assert set(trained) == {name for round_name in names for name in _both(round_name)}
    assert len(runner.collect(MASKING, chosen).trials) == 3 * len(ARMS)


SUBMISSION = """
import pathlib, sys, time
try:
    pathlib.Path(sys.argv[2]).with_suffix(".started").touch()
    time.sleep(600)
except KeyboardInterrupt:
    pathlib.Path(sys.argv[2]).with_suffix(".stopped").touch()
    sys.exit(75)
"""
STUDY = """
import pathlib, signal, sys
from tools.studies import runner
signal.signal(signal.SIGINT, signal.SIG_IGN)
runner.ROOT, runner.POLL = pathlib.Path(sys.argv[1]), 1.0
limit, what = 1.0 if sys.argv[2] == "limit" else 600.0, {"name": "demo", "title": "A demonstration"}
started = runner.ROOT / "study" / "demo.started"
try:
    runner.submit(what, "pair", limit, lambda: sys.argv[2] == "over" and started.exists())
except runner.Unfinished as error:
    sys.exit(int(error.args[0]))
"""


@pytest.mark.parametrize("why, code", [("limit", 0), ("over", 0), ("sigterm", 75)])
def test_submit_stops_runs_after_limit_once_over_and_on_sigterm(
    tmp_path: Path, why: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study in the background of a shell ignores SIGINT. Its submission has to stop its runs nevertheless."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "submit.py").write_text(SUBMISSION)
    monkeypatch.setenv("FLIP_RUNS", str(tmp_path))
    study = subprocess.Popen([sys.executable, "-c", STUDY, str(tmp_path), why], cwd=ROOT)
    if why == "sigterm":
        wait_until((tmp_path / "study" / "demo.started").exists, "the submission")
        study.terminate()
    assert study.wait(50) == code
    assert why == "limit" or (tmp_path / "study" / "demo.stopped").exists(), "the limit may come before it listens"


def _both(name: str) -> tuple[str, str]:
    return f"study_{name}_trials", f"study_{name}"


# -- the page ----------------------------------------------------------------------------------------------------------


def test_page_states_results_for_and_against_claim(tmp_path: Path) -> None:
    gains = {"mask50": 0.05, "mask75": -0.05, "mask50-unmasked": 0.05, "mask50-masked": 0.05}
    study = study_with(tmp_path, 3, gains)
    written = masking_page.write(tmp_path / "docs", CALIBRATION, study)
    text = (tmp_path / "docs" / "study.md").read_text(encoding="utf-8")
    assert "mask50 is more accurate than clip: +5.0 (+5.0 to +5.0) points" in text
    assert "mask75 is less accurate than clip: -5.0" in text
    assert "mask50-unmasked does not differ significantly from mask50-masked: +0.0" in text
    assert "26.0 (25.0, 26.0, 27.0)" in text, "the mean of an arm and each seed"
    assert "evaluate.preprocess: crop\\_resize" in text, "runs from before this field have the value of its default"
    assert "Abacus" in text and "edge of the range" not in text
    charts = [path for path in written if path.suffix == ".svg"]
    assert len(charts) == 2 and all(f"](study/{path.name})" in text for path in charts)
    for path in charts:
        ElementTree.parse(path)
    rows = list(csv.DictReader((tmp_path / "docs" / "study" / "results.csv").open(encoding="utf-8")))
    assert len(rows) == len(study.runs) + len(study.trials)
    assert {row["twemoji"] for row in rows if row["kind"] == "trial"} == {""}


def test_page_of_unfinished_study_names_missing_answers(tmp_path: Path) -> None:
    study = study_with(tmp_path, 2)
    del study.runs[ROUNDS[1].arms[0].run(0)]
    masking_page.write(tmp_path, CALIBRATION, study)
    text = (tmp_path / "study.md").read_text(encoding="utf-8")
    assert text.count("no answer, fewer than 3 pairs") == 4 and "mask75-b64 against mask75: no answer" in text
    masking_page.write(tmp_path, CALIBRATION, Study(MASKING))
    assert "mask50 against clip: no answer" in (tmp_path / "study.md").read_text(encoding="utf-8")


def test_study_command_plans_and_writes_page(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "jobs"), "study", "--docs", str(tmp_path), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)

    without = run("--plan")
    assert without.returncode == 78 and "--calibrate" in without.stderr
    (tmp_path / "study").mkdir()
    write_json(tmp_path / "study" / "calibration.json", CALIBRATION)
    planned = run("--plan")
    assert planned.returncode == 0 and "mask75-b256" in planned.stdout
    assert run("--page").stdout == f"{tmp_path / 'study.md'}\n"
    (tmp_path / "study.md").write_text("results of another machine")
    again = run("--page")
    assert again.returncode == 78 and "no run of this study is complete here" in again.stderr
    assert (tmp_path / "study.md").read_text() == "results of another machine"
