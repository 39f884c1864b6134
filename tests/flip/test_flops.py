"""Tests parameter counts, FLOPs and loss memory of costs against published numbers.

models/test_clip.py compares them with the built model.
"""

import pytest

from flip import model_costs
from flip.config.schema import MODEL_PRESETS, ImageTower, Model, TextTower


def sized(name):
    row = MODEL_PRESETS[name]
    return Model(size=name, embed=row["embed"], image=ImageTower(**row["image"]), text=TextTower(**row["text"]))


@pytest.mark.parametrize("name, millions", [("B/16", 139.8), ("L/16", 413.0), ("H/14", 966.4)])
def test_parameters_match_published_numbers(name, millions):
    assert model_costs.parameters(sized(name))["total"] == pytest.approx(millions * 1e6, rel=1e-3)


def test_parameters_of_b16_are_exact():
    assert model_costs.parameters(sized("B/16"))["total"] == 139_776_001


@pytest.mark.parametrize(
    "name, image, text, share, ratios",
    [
        ("B/16", (35.13, 17.41, 8.82), 2.44, 6.95, (0.528, 0.300)),
        ("L/16", (123.11, 61.07, 30.75), 5.47, 4.45, (0.517, 0.282)),
        ("H/14", (334.59, 165.43, 82.87), 19.43, 5.81, (0.522, 0.289)),
    ],
)
def test_forward_flops_match_published_numbers(name, image, text, share, ratios):
    model = sized(name)
    flops = [model_costs.forward_flops(model, mask) for mask in ("0", "0.5", "0.75")]
    for count, mask in zip(
        flops, (0, 0.5, 0.75), strict=True
    ):  # the table also embeds masked patches; our model never does
        masked = mask * (model.image.size // model.image.patch) ** 2 * 2 * 3 * model.image.patch**2 * model.image.width
        count["image"], count["total"] = count["image"] + masked, count["total"] + masked
    assert [f["image"] / 1e9 for f in flops] == pytest.approx(image, abs=0.006)
    assert flops[0]["text"] / 1e9 == pytest.approx(text, abs=0.006)
    assert 100 * flops[0]["text"] / flops[0]["image"] == pytest.approx(share, abs=0.01)
    assert [f["total"] / flops[0]["total"] for f in flops[1:]] == pytest.approx(ratios, abs=6e-4)
    assert model_costs.training_flops(model, "0.5")["text"] == 3 * flops[1]["text"]


def test_cost_of_masked_images_matches_paper():
    """For L/16 the paper reports 0.52 and 0.28 of the unmasked cost."""
    full, half, quarter = (model_costs.forward_flops(sized("L/16"), mask)["total"] for mask in ("0", "0.5", "0.75"))
    assert (round(half / full, 2), round(quarter / full, 2)) == (0.52, 0.28)


def test_cost_of_masked_text_matches_paper():
    """Table 1c: with 75 % of patches masked, half of the text positions take 0.92 of the time."""
    full, half = (model_costs.training_flops(sized("L/16"), "0.75", positions)["total"] for positions in (None, 16))
    assert round(half / full, 2) == 0.92
    assert model_costs.training_flops(sized("L/16"), "0.75", 32)["total"] == full


def test_loss_bytes_grow_linearly_with_texts():
    sizes = [model_costs.loss_bytes(256, world, 768, tile=512) for world in (1, 2, 4, 8)]
    per_text = 4 * (2 * 768 + 4)  # a text feature, its gradient, and the statistics of its column
    assert [b - a for a, b in zip(sizes[1:], sizes[2:], strict=False)] == [512 * per_text, 1024 * per_text]
    assert sizes[1] - sizes[0] == 256 * per_text + 4 * 3 * 256 * 256  # the tile was not full with 1 rank
