"""What a process on the stub sees: counters of the runtime, cuDNN's attention, and a world that it fills alone.

Import it before the first CUDA call of the process. ``build.py`` starts processes on the stub.
"""

import contextlib
import ctypes
import json
import math
import os
import tempfile
from collections import Counter
from unittest import mock

from torch import distributed

from flip.common import shutdown
from flip.distributed import parallel

_library = ctypes.CDLL(None)
_library.stub_name.restype = ctypes.c_char_p
_library.stub_calls.restype = ctypes.c_long

COLLECTIVES = {"_all_gather_base": "gathers", "_reduce_scatter_base": "scatters", "all_reduce": "reductions"}
"""Names in the flight recorder -> in the rehearsal."""
WIDTHS = {"Float": 4, "BFloat16": 2, "Int": 4, "Long": 8, "Double": 8, "Byte": 1, "Bool": 1}


def calls():
    """Counter of the calls since ``reset``: waits, copies, products, and kernels by name."""
    return Counter(
        {_library.stub_name(i).decode(): n for i in range(_library.stub_names()) if (n := _library.stub_calls(i))}
    )


def reset():
    _library.stub_reset()


def waits(counted=None):
    """The calls in which the host waited for the device."""
    return {name: n for name, n in (counted or calls()).items() if name.startswith("wait ")}


def attention_kernels(counted):
    """Names of the attention kernels among launched ones, and how often each was launched."""
    kinds = {"flash_fwd": "flash", "flash_bwd_dq_dk": "flash backward", "fmha_cutlassF": "efficient",
             "fmha_cutlassB": "efficient backward", "cudnn attention": "cudnn",
             "cudnn backward": "cudnn backward"}  # fmt: skip
    seen = Counter()
    for name, n in counted.items():
        for part, kind in kinds.items():
            if part in name:
                seen[kind] += n
    return dict(seen)


@contextlib.contextmanager
def world(compute, size, local=8, local_rank=0, **options):
    """``parallel.start`` as rank 0 of ``size`` ranks, ``local`` of them on this node, with the GPU of ``local_rank``.

    NCCL is real above the stub's library; groups of gloo, which would wait for the other ranks, are fake ones.
    """
    new_group = distributed.new_group
    initialise = distributed.init_process_group

    def without_gloo(*ranks, backend=None, **options):
        if backend == "gloo" and size > 1:
            backend = "fake"
        return new_group(*ranks, backend=backend, **options)

    def start(backend, **options):
        if size > 1:
            backend = backend.replace("gloo", "fake")
        initialise(backend, **options)

    with tempfile.TemporaryDirectory() as folder:
        local = min(local, size)
        environment = {"RANK": "0", "WORLD_SIZE": str(size), "LOCAL_RANK": str(local_rank)}
        environment |= {"LOCAL_WORLD_SIZE": str(local)}
        environment |= {"FLIP_STORE": f"{folder}/store", "TORCH_FR_BUFFER_SIZE": "100000", "TORCH_FR_CPP_STACK": "0"}
        # From 128 ranks on, torch waits for the identifiers of further roots, which are other ranks.
        environment["TORCH_NCCL_RANKS_PER_ROOT"] = str(size)
        with contextlib.ExitStack() as patches:
            patches.enter_context(mock.patch.dict(os.environ, environment))
            patches.enter_context(mock.patch.object(distributed, "init_process_group", start))
            patches.enter_context(mock.patch.object(distributed, "new_group", without_gloo))
            patches.enter_context(mock.patch.object(parallel, "wait_for_ranks", lambda *_: None))
            try:
                yield parallel.start(compute, **options)
            finally:
                parallel.stop()


def records():
    """The flight recorder's entries of NCCL's collectives, and group name -> number of ranks."""
    record = json.loads(shutdown.flight_record())
    return record.get("entries", []), {
        name: len(json.loads(about["ranks"])) for name, about in record["pg_config"].items()
    }


def collectives(since=0):
    """Collectives of NCCL after the first ``since`` as the rehearsal counts them: kind -> [count, GB]."""
    count = Counter()
    moved = Counter()
    entries, sizes = records()
    for entry in entries[since:]:
        name = entry["profiling_name"].removeprefix("nccl:")
        kind = f"{COLLECTIVES.get(name, name)} of {sizes[entry['process_group'][0]]}"
        largest = max(_bytes(entry, "input"), _bytes(entry, "output"))
        count[kind] += 1
        moved[kind] += largest
    return {kind: [n, round(moved[kind] / 1e9, 2)] for kind, n in sorted(count.items())}


def _bytes(entry, side):
    values = zip(entry[f"{side}_sizes"], entry[f"{side}_dtypes"], strict=True)
    return sum(math.prod(size) * WIDTHS[dtype] for size, dtype in values)
