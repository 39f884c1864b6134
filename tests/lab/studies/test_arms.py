"""Tests of studies of arms: equal cost, fair trials, which runs come next, and the page of synthetic results."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from flip.runs.errors import ConfigError
from flip.runs.rundir import write_json
from jobs.reporting import paired
from jobs.sweeps.sweep_file import read_sweep
from lab.studies import cheapest, masking
from lab.studies.arms import Arm, ArmStudy, Round
from lab.studies.arms_design import FULL_RATE
from lab.studies.engine import answers, page
from lab.studies.engine.design import TRIAL_SEED, StudyRun
from lab.studies.engine.results import Results, agree, checked
from lab.studies.engine.study import read

ROOT = Path(__file__).resolve().parents[3]
MASKING = masking.STUDY
CHEAPEST = cheapest.STUDY
TIMES = {
    "mask 0, batch 128": 1.5e-3,
    "mask 0.5, batch 128": 1e-3,
    "mask 0.75, batch 128": 0.7e-3,
    "mask 0.75, batch 64": 0.8e-3,
    "mask 0.75, batch 256": 0.65e-3,
    "mask 0, batch 128, 24 px, 8 tokens": 0.6e-3,
}
CALIBRATION = {
    "machine": {"processor": "Abacus", "cores": 2, "load": 0.1},
    "time": "2026-01-01 00:00",
    "work": {work: {"seconds": seconds} for work, seconds in TIMES.items()},
}
SMALL = ArmStudy(
    "small",
    "# Two arms",
    (Round("arms", "Masks", (Arm("clip", "0"), Arm("mask50", "0.5"))),),
    (("masking", "mask50", "clip"),),
    seconds=20,
    seeds=(0, 1),
    rates=(1e-3,),
)
"""As CONTRIBUTING.md shows it."""


def record(study: ArmStudy, run: StudyRun, **top1: float) -> dict[str, Any]:
    """Return the file of a complete run."""
    peaks = {arm.name: study.tried(arm)[min(1, len(study.tried(arm)) - 1)] for arm in study.arms.values()}
    evaluations = [
        {"name": name, "role": "validation" if name == "validation" else "test", "task": "zeroshot", "top1": value}
        for name, value in top1.items()
    ]
    return {
        "run": run.name,
        "kind": run.kind,
        "settings": checked(study.entry(run, TIMES, peaks)),
        "preprocess": "crop_resize",
        "samples": study.samples(run, TIMES),
        "seconds": 3.0,
        "evaluations": evaluations,
        "curve": [{"samples": 1280, "top1": 0.1}],
    }


def complete(
    docs: Path, study: ArmStudy, only: str = "", gains: dict[str, float] | None = None, without: tuple[str, ...] = ()
) -> Results:
    """Return the study with results of its runs, or of those in sweeps with ``only`` in their name.

    twemoji scores 0.2 + the arm's gain + 0.01 per seed. The middle trial is the best.
    """
    folder = docs / study.name
    (folder / "results").mkdir(parents=True, exist_ok=True)
    write_json(folder / "calibration.json", CALIBRATION)
    for run in study.runs():
        if only not in run.sweep or run.name in without:
            continue
        if run.kind == "trial":
            middle = run.peak == study.tried(study.arms[run.rates])[1]
            scores = {"validation": 0.1 + 0.1 * middle}
        else:
            top1 = 0.2 + (gains or {}).get(run.rates, 0.0) + 0.01 * run.seed
            scores = {"validation": top1, "twemoji": top1, "openmoji": 0.02}
        write_json(folder / "results" / f"{run.name}.json", record(study, run, **scores))
    return read(study, docs)


# -- the design --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", [*MASKING.arms.values(), CHEAPEST.arms["clipa"]], ids=lambda arm: arm.name)
def test_arms_have_equal_cost_up_to_part_of_batch(arm: Arm) -> None:
    study = CHEAPEST if arm.name == "clipa" else MASKING
    run = study.run(arm, 0)
    peak = study.tried(arm)[0]
    parts = study.stages(arm, peak, TIMES)
    assert abs(study.cost(run, TIMES) - study.seconds_of(arm)) <= len(parts) * arm.batch * 1.5e-3 / 2
    assert [part["base_lr"] * arm.batch / 256 for part in parts.values()] == pytest.approx(
        [peak, peak * FULL_RATE][: len(parts)]
    )
    for part in parts.values():
        assert part["samples"] % arm.batch == 0 and 0 < part["warmup"] < part["samples"] / 10


def test_small_image_stage_comes_first_with_planned_share_of_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm = CHEAPEST.arms["clipa"]
    parts = CHEAPEST.stages(arm, 1e-3, TIMES)
    assert list(parts) == ["pretrain", "full"] and "image" not in parts["full"]
    run = CHEAPEST.run(arm, 0)
    small = CHEAPEST.cost(run, TIMES, parts["pretrain"]["samples"])
    assert small == pytest.approx(0.8 * CHEAPEST.seconds, rel=0.01)
    monkeypatch.setenv("FLIP_CACHE", str(tmp_path / "cache"))
    entry = CHEAPEST.entry(run, TIMES, {"clipa": 1e-3})
    (loaded,) = loaded_runs(tmp_path, CHEAPEST.sweep(run.sweep, {run.name: entry}))
    sizes = [(stage.image.size, stage.text.length) for stage in loaded.config.stages]
    assert sizes == [(24, 8), (None, None)] and loaded.config.model.image.size == 48
    assert len(CHEAPEST.calibration()) == 4


def loaded_runs(folder: Path, sweep: dict[str, Any]) -> list[Any]:
    path = folder / f"{sweep['name']}.yaml"
    path.write_text(json.dumps(sweep), encoding="utf-8")
    return list(read_sweep(path, [], None, None).runs)


@pytest.mark.parametrize("study", [MASKING, CHEAPEST], ids=lambda study: study.name)
def test_design_has_equal_trials_per_arm_and_three_seeds(study: ArmStudy) -> None:
    assert len(study.seeds) >= 3 and TRIAL_SEED not in study.seeds
    for each in study.rounds:
        assert len({study.tried(arm) for arm in each.arms}) == 1, "all arms have the same learning rates"
    assert {name for _, *both in study.questions for name in both} <= study.arms.keys()
    assert study.core_seconds() / 120 < 90, "minutes on two cores; start-up and evaluation come on top"


def test_sweeps_load_and_trials_see_only_validation_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials use only the validation vendor. Runs of the tuning round start from runs of equal seed."""
    monkeypatch.setenv("FLIP_CACHE", str(tmp_path / "cache"))
    peaks = {name: tried[1] for name, tried in MASKING.peaks().items()}
    runs = MASKING.runs()
    for sweep in dict.fromkeys(run.sweep for run in runs):
        entries = {run.name: MASKING.entry(run, TIMES, peaks) for run in runs if run.sweep == sweep}
        is_trial = sweep.endswith("_trials")
        for run in loaded_runs(tmp_path, MASKING.sweep(sweep, entries)):
            roles = {item.role for item in run.config.evaluate.sets}
            assert roles == ({"validation"} if is_trial else {"validation", "test"})
            assert (run.config.seed == TRIAL_SEED) == is_trial
            assert bool(run.config.init.run) == ("tuning" in sweep)
    branch = MASKING.entry(MASKING.run(MASKING.arms["mask75-masked"], 2), TIMES, peaks)
    assert branch["init"] == {"run": "study_arms/mask75-s2", "stage": "pretrain"} and branch["seed"] == 2


