"""What the processes of a run leave on their machine: processes, temporary files with sockets, and shared memory."""

import os
from pathlib import Path

from flip.runs.rundir import OWNER, read_json
from jobs.host import processes, sessions

SHARED_MEMORY = "/dev/shm/"


class Leftovers:
    """Of processes whose folder for temporary files (TMPDIR) is ``temporary``, an empty one with a short path: sockets
    do not fit into others."""

    def __init__(self, temporary):
        self.temporary = temporary
        self._processes = {}
        self._memory = set()

    def note(self, pids):
        """Note ranks that must end, with all that descends from them, and their shared memory."""
        pids = list(pids)
        assert pids, "no rank lives"
        assert any(self.temporary.iterdir()), "ranks use another folder for temporary files"
        for pid in family(pids):
            self._processes[pid] = sessions.start_time(pid)
            self._memory |= shared_memory(pid)

    def find(self, attempt=None):
        """Noted processes and shared memory that still exist, and temporary files but for those of an attempt."""
        alive = [f"process {pid}" for pid, start in self._processes.items() if sessions.alive(pid, start)]
        memory = [path for path in self._memory if os.path.exists(path)]
        paths = [path for path in self.temporary.iterdir() if not is_of_torch(path)]
        return alive + memory + [str(path) for path in paths if attempt is None or owner(path) != attempt]


def is_of_torch(path):
    """Whether the import of torch's compiler makes this empty folder, under the same name in each process."""
    return path.name.startswith("torchinductor_") and not any(path.iterdir())


def owner(folder):
    """The attempt that has made a folder for temporary files, if it has a record."""
    try:
        return (read_json(folder / OWNER) or {}).get("attempt")
    except OSError:
        return None


def family(pids):
    """These processes and all that descend from them."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            parents[int(name)] = processes.read_stat(int(name))[1][1:2]
    found = set(pids)
    size = 0
    while len(found) > size:
        size = len(found)
        found |= {pid for pid, parent in parents.items() if parent and int(parent[0]) in found}
    return found


def shared_memory(pid):
    """Paths of the shared memory that a process has mapped and that is not deleted."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    paths = {line.split(maxsplit=5)[5] for line in lines if SHARED_MEMORY in line}
    return {path for path in paths if not path.endswith("(deleted)")}
