"""Processes of this host as /proc shows them: which attempt they belong to. Kills those of earlier attempts of a run.

Owners, guards and batch shells survive if Slurm loses track of them: its daemon was killed, and what it had started
lives on. The owner of the next start (``job.py``) ends them. Without /proc none is found.
"""

import os
import signal
from typing import Dict, Iterator, List, Tuple

from jobs.host import own_job, slurm_cli

#: Environment variable of a node agent and, as /proc shows it, of the ranks that it forks: /proc keeps the environment
#: that the agent was started with.
AGENT_VARIABLE = "FLIP_NODE_AGENT"

PR_SET_CHILD_SUBREAPER = 36  # an option of prctl


def read_stat(pid: int) -> Tuple[str, List[str]]:
    """Name of a process, and the fields of /proc/PID/stat from the state on; ("", ["X"]) if it has ended.

    The name may contain anything. Fields: 0 state, 1 parent, 2 process group, 3 session, 17 threads, 19 start time.
    """
    head, _, tail = "\0".join(_read(pid, "stat")).rpartition(")")
    return head.partition("(")[2], tail.split() or ["X"]


def has_ended(fields: List[str]) -> bool:
    """Whether no thread of a process can run any more. Its first thread may be a zombie before the others end."""
    return fields[0] == "X" or (fields[0] == "Z" and int(fields[17]) < 2)


def start_time(pid: int) -> str:
    """When the process started, in ticks since boot; "" if it does not exist. Distinguishes it from later ones."""
    return (read_stat(pid)[1] + [""] * 20)[19]


def environment(pid: int) -> Dict[str, str]:
    """The environment that a process was started with; empty if it cannot be read."""
    return {key: value for key, _, value in (word.partition("=") for word in _read(pid, "environ"))}


def arguments(pid: int) -> List[str]:
    """The command line of a process; empty if it cannot be read."""
    return _read(pid, "cmdline")[:-1]


def is_mine(pid: int) -> bool:
    """Whether a process belongs to this user."""
    try:
        return os.stat("/proc/%d" % pid).st_uid == os.geteuid()
    except OSError:
        return False


def is_of_attempt(pid: int, path: str, n: int) -> bool:
    """Whether a process of this user belongs to attempt ``n`` of the run at ``path``.

    Every process of an attempt inherits FLIP_RUN and FLIP_ATTEMPT. A rank that an agent has forked shows the
    environment of the agent; its log shows the attempt. A record of the run is no evidence, since it may come with a
    copy, or be prepared.
    """
    environ = environment(pid)
    if not is_mine(pid):
        return False
    if AGENT_VARIABLE in environ:
        return _same_place(environ.get("FLIP_RUN", ""), path) and _logs_to(pid, os.path.join(path, "logs", str(n)))
    return environ.get("FLIP_ATTEMPT") == str(n) and _same_place(environ.get("FLIP_RUN", ""), path)


def _logs_to(pid: int, folder: str) -> bool:
    """Whether the standard output of a process is a file in a folder."""
    try:
        return _same_place(os.path.dirname(os.readlink("/proc/%d/fd/1" % pid)), folder)
    except OSError:
        return False


def _same_place(first: str, second: str) -> bool:
    try:
        return first == second or os.path.samefile(first, second)
    except OSError:
        return False


def _read(pid: int, name: str) -> List[str]:
    """The words of a file of /proc/PID; empty if it cannot be read."""
    try:
        with open("/proc/%d/%s" % (pid, name), "rb") as file:
            return os.fsdecode(file.read()).split("\0")
    except OSError:
        return []


def prctl(option: int, value: int) -> bool:
    """Change an attribute of this process, as prctl(2) does; returns whether that was possible. Linux only."""
    try:
        import ctypes

        return int(ctypes.CDLL(None).prctl(option, value, 0, 0, 0)) == 0
    except (ImportError, OSError, AttributeError):
        return False


def kill_orphans(path: str, n: int, job: str, restarts: int) -> List[int]:
    """SIGKILL this user's processes of attempts before ``n`` of the run at ``path``; returns their pids.

    An owner is recognised by its command line and an srun by its name; FLIP_RUN in their environments must name the
    run. The attempt is named by FLIP_ATTEMPT; an owner, which starts before it, belongs to another start than this one
    (``job``, ``restarts``). A batch shell is that of an earlier start of this job.
    """
    killed = []
    for pid, started in _own_processes():
        argv = arguments(pid)
        environ = environment(pid)
        same_run = environ.get("FLIP_RUN") == path and (_is_owner(argv) or is_srun(argv))
        earlier = same_run and _is_earlier(environ, n, job, restarts)
        if not (earlier or _is_batch_shell(argv, environ, job, restarts)):
            continue
        if pid != os.getppid() and start_time(pid) == started:  # else the pid belongs to another process by now
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue
            killed.append(pid)
    return killed


def _is_owner(argv: List[str]) -> bool:
    """Whether a command line is that of the owner of a job, or of its guard."""
    return any(word.endswith("/jobs/host/job.py") for word in argv[:4])


def is_srun(argv: List[str]) -> bool:
    """Whether a command line is that of srun, which waits for ever if the daemon of its step was killed."""
    return bool(argv) and os.path.basename(argv[0]) == "srun"


def _is_earlier(environ: Dict[str, str], n: int, job: str, restarts: int) -> bool:
    """Whether a process of the run belongs to an attempt before ``n``, or was started before an attempt existed, by
    another start than this one."""
    attempt = slurm_cli.parse_int(environ.get("FLIP_ATTEMPT", ""))
    if attempt is not None:
        return attempt < n
    return (own_job.own_job(environ), own_job.restart_count(environ)) != (job, restarts)


def _is_batch_shell(argv: List[str], environ: Dict[str, str], job: str, restarts: int) -> bool:
    """Slurm names every batch script slurm_script. Another cluster may have a job of the same number."""
    script = any(word.endswith("/slurm_script") for word in argv[:2])
    same = all(environ.get(name) == os.environ.get(name) for name in ("SLURM_JOB_NAME", "SLURM_CLUSTER_NAME"))
    return bool(job and script and same and own_job.own_job(environ) == job) and (
        own_job.restart_count(environ) < restarts
    )


def own_environments() -> Dict[int, Dict[str, str]]:
    """Pid of each process of this user, without this one -> its environment."""
    return {pid: environment(pid) for pid, _ in _own_processes()}


def _own_processes() -> Iterator[Tuple[int, str]]:
    """(pid, start time) of this user's processes, without this one."""
    try:
        names = os.listdir("/proc")
    except OSError:
        return
    for name in names:
        pid = slurm_cli.parse_int(name)
        if pid is not None and pid != os.getpid() and is_mine(pid):
            yield pid, start_time(pid)
