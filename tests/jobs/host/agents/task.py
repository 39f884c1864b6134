"""A task of a step of agents, as srun starts it, without Slurm: the node n7 of a job whose first attempt is 1."""

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from jobs.host import processes

ROOT = Path(__file__).resolve().parents[4]
TASK = {
    "SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "n7", "SLURMD_NODENAME": "n7", "MASTER_ADDR": "127.0.0.1",
}  # fmt: skip


@functools.cache
def srun():
    """A socket in place of that of srun: a task without a coordinator leaves its job to the owner."""
    return socket.create_server(("127.0.0.1", 0), backlog=1000)


def start_task(run, node="n7", index=0, **environ):
    base = {name: value for name, value in os.environ.items() if not name.startswith(("FLIP_", "SLURM"))}
    place = {"SLURMD_NODENAME": node, "SLURM_NODEID": str(index), "SLURM_PROCID": str(index)}
    place |= {"SLURM_SRUN_COMM_HOST": "127.0.0.1", "SLURM_SRUN_COMM_PORT": str(srun().getsockname()[1])}
    own = {"FLIP_RUN": str(run.path), "FLIP_ATTEMPT": "1", "FLIP_SNAPSHOT": str(ROOT), "FLIP_AGENTS": "1"}
    return subprocess.Popen(
        [sys.executable, "-I", ROOT / "jobs" / "host" / "rank_entry.py", "tests.jobs.runtime.agent_rank"],
        env={**base, **TASK, **place, **own, "PYTHONPATH": str(ROOT), **environ},
        cwd="/",
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def processes_of(run):
    """Pids of living processes of a run."""
    pids = []
    for pid, environ in processes.own_environments().items():
        ended = processes.has_ended(processes.read_stat(pid)[1])
        if environ.get("FLIP_RUN") == str(run.path) and not ended:
            pids.append(pid)
    return pids


def has_connection(pid):
    """Whether a process has an established connection of TCP."""
    return bool(_connections(pid))


def has_unread_message(pid):
    """Whether a process has not read all that came to it by TCP."""
    return any(int(queues.split(":")[1], 16) for queues in _connections(pid))


def _connections(pid):
    """The column ``tx_queue:rx_queue`` of /proc/net/tcp for each established connection of a process."""
    rows = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()]
    established = {f"socket:[{row[9]}]": row[4] for row in rows if row[3] == "01"}
    names = set()
    with contextlib.suppress(OSError):  # it has just ended
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                names.add(os.readlink(entry))
    return [queues for name, queues in established.items() if name in names]


def end_task(process, run):
    process.kill()
    process.wait()
    process.stderr.close()
    for pid in processes_of(run):
        with contextlib.suppress(ProcessLookupError):  # the group of another one of them
            os.kill(pid, signal.SIGKILL)
