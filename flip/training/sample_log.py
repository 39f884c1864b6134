"""A log of the samples that each rank trained on, for tests (FLIP_WITNESS=1)."""

from __future__ import annotations

import hashlib
import json

import torch

from flip.files.creation import open_append, run_folder
from flip.runs.rundir import RunDir
from flip.training.callbacks import Callback, Training

VARIABLE = "FLIP_WITNESS"
"""Environment variable that turns the log on, with the value 1."""


def patch_hashes(patches: torch.Tensor) -> list[int]:
    """The first 8 bytes, little endian and signed, of the SHA-256 of each sample's patches (b, K, p*p*3)."""
    rows = (hashlib.sha256(row.tobytes()).digest() for row in patches.numpy())
    return [int.from_bytes(digest[:8], "little", signed=True) for digest in rows]


class SampleLog(Callback):
    """Writes witness/<attempt>.<rank>.jsonl: per step, S before it, the sample ids, and a hash of what the model saw of
    each image, its visible patches."""

    def __init__(self, run: RunDir, attempt: int, rank: int) -> None:
        folder = run_folder(run.path / "witness")
        self._file = open_append(folder / f"{attempt}.{rank}.jsonl", "utf-8")

    def step(self, training: Training) -> None:
        batch = training.batch
        assert batch is not None
        before = training.samples_seen - training.span.stage.batch
        line = {"samples": before, "ids": batch.ids.tolist(), "seen": patch_hashes(batch.patches)}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
