"""Tests crops, resizing, affine maps and colours of training views."""

import hashlib

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize as resized

from flip.config.schema import Augment
from flip.data import augment as augmenting
from flip.data.augment import AUGMENTATIONS
from tests.synthetic import draw_image

DEFAULT = Augment()
WHOLE = {"crop_area": [1.0, 1.0], "crop_aspect": [1.0, 1.0], "flip": 0.0}


def draws(n=1, augment=DEFAULT, **fixed):
    """Draws of the steps that ``augment`` uses. ``fixed``: step -> the value of all of its draws."""
    drawn = augmenting.draw(augment, 3, np.zeros(n, dtype=np.int64), np.arange(n))
    return drawn | {name: np.full_like(drawn[name], value) for name, value in fixed.items() if name in drawn}


def view(image, size, augment, **fixed):
    return augmenting.view(image, size, augment, draws(1, augment, **fixed), 0)


def test_crop_boxes_span_configured_areas_and_aspects():
    augment = Augment()
    many = draws(2000)
    boxes = np.array([augmenting.crop_box(300, 200, augment, row) for row in many["crop"]])
    width = boxes[:, 2] - boxes[:, 0]
    height = boxes[:, 3] - boxes[:, 1]
    area = width * height / 60000
    aspect = width / height
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 300 and boxes[:, 3].max() <= 200
    assert 0.49 < area.min() < 0.52 and 0.86 < area.max() < 0.9
    assert 0.74 < aspect.min() < 0.8 and 1.3 < aspect.max() < 1.35
    assert boxes[:, 0].max() > 0 and boxes[:, 1].max() > 0


def test_crop_box_is_central_if_no_drawn_box_fits():
    assert augmenting.crop_box(1000, 100, Augment(), draws()["crop"][0]) == (433, 0, 566, 100)


@pytest.mark.parametrize("resize", ["pillow", "torchvision"])
def test_view_without_crop_equals_image_or_its_mirror(resize):
    image = draw_image(3, 32)
    whole = Augment(**WHOLE)
    assert np.array_equal(augmenting.view(image, 32, whole, draws(1, whole), 0, resize), image)
    flipped = Augment(**WHOLE | {"flip": 1.0})
    mirrored = augmenting.view(image, 32, flipped, draws(1, flipped), 0, resize)
    assert np.array_equal(mirrored, image[:, ::-1])


def test_resize_backends_agree_within_three_levels():
    image = np.kron(draw_image(3, 32), np.ones((4, 4, 1), dtype=np.uint8))
    many = draws(8)
    for row in range(8):
        a, b = (augmenting.view(image, 48, Augment(), many, row, resize) for resize in ("pillow", "torchvision"))
        assert np.abs(a.astype(int) - b).max() <= 3


def test_torchvision_resize_equals_public_torchvision_function():
    """The results are equal bit for bit: views of a run must not depend on how the kernel is called."""
    image = np.kron(draw_image(5, 32), np.ones((3, 3, 1), dtype=np.uint8))
    many = draws(16)
    for row in range(16):
        left, top, right, bottom = augmenting.crop_box(96, 96, Augment(), many["crop"][row])
        cut = torch.from_numpy(image[top:bottom, left:right].copy()).permute(2, 0, 1)
        expected = resized(cut, [48, 48], InterpolationMode.BICUBIC, antialias=True).permute(1, 2, 0).numpy()
        if many["flip"][row] < 0.5:
            expected = expected[:, ::-1]
        assert np.array_equal(augmenting.view(image, 48, Augment(), many, row, "torchvision"), expected)


def test_affine_view_mirrors_rotates_and_shifts_pixels():
    """Draws of 0.5 change nothing; mirror, quarter turn and shift move pixels to the expected places."""
    image = draw_image(4, 32)
    turned = Augment(**WHOLE, rotate=180.0)
    rest = draws(1, turned, affine=0.5)
    assert np.array_equal(augmenting.view(image, 32, turned, rest, 0), image)
    assert np.array_equal(view(image, 32, Augment(**WHOLE | {"flip": 1.0}, zoom=0.1), affine=0.5), image[:, ::-1])
    quarter = rest | {"affine": np.array([[0.75, 0.5, 0.5, 0.5]])}
    clockwise = augmenting.view(image, 32, turned, quarter, 0).astype(int)
    assert np.abs(clockwise - np.rot90(image, -1)).max() <= 1
    shifted = rest | {"affine": np.array([[0.5, 1.0, 0.5, 0.5]])}
    moved = augmenting.view(image, 32, Augment(**WHOLE, translate=0.25), shifted, 0)
    assert np.array_equal(moved[:, :24], image[:, 8:]) and (moved[:, 24:] == 255).all()


def test_affine_view_averages_large_image_before_sampling():
    stripes = np.tile(np.array([[[0] * 3], [[255] * 3]], dtype=np.uint8).reshape(1, 2, 3), (256, 128, 1))
    reduced = view(stripes, 32, Augment(**WHOLE, rotate=1.0), affine=0.5)
    assert np.abs(reduced.astype(int) - 127).max() <= 2


def test_colour_augmentation_scales_values_and_removes_saturation():
    image = draw_image(2, 16)
    for name in ("brightness", "contrast", "saturation"):
        assert np.array_equal(view(image, 16, Augment(**WHOLE, **{name: 0.5}), colour=0.5), image)
    low = {
        name: view(image, 16, Augment(**WHOLE, **{name: 0.5}), colour=0.0).astype(int)
        for name in ("brightness", "contrast")
    }
    assert np.abs(low["brightness"] - image / 2).max() <= 1
    assert np.abs(low["contrast"] - (image / 2 + 63.75)).max() <= 1
    grey = view(image, 16, Augment(**WHOLE, grey=1.0))
    assert (grey.max(axis=2) == grey.min(axis=2)).all()


#: Step -> settings that turn it on, and the digest of eight views by the first release of the step.
GOLDEN = {
    "crop": ({"crop_area": [0.5, 1.0], "crop_aspect": [0.75, 1.3]}, "e26d661470222964"),
    "flip": ({"flip": 0.5}, "f2cd8fb988cee965"),
    "affine": ({"rotate": 30.0, "translate": 0.1, "zoom": 0.2}, "7536d38ea5e17422"),
    "colour": ({"brightness": 0.4, "contrast": 0.3, "saturation": 0.5, "grey": 0.3}, "ddec479b58a376c0"),
}


def views_digest(augment):
    image = np.kron(draw_image(5, 32), np.ones((3, 2, 1), dtype=np.uint8))
    many = draws(8, augment)
    views = [augmenting.view(image, 48, augment, many, row) for row in range(8)]
    return hashlib.sha256(np.stack(views).tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_draws_of_each_step_give_the_same_views_as_ever(name):
    """A run that continues with a newer release must draw the same crops, maps and colours."""
    assert name in GOLDEN, f"{name}: add settings and digest to GOLDEN in tests/flip/data/test_augment.py"
    settings, digest = GOLDEN[name]
    augment = Augment(**WHOLE | settings)
    assert digest == views_digest(augment) != views_digest(Augment(**WHOLE))
