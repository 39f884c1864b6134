"""Tests which GPU of a node is a rank's, in the environments of launchers, without a GPU."""

import os

import pytest
import torch

from flip.common import devices
from flip.runs.checks import OK, UNKNOWN
from jobs.runtime import health, network_check


@pytest.mark.parametrize(
    ("local_rank", "local_size", "visible", "own"),
    [(3, 8, None, "3"), (1, 2, "4,GPU-a", "GPU-a"), (0, 8, None, "0"), (0, 1, "5,6", "5,6"), (0, 1, None, None)],
)
def test_each_rank_sees_its_own_gpu_as_the_first(local_rank, local_size, visible, own, monkeypatch):
    """Compiled code contains the index of the device."""
    see_gpus(monkeypatch, local_rank, local_size, visible, lambda: 1)
    assert devices.own_gpu() == torch.device("cuda", 0)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == own


@pytest.mark.parametrize("visible", [None, "7,6,5,4"])
def test_gpus_stay_visible_if_process_has_asked_for_them(visible, monkeypatch):
    """Otherwise all ranks of the node would compute on its first GPU."""
    see_gpus(monkeypatch, 3, 4, visible, lambda: 4)
    assert devices.own_gpu() == torch.device("cuda", 3)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible


def test_rank_without_gpu_keeps_its_index(monkeypatch):
    """torch raises its own error for it."""
    see_gpus(monkeypatch, 2, 4, "0,1", lambda: pytest.fail("asked CUDA"))
    assert devices.own_gpu() == torch.device("cuda", 2) and os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


def see_gpus(monkeypatch, local_rank, local_size, visible, count):
    """Be a rank of a node; ``count``: how many GPUs CUDA shows afterwards."""
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_size))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")  # restored after the test
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", count, raising=False)


def test_network_check_uses_the_gpu_of_training(monkeypatch):
    """A link of another GPU may have another speed."""
    see_gpus(monkeypatch, 2, 8, "7,6,5", lambda: 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    with pytest.raises(Refused, match="^cuda:0$"):
        network_check.measure("cuda")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"


@pytest.mark.parametrize("asked, visible, used", [(2, 4, 2), (4, 2, 2), (1, 0, 0)])
def test_health_check_multiplies_on_the_gpus_of_all_ranks(asked, visible, used, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    seen = []
    monkeypatch.setattr(health, "_gpu_product", lambda _, device: seen.append(device) or (0, 1e12))
    row = health.check_product(asked)
    assert seen == [torch.device("cuda", index) for index in range(used)]
    if used:
        assert row.state == OK and [name for name, _ in row.rates] == [f"a card, GPU {index}" for index in range(used)]
    else:
        assert row.state == UNKNOWN


class Refused(Exception):
    pass


def refuse(device):
    raise Refused(str(device))
