"""Device utilisation: shares of the datasheet peak and of a measured matrix product."""

import pytest
import torch

from flip import costs
from flip.monitoring import collector

LIMIT = collector.MAX_RECOMPILATIONS
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 80GB HBM3", "fp16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200 NVL", "bf16", 835),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156),
        ("NVIDIA A100-SXM4-80GB", "fp32", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
        ("Tesla K80", "bf16", None),
    ],
)
def test_datasheet_peak_by_device_name_and_precision(name, precision, tflops):
    assert costs.peak_flops(name, precision) == (None if tflops is None else 1e12 * tflops)


def test_mfu_is_a_share_of_the_datasheet_peak(monkeypatch):
    """The measured rate of a matrix product is a metric of its own and never replaces the datasheet peak."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(collector, "measure_matmul_flops", lambda device, dtype: 500e12)
    found = collector.Utilisation(GPU, "bf16", world_size=4).of(4 * 200e12)
    assert found == pytest.approx({"mfu": 200 / 989, "matmul_utilisation": 200 / 500})


def test_mfu_is_absent_without_a_datasheet_peak(monkeypatch):
    monkeypatch.setattr(collector, "measure_matmul_flops", lambda device, dtype: 1e12)
    assert collector.Utilisation(CPU, "bf16", world_size=2).of(1e12) == {"mfu": None, "matmul_utilisation": 0.5}
    assert collector.Utilisation(CPU, "fp32", world_size=1).of(1e12)["mfu"] is None


def test_fp32_uses_tf32_peak_only_if_torch_does(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(collector, "measure_matmul_flops", lambda device, dtype: 1e12)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert collector.Utilisation(GPU, "fp32", world_size=1).of(78e12)["mfu"] is None
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert collector.Utilisation(GPU, "fp32", world_size=1).of(78e12)["mfu"] == pytest.approx(0.5)


def test_the_measured_peak_is_a_rate_and_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    assert 1e8 < collector.measure_matmul_flops(CPU, torch.float32, seconds=0.05) < 1e15
    assert torch.equal(torch.get_rng_state(), before)


def test_shapes_that_keep_changing_are_reported_once_per_stage():
    graphs = collector.CompiledGraphs()
    warned = [bool(graphs.update("masked", 12 + n)) for n in range(LIMIT + 4)]
    assert warned == [False] * (LIMIT + 1) + [True] + [False] * 2
    assert not graphs.update("unmasked", 100) and not graphs.update("unmasked", 100 + LIMIT)
    assert graphs.update("unmasked", 101 + LIMIT).startswith(f"stage unmasked: {LIMIT + 1} graphs")


def test_graphs_are_counted():
    class Doubled(torch.nn.Module):
        def forward(self, x):
            return 2 * x

    before, model = collector.CompiledGraphs.count(), Doubled()
    model.compile(dynamic=False, backend="eager")
    for rows in (3, 3, 4):
        model(torch.ones(rows))
    assert collector.CompiledGraphs.count() == before + 2
