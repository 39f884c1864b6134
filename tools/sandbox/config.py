"""Options, paths, ports and configuration files of the Slurm in a folder."""

import os
import pwd
import random
import re
import secrets
import socket
from dataclasses import dataclass, field, fields
from pathlib import Path
from textwrap import dedent
from typing import Any

from flip.runs.errors import ConfigError
from flip.runs.rundir import write_bytes

_SOCKET = "/spool/n99/n99_1234567.4294967291"
_LONGEST = 107
"""Slurm's longest unix socket below its folder (of a step of a job with seven digits), and the kernel's limit."""
_PORTS = range(28000, 32000)
"""Below the ports that the kernel gives to clients."""
CLUSTER = "here"
CGROUPS = {name: Path("/sys/fs/cgroup") / name for name in ("freezer", "memory")}
"""Mount points of the controllers of cgroup version 1 that Slurm uses here."""
CRED_EXPIRE = 5
"""Seconds before a requeued job may run again, less one. Slurm's default: 120."""


def _option(default: Any, about: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": about, **metadata})


@dataclass(frozen=True)
class Options:
    """Options of the Slurm; sizes are per node. ``slurm_sandbox start`` has a command-line option for each field."""

    nodes: int = _option(4, "virtual nodes", least=1)
    gpus: int = _option(8, "fake GPUs per node; none with --select linear, which cannot allocate them")
    cpus: int = _option(16, "CPUs per node; may exceed those of the machine", least=1)
    memory: int = _option(64000, "MB per node", least=1)
    grace: int = _option(0, "seconds between the signal and the end of a preempted job (GraceTime of low)")
    kill_wait: int = _option(5, "seconds between TERM and KILL (KillWait)")
    user_signal: bool = _option(
        True, "preemption sends TERM, not the job's own signal (no PreemptParameters=send_user_signal)"
    )
    accounting: bool = _option(False, "start slurmdbd and MariaDB too, for sacct; account acc")
    select: str = _option("cons_tres", "how nodes are allocated (SelectType)", choices=("cons_tres", "linear"))
    node_timeout: int = _option(30, "seconds until a silent node is down (SlurmdTimeout)")
    settings: tuple[str, ...] = _option((), "add or replace a line of slurm.conf (repeatable)")
    port: int = _option(0, "first of a block of ports; 0: choose free ones")
    preempt: str = _option(
        "partition",
        "preempt by partition or by QOS, each low and high; qos needs --accounting",
        choices=("partition", "qos"),
    )
    cgroups: bool = _option(
        False, "track processes and limit memory by cgroups (version 1, needs root); one such Slurm per machine"
    )
    requeue: bool = _option(True, "jobs are not requeued unless they ask for it (JobRequeue=0)")
    job_submit: str = _option("", "a script that checks and changes jobs at submission (job_submit.lua)")
    """The text of the script; the command-line option names its file."""
    max_submit: int = _option(
        0, "maximum number of queued jobs of this user (MaxSubmitJobs of the association; needs --accounting)"
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            name = f"option {option.name}"
            value = getattr(self, option.name)
            least = option.metadata.get("least", 0)
            choices = option.metadata.get("choices")
            if isinstance(value, int) and value < least:
                raise ConfigError(f"must be at least {least}", name, value)
            if choices and value not in choices:
                raise ConfigError("unknown value", name, value, f"Use one of: {', '.join(choices)}.")
        if self.nodes > 99:
            raise ConfigError("must be at most 99", "option nodes", self.nodes)
        if self.limited and not self.accounting:
            name = "preempt" if self.preempt == "qos" else "max_submit"
            remedy = "Start it with --accounting: QOS and limits are stored in the accounting database."
            raise ConfigError("needs accounting", f"option {name}", getattr(self, name), remedy)
        for line in self.settings:
            if not re.fullmatch(r"\w+=[^\n]*", line):
                raise ConfigError("must be KEY=VALUE", "option set", line)

    @property
    def cards(self) -> int:
        """GPUs that Slurm allocates; none with select/linear, which gives them to jobs but not to steps."""
        if self.select == "linear":
            return 0
        return self.gpus

    @property
    def limited(self) -> bool:
        """Whether slurmctld enforces QOS and limits of the accounting database."""
        return self.preempt == "qos" or self.max_submit > 0

    @property
    def ports(self) -> int:
        """Number of ports needed: slurmctld, slurmds, and with accounting slurmdbd and MariaDB."""
        return 1 + self.nodes + (2 if self.accounting else 0)


class SandboxConfig:
    """Paths, names and configuration files of the Slurm in ``folder``."""

    def __init__(self, folder: Path, options: Options) -> None:
        self.folder = folder
        self.options = options
        self.host = socket.gethostname().partition(".")[0]
        self.user = user_name()
        self.address, self.only = loopback()

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    @property
    def conf(self) -> Path:
        return self / "slurm.conf"

    @property
    def names(self) -> list[str]:
        """Names of the nodes."""
        return [f"n{number}" for number in range(1, self.options.nodes + 1)]

    def spool(self, node: str) -> Path:
        return self / "spool" / node

    def cgroups(self) -> list[Path]:
        """The cgroups that Slurm has created here, inner ones first."""
        roots = [path / f"slurm_{name}" for path in CGROUPS.values() for name in self.names]
        inner = [path for root in roots for path in root.glob("**/") if path != root]
        return sorted(inner, reverse=True) + [root for root in roots if root.exists()]

    @property
    def database_ports(self) -> tuple[int, int]:
        """Ports of slurmdbd and MariaDB."""
        first = self.options.port + 1 + self.options.nodes
        return first, first + 1

    def check(self) -> None:
        """Raise ConfigError if the folder cannot hold a Slurm."""
        closed = [str(path) for path in CGROUPS.values() if not os.access(path, os.W_OK)]
        if self.options.cgroups and closed:
            remedy = "It needs root and cgroup version 1 with freezer and memory; start it without cgroups."
            raise ConfigError("cannot create cgroups", "option cgroups", ", ".join(closed), remedy)
        text = str(self.folder)
        if not re.fullmatch(r"[\w./+-]+", text):
            remedy = "Name one of letters, digits and ._-+ with --folder: Slurm's files and shell commands contain it."
            raise ConfigError("the folder's name has other characters", "option folder", text, remedy)
        if len(text + _SOCKET) > _LONGEST:
            remedy = f"Name a folder of at most {_LONGEST - len(_SOCKET)} characters with --folder."
            raise ConfigError("the folder's name is too long for unix sockets below it", "option folder", text, remedy)
        is_sandbox = self.conf.exists() or (self / ".lock").exists()  # the lock alone: of a start that failed
        if self.folder.exists() and not is_sandbox and any(self.folder.iterdir()):
            raise ConfigError("the folder has other files", "option folder", text, "Name a new or empty folder.")

    def write(self) -> None:
        """Write all configuration files; the folders must exist."""
        for number in range(self.options.cards):
            gpu = self / "dev" / f"gpu{number}"
            if not gpu.is_symlink():  # Slurm requires a character device, but does not open it
                gpu.symlink_to("/dev/null")
        key = self / "munge" / "key"
        if not key.exists():
            write_bytes(key, secrets.token_bytes(128), 0o600)
        gpus = ""
        if self.options.cards:
            gpus = f"Name=gpu File={self.folder}/dev/gpu[0-{self.options.cards - 1}]\n"
        cgroups = "CgroupPlugin=disabled\n"
        if self.options.cgroups:
            cgroups = "CgroupPlugin=cgroup/v1\nConstrainRAMSpace=yes\n"
        texts = {"cgroup.conf": cgroups, "gres.conf": gpus, "profile.yaml": self.profile()}
        if self.options.job_submit:
            texts["job_submit.lua"] = self.options.job_submit
        for name, text in (texts | {"slurm.conf": self.slurm_conf()}).items():
            write_bytes(self / name, text.encode())

    def slurm_conf(self) -> str:
        """slurm.conf. docs/slurm_at_home.md explains the unusual lines."""
        options = self.options
        lines = self._fixed() | self._chosen()
        for key, value in (line.split("=", 1) for line in options.settings):
            # replaces a default of the same name, regardless of case
            lines = {known: old for known, old in lines.items() if known.lower() != key.lower()} | {key: value}
        gres = ""
        if options.cards:
            gres = f" Gres=gpu:{options.cards}"
        nodes = [
            f"NodeName={name} NodeHostname={self.host} NodeAddr={self.address} Port={options.port + 1 + index} "
            f"CPUs={options.cpus} RealMemory={options.memory}{gres}"
            for index, name in enumerate(self.names)
        ]
        both = "Nodes=ALL MaxTime=INFINITE State=UP"
        partitions = [
            f"PartitionName=low {both} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={options.grace}",
            f"PartitionName=high {both} PriorityTier=10 PreemptMode=OFF",
        ]
        return "\n".join([*(f"{key}={value}" for key, value in lines.items()), *nodes, *partitions, ""])

    def _fixed(self) -> dict[str, str]:
        folder = self.folder
        return {
            "ClusterName": CLUSTER,
            "SlurmctldHost": f"{self.host}({self.address})",
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={folder}/run/munge.sock,cred_expire={CRED_EXPIRE}",
            "SlurmUser": self.user,
            "SlurmdUser": self.user,
            "StateSaveLocation": f"{folder}/state",
            "SlurmdSpoolDir": f"{folder}/spool/%n",
            "SlurmctldPidFile": f"{folder}/run/slurmctld.pid",
            "SlurmdPidFile": f"{folder}/run/slurmd.%n.pid",
            "SlurmctldLogFile": f"{folder}/log/slurmctld.log",
            "SlurmdLogFile": f"{folder}/log/slurmd.%n.log",
            "MailProg": "/bin/true",
            "SlurmdParameters": "config_overrides",  # sizes that this machine does not have
            "JobAcctGatherType": "jobacct_gather/none",
            "MpiDefault": "none",
            "ReturnToService": "2",  # use a lost node again when it returns
            "PreemptMode": "REQUEUE",
            "SlurmctldTimeout": "10",
            "MinJobAge": "300",
            "SchedulerType": "sched/backfill",
            "SchedulerParameters": "batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2",
        }

    def _chosen(self) -> dict[str, str]:
        options = self.options
        lines = {
            "ProctrackType": "proctrack/cgroup" if options.cgroups else "proctrack/linuxproc",
            "TaskPlugin": "task/cgroup" if options.cgroups else "task/none",
            "SlurmctldPort": str(options.port),
            "KillWait": str(options.kill_wait),
            "SlurmdTimeout": str(options.node_timeout),
            "SelectType": f"select/{options.select}",
            "PreemptType": "preempt/qos" if options.preempt == "qos" else "preempt/partition_prio",
            "JobRequeue": str(int(options.requeue)),
        }
        if options.job_submit:
            lines["JobSubmitPlugins"] = "lua"
        if options.select == "linear":  # allocates whole nodes; memory is the only consumable resource
            lines |= {"SelectTypeParameters": "CR_Memory", "DefMemPerNode": str(options.memory)}
        else:
            lines |= {"SelectTypeParameters": "CR_CPU_Memory", "DefMemPerCPU": "100"}
        if self.only:
            lines["CommunicationParameters"] = "NoInAddrAny,NoCtldInAddrAny"
        if options.cards:
            lines["GresTypes"] = "gpu"
        if options.user_signal:
            lines["PreemptParameters"] = "send_user_signal"
        return lines | (self._accounting() if options.accounting else {})

    def profile(self) -> str:
        """A cluster profile for flip submit (jobs/common/cluster_profile.py)."""
        options = self.options
        lines = f"""\
            # The Slurm on this machine, for which jobs need SLURM_CONF={self.conf}
            name: here
            kind: slurm
            partition: low
            gpus_per_node: {options.cards}
            cpus_per_node: {options.cpus}
            memory_gb: {options.memory // 1024}
            hours: 1
            signal_seconds: 60
            env: [SLURM_CONF]
            """
        account = ""
        if options.accounting:
            account = "account: acc\n"
        return dedent(lines) + account + ("qos: low\n" if options.preempt == "qos" else "")

    def _accounting(self) -> dict[str, str]:
        return {
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "AccountingStorageHost": self.address,
            "AccountingStoragePort": str(self.database_ports[0]),
            "AccountingStoragePass": f"{self.folder}/run/munge.sock",  # clients use it as munge's socket
            "AccountingStorageTRES": "gres/gpu",
            **({"AccountingStorageEnforce": "limits,qos"} if self.options.limited else {}),
        }


def user_name() -> str:
    """Name of the current user."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        remedy = "Slurm needs a name: add the user to /etc/passwd, or run as root."
        raise ConfigError("this user id has no name", value=os.getuid(), remedy=remedy) from None


def loopback() -> tuple[str, bool]:
    """The address of the nodes, and whether Slurm can be restricted to it.

    Slurm listens on all addresses or only on that of the host name, which need not be a loopback address.
    """
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1", False
    if address.startswith("127."):
        return address, True
    return "127.0.0.1", False


def free_block(count: int, first: int = 0) -> int:
    """First of ``count`` consecutive free ports: ``first``, or any."""
    if first:
        taken = [port for port in range(first, first + count) if not _free(port)]
        if taken:
            raise ConfigError("port in use", "option port", taken[0], f"Slurm needs {count} consecutive free ports.")
        return first
    for _ in range(200):
        first = random.choice(_PORTS)
        if all(_free(port) for port in range(first, first + count)):
            return first
    raise ConfigError("no consecutive free ports", "option port", count, "Name the first with --port.")


def _free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the daemons do
        try:
            listener.bind(("", port))
            listener.listen(1)
        except (OSError, OverflowError):
            return False
    return True
