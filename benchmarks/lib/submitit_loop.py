"""A job of submitit with two ranks, which add up a number in each step until the job is cancelled."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

PAUSE = 0.05
"""Seconds between two steps, as of the training that it is compared with."""


class Loop:
    """What each rank calls. Rank 0 writes a line per step into a file of each start of the job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self) -> None:
        import torch
        import torch.distributed

        rank = int(os.environ["SLURM_PROCID"])
        restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        port = 20000 + (31 * int(os.environ["SLURM_JOB_ID"]) + restarts) % 9000
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # all nodes are on this machine
        torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
        (self.folder / f"pid.{rank}").write_text(str(os.getpid()))
        total = torch.ones(1)
        while True:
            torch.distributed.all_reduce(total)
            if rank == 0:
                with open(self._lines(restarts), "a") as file:
                    file.write(f"{time.time()}\n")
            time.sleep(PAUSE)

    def checkpoint(self) -> Any:
        """submitit calls it at SIGUSR2, and requeues the job to call the result."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def steps(self, restarts: int) -> int:
        """Steps since the job has started for the (``restarts`` + 1)-th time."""
        path = self._lines(restarts)
        if not path.exists():
            return 0
        return path.read_text().count("\n")

    def pid(self, rank: int) -> int:
        """Of the newest process of a rank."""
        return int((self.folder / f"pid.{rank}").read_text())

    def _lines(self, restarts: int) -> Path:
        return self.folder / f"steps.{restarts}"


def submit(folder: Path, partition: str) -> str:
    """Submit a job of two nodes with one rank each; returns its number."""
    from submitit import AutoExecutor

    folder.mkdir()
    executor = AutoExecutor(folder / "log", cluster="slurm")
    executor.update_parameters(
        nodes=2, tasks_per_node=1, cpus_per_task=1, timeout_min=30, slurm_partition=partition,
        slurm_signal_delay_s=60,
    )  # fmt: skip
    return str(executor.submit(Loop(folder)).job_id)
