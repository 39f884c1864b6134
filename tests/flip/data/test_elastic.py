"""Tests that fifty global batches are equal if a run changes its layout of ranks and workers twice.

Runs with one data set and with two; N is 203 and 203 + 120, so that fifty batches of 48 cover several passes.
"""

import random

import pytest
import torch

from flip.config import schema
from flip.data.loader import Loader
from flip.data.worker import WorkerConfig
from tests.flip.data.loading import PLAIN
from tests.synthetic import make_dataset

pytestmark = pytest.mark.long

LAYOUTS = [(1, 0), (1, 1), (2, 1), (2, 3), (4, 2), (8, 1)]
"""Ranks, and workers per rank."""
STEPS = 50
BATCH = 48
LANES = 24


@pytest.fixture(scope="module", params=["one data set", "two"])
def data(request, original, tmp_path_factory):
    common = {"block": 3, "lanes": LANES, "decoder": "pillow", "resize": "pillow"}
    common["tokenizer"] = str(original.parent / "tokenizer.json")
    if request.param == "one data set":
        return schema.Data(manifest=str(original), samples=203, chunk=2, **common)
    other = make_dataset(tmp_path_factory.mktemp("other"), 120, 3, size=32, seed=1, chunk=4)
    sets = [schema.DataSet("a", str(original), 2, 16, chunk=2), schema.DataSet("b", str(other), 1, 8, chunk=4)]
    return schema.Data(sets=sets, **common)


def batches(data, layout, steps):
    """Global batches of ``steps``, concatenated from all ranks."""
    world, workers = layout
    data.workers = workers
    parts = []
    for rank in range(world):
        image = schema.ImageTower(size=24, patch=8)
        text = schema.TextTower(length=8, vocabulary=300)
        loader = Loader(WorkerConfig(data, PLAIN, image, text, 11), rank, world)
        source = loader.batches(steps.start * BATCH, BATCH, "0.5")
        parts.append([next(source) for _ in steps])
        source.close()
    names = ("patches", "keep_indices", "tokens", "ids")
    return [{name: torch.cat([getattr(part[t], name) for part in parts]) for name in names} for t in range(len(steps))]


@pytest.fixture(scope="module")
def reference(data):
    return batches(data, LAYOUTS[0], range(STEPS))


@pytest.mark.parametrize("first", range(len(LAYOUTS)), ids=["x".join(map(str, layout)) for layout in LAYOUTS])
def test_batches_are_equal_across_two_changes_of_layout(data, reference, first):
    draw = random.Random(first)
    later_layouts = draw.sample([layout for layout in LAYOUTS if layout != LAYOUTS[first]], 2)
    borders = [0, *sorted(draw.sample(range(1, STEPS), 2)), STEPS]
    resumed = []
    for layout, start, stop in zip([LAYOUTS[first], *later_layouts], borders[:-1], borders[1:], strict=True):
        resumed += batches(data, layout, range(start, stop))
    wrong = [
        (t, name) for t in range(STEPS) for name in resumed[t] if not torch.equal(resumed[t][name], reference[t][name])
    ]
    assert not wrong, f"layouts {LAYOUTS[first]}, {later_layouts} from steps {borders}"
