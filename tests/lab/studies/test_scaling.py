"""Tests of the scaling study: its plan, the runs missing from the committed results, the prediction, and the page."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from flip.config.identity import identity
from flip.runs.errors import ConfigError
from flip.runs.rundir import write_json
from jobs.sweeps.sweep_file import read_sweep
from lab import study as command
from lab.studies import scaling_design
from lab.studies.engine import page as pages
from lab.studies.engine import training
from lab.studies.engine.answers import pack
from lab.studies.engine.results import checked, score
from lab.studies.engine.study import read
from lab.studies.scaling import STUDY
from lab.studies.scaling_design import Group, ScalingResults, ScalingRun, StudyPoint
from tests.synthetic import make_dataset, make_tokenizer

ROOT = Path(__file__).resolve().parents[3]

WIDTHS = {"0.5M/8": 64, "2M/8": 128, "8M/8": 256}
SECONDS = {"0.5M/8": 2e-3, "2M/8": 5e-3, "8M/8": 15e-3}
TIMES = {
    work: SECONDS[model] * {"0": 2, "0.5": 1, "0.75": 0.6}[mask] for work, (model, mask) in scaling_design.WORKS.items()
}
CALIBRATION = {
    "machine": {"processor": "Abacus", "cores": 2, "load": 0.1},
    "time": "2026-01-01 00:00",
    "work": {work: {"seconds": seconds} for work, seconds in TIMES.items()},
}
PEAKS = dict.fromkeys(scaling_design.WORKS, 5e-4)
SIZE = scaling_design.unit(TIMES)
PARAMETERS = {"0.5M/8": 527_809, "2M/8": 1_960_065, "8M/8": 8_317_697}
PICTURES = {"1/64": 5_000, "1/8": 40_000, "all": 320_000}


def top1(job: ScalingRun) -> float:
    """Return a synthetic score with 0.2 points of noise.

    The middle trial is the best. A mask of 50 % costs no accuracy; a mask of 75 % costs two points.
    """
    group = job.group
    if group.peak:
        return 0.2 + 0.1 * (group.peak == 5e-4)
    odds = 2e-3 * PARAMETERS[group.model] ** 0.16 * PICTURES[group.data] ** 0.07 * max(1, job.length) ** 0.31
    noise = np.random.default_rng([group.seed, *job.name.encode()]).standard_normal()
    return 7 * odds / (1 + 7 * odds) - 0.02 * (group.mask == "0.75") + 0.002 * noise


def record(job: ScalingRun) -> dict[str, Any]:
    score = top1(job)
    samples = job.length * SIZE or 3 * SIZE
    items = [("validation", "validation", "zeroshot"), ("tabler", "test", "zeroshot"), ("carbon", "test", "zeroshot")]
    items += [("icons-text", "test", "retrieval"), ("icons-carbon-probe", "test", "probe")]
    return {
        "run": job.name,
        "kind": job.kind,
        "settings": checked(STUDY.entry(job, TIMES, PEAKS)),
        "configuration": f"digest of {job.name}",
        "data": "digest",
        "data_samples": PICTURES[job.group.data],
        "threads": 1 + (job.group.model == "8M/8"),
        "parameters": PARAMETERS[job.group.model],
        "samples": samples,
        "seconds": 3.0,
        "evaluations": [{"name": n, "role": r, "task": t, "top1": score, "chance": 0.001} for n, r, t in items],
        "curve": [{"samples": samples // 2, "seconds": 1.5, "top1": score / 2}],
        "hours": {"useful": 1.0, "lost": 0.25},
        "attempts": 2,
        "machine": {"processor": "Abacus", "cores": 2},
        "time": "2026-01-02 00:00",
    }


def complete(docs: Path, jobs: list[ScalingRun]) -> ScalingResults:
    """Return a study with results of these runs."""
    folder = docs / scaling_design.NAME
    (folder / "results").mkdir(parents=True, exist_ok=True)
    write_json(folder / "calibration.json", CALIBRATION)
    for job in jobs:
        write_json(folder / "results" / f"{job.name}.json", record(job))
    return scaling_results(docs)


def scaling_results(docs: Path) -> ScalingResults:
    results = read(STUDY, docs)
    assert isinstance(results, ScalingResults)
    return results


def predict(study: ScalingResults) -> dict[str, Any]:
    prediction = STUDY.predict(study)
    write_json(study.folder / "prediction.json", prediction)
    return prediction


def single() -> list[ScalingRun]:
    """Return all runs outside the joint corner."""
    return [job for job in scaling_design.all_jobs() if not scaling_design.is_predicted(job)]


# -- the plan ----------------------------------------------------------------------------------------------------------


def test_all_jobs_fit_budget_and_follow_their_trunks() -> None:
    jobs = scaling_design.all_jobs()
    assert len({job.name for job in jobs}) == len(jobs)
    assert 9 * 3600 < sum(STUDY.cost(job, TIMES) for job in jobs) / scaling_design.CORES < 12 * 3600
    places = {job: i for i, job in enumerate(jobs)}
    assert all(places[job.trunk] < places[job] for job in jobs if job.trunk)
    assert all(job.kind == "trial" for job in jobs[:15])


def test_sweep_loads_and_cooldowns_extend_their_trunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials and trunks use only validation sets. A cooldown extends its trunk at a commit that the trunk keeps."""
    monkeypatch.setenv("FLIP_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "sweep.yaml"
    jobs = {job.name: job for job in scaling_design.all_jobs()}
    entries = {name: STUDY.entry(job, TIMES, PEAKS) for name, job in jobs.items()}
    path.write_text(json.dumps(STUDY.sweep(scaling_design.NAME, entries)), encoding="utf-8")
    runs = {run.name: run.config for run in read_sweep(path, [], None, None).runs}
    assert runs.keys() == jobs.keys()
    for name, config in runs.items():
        (stage,) = config.stages
        job = jobs[name]
        roles = {evaluation_set.role for evaluation_set in config.evaluate.sets}
        is_trial = job.kind == "trial" or name == "8m-data8-mask0.5-s9-repeat-x0.5"
        assert roles == ({"validation"} if is_trial or job.kind == "trunk" else {"validation", "test"})
        if "test" in roles:
            scored = [each.name for each in config.evaluate.sets if each.role == "test" and each.task == "zeroshot"]
            assert scored == list(scaling_design.EVERY), "all pictures of the test families"
        assert (config.seed == 9) == is_trial and config.model.embed == WIDTHS[job.group.model]
        if job.trunk:
            trunk = runs[job.trunk.name]
            assert config.init.run == f"scaling_study/{job.trunk.name}" and config.init.extend
            assert config.init.samples == stage.samples - stage.cooldown and stage.schedule == "wsd"
            assert config.init.samples in trunk.checkpoint.keep_at and trunk.stages[0].samples >= config.init.samples
            assert (trunk.stages[0].warmup, trunk.stages[0].base_lr) == (stage.warmup, stage.base_lr)
    assert STUDY.calibration().keys() == TIMES.keys()


# -- missing runs -----------------------------------------------------------------------------------------------------


def test_trials_run_first_and_determine_peak_learning_rates(tmp_path: Path) -> None:
    study = complete(tmp_path, [])
    assert {job.kind for job in study.ready({})} == {"trial"} and study.peaks == {}
    trials = [job for job in single() if job.kind == "trial"]
    study = complete(tmp_path, trials)
    assert study.peaks == PEAKS
    ready = study.ready({})
    assert ready[0].name == "2m-data8-mask0.5-s0-trunk" and not any(job.trunk for job in ready)
    assert not any(scaling_design.is_predicted(job) for job in ready), "the joint corner waits for its prediction"


def test_range_is_extended_if_loss_is_smallest_at_its_edge(tmp_path: Path) -> None:
    """Trials of the committed runs have no losses, so that their range stays, although two choices are at its edge."""
    committed = scaling_results(ROOT / "docs")
    assert min(scaling_design.PEAKS) in committed.peaks.values() and not committed.missing()
    trials = [job for job in single() if job.kind == "trial"]
    study = complete(tmp_path, trials)
    for job in trials:
        known = record(job)
        known["evaluations"][0]["loss"] = 5.0 + job.group.peak * (-1 if job.group.mask == "0.75" else 1)
        write_json(study.folder / "results" / f"{job.name}.json", known)
    study = scaling_results(tmp_path)
    missing = {job.group.work: job.group.peak for job in study.ready({}) if job.kind == "trial"}
    assert missing == {work: 2e-3 if work.endswith("0.75") else 1.25e-4 for work in scaling_design.WORKS}
    assert study.peaks == {} and "the next of 0.000125, 0.002 is tried" in page(study)


def test_trunk_is_trained_again_only_if_cooldown_is_missing(tmp_path: Path) -> None:
    cooldown = next(job for job in single() if job.name == "2m-data8-mask0-s0-x4")
    study = complete(tmp_path, [job for job in single() if job != cooldown])
    assert study.ready({}) == [cooldown.trunk]
    local: Any = {"2m-data8-mask0-s0-trunk": None}
    assert study.ready(local) == [cooldown]
    assert complete(tmp_path, [cooldown]).ready({}) == []


def test_further_seeds_are_skipped_if_difference_is_clear(tmp_path: Path) -> None:
    """1/64 of the data costs two points, 8M gains three points, and the noise between seeds is 0.2 points."""
    first = [job for job in single() if job.group.seed in (0, 9) or len(job.group.lengths) > 1]
    study = complete(tmp_path, first)
    assert study.missing() and all(scaling_design.is_predicted(job) for job in study.missing())
    near = Group(data="all")
    undecided = complete(tmp_path / "early", [job for job in first if job.name != "2m-data8-mask0-s1-x4"])
    assert not [job for job in undecided.ready({}) if job.kind == "run"], "further seeds wait for the spread"
    assert ScalingRun(Group(data="all", seed=1), 2) in undecided.missing(), "but they may be needed"
    path = tmp_path / scaling_design.NAME / "results" / f"{near.name}-x2.json"
    close = record(ScalingRun(near, 2)) | {"evaluations": record(ScalingRun(Group(), 2))["evaluations"]}
    write_json(path, close)
    missing = {job.group for job in scaling_results(path.parents[2]).missing()}
    assert Group(data="all", seed=1) in missing


def test_read_rejects_results_of_other_settings_and_damaged_files(tmp_path: Path) -> None:
    study = complete(tmp_path, single())
    write_json(study.folder / "calibration.json", CALIBRATION | {"work": {w: {"seconds": 0.1} for w in TIMES}})
    with pytest.raises(ConfigError, match="run with other settings"):
        scaling_results(study.folder.parent)
    (study.folder / "results" / "damaged.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be read"):
        scaling_results(study.folder.parent)


def test_runs_with_other_test_pictures_are_not_mixed(tmp_path: Path) -> None:
    """An accuracy over one picture per class and one over all pictures are different numbers of the same name."""
    jobs = [job for job in single() if job.kind in ("trial", "run")]
    study = complete(tmp_path, jobs)
    assert study.tests == {"tabler": 0, "carbon": 0}
    assert complete(tmp_path / "new", []).tests == dict.fromkeys(scaling_design.EVERY, 0)
    path = study.folder / "results" / f"{jobs[-1].name}.json"
    other = json.loads(path.read_text(encoding="utf-8").replace('"tabler"', '"tabler-all"'))
    write_json(path, other)
    with pytest.raises(ConfigError, match=r"other test pictures than .*: .*tabler-all.*--again"):
        scaling_results(tmp_path)


def test_page_says_whether_pictures_are_paired(tmp_path: Path) -> None:
    study = complete(tmp_path, [ScalingRun(Group(), 2), ScalingRun(Group(model="8M/8"), 2)])
    assert not study.is_answered and "as if they had seen" in page(study)
    for name, known in study.records.items():
        bits = np.arange(1000) < round(1000 * score(known))
        for item in known["evaluations"]:
            item |= {"top1": float(bits.mean()), "n": 1000} | pack(range(1000), bits)
        write_json(study.folder / "results" / f"{name}.json", known)
    study = scaling_results(tmp_path)
    assert study.is_answered and "answers to the same pictures" in page(study) and "All 2,000 pictures" in page(study)
    pictures = study.pictures([StudyPoint(), StudyPoint("8M/8")])
    factors = np.array([1, -1])
    assert factors @ pictures @ factors < 0.5 * np.trace(pictures), "one is right where the other is"


# -- the prediction ----------------------------------------------------------------------------------------------------


def test_joint_corner_is_predicted_once_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is missing"):
        predict(complete(tmp_path, single()[:20]))
    study = complete(tmp_path, single())
    prediction = predict(study)
    corner = [job for job in scaling_design.all_jobs() if scaling_design.is_predicted(job) and job.length]
    for job in corner:
        errors = prediction["errors"][str(job.length)]
        assert errors["low"] < 1 - top1(job) < errors["high"] and errors["high"] - errors["low"] < 0.03
    study = scaling_results(study.folder.parent)
    assert {job.name for job in study.ready({})} == {"8m-data1-mask0.5-s0-x2", "8m-data1-mask0.5-s0-x4"}
    with pytest.raises(ConfigError, match="exists"):
        predict(study)
    os.unlink(study.folder / "prediction.json")
    with pytest.raises(ConfigError, match="is complete"):
        predict(complete(tmp_path, corner))


# -- the page ----------------------------------------------------------------------------------------------------------


def page(study: ScalingResults) -> str:
    docs = study.folder.parent
    for path in pages.write(docs, study.study, study):
        if path.suffix == ".svg":
            ElementTree.parse(path)
    return (docs / "scaling_study.md").read_text(encoding="utf-8")


def row(text: str, start: str) -> list[str]:
    """Return the cells of the first table row that starts with ``start``."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_small_sweep_has_settings_of_study(tmp_path: Path) -> None:
    """Runs of several lengths share a trunk in the study; the sweep trains each on its own, with the same steps."""
    study = read(STUDY, ROOT / "docs")
    large = {"model": "8M/8"}
    everything = {"data": "all"}
    alone = (
        {},
        large,
        everything,
        {"length": 4},
        {"model": "0.5M/8"},
        {"data": "1/64"},
        {"mask": "0"},
        {"mask": "0.75"},
    )
    joint = (large | everything, large | everything | {"length": 4})
    points = {StudyPoint(**fields) for fields in (*alone, *joint)}
    assert points <= set(scaling_design.points())
    groups = [Group(point.model, point.data, point.mask, (point.length,)) for point in points]
    entries = [STUDY.entry(ScalingRun(group, group.lengths[0]), study.times, study.peaks) for group in groups]
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps(STUDY.sweep("study", {str(i): entry for i, entry in enumerate(entries)})))
    ours = {identity(run.config, "")["hash"] for run in read_sweep(path, [], None, None).runs}
    runs = read_sweep(ROOT / "sweeps" / "scaling_small.yaml", [], None, None).runs
    small = [identity(run.config, "")["hash"] for run in runs]
    assert ours == set(small) and len(small) == len(points)


@pytest.mark.long
def test_page_of_complete_study_states_verdicts(tmp_path: Path) -> None:
    study = complete(tmp_path, single())
    predict(study)
    leakage = {"pictures": 5000, "near_before": 0.12, "near_after": 0.0, "near_before_2x": 0.2, "near_after_2x": 0.1}
    write_json(study.folder / "data.json", {"leakage": {"tabler": leakage}})
    text = page(complete(tmp_path, scaling_design.all_jobs()))
    assert "runs are missing" not in text and "All pictures whose names training has count." in text
    assert row(text, "A larger model is more accurate")[-1] == "shown"
    assert row(text, "More data gain more than longer training")[-1] == "opposite"
    assert row(text, "Mask 50 % costs accuracy")[1] == "+0.1", "the paper's numbers at equal batch"
    costs = row(text, "Mask 75 % costs more than 50 %")
    assert (costs[1], costs[-1]) == ("+2.7", "shown (confounded)")
    assert row(text, "Mask 50 % reaches the accuracy")[-1] == "shown"
    assert row(text, "joint")[1:3] == ["78.8", "+4.5"], "the paper's numbers"
    masks = text.partition("### Masks at equal samples")[2]
    assert row(masks, "50 %")[1:5] == ["69.6", "68.5", "2.0", "1.92"], "the paper's numbers"
    speeds = row(text.partition("### Speed-up by masking")[2], "50 %")
    assert all(1.7 < float(cell.split()[0]) < 2.3 for cell in speeds[1:]), "half the cost at equal accuracy"
    half, most, between = (
        [float(cell.split()[0]) for cell in row(text.partition("### Speed-up by masking")[2], name)[1:4]]
        for name in ("50 %", "75 % |", "75 % instead of 50 %")
    )
    assert between == pytest.approx([b / a for a, b in zip(half, most, strict=True)], rel=0.01), "at the same levels"
    assert row(text, "length 4")[-1] == "yes" and row(text, "chance")[2:] == ["0.10"] * 5
    assert row(text, "tabler")[2:4] == ["12.00", "0.00"]
    assert row(text, "1/64") == ["1/64", "digest", "2"] and "several digests" not in text
    assert row(text, "0.5m-data8-mask0.5-s0-repeat-x2")[1] and "docs/sweeps.md" in text
    assert row(text, "8m-data8-mask0.5-s9-repeat-x0.5")[1].startswith("30.0 "), "the chosen trial, not another one"
    assert "Runs with several threads: 8m-" in text
    for name in ("axes-1", "axes-2", "axes-3", "cost-1", "cost-2"):
        assert f"](scaling_study/{name}.svg)" in text


@pytest.mark.long
def test_page_states_no_verdict_if_runs_are_missing(tmp_path: Path) -> None:
    text = page(complete(tmp_path, []))
    assert "runs are missing" in text and row(text, "A larger model is more accurate")[2:] == ["-", "-"]
    masks = [job for job in single() if job.kind == "trial" or len(job.group.lengths) > 1]
    text = page(complete(tmp_path, masks))
    assert row(text, "Mask 50 % reaches the accuracy")[-1] == "shown"
    assert row(text, "A larger model is more accurate")[2:] == ["-", "-"]
    assert "The joint corner is not predicted yet" in text
    first = [job for job in masks if job.group.seed != 1]
    text = page(complete(tmp_path / "first", first))
    assert row(text, "Mask 50 % reaches the accuracy")[2:] == ["-", "-"]
    assert "(no interval, one seed)" in row(text.partition("### Speed-up by masking")[2], "50 %")[-1], "so far"


@pytest.mark.long
def test_study_command_plans_and_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = ["--study", "scaling", "--docs", str(tmp_path)]
    assert command.main([*study, "--plan"]) == 78
    assert "--calibrate" in capsys.readouterr().err
    complete(tmp_path, single())
    assert command.main([*study, "--predict"]) == 0 and (tmp_path / "scaling_study" / "prediction.json").exists()
    capsys.readouterr()
    assert command.main([*study, "--plan"]) == 0
    shown = capsys.readouterr().out
    assert "8m-data1-mask0.5-s0-x4" in shown and "2m-data8" not in shown, "the plan lists only missing runs"


@pytest.mark.slow
def test_small_study_is_trained_in_parts_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains a trial, a trunk with two cooldowns, and a repeat.

    The first call is stopped. Results remain after the run folders are deleted.
    """
    cache = tmp_path / "cache" / "icons"
    for name in ("train-1of8", "bi", *scaling_design.EVERY, "retrieval", "probe/train", "probe/test"):
        make_dataset(cache / name, samples=640 if name.startswith("train") else 32, shards=1, classes=16)
    make_tokenizer(cache / "tokenizer.json")
    monkeypatch.setenv("FLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FLIP_RUNS", str(tmp_path / "runs"))
    group = Group("0.5M/8", lengths=(1, 2))
    arm = "0.5M/8", "0.5"
    trial = Group("0.5M/8", lengths=(1,), seed=9, peak=1e-3)
    rounds = (("trials", (trial,)), ("runs", (group,)), ("repeats", (Group("0.5M/8", repeat=True),)))
    for name, value in (
        ("ROUNDS", rounds),
        ("WORKS", {"0.5M/8, mask 0.5": arm}),
        ("PEAKS", (1e-3,)),
        ("FURTHER", ()),
        ("GRAIN", 1280),
        ("BUDGET", 1.0),
    ):
        monkeypatch.setattr(scaling_design, name, value)
    docs = tmp_path / "docs"
    study = complete(docs, [])
    assert study.unit == 1280
    training.train(STUDY, docs, "pair", 6.0)
    assert scaling_results(study.folder.parent).missing(), "six seconds are too short for all runs"
    training.train(STUDY, docs, "pair", float("inf"))
    study = scaling_results(docs)
    assert not study.missing() and len(study.records) == 5
    first, again = (study.records[f"{group.name}{end}-x2"] for end in ("", "-repeat"))
    assert score(first) == score(again), "a trunk and its cooldown are a run"
    assert (first["data_samples"], first["threads"]) == (640, 1)
    assert first["data"].startswith("digest:") and len(first["configuration"]) == 64
    assert {item["task"] for item in first["evaluations"]} == {"zeroshot", "retrieval", "probe"}
    assert study.records[f"{group.name}-trunk"]["curve"] and first["hours"]["useful"] > 0
    shutil.rmtree(tmp_path / "runs")
    assert training.train(STUDY, docs, "pair", float("inf")).records == study.records
    assert not (tmp_path / "runs" / "scaling_study").exists(), "no run trains again"
    assert "0.5M/8" in page(study)
