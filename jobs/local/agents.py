"""Attempts of a run on this machine: a node agent starts the ranks, and this process is its coordinator.

An agent outlives an attempt that ended by a fault: the next one starts its ranks from it, in seconds. Its connection is
a socket pair; if this process dies, the agent lets the ranks save and ends (``jobs.runtime.node_agent``). If the agent
dies, the ranks do the same by their lifeline, and are waited for as those of a dead supervisor.
"""

import logging
import os
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flip.common import devices
from flip.common.shutdown import ORPHAN_GRACE_SECONDS
from flip.files import deletion, python_path
from flip.files.creation import RefusedPath, open_append
from flip.runs.errors import CAUSES, COMPLETE
from flip.runs.rundir import RunDir
from jobs.host.agents.channel import KEY_VARIABLE, new_key
from jobs.host.agents.coordinator import TIMING, Coordinator, State
from jobs.host.agents.server import AgentServer
from jobs.host.processes import AGENT_VARIABLE
from jobs.host.rank_entry import allocator
from jobs.local.adopted import AdoptedAttempt, adopt
from jobs.local.stores import make_store

JOB_KEYS = ("python", "module", "snapshot", "world", "env")  # what ``start`` needs of a job.json
IMPORT_SECONDS = 600.0  # for an agent to import torch and the trainer, from a cold file system
ADOPTION = ORPHAN_GRACE_SECONDS + 10.0  # for ranks whose agent or supervisor died: their lifeline lets them save

STALL_SECONDS = 120.0  # for which an agent may wait for a disk; its death is seen at once, by the end of its connection
LEAVE_SECONDS = 10.0  # for an agent without ranks to end
LATE = (
    f"its node agent was not ready within {IMPORT_SECONDS:g} s and was ended: see that the file systems of the code and"
    " of its Python answer, and that the machine is not overloaded"
)

log = logging.getLogger("supervisor")


class LocalAgent:
    """The node agent of a run, with its coordinator. ``job``: the fields ``JOB_KEYS`` of its job.json.

    Raises OSError if the process cannot be started. ``n``: the attempt whose logs it writes to.
    """

    def __init__(self, run: RunDir, n: int, job: Mapping[str, Any], grace: float, gpus: Sequence[str]) -> None:
        self.job = job
        timing = TIMING._replace(
            ready=IMPORT_SECONDS,
            silence=STALL_SECONDS,
            kill=STALL_SECONDS,
            peer_grace=grace,
            killed_grace=min(grace, TIMING.killed_grace),
        )
        self.coordinator = Coordinator(timing, log=lambda text: log.info("%s: %s", run.name, text))
        key = new_key()
        self._server = AgentServer(self.coordinator, key)
        own, other = socket.socketpair()
        try:
            environ = {**_environment(run, job, gpus), KEY_VARIABLE: key.hex()}
            self.process = self._start(run, n, environ, other)
        except OSError:
            own.close()
            raise
        finally:
            other.close()
        self._server.add(own)

    def _start(self, run: RunDir, n: int, environ: dict[str, str], sock: socket.socket) -> subprocess.Popen[bytes]:
        folder = run.open_logs(n)
        with open_append(folder / "node0.out") as output, open_append(folder / "node0.err") as errors:
            return subprocess.Popen(
                [*_command(self.job), str(run.path), self.job["module"], "--socket", str(sock.fileno())],
                cwd=self.job["snapshot"],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                pass_fds=[sock.fileno()],
                start_new_session=True,
            )

    def poll(self) -> None:
        """Handle what the agent has sent, and what is due."""
        self._server.poll()

    @property
    def code(self) -> int | None:
        """Its exit code, as in a shell; None while it runs."""
        code = self.process.poll()
        if code is not None and code < 0:
            return 128 - code
        return code

    def is_usable(self) -> bool:
        """Whether it can start another attempt."""
        return bool(self.coordinator.ready()) and self.coordinator.state is State.DECIDE

    def leave(self) -> None:
        """Ask it to end, with the ranks that it has. The caller waits for ``process``."""
        self.coordinator.leave()
        self._server.close()

    def kill(self) -> None:
        self.process.kill()
        self._server.close()


