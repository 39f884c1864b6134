"""Features kept between evaluations: a folder per model, a safetensors file per data set and view. Rank 0's alone.

    <root>/<model>/images-<key>.safetensors    features (N, E), labels (N,), ids (N,)
    <root>/<model>/texts-<key>.safetensors     features (C, E)

``model`` is a commit's digest with how it is computed; a key is a hash of all else that moves a feature. Files appear
whole; one that cannot be read is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flip.checkpoint.safetensors_io import save_tensors
from flip.runs.rundir import sync_folder

log = logging.getLogger(__name__)


class FeatureCache:
    """``folder``: of one model."""

    def __init__(self, root: os.PathLike[str] | str, model: str) -> None:
        self.folder = Path(root) / model

    def path(self, kind: str, *parts: Any) -> Path:
        """Of features that ``parts`` (plain values) determine."""
        text = json.dumps(parts, sort_keys=True)
        return self.folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"

    def get(self, path: Path) -> dict[str, Tensor] | None:
        """The tensors, None where they are not there whole."""
        try:
            return load_file(path)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            log.warning("cached features cannot be read and are made again: %s: %s", path, error)
            return None

    def put(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Keep them; where that does not work (a full disk), a line says so and nothing is kept."""
        temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_tensors(tensors, temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(self.folder)
        except (SafetensorError, OSError) as error:
            temporary.unlink(missing_ok=True)
            log.warning("features are not kept: %s: %s", path, error)
