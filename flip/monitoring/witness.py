"""A hook for tests (FLIP_WITNESS=1): what each rank really saw, step by step, independent of the order function."""

from __future__ import annotations

import json

from flip.data.loader import Batch
from flip.runs.rundir import RunDir


class Witness:
    """witness/<n>.<rank>.jsonl: per trained step S, the ids, and a hash of each image as decoded, before its crop."""

    def __init__(self, run: RunDir, attempt: int, rank: int) -> None:
        folder = run.path / "witness"
        folder.mkdir(exist_ok=True)
        self._file = open(folder / f"{attempt}.{rank}.jsonl", "a", encoding="utf-8")  # noqa: SIM115

    def saw(self, samples: int, batch: Batch) -> None:
        """``batch`` was trained on; its global batch began at S = ``samples``."""
        assert batch.witness is not None
        line = {"samples": samples, "ids": batch.ids.tolist(), "seen": batch.witness.tolist()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
