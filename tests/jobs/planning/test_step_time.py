"""Tests of the calculated time of a training step, and of warnings and advice that follow from it."""

import math
import re
from dataclasses import replace

import pytest

from jobs.common.cluster_profile import ClusterProfile, load_profile
from jobs.planning import run_cost, step_time
from jobs.planning.core_speeds import SpeedTable
from tests.jobs.planning.test_memory_fit import planned

H100 = load_profile("h100")
CORE_SAMPLES = 389.0
"""Samples per second of a core, of any images."""
MASKED = ("model.size=B/16", "stages.pretrain.mask=0.75", "resources.nodes=1", "compute.accumulate=2")


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    monkeypatch.setenv("FLIP_CACHE", "/no/cache")
    monkeypatch.setattr(SpeedTable, "microseconds", lambda *_: 1e6 / CORE_SAMPLES)


def first(config, profile=H100):
    return step_time.step_time(config, config.stages[0], profile)


def test_step_time_consists_of_compute_and_communication():
    step = first(planned("resources.nodes=64"))
    assert 0 < step.communication_seconds < step.compute_seconds and step.data_seconds == 0
    assert step.utilisation == pytest.approx(0.4 * step.compute_seconds / step.total)


def test_assumed_utilisation_includes_communication():
    config = planned("resources.nodes=64")
    step = first(config, replace(H100, utilisation=0.3))
    assert (step.communication_seconds, step.utilisation) == (0, pytest.approx(0.3))
    assert "an assumed 30 % of 989 TFLOP/s" in run_cost.assumption(replace(H100, utilisation=0.3))


@pytest.mark.parametrize("unknown", ["nvlink_gbps", "network_gbps"])
def test_step_time_omits_communication_over_links_of_unknown_speed(unknown):
    profile = replace(H100, **{unknown: 0.0})
    config = planned("resources.nodes=64")
    assert first(config, profile).communication_seconds == 0 and not step_time.advice(config, profile)
    assert f"set {unknown} in the profile" in run_cost.assumption(profile)
    assert "set" not in run_cost.assumption(H100)
    assert "no communication" in run_cost.assumption(ClusterProfile(gpu="h100"))


def test_step_time_is_none_without_peak_of_card():
    assert first(planned(), ClusterProfile(kind="slurm")) is None
    fp32 = planned("compute.precision=fp32")
    assert first(fp32) is None, "the peak of the card is that of bf16"
    assert first(fp32, replace(H100, utilisation=0.03)).utilisation == pytest.approx(0.03)


def test_run_without_gpus_on_cluster_with_gpus_is_warned():
    cpu = planned("resources.processes=1", "resources.gpus=0", "compute.device=cpu")
    assert "resources: {processes: 8, gpus: 8}" in step_time.input_warning(cpu, H100)
    assert not step_time.input_warning(cpu, replace(H100, gpus_per_node=0))


def test_step_time_includes_wait_for_input(monkeypatch):
    """A node trains at most at the speed at which its cores decode: 64 of 96 cores are left for loaders."""
    config = planned(*MASKED)
    step = first(config)
    assert config.stages[0].batch / step.total == pytest.approx(64 * CORE_SAMPLES)
    assert step.input_cores == pytest.approx(64 * step.total / (step.compute_seconds + step.communication_seconds))
    warning = step_time.input_warning(config, H100)
    assert f"needs {step.input_cores:.0f} cores" in warning and "has 64" in warning
    # Without a GPU model the demand is unknown.
    assert not step_time.input_warning(planned(), ClusterProfile(kind="slurm"))
    monkeypatch.setattr(SpeedTable, "microseconds", lambda *_: 1e6 / CORE_SAMPLES / 4)
    assert not step_time.input_warning(config, H100)


@pytest.mark.parametrize(
    "cores, cpus, workers",
    [(96, 0, 8), (48, 0, 2), (1024, 0, None), (1024, 30, 26), (0, 0, 8), (8, 0, 1)],
)
def test_fit_workers_meets_gpu_demand_within_cores_of_node(cores, cpus, workers):
    """The GPUs get as many workers as they need with a margin of 25 %, if the node has the cores.

    0 cores means that the profile gives no number of cores.
    """
    config = planned(*MASKED, f"resources.cpus={cpus}")
    profile = replace(H100, cpus_per_node=cores)
    needed = math.ceil(1.25 * first(config, replace(H100, cpus_per_node=10**6)).input_cores / 8)
    step_time.fit_workers(config, profile)
    assert config.data.workers == (workers or needed) and needed > 26
    few = planned("data.lanes=256")
    step_time.fit_workers(few, replace(H100, cpus_per_node=1024))
    assert few.data.workers == 2, "a rank has two lanes"


def test_advice_names_changes_that_raise_utilisation():
    config = planned("resources.nodes=64", "compute.replicate=1", "compute.reshard=yes")
    text = step_time.advice(config, H100)
    assert re.match(r"stage pretrain: communication takes \d+ % of a step, the utilisation is [\d.]+ %;", text)
    gains = dict(re.findall(r"(\w+\.\w+)=\S+(?: \(.*?\)| and compute.reshard=no)? ([\d.]+) %", text))
    assert gains.keys() == {"resources.nodes", "compute.replicate", "compute.reshard"}
    config.compute.replicate = 64
    config.compute.reshard = "no"
    assert first(config).utilisation == pytest.approx(float(gains["compute.replicate"]) / 100, abs=0.0006)


def test_advice_is_empty_if_communication_takes_little_time():
    assert step_time.advice(planned("resources.nodes=1", "compute.accumulate=8"), H100) == ""
