"""Starts the ranks of a row on this machine: processes that meet at a store in a folder of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flip.files.creation import create_file


def run_ranks(row: str, options: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """Run a row of this package in each of ``ranks`` processes; returns the numbers of the first one.

    Raises SystemExit with the last error of one that fails.
    """
    with tempfile.TemporaryDirectory() as folder:  # closed to other users, like the store in it
        outputs = _outputs(row, options, ranks, Path(folder))
    return dict(json.loads(outputs[0].strip().splitlines()[-1]))


def _outputs(row: str, options: Mapping[str, Any], ranks: int, folder: Path) -> list[str]:
    place = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "FLIP_STORE": folder / "store"}
    command = [sys.executable, "-m", "jobs.measuring.functions", row, json.dumps(options)]
    processes = []
    for rank in range(ranks):
        environment = place | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1}
        own = os.environ | {name: str(value) for name, value in environment.items()}
        with create_file(folder / f"errors{rank}") as errors:
            processes.append(subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=errors, text=True))
    outputs = [process.communicate()[0] for process in processes]
    for rank, process in enumerate(processes):
        if process.returncode:
            errors = (folder / f"errors{rank}").read_text(encoding="utf-8", errors="replace")
            raise SystemExit(f"rank {rank} has failed: {reason(errors) or f'code {process.returncode}'}")
    return outputs


def reason(errors: str) -> str:
    """The line of the exception that ended a process; warnings of torch may follow it."""
    lines = [re.sub(r"^\[rank\d+\]: ?", "", line) for line in errors.splitlines()]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit)\b", line)]
    return (raised or lines or [""])[-1]
