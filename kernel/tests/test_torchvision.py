"""Tests the data set of torchvision in the README: it has the same items with the kernel and without it."""

import re
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from images import draw_image
from PIL import Image
from torch.utils.data import DataLoader

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[1]


@pytest.fixture
def images(tmp_path):
    """The data set of the README, with twelve JPEG files and a PNG file."""
    pytest.importorskip("torchvision")
    names = {}
    exec(compile(EXAMPLE, "README.md", "exec"), names)
    folder = tmp_path / "class"
    folder.mkdir()
    random = np.random.default_rng(3)
    for i in range(12):
        pixels = draw_image(random, 90 + 7 * i, 150 - 5 * i)
        (folder / f"{i:02d}.jpg").write_bytes(simplejpeg.encode_jpeg(pixels, 90, colorsubsampling="420"))
    Image.fromarray(draw_image(random, 80, 70)).save(folder / "12.png")
    return names["MaskedImages"](tmp_path)


def items(images):
    torch.manual_seed(7)
    return [images[i] for i in range(len(images))]


def test_items_are_equal_with_kernel_and_without(kernel, images, monkeypatch):
    decoded = []
    patches = kernel.File.patches

    def counted(*arguments, **named):
        result = patches(*arguments, **named)
        decoded.append(result is not None)
        return result

    monkeypatch.setattr(kernel.File, "patches", counted)
    fast = items(images)
    assert decoded.count(True) > 8, "noise of high contrast may be refused"
    monkeypatch.setattr(kernel.File, "patches", lambda *arguments, **named: None)
    slow = items(images)
    for (some, kept), (others, positions) in zip(fast, slow, strict=True):
        assert some.shape == (98, 768) and some.dtype == torch.uint8 and len(set(kept.tolist())) == 98
        assert torch.equal(kept, positions) and torch.equal(some, others)
    assert len({positions[0].item() for _, positions in fast}) > 5


def test_data_loader_collates_items(kernel, images):
    patches, positions = next(iter(DataLoader(images, batch_size=6)))
    assert patches.shape == (6, 98, 768) and positions.shape == (6, 98)
