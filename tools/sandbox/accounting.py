"""slurmdbd and its MariaDB: configuration files, start, and the account that may submit."""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Callable
from textwrap import dedent

from flip.runs.errors import FlipError
from tools.sandbox import daemons
from tools.sandbox.config import CLUSTER, SandboxConfig, write_file

ACCOUNT = "acc"


def write(site: SandboxConfig) -> None:
    """Write the configuration with a new password for each start; MariaDB reads it when it starts."""
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
        write_file(site / name, dedent(text).encode(), 0o600)


def start(site: SandboxConfig, call: Callable[..., str]) -> None:
    """Start both daemons; create the cluster, the account, the user, QOS and limits.

    Runs before slurmctld, which does not answer until it has registered. ``call``: runs a Slurm command and returns its
    output.
    """
    port, database = site.database_ports
    create_database(site)
    daemons.start(site, daemons.mariadbd(site), lambda: daemons.listens("127.0.0.1", database))
    for last in (False, False, True):
        try:
            daemons.start(site, daemons.slurmdbd(site), lambda: daemons.listens(site.address, port))
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
    options, limits = site.options, []
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


def create_database(site: SandboxConfig) -> None:
    """Create an empty data directory of MariaDB unless one exists."""
    folder, log = site / "database", site / "log" / "mariadb-install.out"
    if (folder / "mysql").exists():
        return
    arguments = ["--no-defaults", f"--user={site.user}", f"--datadir={folder}", "--skip-test-db"]
    arguments += ["--auth-root-authentication-method=socket", f"--auth-root-socket-user={site.user}"]
    command = ["mariadb-install-db", *arguments, "--innodb-log-file-size=16M"]
    with open(log, "wb") as out:
        code = subprocess.run(
            command, env=daemons.environment(site), stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=120
        ).returncode
    if code:
        remedy = f"Its last lines:\n{daemons.tail(log)}"
        raise FlipError(f"mariadb-install-db ended with {code}", log, remedy=remedy)
