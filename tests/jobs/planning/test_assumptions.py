"""Tests of the numbers that plans assume: what a measurement replaces, and that nothing else changes without one."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from flip import environment
from flip.config.schema import MODEL_PRESETS
from jobs.common.cluster_profile import ClusterProfile, load_profile
from jobs.planning import assumptions, run_cost, step_time, throughput
from jobs.planning.measurement import FAILED, MEASURED, MeasuredRow
from tests.jobs.planning.test_measurement import example
from tests.jobs.planning.test_memory_fit import planned

ROOT = Path(__file__).resolve().parents[3]
H100 = load_profile("h100")
B16 = 150e6
H14 = 980e6


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    monkeypatch.setenv("FLIP_CACHE", "/no/cache")


def step_row(size, parameters, mask, tflops, device="cuda", **more):
    values = {"size": size, "parameters": parameters, "mask": mask, "device": device, "tflops": tflops, **more}
    return MeasuredRow(f"step_{size}_{mask}", "a step", MEASURED, values)


ROWS = (
    step_row("B/16", B16, "0.5", 300.0),
    step_row("B/16", B16, "0.75", 200.0),
    step_row("H/14", H14, "0.5", 500.0),
    MeasuredRow("link_node", "collectives", MEASURED, {"device": "cuda", "gbps": 2900.0}),
    MeasuredRow("link_network", "collectives", MEASURED, {"device": "cuda", "gbps": 340.0}),
    MeasuredRow(
        "input_synthetic", "cost of a sample", MEASURED,
        {"rows": [{"short": 384, "markers": False, "size": 224, "mask": 0.5, "kernel": False, "microseconds": 500.0}]},
    ),
)  # fmt: skip


def measured_profile(tmp_path, *rows, base="kind: slurm\ngpu: H100 SXM\ngpus_per_node: 8\n", **fields):
    """A profile that names a measurement in its own folder."""
    (tmp_path / "measured.json").write_text(json.dumps(example(*rows, **fields).as_dict()))
    (tmp_path / "mine.yaml").write_text(f"{base}measured: measured.json\n")
    return load_profile(str(tmp_path / "mine.yaml"))


def test_plan_uses_measured_steps_links_and_cores_and_says_so(tmp_path):
    base = "kind: slurm\ngpu: H100 SXM\ngpus_per_node: 8\ncpus_per_node: 96\nnvlink_gbps: 3600\nnetwork_gbps: 400\n"
    profile = measured_profile(tmp_path, *ROWS, base=base)
    config = planned("model.size=B/16", "stages.pretrain.mask=0.5", "resources.nodes=64")
    stage = config.stages[0]
    assert assumptions.arithmetic_share(config, stage, profile) == pytest.approx(300 / 989)
    assert assumptions.links_of(config, profile)[1:] == (2900, 340)
    assert throughput.core_samples(config, stage, profile) == pytest.approx(2000)
    step = step_time.step_time(config, stage, profile)
    before = step_time.step_time(config, stage, replace(profile, measured=""))
    assert step.compute_seconds == pytest.approx(before.compute_seconds * 0.4 * 989 / 300)
    text = run_cost.assumption(profile)
    assert text.count("measured 2026-11-29 on 2 nodes") == 4 and "assumed" not in text
    assert "2,900 Gbit/s (nvlink_gbps, measured" in text and "none of it was measured" not in text


@pytest.mark.long
def test_plan_of_model_scaling_says_measured_at_each_number_that_was(desk, tmp_path):
    """Before a measurement and after it, which has an older torch."""
    base = (ROOT / "sweeps" / "clusters" / "h100.yaml").read_text()
    measured_profile(tmp_path, *ROWS, base=f"{base}\n")
    old = replace(example(*ROWS), packages={"torch": "1.0.0"})
    (tmp_path / "measured.json").write_text(json.dumps(old.as_dict()))
    plans = []
    for profile in ("h100", str(tmp_path / "mine.yaml")):
        done = desk.submit("--dry-run", "--cluster", profile, sweep="model_scaling")
        assert done.returncode == 0, done.stderr
        plans.append(done.stdout)
    before, after = plans
    origin = "measured 2026-11-29 on 2 nodes"
    assert origin not in before and before.count("assumed") == 2 and "none of it was measured on GPUs" in before
    assert after.count(origin) == 4 and "assumed" not in after and "none of it was measured" not in after
    for words in ("20 to 51 % of 989 TFLOP/s", "2,900 Gbit/s (nvlink_gbps", "340 Gbit/s (network_gbps", "of a core"):
        assert re.search(rf"{re.escape(words)}[^;]*?{origin}", after), words
    assert "0.258 s arithmetic" in before and "0.204 s arithmetic" in after
    assert "the measurement of 2026-11-29 is older than torch 1.0.0 -> " in after


@pytest.mark.parametrize(("size", "mask", "rate"), [("B/16", "0.625", 250), ("B/16", "0", 300), ("L/16", "0.5", 500)])
def test_arithmetic_is_of_nearest_model_and_linear_in_mask(tmp_path, size, mask, rate):
    profile = measured_profile(tmp_path, *ROWS)
    assert size in MODEL_PRESETS
    config = planned(f"model.size={size}", f"stages.pretrain.mask={mask}")
    assert assumptions.arithmetic_share(config, config.stages[0], profile) == pytest.approx(rate / 989)


def test_plan_without_measurement_has_the_assumed_numbers():
    config = planned("resources.nodes=64")
    assert assumptions.arithmetic_share(config, config.stages[0], H100) == assumptions.ARITHMETIC
    assert assumptions.links_of(config, H100) == (8, 3600, 400)
    assert "none of it was measured on GPUs" in run_cost.assumption(H100) and "2026" not in run_cost.assumption(H100)
    assert not assumptions.remarks(H100)


def test_each_missing_or_failed_row_leaves_its_number_assumed(tmp_path):
    rows = (replace(ROWS[3], status=FAILED), ROWS[0], replace(ROWS[4], values={"device": "cpu", "gbps": 3.0}))
    profile = measured_profile(tmp_path, *rows, base="kind: slurm\ngpu: H100 SXM\ngpus_per_node: 8\nnvlink_gbps: 1\n")
    config = planned("resources.nodes=64")
    assert assumptions.links_of(config, profile) == (8, 1, 0), "a link of gloo is no link of GPUs"
    text = run_cost.assumption(profile)
    assert "1 Gbit/s (nvlink_gbps)" in text and "set network_gbps" in text and "assumed speeds of a core" in text
    assert "at 30 % of 989 TFLOP/s" in text


def test_explicit_numbers_of_profile_come_first(tmp_path):
    profile = replace(measured_profile(tmp_path, *ROWS), utilisation=0.3)
    assert "assumed 30 %" in run_cost.assumption(profile)


def test_measurement_of_another_gpu_is_not_used_and_said(tmp_path):
    profile = replace(measured_profile(tmp_path, *ROWS), gpu="A100 80 GB")
    config = planned("model.size=B/16")
    assert assumptions.arithmetic_share(config, config.stages[0], profile) == assumptions.ARITHMETIC
    assert "is of NVIDIA H100 80GB HBM3, not of A100 80 GB: it is not used" in run_cost.assumption(profile)


def test_measurement_older_than_its_packages_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "environment", lambda: {"python": "", "packages": {"torch": "2.99.0"}})
    assert "is older than torch 2.13.0 -> 2.99.0" in run_cost.assumption(measured_profile(tmp_path, *ROWS))


def test_measurement_on_a_busy_machine_is_said(tmp_path):
    text = run_cost.assumption(measured_profile(tmp_path, *ROWS, load=1.5))
    assert "other processes used 1.5 of 96 cores during the measurement of 2026-11-29" in text
    (tmp_path / "idle").mkdir()
    assert "other processes" not in run_cost.assumption(measured_profile(tmp_path / "idle", *ROWS, load=0.1))


def test_cpu_plan_uses_measured_cores(tmp_path):
    rows = [step_row("tiny", 2e6, "0.5", 0.08, device="cpu", core_gflops=40.0)]
    profile = measured_profile(tmp_path, *rows, base="kind: local\n")
    config = planned("resources.processes=1", "resources.gpus=0", "compute.device=cpu")
    before = run_cost.estimate(config, ClusterProfile(kind="local"))
    after = run_cost.estimate(config, profile)
    assert after.wall_hours == pytest.approx(before.wall_hours * 100 / 40)
    text = run_cost.assumption(profile, gpus=False)
    assert "40 GFLOP/s a core of a processor, measured 2026-11-29 on 2 nodes (steps of tiny)" in text


@pytest.mark.parametrize(("processor", "core"), [("AMD EPYC", "a core of AMD EPYC"), ("", "a core")])
def test_plan_names_processor_of_measured_speeds(tmp_path, processor, core):
    content = example(*ROWS).as_dict()
    content["machine"]["processor"] = processor
    (tmp_path / "measured.json").write_text(json.dumps(content))
    profile = ClusterProfile(kind="local", measured=str(tmp_path / "measured.json"))
    origin = f"speeds of {core}, measured 2026-11-29 on 2 nodes"
    config = planned("resources.processes=1", "resources.gpus=0", "compute.device=cpu")
    for text in (throughput.origin(profile), throughput.described(config, config.stages[0], profile)):
        assert text.removesuffix(")").endswith(origin)


def test_faster_network_is_advised_beside_a_measured_link(tmp_path):
    profile = measured_profile(tmp_path, ROWS[3], replace(ROWS[4], values={"device": "cuda", "gbps": 50.0}))
    config = planned("resources.nodes=64", "compute.replicate=1", "compute.reshard=yes")
    assert "network_gbps=100" in step_time.advice(config, profile)