def test_set_that_recipe_lacks_is_scored_by_runs_and_has_no_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"manifest": "cache:emoji/unseen", "classes": "cache:emoji/classes-unseen.json", "role": "test"}
    study = replace(SMALL, rates=(1e-3, 2e-3), tests=(*SMALL.tests, "unseen"), added_sets={"unseen": fields})
    monkeypatch.setenv("FLIP_CACHE", str(tmp_path / "cache"))
    arm = study.arms["clip"]
    sets = {}
    for run in (study.run(arm, 1), study.trial_of(arm, 2e-3)):
        (loaded,) = loaded_runs(tmp_path, study.sweep(run.sweep, {run.name: study.entry(run, TIMES, {"clip": 2e-3})}))
        sets[run.kind] = [item.name for item in loaded.config.evaluate.sets]
    assert sets == {"run": ["validation", *study.tests], "trial": ["validation"]}
    assert [item.name for item in study.test_sets()] == ["validation", *SMALL.tests]


def test_run_of_another_optimiser_is_not_that_of_the_entry() -> None:
    entry = {"optim.name": "muon", "seed": 1}
    assert agree(checked(entry), entry)
    assert not agree(checked(entry | {"optim.name": "adamw"}), entry)


# -- choice and pairs --------------------------------------------------------------------------------------------------


