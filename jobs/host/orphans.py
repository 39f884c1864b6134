"""Ends processes of earlier attempts of a run that are left on this host: watchers, and batch shells without a job.

They are left where Slurm loses track of them: its daemon was killed, or the batch shell was, and what it had started
survived. Standard library, Python >= 3.6: ``batch_hooks.py begin`` calls it on the host.
"""

import os
import signal
from typing import Dict, Iterator, List, Tuple

from jobs.host import slurm_cli

#: What ``batch_hooks.py`` does beside the ranks for as long as its attempt lasts.
WATCHERS = ("watch", "release")


def kill_orphans(path: str, n: int, job: str, restarts: int) -> List[int]:
    """SIGKILL this user's processes of attempts before ``n`` of the run at ``path``; their pids.

    A watcher is known by its command line and by FLIP_RUN and FLIP_ATTEMPT in its environment, a batch shell as an
    earlier start of the very job that begins now (``job``, ``restarts``). Whose start time changes in between is
    another process. Where there is no /proc, none is found.
    """
    found = []
    for pid, started in _processes():
        words, environ = _read(pid, "cmdline"), _environment(pid)
        if not (_watcher(words, environ, path, n) or _shell(words, environ, job, restarts)):
            continue
        if pid != os.getppid() and _started(pid) == started:
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue
            found.append(pid)
    return found


def _watcher(words: List[str], environ: Dict[str, str], path: str, n: int) -> bool:
    ours = [word.endswith(("/batch_hooks.py", "/requeue.py")) for word in words]
    what = words[ours.index(True) + 1 :][:1] if any(ours) else []
    attempt = slurm_cli.parse_int(environ.get("FLIP_ATTEMPT", ""))
    beside = bool(what) and what[0] in WATCHERS and environ.get("FLIP_RUN") == path
    return beside and attempt is not None and attempt < n


def _shell(words: List[str], environ: Dict[str, str], job: str, restarts: int) -> bool:
    """Slurm names every batch script slurm_script. Another cluster may have a job of the same number."""
    script = any(word.endswith("/slurm_script") for word in words[:2])
    same = all(environ.get(name) == os.environ.get(name) for name in ("SLURM_JOB_NAME", "SLURM_CLUSTER_NAME"))
    if not (job and script and same and slurm_cli.own_job(environ) == job):
        return False
    return slurm_cli.restart_count(environ) < restarts


def _processes() -> Iterator[Tuple[int, str]]:
    """(pid, start time) of this user's processes, without this one."""
    try:
        names = os.listdir("/proc")
    except OSError:
        return
    for name in names:
        pid = slurm_cli.parse_int(name)
        try:
            if pid is not None and pid != os.getpid() and os.stat("/proc/%d" % pid).st_uid == os.geteuid():
                yield pid, _started(pid)
        except OSError:  # it has ended
            continue


def _started(pid: int) -> str:
    """Field 22 of /proc/PID/stat, counted after the name, which may hold anything."""
    text = "\0".join(_read(pid, "stat")).rpartition(")")[2].split()
    return text[19] if len(text) > 19 else ""


def _environment(pid: int) -> Dict[str, str]:
    """The environment that a process was started with."""
    return {key: value for key, _, value in (word.partition("=") for word in _read(pid, "environ"))}


def _read(pid: int, name: str) -> List[str]:
    """The words of a file of /proc/PID; none where it cannot be read."""
    try:
        with open("/proc/%d/%s" % (pid, name), "rb") as file:
            return os.fsdecode(file.read()).split("\0")
    except OSError:
        return []
