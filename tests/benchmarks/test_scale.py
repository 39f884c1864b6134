"""Tests benchmarks/scale.md, its results file and the simulations and formulas behind both."""

import json
import math
import re
from itertools import pairwise

import pytest

from benchmarks.lib import burst, controller, fleet, interruptions, page_numbers
from benchmarks.lib.burst import Burst
from benchmarks.lib.interruptions import History, Life
from flip.checkpoint import manager
from flip.config.merge import to_dict
from flip.runs.rundir import RunDir
from tests.benchmarks.test_benchmarks import FOLDER, run

PAGE = (FOLDER / "scale.md").read_text(encoding="utf-8")
RESULTS = json.loads((FOLDER / "results" / "scale.json").read_text(encoding="utf-8"))
LIVES = [Life(3600.0, 120.0, 4.0, 0.0), Life(7200.0, 300.0, 1.0, 60.0), Life(400.0, 100.0, 20.0, 30.0)]


def test_scale_page_shows_numbers_of_results_file():
    assert page_numbers.fill(PAGE, RESULTS) == PAGE
    rows = re.findall(r"^\| `([\w.]+)` \|", PAGE, re.MULTILINE)
    assert len(rows) == len(set(rows)) > 60
    assert page_numbers.fill(PAGE.replace(f"| {RESULTS['run']['step_s']} |", "| 0.5 |"), RESULTS) == PAGE


def test_scale_results_equal_arithmetic_of_current_code():
    config, profile = fleet.planned()
    computed = fleet.arithmetic(config, profile, RESULTS["measured"])  # not with later measurements
    assert {name: RESULTS[name] for name in computed} == computed
    assert fleet.measured().keys() == RESULTS["measured"].keys()
    assert RESULTS["run"]["gpus"] == 512 and to_dict(config)["model"]["size"] == "H/14"


def test_scale_results_of_simulation_agree_with_formula():
    for row in RESULTS["simulated"].values():
        assert abs(row["errors_apart"]) < 4 and abs(row["learning"] - row["formula"]) < max(0.1, 4 * row["error"])


@pytest.mark.long
def test_scale_script_fills_page_and_rejects_unknown_number(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("| | |\n| `run.gpus` | 3 | of them |\n\nat 1.5 (`run.step_s`) seconds\n\n| | `events` |\n"
                    "| `simulated.8_h_blocking` | 0 |\n", encoding="utf-8")  # fmt: skip
    done = run("scale", "--quick", "--json", "--out", tmp_path / "scale.json", "--page", page, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "scale.json").read_text(encoding="utf-8"))
    events = page_numbers.shown(results["simulated"]["8_h_blocking"]["events"])
    assert page.read_text(encoding="utf-8").splitlines() == [
        "| | |",
        "| `run.gpus` | 512 | of them |",
        "",
        f"at {RESULTS['run']['step_s']} (`run.step_s`) seconds",
        "",
        "| | `events` |",
        f"| `simulated.8_h_blocking` | {events} |",
    ]
    assert results["slurm"]["calls"] == RESULTS["slurm"]["calls"] and results["reads"].keys() == RESULTS["reads"].keys()
    page.write_text("| `run.gpu` | 3 |\n", encoding="utf-8")
    assert "no number is called run.gpu" in run("scale", "--quick", "--page", page, cwd=tmp_path).stderr


@pytest.mark.parametrize("life", LIVES)
def test_simulated_goodput_agrees_with_formula(life):
    for every in (60.0, 600.0):
        share, error = interruptions.simulate(life, lambda history, every=every: every, 20_000, 1)
        assert abs(share - interruptions.goodput(life, every)) < 4 * error and error < 0.01


@pytest.mark.parametrize("life", LIVES)
def test_goodput_formula_equals_daly_and_its_optimum_approaches_young(life):
    """Daly's expected time of T seconds of work: m exp(R / m) (exp((t + c) / m) - 1) T / t."""
    every = 300.0
    m = life.between
    start = life.start + life.written
    expected_time = m * math.exp(start / m) * (math.exp((every + life.cost) / m) - 1) / every
    assert interruptions.goodput(life, every) == pytest.approx(1 / expected_time, rel=1e-12)
    calm = Life(1e8, life.start, life.cost, life.written)
    assert interruptions.optimum(calm) == pytest.approx(interruptions.young(calm), rel=1e-3)
    around = [interruptions.goodput(life, interruptions.optimum(life) * share) for share in (0.5, 0.9, 1, 1.1, 2)]
    assert max(around) == around[2] and all(a < b for a, b in pairwise(around[:3]))


def test_learning_rule_equals_save_interval_of_real_run(tmp_path, monkeypatch):
    life = Life(7200.0, 300.0, 10.0, 20.0)
    now = 1000.0
    monkeypatch.setattr(manager.time, "monotonic", lambda: now)
    real = manager.SaveInterval(0.0, RunDir(tmp_path), 1)
    rule = interruptions.learning(life)
    now += 50_000.0
    for saves in (0, 1, 7):
        history = History(trained=50_000.0, cut=0, saves=saves)
        assert rule(history) == real.seconds(saves, saves * life.cost, life.cost + life.written)


@pytest.mark.parametrize("limit", [10_000.0, 300.0, 100.0])
def test_burst_completes_close_to_storage_request_limit(limit):
    result = burst.simulate(Burst(readers=250, each=4, limit=limit, megabytes=1.0), seed=3)
    assert result["given_up"] == 0 and (result["refused"] == 0) == (limit == 10_000.0)
    assert result["seconds"] > result["requests"] / limit - 1 and result["longest_pause_s"] <= 30
    assert result["seconds"] < 30 * result["requests"] / limit + 5


def test_storm_duration_follows_token_bucket():
    result = controller.storm(50, 3, seed=0, bucket=30, refill=2.0)
    assert result["seconds"] == 1 + (50 * 3 - 30) / 2 and result["requests"] > 150
    assert controller.storm(50, 3, seed=0, bucket=150) == {
        "requests": 150, "seconds": 3, "unanswered": 0, "jobs_done_within_kill_wait": 50,
    }  # fmt: skip