def test_best_trial_on_validation_is_chosen_then_smallest_rate(tmp_path: Path) -> None:
    results = complete(tmp_path, MASKING, "arms_trials")
    assert results.peaks == dict.fromkeys(("clip", "mask50", "mask75"), 1e-3)
    results.trials["clip"] = {5e-4: 0.2, 1e-3: 0.3, 2e-3: 0.3}
    assert results.best("clip") == 1e-3
    del results.trials["clip"][5e-4]
    assert results.best("clip") is None, "arms are compared only after equally many trials"


def test_loss_over_all_pictures_chooses_rate_if_trials_have_it(tmp_path: Path) -> None:
    """The rate with the most right pictures has the higher loss; of two equal losses the smaller rate is chosen."""
    complete(tmp_path, MASKING, "arms_trials")
    for peak, loss in ((5e-4, 5.1), (1e-3, 5.3), (2e-3, 5.1)):
        path = tmp_path / "study" / "results" / f"clip-lr{peak:g}.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        content["evaluations"][0]["loss"] = loss
        write_json(path, content)
    results = read(MASKING, tmp_path)
    assert results.best("clip") == 5e-4 and results.best("mask50") == 1e-3, "mask50 has no losses"


def test_range_is_extended_while_its_edge_is_best(tmp_path: Path) -> None:
    """The next rate is tried for the arm whose edge wins, until the best one has a worse one on both sides."""
    study = replace(SMALL, rates=(1e-3, 2e-3), further=(5e-4, 4e-3, 8e-3))
    complete(tmp_path, study, "nothing")
    losses = {"clip": {1e-3: 5.0, 2e-3: 4.9, 4e-3: 4.8, 8e-3: 4.9}, "mask50": {1e-3: 4.0, 2e-3: 4.1, 5e-4: 4.2}}
    order = []
    while trials := [run for run in read(study, tmp_path).ready(()) if run.kind == "trial"]:
        order.append([run.name for run in trials])
        for run in trials:
            content = record(study, run, validation=0.1)
            content["evaluations"][0]["loss"] = losses[run.rates][run.peak]
            write_json(tmp_path / "small" / "results" / f"{run.name}.json", content)
    first = ["clip-lr0.001", "clip-lr0.002", "mask50-lr0.001", "mask50-lr0.002"]
    assert order == [first, ["clip-lr0.004", "mask50-lr0.0005"], ["clip-lr0.008"]]
    results = read(study, tmp_path)
    assert results.peaks == {"clip": 4e-3, "mask50": 1e-3}
    assert [run.name for run in results.missing()] == ["clip", "mask50", "clip-s1", "mask50-s1"]
    page.write(tmp_path, results.study, results)
    text = (tmp_path / "small.md").read_text(encoding="utf-8")
    assert "smallest contrastive loss over all pictures of the validation vendor" in text
    assert "tries the next of 0.0005, 0.004, 0.008" in text and "edge of the range)" not in text
    assert "| clip | 0.001: 5.000, 0.002: 4.900, 0.004: 4.800, 0.008: 4.900 |" in text
    assert "the complete plan takes 150 core-seconds" in text, "4 runs of 20 s and 7 trials of half of it"


