"""Tests of device utilisation as a share of the datasheet peak and of the measured rate of a matrix product."""

import pytest
import torch

from flip import model_costs
from flip.monitoring import utilisation

CPU = torch.device("cpu")
GPU = torch.device("cuda")


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
    assert model_costs.peak_flops(name, precision) == (None if tflops is None else 1e12 * tflops)


def test_mfu_is_share_of_datasheet_peak(monkeypatch):
    """The measured rate of a matrix product is a separate metric. It never replaces the datasheet peak."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(utilisation, "measure_matmul_flops", lambda device, dtype: 500e12)
    shares = utilisation.Utilisation(GPU, "bf16", world_size=4).of(4 * 200e12)
    assert shares == pytest.approx({"mfu": 200 / 989, "matmul_utilisation": 200 / 500})


def test_mfu_is_none_without_datasheet_peak(monkeypatch):
    monkeypatch.setattr(utilisation, "measure_matmul_flops", lambda device, dtype: 1e12)
    assert utilisation.Utilisation(CPU, "bf16", world_size=2).of(1e12) == {"mfu": None, "matmul_utilisation": 0.5}
    assert utilisation.Utilisation(CPU, "fp32", world_size=1).of(1e12)["mfu"] is None


def test_fp32_uses_tf32_peak_only_if_torch_does(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(utilisation, "measure_matmul_flops", lambda device, dtype: 1e12)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert utilisation.Utilisation(GPU, "fp32", world_size=1).of(78e12)["mfu"] is None
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert utilisation.Utilisation(GPU, "fp32", world_size=1).of(78e12)["mfu"] == pytest.approx(0.5)


def test_measure_matmul_flops_returns_rate_and_preserves_random_state():
    before = torch.get_rng_state()
    assert 1e8 < utilisation.measure_matmul_flops(CPU, torch.float32, seconds=0.05) < 1e15
    assert torch.equal(torch.get_rng_state(), before)
