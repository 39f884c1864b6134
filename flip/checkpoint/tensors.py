"""Writes safetensors files with the permissions of ordinary files."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write ``tensors`` to ``path``, readable by whoever may read other new files in that folder.

    ``save_file`` renames a temporary file of mode 0600 into place. The permissions are therefore taken from
    an empty file made first, which follows the umask and the folder's default ACL.

    Raises:
        SafetensorError, OSError: the file cannot be written.
    """
    with open(path, "wb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata={"format": "pt"})
    path.chmod(mode)