def test_recorded_choices_override_new_trials(tmp_path: Path) -> None:
    """If two trials are almost equal, another processor could choose differently; the record prevents that."""
    complete(tmp_path, MASKING, "_trials")
    choices = {name: tried[0] for name, tried in MASKING.peaks().items()}
    path = tmp_path / "study" / "choices.json"
    for trial in (tmp_path / "study" / "results").glob("mask50-unmasked*"):
        trial.unlink()  # they started from another trial
    for trial in (tmp_path / "study" / "results").glob("*masked*"):
        trial.unlink()
    write_json(path, choices)
    results = read(MASKING, tmp_path)
    assert results.peaks == choices
    (row, *_) = page.rates_table(results, ("arm",), [(("clip",), "clip")])
    assert "(these trials: 0.001)" in row["chosen"] and "edge of the range" in row["chosen"]
    for wrong in ({"clip": 0.1}, choices | {"clip": 0.1}, [1]):
        write_json(path, wrong)
        with pytest.raises(ConfigError, match="the chosen learning rates cannot be read"):
            read(MASKING, tmp_path)


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
def test_compared_runs_come_first_if_learning_rates_are_known(tmp_path: Path, recorded: bool) -> None:
    """Compared runs come first, so that a study that stops early has its table. A new study needs trials first."""
    folder = tmp_path / "study"
    (folder / "results").mkdir(parents=True)
    write_json(folder / "calibration.json", CALIBRATION)
    if recorded:
        write_json(folder / "choices.json", {name: tried[1] for name, tried in MASKING.peaks().items()})
    local: set[str] = set()
    order = []
    while ready := read(MASKING, tmp_path).ready(local):
        sweep = ready[0].sweep
        order.append(sweep)
        for run in (each for each in ready if each.sweep == sweep):
            top1 = 0.2 if run.peak == MASKING.tried(MASKING.arms[run.rates])[1] else 0.1
            write_json(folder / "results" / f"{run.name}.json", record(MASKING, run, validation=top1, twemoji=top1))
            local.add(run.name)
    names = [f"study_{name}" for name in ("arms", "tuning", "batch")]
    trials = [f"{name}_trials" for name in names]
    if recorded:
        assert order == [*names, *trials]
    else:
        assert order == [trials[0], names[0], trials[1], names[1], trials[2], names[2]]


def test_source_is_trained_again_if_its_directory_is_elsewhere(tmp_path: Path) -> None:
    """The results of another machine are here, its checkpoints are not."""
    results = complete(tmp_path, MASKING, without=("mask50-unmasked-s1",))
    assert [run.name for run in results.ready(())] == ["mask50-s1"]
    assert [run.name for run in results.ready({"mask50-s1"})] == ["mask50-unmasked-s1"]
    assert complete(tmp_path, MASKING).ready(()) == []


# -- the page ----------------------------------------------------------------------------------------------------------


def test_page_states_results_for_and_against_claim(tmp_path: Path) -> None:
    gains = {"mask50": 0.05, "mask75": -0.05, "mask50-unmasked": 0.05, "mask50-masked": 0.05}
    results = complete(tmp_path, MASKING, gains=gains)
    written = page.write(tmp_path, results.study, results)
    text = (tmp_path / "study.md").read_text(encoding="utf-8")
    assert "mask50 against clip: on twemoji more accurate, +5.0 (+5.0 to +5.0) points; on openmoji undecided" in text
    assert "mask75 against clip: on twemoji less accurate, -5.0" in text
    assert "mask50-unmasked against mask50-masked: on twemoji undecided, +0.0" in text
    assert "cannot be paired" in text and "corrected for all 18 comparisons" in text
    assert "nearest training picture" not in text.partition("## Results")[2], "it was not computed"
    assert "26.0 (25.0, 26.0, 27.0)" in text, "the mean of an arm and each seed"
    assert "Abacus" in text and "edge of the range" not in text
    charts = [path for path in written if path.suffix == ".svg"]
    assert len(charts) == 2 and all(f"](study/{path.name})" in text for path in charts)
    for path in charts:
        ElementTree.parse(path)
    rows = list(csv.DictReader((tmp_path / "study" / "results.csv").open(encoding="utf-8")))
    assert len(rows) == len(results.records)
    assert {row["twemoji"] for row in rows if row["kind"] == "trial"} == {""}


