"""Safetensors files of ours have the permissions that any new file has."""

import os
import stat

import pytest
import torch
from safetensors.torch import load_file

from flip.checkpoint import tensors
from flip.evaluation.cache import FeatureCache


@pytest.fixture(params=[0o022, 0o027, 0o002])
def mode(request):
    """Permissions that a new file has under the umask of this test."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def permissions(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_has_the_permissions_of_the_umask(mode, tmp_path):
    path = tmp_path / "weights.safetensors"
    for value in (1.0, 2.0):  # new, then replaced
        tensors.save({"a": torch.full((3, 2), value).T}, path)
        assert permissions(path) == mode and load_file(path)["a"].tolist() == [[value] * 3] * 2
    assert os.listdir(tmp_path) == ["weights.safetensors"]


def test_cached_features_have_the_permissions_of_the_umask(mode, tmp_path):
    cache = FeatureCache(tmp_path, "model")
    path = cache.path("images", 1)
    cache.put(path, {"features": torch.zeros(2, 3)})
    assert permissions(path) == mode
