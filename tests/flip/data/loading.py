"""Shared helpers for tests of the loader: a configuration and a loader for it."""

from flip.config import schema
from flip.data.loader import Loader
from flip.data.worker import WorkerConfig

SAMPLES = 203
CHUNK = 2
BLOCK = 3
LANES = 12
BATCH = 48

AFFINE = schema.Augment(rotate=15, translate=0.1, zoom=0.2, brightness=0.2, contrast=0.2, saturation=0.2, grey=0.2)
PLAIN = schema.Augment()


def loader(original, rank=0, world=1, workers=0, augment=PLAIN, folder=None, pinned=False, **fields):
    """A loader of ``folder``, by default of ``original``, whose parent has the tokenizer unless ``fields`` name one."""
    values = {
        "chunk": CHUNK, "block": BLOCK, "lanes": LANES, "decoder": "pillow", "resize": "pillow",
        "tokenizer": str(original.parent / "tokenizer.json"),
    } | fields  # fmt: skip
    data = schema.Data(manifest=str(folder or original), workers=workers, **values)
    image = schema.ImageTower(size=24, patch=8)
    text = schema.TextTower(length=8, vocabulary=300)
    return Loader(WorkerConfig(data, augment, image, text, 11), rank, world, pinned)
