"""A copy of the code that torch compiles for GPUs, in the run directory, for attempts on other nodes.

Ranks compile into a folder on the disk of their node (``parallel.set_compile_caches``): the blocks of H/14 are hundreds
of small files, which every rank would write to the shared file system. Rank 0 copies what it has used into one file per
stage, and the first rank of each node of a later attempt loads it. The code is the same for every rank
(``devices.own_gpu``). torch itself checks that it fits the GPU, the model and the releases of libraries.

Code for a CPU stays in the run directory: the file would lack its shared objects.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from flip.config.schema import Compute
from flip.distributed import parallel
from flip.files.creation import private_folder, read_trusted
from flip.monitoring.collector import CompiledGraphs
from flip.runs.rundir import RunDir, write_bytes
from flip.training.callbacks import Callback, Training

log = logging.getLogger(__name__)
LARGEST_FILE = 1 << 30
"""Bytes. A larger file is not loaded."""


def is_copied(compute: Compute) -> bool:
    """Whether a run has such files."""
    return compute.compile == "yes" and compute.device == "cuda"


class CompiledCode(Callback):
    """Loads the compiled code of a stage when it starts, and copies it to the run directory with the saves.

    Without the file, or if it cannot be read or written, ranks compile as in a first attempt.
    """

    def __init__(self, run: RunDir, world: parallel.World) -> None:
        self._run = run
        self._world = world
        self._graphs = 0
        """Compiled graphs of this process at the last copy."""
        self._parts = 0
        """Parts of the file of this stage: the copy of a short attempt must not replace one that has more."""

    def start_stage(self, training: Training) -> None:
        self._parts = 0
        if os.environ.get("LOCAL_RANK", "0") == "0":
            self._load(self._file(training))
        if self._world.size > 1:
            parallel.check_group(self._world.control_group)  # the other ranks of the node find what this one has loaded

    def save(self, training: Training) -> None:
        graphs = CompiledGraphs.count()
        if self._world.is_rank0 and graphs > self._graphs:
            self._graphs = graphs
            self._copy(self._file(training))

    def _file(self, training: Training) -> Path:
        return self._run.compiled / f"{training.span.stage.name}.bin"

    def _load(self, file: Path) -> None:
        try:
            private_folder(file.parent)  # torch unpickles the code
            saved = torch.compiler.load_cache_artifacts(read_trusted(file, LARGEST_FILE))
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            log.warning("compiled code of an earlier attempt is not used: %s", error)
            return
        if saved is not None:  # else torch has logged why
            self._parts = _count(saved)

    def _copy(self, file: Path) -> None:
        saved = torch.compiler.save_cache_artifacts()
        if saved is None:
            return
        data, contents = saved
        parts = _count(contents)
        if parts < self._parts:
            return
        try:
            private_folder(file.parent)
            write_bytes(file, data, 0o600)
        except OSError as error:
            log.warning("compiled code is not kept for later attempts: %s", error)
            return
        self._parts = parts


def _count(contents: torch.compiler.CacheInfo) -> int:
    return sum(map(len, contents.artifacts.values()))
