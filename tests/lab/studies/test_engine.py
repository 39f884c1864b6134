"""Tests of the engine: committed pages and runs are reproduced, submissions stop and continue, records of real runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flip
from flip.config.identity import identity
from flip.evaluation.metrics.predictions import Predictions, path_of
from flip.runs.errors import STOPPED, ConfigError
from flip.runs.lifecycle import RunState
from flip.runs.rundir import RunDir, write_json
from jobs.sweeps.sweep_file import read_sweep
from lab import study as command
from lab.studies import scaling_design
from lab.studies.engine import page, training
from lab.studies.engine.answers import right
from lab.studies.engine.design import TRIAL_SEED, Entry, StudyRun
from lab.studies.engine.results import read_calibration
from lab.studies.engine.study import Study, read
from lab.studies.scaling_design import ScalingRun
from tests.lab.studies.test_arms import CALIBRATION, MASKING, SMALL, complete

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs"


def study_of(name: str) -> Study:
    study = import_module(f"lab.studies.{name}").STUDY
    assert isinstance(study, Study)
    return study


def trained() -> list[str]:
    """Studies with results. The design of a new one is committed before it is trained."""
    return [name for name in command.studies() if (DOCS / study_of(name).name / "results").is_dir()]


def test_studies_are_the_files_with_a_study() -> None:
    """A new study is one file: no list names it."""
    assert {"cheapest", "masking", "scaling"} <= set(trained())
    for name in command.studies():
        assert study_of(name).head.startswith("# ")


# -- committed studies -------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("name", trained())
def test_committed_pages_and_figures_are_reproduced(name: str, tmp_path: Path) -> None:
    study = study_of(name)
    shutil.copytree(DOCS / study.name, tmp_path / study.name)
    written = page.write(tmp_path, study, read(study, tmp_path))
    assert len(written) >= 4
    for path in written:
        is_same = path.read_bytes() == (DOCS / path.relative_to(tmp_path)).read_bytes()
        assert is_same, f"{path.name}: after a change of its drawing or text: python -m lab.study --page --study {name}"


def scored_then(run: StudyRun) -> Entry:
    """Return the test sets of committed runs of the scaling study, in place of the larger ones that replaced them.

    They change no weight, and `python -m lab.icons` still writes them.
    """
    if not isinstance(run, ScalingRun) or run.kind == "trunk" or run.seed == TRIAL_SEED:
        return {}
    folders = {name: f"cache:icons/{name}" for name in scaling_design.FAMILIES}
    return {
        "evaluate.sets": [
            dict(scaling_design.ICONS),
            *({"name": n, "manifest": f, "classes": f"{f}/classes.json", "role": "test"} for n, f in folders.items()),
            {"name": "icons", "task": "retrieval", "manifest": "cache:icons/retrieval", "role": "test"},
            {
                "name": "icons-carbon", "task": "probe", "manifest": "cache:icons/probe/test",
                "train": "cache:icons/probe/train", "role": "test",
            },
        ]
    }  # fmt: skip


@pytest.mark.long
def test_runs_have_identities_of_trained_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """identities.json has the digests of the configurations that the engines before this one gave to the same runs. A
    study that is newer than this engine has none there."""
    monkeypatch.setenv("FLIP_CACHE", "/absent")  # data sets and tokenizer by path
    digests = {}
    for name in trained():
        study = study_of(name)
        results = read(study, DOCS)
        assert not results.missing(), "the study is complete"
        for sweep in dict.fromkeys(run.sweep for run in results.runs):
            runs = [run for run in results.runs if run.sweep == sweep]
            entries = {run.name: study.entry(run, results.times, results.peaks) | scored_then(run) for run in runs}
            path = tmp_path / f"{sweep}.yaml"
            path.write_text(json.dumps(study.sweep(sweep, entries)), encoding="utf-8")
            for run in read_sweep(path, [], None, None).runs:
                digests[f"{sweep}/{run.name}"] = identity(run.config, "")["hash"]
    known = json.loads((Path(__file__).parent / "identities.json").read_text(encoding="utf-8"))
    assert {name: digests.get(name) for name in known} == known


def test_result_of_other_settings_is_refused(tmp_path: Path) -> None:
    shutil.copytree(DOCS / "study", tmp_path / "study")
    path = tmp_path / "study" / "results" / "mask50.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["settings"]["stages.pretrain.mask"] = "0.6"
    write_json(path, record)
    with pytest.raises(ConfigError, match=r"mask50\.json: the result is of a run with other settings"):
        read(MASKING, tmp_path)


# -- calibration -------------------------------------------------------------------------------------------------------


def timed(folder: Path, name: str, sample_seconds: list[float]) -> Path:
    """Write a calibration run with a metric line per 128 samples, of ``sample_seconds`` seconds per sample."""
    run = RunDir(folder / name)
    seconds = 9.0
    lines = []
    for i, value in enumerate([0.0, *sample_seconds], 1):
        seconds += 128 * value
        lines.append({"step": i, "samples": 128 * i, "cpu_seconds": seconds})
    run.metrics.mkdir(parents=True)
    (run.metrics / "1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    write_json(run.identity, {"schema": 2})
    return run.path


def test_calibration_is_median_of_intervals_after_warmup(tmp_path: Path) -> None:
    """The first steps are slow and do not count."""
    slow = timed(tmp_path, "a", [0.9, 0.9] + 5 * [0.002])
    slower = timed(tmp_path, "a-s1", [0.9, 0.9] + 5 * [0.004])
    uneven = training.step_times("work", slow, slower)
    assert uneven == {"seconds": 0.003, "quartiles": [0.002, 0.004], "intervals": 10}
    assert not training.is_even(uneven)
    assert training.is_even(training.step_times("work", slow))
    assert not training.is_even({"seconds": 1.159e-3, "quartiles": [1.105e-3, 1.229e-3]}), "a machine with a load of 9"
    for study in trained():
        work = read(study_of(study), DOCS).calibration["work"].values()
        assert all(training.is_even(facts) for facts in work if "quartiles" in facts), "idle machines"
    with pytest.raises(ConfigError, match="was not timed"):
        training.step_times("work", timed(tmp_path, "b", [0.9, 0.9]))


def test_read_calibration_rejects_missing_or_incomplete_file(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    with pytest.raises(ConfigError, match="there is no calibration"):
        read_calibration(MASKING, path)
    write_json(path, CALIBRATION | {"work": {}})
    with pytest.raises(ConfigError, match="lacks a kind of work"):
        read_calibration(MASKING, path)
    write_json(path, CALIBRATION)
    assert read_calibration(MASKING, path) == CALIBRATION


def test_record_has_answers_of_the_final_predictions(tmp_path: Path) -> None:
    """Of two files of predictions the one with the digest of the result counts."""
    for position, digest, labels in ((128, "old", [0, 0, 0]), (256, "new", [0, 1, 1])):
        classes = np.array([[0, 1], [0, 1], [1, 0]])
        shown = Predictions(digest, "/data", ["a", "b"], [0, 1, 2], np.array(labels), classes, np.ones((3, 2)))
        shown.write(path_of(RunDir(tmp_path), "pretrain", position, "twemoji"))
    answered = training.answered(tmp_path, {"name": "twemoji", "predictions": "new"})
    item = {"name": "twemoji", "n": 3, "top1": 2 / 3, **answered}
    bits = right(item)
    assert bits is not None and bits.tolist() == [True, False, True]
    assert training.answered(tmp_path, {"name": "icons-text", "predictions": "new"}) == {}


# -- submissions -------------------------------------------------------------------------------------------------------


class Runs:
    """Stands for the runs of ``flip.submit``: they end when they are cancelled, or once ``ends`` says so."""

    def __init__(self, ends: str = "", kill: int = 0) -> None:
        self.state = "running"
        self.ends = ends
        self.kill = kill
        self.why = ""
        self.waits = 0

    def wait(self, timeout: float | None = None) -> dict[str, RunState]:
        self.waits += 1
        assert self.waits < 10, "no one stops these runs"
        if self.kill and not self.why:
            os.kill(os.getpid(), self.kill)
        if self.ends:
            self.state = self.ends
        if self.state == "running":
            raise TimeoutError
        return {"a": RunState(self.state)}

    def cancel(self, why: str) -> None:
        self.state = "cancelled"
        self.why = why


def submit(monkeypatch: pytest.MonkeyPatch, folder: Path, runs: Runs, seconds: float = 600, over: bool = False) -> None:
    monkeypatch.setenv("FLIP_RUNS", str(folder))
    submitted: dict[str, Any] = {}
    monkeypatch.setattr(flip, "submit", lambda path, **options: submitted.update(options, path=path) or runs)
    training.submit({"name": "demo", "title": "A demonstration"}, "pair", seconds, lambda: over)
    assert submitted["cluster"] == "pair" and submitted["retry"] and submitted["path"].name == "demo.yaml"


def test_submit_stops_runs_after_limit_and_once_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ({"seconds": 0.0}, {"over": True}):
        runs = Runs()
        submit(monkeypatch, tmp_path, runs, **limit)  # type: ignore[arg-type]
        assert runs.why and runs.state == "cancelled"
    runs = Runs(ends="complete")
    submit(monkeypatch, tmp_path, runs)
    assert not runs.why


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_submit_stops_runs_on_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A study in the background of a shell ignores SIGINT. It has to stop its runs nevertheless."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        runs = Runs(kill=number)
        with pytest.raises(training.Unfinished) as caught:
            submit(monkeypatch, tmp_path, runs)
        assert caught.value.args == (STOPPED,) and runs.state == "cancelled"
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN, "handlers are those from before"
    finally:
        signal.signal(signal.SIGINT, before)


def test_submit_reports_failed_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(training.Unfinished):
        submit(monkeypatch, tmp_path, Runs(ends="failed"))
    assert "demo/a: failed" in capsys.readouterr().err


def test_submission_is_overtaken_only_by_more_important_runs_of_its_sweep(tmp_path: Path) -> None:
    results = complete(tmp_path, SMALL)
    first, second, third, _ = results.runs
    assert training.is_overtaken([second, third], [first, second, third])
    assert not training.is_overtaken([first, second], [second, third])
    assert not training.is_overtaken([second], [first]), "none of the batch is left"
