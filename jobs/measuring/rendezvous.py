"""Nodes of a job meet in a folder of the runs root: they exchange values, and measure how soon a file is visible."""

from __future__ import annotations

import fcntl
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flip.files.creation import open_lock, run_folder
from flip.runs.rundir import read_json, write_json
from jobs.measuring.limited import MeasurementStopped
from jobs.planning.measurement import node_name

ROUNDS = 5
POLL_SECONDS = 0.002


class Rendezvous:
    """The rendezvous of one attempt. All nodes call the same methods in the same order.

    Args:
        folder: shared by the nodes; it belongs to this attempt.
        node: number of this node, of ``nodes``.
        stopped: whether the job must stop, upon which a wait raises MeasurementStopped.
        names: returns the host names of the nodes, by which errors name them; none if they may not be named.
    """

    def __init__(
        self,
        folder: Path,
        node: int,
        nodes: int,
        stopped: Callable[[], bool] = lambda: False,
        names: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self._folder = run_folder(folder)
        self.node = node
        self.nodes = nodes
        self._stopped = stopped
        self.names = names

    def exchange(self, name: str, value: Any, seconds: float) -> list[Any]:
        """The values of all nodes, in their order. Raises TimeoutError if one does not come within ``seconds``."""
        self.leave(name, value)
        end = time.monotonic() + seconds
        return [self._wait(self._folder / f"{name}-{node}.json", end, node)["value"] for node in range(self.nodes)]

    def leave(self, name: str, value: Any) -> None:
        """Write the value of this node, without a wait for the others."""
        write_json(self._folder / f"{name}-{self.node}.json", {"value": value})

    def visible_milliseconds(self, seconds: float) -> float:
        """Milliseconds until a file of the first node and the answers of all others are visible; median of rounds."""
        times = []
        for number in range(ROUNDS):
            self.exchange(f"round{number}", None, seconds)
            start_time = time.monotonic()
            if self.node == 0:
                write_json(self._folder / f"call{number}.json", {})
            else:
                self._wait(self._folder / f"call{number}.json", start_time + seconds, 0)
            self.exchange(f"answer{number}", None, seconds)
            times.append(time.monotonic() - start_time)
        return float(f"{1000 * statistics.median(times):.4g}")

    def locks_exclude(self, seconds: float) -> bool:
        """Whether other nodes cannot take a lock that the first one holds."""
        handle = open_lock(self._folder / "lock")
        try:
            if self.node == 0:
                fcntl.flock(handle, fcntl.LOCK_EX)
            self.exchange("locked", None, seconds)
            refused = self.exchange("tried", self.node == 0 or _is_refused(handle), seconds)
        finally:
            os.close(handle)
        return all(refused)

    def _wait(self, path: Path, end: float, node: int) -> Any:
        while True:
            content = read_json(path)
            if content is not None:
                return content
            if self._stopped():
                raise MeasurementStopped
            if time.monotonic() > end:
                name = node_name(self.names(), node)
                raise TimeoutError(f"{name} did not finish: it has died, is slow, or does not see the same folder")
            time.sleep(POLL_SECONDS)


def _is_refused(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
