"""The daemons of a Slurm in one folder: which there are, how each is started and waited for.

All run in the foreground in a session of their own: no pid files are relied on, Ctrl-C does not reach them.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flip.runs.errors import ConfigError, FlipError
from tools.sandbox import processes
from tools.sandbox.config import Site

PACKAGES = {
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
}
ACCOUNTING = {"slurmdbd": "slurmdbd", "mariadbd": "mariadb-server", "mariadb-install-db": "mariadb-server"}
#: Seconds that a daemon gets to come up. Two busy cores are slow.
PATIENCE = 60.0


@dataclass(frozen=True)
class Daemon:
    """One daemon: its command, and the working directory by which it is found again."""

    name: str
    program: str
    place: Path
    words: tuple[str, ...]

    def log(self, site: Site) -> Path:
        """Its log file. In the foreground, daemons also log to their terminal."""
        return site / "log" / f"{self.name}.out"


def lacking(accounting: bool) -> list[str]:
    """Names of the required Debian packages that are not installed."""
    wanted = PACKAGES | (ACCOUNTING if accounting else {})
    return sorted({package for program, package in wanted.items() if not shutil.which(program, path=search_path())})


def missing(accounting: bool) -> None:
    """Raise ConfigError if this machine cannot run a Slurm."""
    if not sys.platform.startswith("linux"):
        raise ConfigError("a Slurm at home needs Linux", value=sys.platform)
    packages = lacking(accounting)
    if packages:
        remedy = f"Install them: apt-get install --no-install-recommends {' '.join(packages)}"
        raise ConfigError("Slurm's packages are missing", value=", ".join(packages), remedy=remedy)


def search_path() -> str:
    """PATH with the folders of daemons, which are often missing in user shells."""
    return os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/local/sbin:/usr/sbin:/sbin"


def environment(site: Site) -> dict[str, str]:
    """Environment of this process without variables of a job or of another Slurm."""
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SRUN", "SALLOC"))
    }
    return {**kept, "PATH": search_path(), "SLURM_CONF": str(site.conf)}


def munged(site: Site) -> Daemon:
    words = (
        "--foreground",
        "--force",  # a home folder that is closed to others is well
        f"--key-file={site / 'munge' / 'key'}",
        f"--socket={site / 'run' / 'munge.sock'}",
        f"--pid-file={site / 'run' / 'munged.pid'}",
        f"--seed-file={site / 'munge' / 'seed'}",
    )
    return Daemon("munged", "munged", site / "munge", words)


def slurmctld(site: Site) -> Daemon:
    words = ("-D", "-i", "-f", str(site.conf))
    return Daemon("slurmctld", "slurmctld", site / "state", words)


def slurmd(site: Site, node: str) -> Daemon:
    words = ("-D", "-N", node, "-f", str(site.conf))
    return Daemon(f"slurmd.{node}", "slurmd", site.spool(node), words)


def slurmdbd(site: Site) -> Daemon:
    return Daemon("slurmdbd", "slurmdbd", site / "run", ("-D",))


def mariadbd(site: Site) -> Daemon:
    words = (
        "--no-defaults",  # comes first, or is not understood
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
        "--innodb-lock-wait-timeout=900",  # both asked for by slurmdbd
    )
    return Daemon("mariadbd", "mariadbd", site / "database", words)


def wanted(site: Site) -> list[Daemon]:
    """All daemons of the site."""
    database = [mariadbd(site), slurmdbd(site)] if site.options.accounting else []
    return [munged(site), *database, slurmctld(site), *(slurmd(site, node) for node in site.names)]


def pids(site: Site) -> dict[str, int]:
    """Name of each daemon of the site -> its pid, 0 if it does not run."""
    there = processes.daemons(site.folder)
    return {
        daemon.name: next((p.pid for p in there.get(daemon.place, []) if p.name == daemon.program), 0)
        for daemon in wanted(site)
    }


def launch(site: Site, daemon: Daemon) -> subprocess.Popen[bytes]:
    """Start a daemon without waiting for it."""
    with open(daemon.log(site), "ab") as out:
        return subprocess.Popen(
            [daemon.program, *daemon.words],
            cwd=daemon.place,
            env=environment(site),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def one(site: Site, daemon: Daemon, ready: Callable[[], bool]) -> None:
    """Start a daemon and wait until it is ready."""
    up(site, launch(site, daemon), daemon, ready)


def up(site: Site, child: subprocess.Popen[bytes], daemon: Daemon, ready: Callable[[], bool]) -> None:
    """Wait until ``ready()``. Raises FlipError with the last lines of the log if the daemon ends or takes too long."""
    limit = time.monotonic() + PATIENCE
    while not ready():
        if child.poll() is not None or time.monotonic() > limit:
            how = "did not answer" if child.returncode is None else f"ended with {child.returncode}"
            log = daemon.log(site)
            raise FlipError(f"{daemon.name} {how}", log, remedy=f"It said at the end:\n{tail(log)}")
        time.sleep(0.05)


def listens(address: str, port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(1)
        return client.connect_ex((address, port)) == 0


def tail(log: Path, lines: int = 8) -> str:
    try:
        return "\n".join("  " + line for line in log.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return "  (there is none)"
