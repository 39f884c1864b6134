"""The ranks of tests/jobs/local/test_agents.py: they form a process group, record this in a file, and wait for
another file."""

import os
import sys
import time
from pathlib import Path

import torch
from torch import distributed

from flip.config import schema
from flip.distributed import parallel
from flip.runs.rundir import write_json

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    world = parallel.start(schema.Compute(device="cpu", threads=1, deterministic="no"))
    distributed.all_reduce(torch.ones(1), group=world.control_group)
    chosen = os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]
    write_json(folder / f"met.{world.rank}", {"pid": os.getpid(), "interfaces": chosen})
    while not (folder / "leave").exists():
        time.sleep(0.02)
    os._exit(0)