@pytest.mark.long
def test_page_pairs_pictures_and_shows_baseline(tmp_path: Path) -> None:
    """Both arms miss the same 500 of 1,000 pictures; mask50 is right on 100 more: pictures add little to 10 points."""
    complete(tmp_path, SMALL)
    three = replace(SMALL, seeds=(0, 1, 2))
    complete(tmp_path, three)
    for run in three.runs():
        bits = np.arange(1000) < 400 + 100 * (run.rates == "mask50") + run.seed
        scores = dict.fromkeys(("validation", "twemoji", "openmoji"), float(bits.mean()))
        content = record(three, run, **scores)
        for item in content["evaluations"]:
            item |= {"n": 1000, **answers.pack(range(1000), bits)}
        write_json(tmp_path / "small" / "results" / f"{run.name}.json", content)
    pixels = [
        {"train": "train", "set": name, "by": "colour", "top1": 0.7, "near": 0.1}
        for name in ("validation", *SMALL.tests)
    ]
    write_json(tmp_path / "small" / "baseline.json", {"sets": pixels})
    page.write(tmp_path, three, read(three, tmp_path))
    text = (tmp_path / "small.md").read_text(encoding="utf-8")
    assert "difference of answers to the same pictures" in text and "cannot be paired" not in text
    low, high = map(float, re.findall(r"twemoji more accurate, \+10\.0 \(\+(\d+\.\d) to \+(\d+\.\d)\)", text)[0])
    assert 7.5 < low < 9.0 and 11.0 < high < 12.5, "1.96 * sqrt(0.1 * 0.9 / 1000) = 1.9 points; unpaired 4.4"
    assert "| nearest training picture | - | - | - | - | - | 0 | - | 70.0 | 70.0 | 70.0 |" in text
    write_json(tmp_path / "small" / "baseline.json", {"sets": pixels[:2]})
    page.write(tmp_path, three, read(three, tmp_path))
    text = (tmp_path / "small.md").read_text(encoding="utf-8")
    assert "| 0 | - | 70.0 | - | 70.0 |" in text and "10.0 % of the twemoji pictures" in text
    chart = (tmp_path / "small" / "course-1.svg").read_text(encoding="utf-8")
    assert "nearest training picture, 70.0" in chart
    assert (tmp_path / "small" / "course.csv").read_text(encoding="utf-8").startswith("arm,seed,samples,cost,top1")


def test_page_of_unfinished_study_names_missing_answers(tmp_path: Path) -> None:
    results = complete(tmp_path, MASKING, without=("mask50-unmasked",))
    page.write(tmp_path, results.study, results)
    text = (tmp_path / "study.md").read_text(encoding="utf-8")
    assert text.count("no answer, fewer than 3 pairs") == 2
    page.write(tmp_path, MASKING, Results(MASKING, tmp_path / "study", CALIBRATION, {}, {}, None))
    assert "mask50 against clip: no answer" in (tmp_path / "study.md").read_text(encoding="utf-8")


def test_study_of_one_learning_rate_and_two_seeds_has_no_trials_and_no_verdict(tmp_path: Path) -> None:
    results = complete(tmp_path, SMALL, gains={"mask50": 0.05})
    assert [run.name for run in SMALL.runs()] == ["clip", "mask50", "clip-s1", "mask50-s1"]
    page.write(tmp_path, results.study, results)
    text = (tmp_path / "small.md").read_text(encoding="utf-8")
    assert "mask50 against clip: no answer" in text and "+5.0, +5.0" in text, "each seed is shown"
    assert "course-1.svg" in text and "differences-1.svg" not in text, "nothing to draw"
    assert "It was not tuned" in text and "## Trials" not in text


@pytest.mark.long
def test_study_command_plans_and_writes_page(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lab.study", "--docs", str(tmp_path), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)

    without = run("--plan")
    assert without.returncode == 78 and "--calibrate" in without.stderr
    complete(tmp_path, MASKING, "study_arms")
    planned = run("--plan")
    assert planned.returncode == 0 and "study_batch/mask75-b256-s2" in planned.stdout
    assert "study_arms/" not in planned.stdout, "the plan lists only missing runs"
    written = run("--page").stdout.splitlines()
    assert written[0] == str(tmp_path / "study.md") and len(written) == 5
    wrong = run("--predict")
    assert wrong.returncode == 78 and "predicts nothing" in wrong.stderr
    reader, output = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "lab.study", "--docs", str(tmp_path), "--page"]
    unread = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, timeout=60, cwd=ROOT)
    os.close(output)
    assert unread.returncode == 141 and not unread.stderr, "a closed pipe is not a folder that cannot be written"


def test_again_has_lengths_and_learning_rates_of_study(tmp_path: Path) -> None:
    from lab.studies.engine import training

    with pytest.raises(ConfigError, match="not all chosen"):
        training.again(MASKING, complete(tmp_path, MASKING, "study_arms").folder.parent, tmp_path / "mine")
    first = complete(tmp_path, MASKING)
    training.again(MASKING, tmp_path, tmp_path / "mine")
    second = read(MASKING, tmp_path / "mine")
    assert (second.times, second.peaks, second.records) == (first.times, first.peaks, {})
