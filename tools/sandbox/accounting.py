"""slurmdbd and its MariaDB: configuration files, start, and the account that may submit."""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Callable

from flip.runs.errors import FlipError
from tools.sandbox import daemons
from tools.sandbox.config import CLUSTER, Site, put

ACCOUNT = "acc"


def write(site: Site) -> None:
    """Write the configuration with a new password for each start; MariaDB gets it at start."""
    word = secrets.token_hex(16)
    port, database = site.database_ports
    lines = {
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={site / 'run' / 'munge.sock'}",
        "DbdHost": "localhost",
        "DbdAddr": site.address,
        "DbdPort": port,
        "SlurmUser": site.user,
        "PidFile": site / "run" / "slurmdbd.pid",
        "StorageType": "accounting_storage/mysql",
        "StorageHost": "127.0.0.1",
        "StoragePort": database,
        "StorageUser": "slurm",
        "StoragePass": word,
        "StorageLoc": "slurm",
    }
    put(site / "slurmdbd.conf", "".join(f"{key}={value}\n" for key, value in lines.items()).encode(), 0o600)
    grants = (
        f"CREATE OR REPLACE USER slurm@'127.0.0.1' IDENTIFIED BY '{word}';\n"
        "GRANT ALL ON slurm.* TO slurm@'127.0.0.1';\n"
    )
    put(site / "grants.sql", grants.encode(), 0o600)


def up(site: Site, call: Callable[..., str]) -> None:
    """Both daemons, the cluster, the account and the user. Before slurmctld: one that cannot register answers nobody.

    ``call``: a command of Slurm's -> what it prints.
    """
    port, database = site.database_ports
    make_database(site)
    daemons.one(site, daemons.mariadbd(site), lambda: daemons.listens("127.0.0.1", database))
    for last in (False, False, True):
        try:
            daemons.one(site, daemons.slurmdbd(site), lambda: daemons.listens(site.address, port))
            break
        except FlipError:  # seen: it trips over the tables that it makes, and is well the next time
            if last:
                raise
    there = call("sacctmgr", "-n", "-P", "show", "assoc", "format=cluster,account,user", timeout=30).split()
    if f"{CLUSTER}|{ACCOUNT}|{site.user}" not in there:  # a cluster brings root and its account with it
        call("sacctmgr", "-i", "add", "cluster", CLUSTER, timeout=30)
        call("sacctmgr", "-i", "add", "account", ACCOUNT, f"cluster={CLUSTER}", timeout=30)
        call("sacctmgr", "-i", "add", "user", site.user, f"account={ACCOUNT}", timeout=30)
        call("sacctmgr", "-i", "modify", "user", site.user, "set", f"DefaultAccount={ACCOUNT}", timeout=30)
    _limits(site, call)


def _limits(site: Site, call: Callable[..., str]) -> None:
    """Create the QOS low and high (high preempts low) and the limit of the association."""
    options, wanted = site.options, []
    if options.preempt == "qos":
        present = call("sacctmgr", "-n", "-P", "show", "qos", "format=name", timeout=30).split()
        for name in {"low", "high"} - set(present):
            call("sacctmgr", "-i", "add", "qos", name, timeout=30)
        call("sacctmgr", "-i", "modify", "qos", "high", "set", "Preempt=low", "Priority=10", timeout=30)
        call("sacctmgr", "-i", "modify", "qos", "low", "set", "PreemptMode=requeue", timeout=30)
        set_grace(call, options.grace)
        wanted += ["QOS=low,high", "DefaultQOS=low"]
    if options.limited:  # -1: no limit, also where the last start had one
        wanted.append(f"MaxSubmitJobs={options.max_submit or -1}")
        where = ("where", f"account={ACCOUNT}", f"cluster={CLUSTER}", "set")
        call("sacctmgr", "-i", "modify", "user", site.user, *where, *wanted, timeout=30)


def set_grace(call: Callable[..., str], seconds: int) -> None:
    """Set GraceTime of the QOS low."""
    call("sacctmgr", "-i", "modify", "qos", "low", "set", f"GraceTime={seconds}", timeout=30)


def make_database(site: Site) -> None:
    """Create an empty data directory of MariaDB unless one exists."""
    folder = site / "database"
    if (folder / "mysql").exists():
        return
    words = [
        "mariadb-install-db",
        "--no-defaults",
        f"--user={site.user}",
        f"--datadir={folder}",
        "--auth-root-authentication-method=socket",
        f"--auth-root-socket-user={site.user}",
        "--skip-test-db",
        "--innodb-log-file-size=16M",
    ]
    log = site / "log" / "mariadb-install.out"
    with open(log, "wb") as out:
        code = subprocess.run(
            words,
            env=daemons.environment(site),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            timeout=120,
        ).returncode
    if code:
        raise FlipError(
            f"mariadb-install-db ended with {code}", log, remedy=f"It said at the end:\n{daemons.tail(log)}"
        )