class AgentAttempt:
    """Attempt n of a run, from its start to the end of its last rank."""

    observed = True

    def __init__(self, run: RunDir, n: int, agent: LocalAgent, gpus: Sequence[str]) -> None:
        self.run = run
        self.n = n
        self.agent = agent
        self.gpus = gpus  # names of the devices that it was given, as in CUDA_VISIBLE_DEVICES
        self.world: int = agent.job["world"]
        self.code: int | None = None  # of the attempt, when ``poll`` has returned True
        self.failure: tuple[str, str] | None = None  # (cause, reason) if it could not be started
        self.noticed: float | None = None  # when a rank was seen to fail, or the agent to die
        self.stop_requested = False  # whether a rank was asked to save and stop
        self.store: Path | None = None  # private folder of the file in which several ranks publish their addresses
        if self.world > 1:
            self.store = make_store(run, n)
        self._started = False
        self._leaves_by: float | None = None  # when the agent of a complete attempt is killed
        self._orphans: AdoptedAttempt | None = None  # its ranks, after the death of the agent

    def poll(self) -> bool:
        """Whether all ranks have ended and nothing of them is left."""
        if self._orphans is not None:
            return self._orphans.poll()
        if self._leaves_by is not None:
            return self._has_left(self._leaves_by)
        self.agent.poll()
        if not self._started:
            return self._start()
        if self.agent.coordinator.state is not State.DECIDE:
            return False
        outcome = self.agent.coordinator.outcome
        assert outcome is not None
        self.code = outcome.code
        if self.noticed is None:
            self.noticed = time.time() - outcome.settling
        self.stop_requested = self.stop_requested or outcome.stop_requested
        if self.code == COMPLETE:  # no attempt follows
            self.agent.leave()
            self._leaves_by = time.monotonic() + LEAVE_SECONDS
            return False
        if not outcome.lost:
            return True
        self.agent.kill()  # it may be stopped, or hang
        self._orphans = adopt(self.run, self.n, ADOPTION)
        return self._orphans.poll()

    def _has_left(self, deadline: float) -> bool:
        if time.monotonic() > deadline:
            self.agent.kill()
        return self.agent.code is not None

    def _start(self) -> bool:
        """Start the ranks as soon as the agent is ready. Returns whether it has ended instead."""
        coordinator = self.agent.coordinator
        if coordinator.ready():
            environ = _attempt_environment(self.store, self.gpus)
            coordinator.start(self.n, [range(self.world)], {"environment": environ})
            self._started = True
            return False
        if not coordinator.agents:
            if coordinator.late_agent:
                self.failure = "hang", LATE
            self.agent.kill()
        self.code = self.agent.code
        return self.code is not None

    def terminate(self, seconds: float) -> None:
        """Ask all ranks to save and stop; SIGKILL ``seconds`` after the first call. Called until they have ended."""
        if self._orphans is not None:
            self._orphans.terminate(seconds)
        elif self._started:  # after its end without effect
            self.agent.coordinator.stop("TERM", seconds)
        else:  # nothing to save yet
            self.stop_requested = True
            self.agent.kill()

    def close(self) -> None:
        if self.store is not None:
            deletion.discard_own_folder(self.store)


class FailedAttempt:
    """Attempt n, which failed to start: this machine could not start a process or open a file."""

    agent = None
    world = 0
    gpus: Sequence[str] = ()
    stop_requested = False
    noticed = None
    observed = True

    def __init__(self, run: RunDir, n: int, job: Mapping[str, Any], error: OSError) -> None:
        self.run = run
        self.n = n
        # Storage is retried. An error without a file name: no temporary folder is writable (a full disk).
        if isinstance(error, FileNotFoundError) and error.filename:
            cause = "config"
        else:
            cause = "storage"
        if isinstance(error, RefusedPath):
            cause = "permission"
        self.failure = cause, f"cannot start {job['python']} in {job['snapshot']}: {error}"
        self.code = CAUSES[cause]

    def poll(self) -> bool:
        return True

    def terminate(self, seconds: float) -> None:
        """Nothing runs."""

    def close(self) -> None:
        """Nothing is open."""


Attempt = AgentAttempt | AdoptedAttempt | FailedAttempt


def start(
    run: RunDir,
    n: int,
    job: Mapping[str, Any],
    grace: float,
    gpus: Sequence[str] = (),
    agent: LocalAgent | None = None,
) -> AgentAttempt:
    """Start attempt n, with ``job`` from job.json, from ``agent`` if there is one, else from a new one.

    ``gpus``: those that the ranks see, all if empty. ``grace``: seconds that the peers of a failed rank get. Raises
    OSError if a process cannot be started, or a file not be opened.
    """
    started = agent
    try:
        if started is None:
            started = LocalAgent(run, n, job, grace, gpus)
        else:
            run.open_logs(n)
            started.coordinator.gather()
        return AgentAttempt(run, n, started, gpus)
    except OSError:
        if started is not None:
            started.leave()
        raise


def visible_gpus(environ: Mapping[str, str]) -> list[str]:
    """The GPUs that a process may use: names of CUDA_VISIBLE_DEVICES, or indices of all devices of NVIDIA's driver."""
    names = devices.named_gpus(environ)
    if names is None:
        return [str(index) for index, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]
    return names


def _command(job: Mapping[str, Any]) -> list[str]:
    """The interpreter, and the agent of the run's code."""
    return [job["python"], "-m", "jobs.runtime.node_agent"]


def _environment(run: RunDir, job: Mapping[str, Any], gpus: Sequence[str]) -> dict[str, str]:
    """The environment of an agent. ``allocator``: the C library reads its settings when a process starts."""
    own = {
        **python_path.variables(job["snapshot"]),
        "PYTHONUNBUFFERED": "1",  # ranks share a log: whole lines, at once
        "FLIP_RUN": str(run.path),
        "FLIP_SNAPSHOT": job["snapshot"],
        AGENT_VARIABLE: "1",
    }
    inherited = {**os.environ, **job["env"]}
    if gpus:
        inherited[devices.VISIBLE] = ",".join(gpus)
    return {**inherited, **allocator(inherited), **own}


def _attempt_environment(store: Path | None, gpus: Sequence[str]) -> dict[str, str]:
    """Variables of the ranks of one attempt."""
    environ = {"FLIP_STORE": ""}
    if store is not None:
        environ["FLIP_STORE"] = str(store / "store")
    if gpus:
        environ[devices.VISIBLE] = ",".join(gpus)
    return environ
