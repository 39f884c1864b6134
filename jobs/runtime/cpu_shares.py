"""Divides the CPUs of a node agent between its ranks: ``share_of_cpus``."""

import os
import re
from collections.abc import Mapping
from pathlib import Path


def share_of_cpus(local_rank: int, ranks: int, environ: Mapping[str, str]) -> list[int]:
    """The CPUs of a rank, if Slurm has bound this process to those of all its ranks; empty: as this process.

    Threads of a core stay together, and neighbouring ranks on a socket, as Slurm distributes them by block:block.
    """
    if not re.search("(mask|map)_(cpu|ldom)", environ.get("SLURM_CPU_BIND", "")):
        return []
    cpus = sorted(os.sched_getaffinity(0), key=lambda cpu: (package(cpu), first_thread(cpu), cpu))
    each = len(cpus) // ranks
    return cpus[local_rank * each : (local_rank + 1) * each]


def package(cpu: int, folder: Path = Path("/sys/devices/system/cpu")) -> int:
    """The number of the socket of a CPU; 0 if the system does not show it."""
    try:
        return int((folder / f"cpu{cpu}" / "topology" / "physical_package_id").read_text())
    except OSError:
        return 0


def first_thread(cpu: int, folder: Path = Path("/sys/devices/system/cpu")) -> int:
    """The lowest number of a thread of the same core; the own one if the system does not show it."""
    try:
        text = (folder / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text()
    except OSError:
        return cpu
    return int(re.split("[,-]", text)[0])
