"""The daemons of a Slurm in one folder: their commands, start, shutdown, accounting, and simulated node failures.

All run in the foreground in a session of their own: no pid files are needed, and Ctrl-C does not reach them.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

from flip.files import deletion
from flip.files.creation import atomic_write, open_append
from flip.runs.errors import ConfigError, FlipError
from flip.runs.rundir import write_bytes
from tools.sandbox import processes
from tools.sandbox.config import CLUSTER, SandboxConfig
from tools.sandbox.processes import Process

PACKAGES = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client"}
ACCOUNTING = {"slurmdbd": "slurmdbd", "mariadbd": "mariadb-server", "mariadb-install-db": "mariadb-server"}
ACCOUNT = "acc"
START_SECONDS = 60.0
"""Deadline for the start of a daemon. Two busy cores are slow."""
STOP_SECONDS = {"slurmctld": 15.0, "slurmscriptd": 5.0, "slurmdbd": 15.0, "mariadbd": 30.0, "munged": 5.0}
"""Daemons in the order of their shutdown, and the seconds between SIGTERM and SIGKILL."""


@dataclass(frozen=True)
class Daemon:
    """One daemon: its command, and the working directory that identifies its process."""

    name: str
    program: str
    directory: Path
    arguments: tuple[str, ...]

    def log(self, site: SandboxConfig) -> Path:
        """Its log file. In the foreground, daemons also log to their terminal."""
        return site / "log" / f"{self.name}.out"


def missing_packages(accounting: bool) -> list[str]:
    """Names of the required Debian packages that are not installed."""
    programs = PACKAGES | (ACCOUNTING if accounting else {})
    return sorted({package for program, package in programs.items() if not shutil.which(program, path=search_path())})


def require_packages(accounting: bool) -> None:
    """Raise ConfigError if this machine cannot run a Slurm."""
    if not sys.platform.startswith("linux"):
        raise ConfigError("the Slurm sandbox needs Linux", value=sys.platform)
    packages = missing_packages(accounting)
    if packages:
        remedy = f"Install them: apt-get install --no-install-recommends {' '.join(packages)}"
        raise ConfigError("Slurm's packages are missing", value=", ".join(packages), remedy=remedy)


def search_path() -> str:
    """PATH with the folders of daemons, which are often missing in user shells."""
    return os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/local/sbin:/usr/sbin:/sbin"


def environment(site: SandboxConfig) -> dict[str, str]:
    """Environment of this process without variables of a job or of another Slurm."""
    of_slurm = ("SLURM", "SBATCH", "SRUN", "SALLOC")
    variables = {key: value for key, value in os.environ.items() if not key.startswith(of_slurm)}
    return {**variables, "PATH": search_path(), "SLURM_CONF": str(site.conf)}


def munged(site: SandboxConfig) -> Daemon:
    arguments = (
        "--foreground",
        "--force",  # accept a home folder that is closed to others
        f"--key-file={site / 'munge' / 'key'}",
        f"--socket={site / 'run' / 'munge.sock'}",
        f"--pid-file={site / 'run' / 'munged.pid'}",
        f"--seed-file={site / 'munge' / 'seed'}",
    )
    return Daemon("munged", "munged", site / "munge", arguments)


def slurmctld(site: SandboxConfig) -> Daemon:
    return Daemon("slurmctld", "slurmctld", site / "state", ("-D", "-i", "-f", str(site.conf)))


def slurmd(site: SandboxConfig, node: str) -> Daemon:
    return Daemon(f"slurmd.{node}", "slurmd", site.spool(node), ("-D", "-N", node, "-f", str(site.conf)))


def slurmdbd(site: SandboxConfig) -> Daemon:
    return Daemon("slurmdbd", "slurmdbd", site / "run", ("-D",))


def mariadbd(site: SandboxConfig) -> Daemon:
    arguments = (
        "--no-defaults",  # must come first
        f"--user={site.user}",
        f"--datadir={site / 'database'}",
        f"--socket={site / 'run' / 'mariadb.sock'}",
        f"--pid-file={site / 'run' / 'mariadb.pid'}",
        f"--init-file={site / 'grants.sql'}",
        "--bind-address=127.0.0.1",
        f"--port={site.database_ports[1]}",
        "--skip-name-resolve",
        "--innodb-buffer-pool-size=64M",
        "--innodb-log-file-size=16M",
        "--innodb-lock-wait-timeout=900",  # slurmdbd asks for this and for the log size
    )
    return Daemon("mariadbd", "mariadbd", site / "database", arguments)


def pids(site: SandboxConfig) -> dict[str, int]:
    """Name of each daemon of the sandbox -> its pid, 0 if it does not run."""
    database = []
    if site.options.accounting:
        database = [mariadbd(site), slurmdbd(site)]
    expected = [munged(site), *database, slurmctld(site), *(slurmd(site, node) for node in site.names)]
    running = processes.daemons(site.folder)
    return {
        daemon.name: next((p.pid for p in running.get(daemon.directory, []) if p.name == daemon.program), 0)
        for daemon in expected
    }


def launch(site: SandboxConfig, daemon: Daemon) -> subprocess.Popen[bytes]:
    """Start a daemon without waiting for it."""
    with open_append(daemon.log(site)) as log:
        return subprocess.Popen(
            [daemon.program, *daemon.arguments], cwd=daemon.directory, env=environment(site), start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip


def start(site: SandboxConfig, daemon: Daemon, ready: Callable[[], bool]) -> None:
    """Start a daemon and wait until it is ready."""
    wait_ready(site, launch(site, daemon), daemon, ready)


def wait_ready(site: SandboxConfig, child: subprocess.Popen[bytes], daemon: Daemon, ready: Callable[[], bool]) -> None:
    """Wait until ``ready()``. Raises FlipError with the last lines of the log if the daemon ends or takes too long."""
    limit = time.monotonic() + START_SECONDS
    while not ready():
        if child.poll() is not None or time.monotonic() > limit:
            if child.returncode is None:
                what = "did not answer"
            else:
                what = f"ended with {child.returncode}"
            log = daemon.log(site)
            raise FlipError(f"{daemon.name} {what}", log, remedy=f"Its last lines:\n{tail(log)}")
        time.sleep(0.05)


def listens(address: str, port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(1)
        return client.connect_ex((address, port)) == 0


def tail(log: Path, lines: int = 8) -> str:
    try:
        return "\n".join("  " + line for line in log.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return "  (there is no log)"


def write_accounting(site: SandboxConfig) -> None:
    """Write the configuration of slurmdbd and MariaDB, with a new password that MariaDB reads when it starts."""
    password = secrets.token_hex(16)
    port, database = site.database_ports
    conf = f"""\
        AuthType=auth/munge
        AuthInfo=socket={site.folder}/run/munge.sock
        DbdHost=localhost
        DbdAddr={site.address}
        DbdPort={port}
        SlurmUser={site.user}
        PidFile={site.folder}/run/slurmdbd.pid
        StorageType=accounting_storage/mysql
        StorageHost=127.0.0.1
        StoragePort={database}
        StorageUser=slurm
        StoragePass={password}
        StorageLoc=slurm
        """
    grants = f"""\
        CREATE OR REPLACE USER slurm@'127.0.0.1' IDENTIFIED BY '{password}';
        GRANT ALL ON slurm.* TO slurm@'127.0.0.1';
        """
    for name, text in {"slurmdbd.conf": conf, "grants.sql": grants}.items():
        write_bytes(site / name, dedent(text).encode(), 0o600)


def start_accounting(site: SandboxConfig, call: Callable[..., str]) -> None:
    """Start MariaDB and slurmdbd; create the cluster, the account, the user, QOS and limits.

    Runs before slurmctld, which does not answer until it has registered. ``call``: runs a Slurm command and returns its
    output.
    """
    port, database = site.database_ports
    _create_database(site)
    start(site, mariadbd(site), lambda: listens("127.0.0.1", database))
    for last in (False, False, True):
        try:
            start(site, slurmdbd(site), lambda: listens(site.address, port))
            break
        except FlipError:  # the first start may fail while it creates its tables
            if last:
                raise

    def sacctmgr(*arguments: str) -> str:
        return call("sacctmgr", *arguments, timeout=30)

    user = ("user", site.user)
    associations = sacctmgr("-n", "-P", "show", "assoc", "format=cluster,account,user").split()
    if f"{CLUSTER}|{ACCOUNT}|{site.user}" not in associations:  # a new cluster has only root and its account
        sacctmgr("-i", "add", "cluster", CLUSTER)
        sacctmgr("-i", "add", "account", ACCOUNT, f"cluster={CLUSTER}")
        sacctmgr("-i", "add", *user, f"account={ACCOUNT}")
        sacctmgr("-i", "modify", *user, "set", f"DefaultAccount={ACCOUNT}")
    options = site.options
    limits = []
    if options.preempt == "qos":
        present = sacctmgr("-n", "-P", "show", "qos", "format=name").split()
        for name in {"low", "high"} - set(present):
            sacctmgr("-i", "add", "qos", name)
        sacctmgr("-i", "modify", "qos", "high", "set", "Preempt=low", "Priority=10")
        sacctmgr("-i", "modify", "qos", "low", "set", "PreemptMode=requeue")
        set_grace(call, options.grace)
        limits += ["QOS=low,high", "DefaultQOS=low"]
    if options.limited:  # -1: remove the limit of the last start
        limits.append(f"MaxSubmitJobs={options.max_submit or -1}")
        sacctmgr("-i", "modify", *user, "where", f"account={ACCOUNT}", f"cluster={CLUSTER}", "set", *limits)


def set_grace(call: Callable[..., str], seconds: int) -> None:
    """Set GraceTime of the QOS low."""
    call("sacctmgr", "-i", "modify", "qos", "low", "set", f"GraceTime={seconds}", timeout=30)


def _create_database(site: SandboxConfig) -> None:
    """Create an empty data directory of MariaDB unless one exists."""
    folder = site / "database"
    log = site / "log" / "mariadb-install.out"
    if (folder / "mysql").exists():
        return
    arguments = ["--no-defaults", f"--user={site.user}", f"--datadir={folder}", "--skip-test-db"]
    arguments += ["--auth-root-authentication-method=socket", f"--auth-root-socket-user={site.user}"]
    command = ["mariadb-install-db", *arguments, "--innodb-log-file-size=16M"]
    with atomic_write(log) as out:
        code = subprocess.run(
            command, env=environment(site), stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=120
        ).returncode
    if code:
        remedy = f"Its last lines:\n{tail(log)}"
        raise FlipError(f"mariadb-install-db ended with {code}", log, remedy=remedy)


def kill_node(site: SandboxConfig, node: str) -> None:
    """Simulate a machine failure: SIGKILL slurmd, its slurmstepds and their tasks, in this order."""
    _kill([p for p in processes.daemons(site.folder).get(site.spool(node), []) if p.name == "slurmd"])
    kill_steps(site, [node])


def stop_node(site: SandboxConfig, node: str) -> None:
    """Simulate a machine that is silent: SIGSTOP slurmd, its slurmstepds and their tasks. No connection ends."""
    for _ in range(50):
        victims = _processes_of(site, node)
        if all(processes.state(process.pid) in "TZX" for process in victims):
            return
        processes.freeze(victims)  # again, because a step may be starting


def continue_node(site: SandboxConfig, node: str) -> None:
    """The opposite of ``stop_node``."""
    processes.kill(_processes_of(site, node), signal.SIGCONT)


def _processes_of(site: SandboxConfig, node: str) -> list[Process]:
    """slurmd of a node, its slurmstepds and their tasks."""
    marks = [(f"SLURM_CONF={site.conf}", f"SLURMD_NODENAME={node}")]
    running = processes.daemons(site.folder).get(site.spool(node), [])
    return running + processes.tasks([p for p in running if p.name == "slurmstepd"], marks)


def kill_steps(site: SandboxConfig, nodes: Sequence[str]) -> None:
    """SIGKILL the slurmstepds of nodes and their tasks so that none can report the end of another.

    A slurmstepd would report its tasks, and srun or its parent would end the step on other nodes. So all are stopped
    before the first is killed, and children are killed first: the kernel wakes a process that loses its parent. This is
    repeated because a step may be starting.
    """
    marks = [(f"SLURM_CONF={site.conf}", f"SLURMD_NODENAME={node}") for node in nodes]
    for _ in range(50):
        running = processes.daemons(site.folder)
        steps = [p for node in nodes for p in running.get(site.spool(node), []) if p.name == "slurmstepd"]
        tasks = processes.tasks(steps, marks)
        if not steps and not tasks:
            return
        processes.freeze(steps + tasks)
        _kill(processes.children_first(steps + tasks))


def stop_all(site: SandboxConfig) -> None:
    """End all processes: slurmds, steps and tasks, slurmctld, slurmdbd, MariaDB, munged."""
    nodes = [directory.name for directory in processes.daemons(site.folder) if directory.parent == site / "spool"]
    processes.end([p for p in _running(site) if p.name == "slurmd"], 10.0)
    kill_steps(site, sorted({*nodes, *site.names}))
    for name, seconds in STOP_SECONDS.items():
        processes.end([p for p in _running(site) if p.name == name], seconds)
    if site.options.cgroups:
        for path in site.cgroups():
            deletion.delete_empty_folder(path)
    for left in _running(site):
        value = f"{left.name}, pid {left.pid}"
        raise FlipError("a daemon survived SIGKILL", site.folder, value, "It may hang in the kernel.")


def _running(site: SandboxConfig) -> list[Process]:
    return [process for group in processes.daemons(site.folder).values() for process in group]


def _kill(victims: list[Process]) -> None:
    processes.kill(victims)
    processes.wait(victims, 5)
