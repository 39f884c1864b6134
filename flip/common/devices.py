"""The GPUs that a process may use, and which of them is a rank's: the local rank i has the i-th visible GPU.

torch is imported only by the functions that return its devices.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

VISIBLE = "CUDA_VISIBLE_DEVICES"


def named_gpus(environ: Mapping[str, str]) -> list[str] | None:
    """The names in CUDA_VISIBLE_DEVICES. None without it: all GPUs of the node are visible."""
    names = environ.get(VISIBLE)
    if names is None:
        return None
    return [name.strip() for name in names.split(",") if name.strip()]


def own_gpu() -> torch.device:
    """The GPU of this rank: ``cuda:0`` in every rank, because the other GPUs of the node are hidden from it.

    Compiled code contains the index of its device, so that ranks with other indices could not load it. NCCL reaches the
    GPUs of other processes although they are hidden. CUDA reads the variable once: in a process that has asked for its
    GPUs before, they stay visible, and the index is LOCAL_RANK.
    """
    import torch

    number = int(os.environ.get("LOCAL_RANK", 0))
    names = named_gpus(os.environ)
    if names is None:
        names = [str(index) for index in range(number + 1)]
    if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) == 1 or number >= len(names):
        return torch.device("cuda", number)
    before = os.environ.get(VISIBLE)
    os.environ[VISIBLE] = names[number]
    if torch._C._cuda_getDeviceCount() == 1:
        return torch.device("cuda", 0)
    if before is None:
        del os.environ[VISIBLE]
    else:
        os.environ[VISIBLE] = before
    return torch.device("cuda", number)


def gpus_of_ranks(count: int) -> list[torch.device]:
    """The GPUs of the first ``count`` ranks of this node in a process that uses all of them; fewer if it sees fewer."""
    import torch

    return [torch.device("cuda", index) for index in range(min(count, torch.cuda.device_count()))]
