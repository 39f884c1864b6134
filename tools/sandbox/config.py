"""Options, paths, ports and configuration files of the Slurm in a folder."""

from __future__ import annotations

import os
import pwd
import random
import re
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

from flip.runs.errors import ConfigError

SELECTS = ("cons_tres", "linear")
PREEMPTIONS = ("partition", "qos")
#: Slurm's longest unix socket below its folder (a step's, of a job with seven digits), and what the kernel allows.
_SOCKET, _LONGEST = "/spool/n99/n99_1234567.4294967291", 107
#: Below the ports that the kernel gives to clients.
_PORTS = range(28000, 32000)
CLUSTER = "here"
#: Seconds before a requeued job may run again, less one. Slurm's own: 120.
CRED_EXPIRE = 5


@dataclass(frozen=True)
class Options:
    """Options of the Slurm; sizes are per node."""

    nodes: int = 4
    gpus: int = 8
    cpus: int = 16
    memory: int = 64000
    """MB."""
    grace: int = 0
    """GraceTime of the partition low, seconds."""
    kill_wait: int = 5
    user_signal: bool = True
    """Whether preemption sends the signal of ``sbatch --signal`` (PreemptParameters=send_user_signal)."""
    accounting: bool = False
    select: str = "cons_tres"
    node_timeout: int = 30
    """SlurmdTimeout, seconds until a silent node is down."""
    settings: tuple[str, ...] = ()
    """Further lines KEY=VALUE of slurm.conf; they replace default lines with the same key."""
    port: int = 0
    """First of a block of ports; 0: chosen at start."""
    preempt: str = "partition"
    """Preemption by partition (low, high), or by QOS (low, high), which needs accounting."""
    requeue: bool = True
    """JobRequeue, the default for jobs that do not specify it."""
    job_submit: str = ""
    """Text of job_submit.lua; empty: no plugin."""
    max_submit: int = 0
    """MaxSubmitJobs of the user's association; 0: no limit."""

    def __post_init__(self) -> None:
        for name, least in {
            "nodes": 1,
            "gpus": 0,
            "cpus": 1,
            "memory": 1,
            "grace": 0,
            "kill_wait": 0,
            "port": 0,
            "max_submit": 0,
        }.items():
            if getattr(self, name) < least:
                raise ConfigError(f"must be at least {least}", f"option {name}", getattr(self, name))
        if self.nodes > 99:
            raise ConfigError("must be at most 99", "option nodes", self.nodes)
        if self.select not in SELECTS:
            raise ConfigError("unknown plugin", "option select", self.select, f"There are: {', '.join(SELECTS)}.")
        if self.preempt not in PREEMPTIONS:
            remedy = f"Use one of: {', '.join(PREEMPTIONS)}."
            raise ConfigError("unknown kind of preemption", "option preempt", self.preempt, remedy)
        if not self.accounting and (self.preempt == "qos" or self.max_submit):
            name = "preempt" if self.preempt == "qos" else "max_submit"
            remedy = "Start it with --accounting: QOS and limits are kept in the accounting database."
            raise ConfigError("needs accounting", f"option {name}", getattr(self, name), remedy)
        for line in self.settings:
            if not re.fullmatch(r"\w+=[^\n]*", line):
                raise ConfigError("must be KEY=VALUE", "option set", line)

    @property
    def cards(self) -> int:
        """GPUs that Slurm allocates; none with select/linear, whose jobs would get them but not their steps."""
        return 0 if self.select == "linear" else self.gpus

    @property
    def limited(self) -> bool:
        """Whether slurmctld enforces QOS and limits of the accounting database."""
        return self.preempt == "qos" or self.max_submit > 0

    @property
    def ports(self) -> int:
        """Number of ports needed: slurmctld, slurmds, and with accounting slurmdbd and MariaDB."""
        return 1 + self.nodes + (2 if self.accounting else 0)


class Site:
    """A folder and the options of the Slurm in it."""

    def __init__(self, folder: Path, options: Options) -> None:
        self.folder, self.options = folder, options
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
        """The nodes."""
        return [f"n{number}" for number in range(1, self.options.nodes + 1)]

    def spool(self, node: str) -> Path:
        return self / "spool" / node

    @property
    def database_ports(self) -> tuple[int, int]:
        """Ports of slurmdbd and MariaDB."""
        first = self.options.port + 1 + self.options.nodes
        return first, first + 1

    def check(self) -> None:
        """Raise ConfigError if the folder cannot hold a Slurm."""
        text = str(self.folder)
        if not re.fullmatch(r"[\w./+-]+", text):
            remedy = "Name one of letters, digits and ._-+ with --folder: it stands in Slurm's files and in shells."
            raise ConfigError("the folder's name holds other characters", "option folder", text, remedy)
        if len(text + _SOCKET) > _LONGEST:
            remedy = f"Name a folder of at most {_LONGEST - len(_SOCKET)} characters with --folder."
            raise ConfigError("the folder's name is too long for unix sockets below it", "option folder", text, remedy)
        if self.folder.exists() and not self.conf.exists() and any(self.folder.iterdir()):
            raise ConfigError("the folder holds something else", "option folder", text, "Name a new or empty folder.")

    def write(self) -> None:
        """Write all configuration files; the folders must exist."""
        for number in range(self.options.cards):
            gpu = self / "dev" / f"gpu{number}"
            if not gpu.is_symlink():  # Slurm wants a character device, and only looks at it
                gpu.symlink_to("/dev/null")
        key = self / "munge" / "key"
        if not key.exists():
            put(key, secrets.token_bytes(128), 0o600)
        gpus = f"Name=gpu File={self.folder}/dev/gpu[0-{self.options.cards - 1}]\n" if self.options.cards else ""
        texts = {"cgroup.conf": "CgroupPlugin=disabled\n", "gres.conf": gpus, "profile.yaml": self.profile()}
        if self.options.job_submit:
            texts["job_submit.lua"] = self.options.job_submit
        for name, text in (texts | {"slurm.conf": self.slurm_conf()}).items():
            put(self / name, text.encode())

    def slurm_conf(self) -> str:
        """slurm.conf. docs/slurm_at_home.md explains the unusual lines."""
        options = self.options
        lines = self._fixed() | self._chosen()
        for key, value in (line.split("=", 1) for line in options.settings):
            # Slurm does not mind capitals: ours of that name goes
            lines = {known: old for known, old in lines.items() if known.lower() != key.lower()} | {key: value}
        gres = f" Gres=gpu:{options.cards}" if options.cards else ""
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
            "SlurmdParameters": "config_overrides",  # sizes that this machine has not
            "ProctrackType": "proctrack/linuxproc",  # these two: nothing of cgroups
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "MpiDefault": "none",
            "ReturnToService": "2",  # a lost node is used again when it is back
            "PreemptMode": "REQUEUE",
            "SlurmctldTimeout": "10",
            "MinJobAge": "300",
            "SchedulerType": "sched/backfill",
            "SchedulerParameters": "batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2",
        }

    def _chosen(self) -> dict[str, str]:
        options = self.options
        lines = {
            "SlurmctldPort": str(options.port),
            "KillWait": str(options.kill_wait),
            "SlurmdTimeout": str(options.node_timeout),
            "SelectType": f"select/{options.select}",
            "PreemptType": "preempt/qos" if options.preempt == "qos" else "preempt/partition_prio",
            "JobRequeue": str(int(options.requeue)),
        }
        if options.job_submit:
            lines["JobSubmitPlugins"] = "lua"
        if options.select == "linear":  # whole nodes; of these it can count memory alone
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
        """A cluster profile for jobs/submit.py (jobs/common/cluster_profile.py)."""
        fields = {
            "kind": "slurm",
            "partition": "low",
            "gpus_per_node": self.options.cards,
            "cpus_per_node": self.options.cpus,
            "memory_gb": self.options.memory // 1024,
            "hours": 1,
            "signal_seconds": 60,
            "env": "[SLURM_CONF]",
        }
        if self.options.accounting:
            fields["account"] = "acc"
        if self.options.preempt == "qos":
            fields["qos"] = "low"
        head = f"# The Slurm on this machine; jobs find it by SLURM_CONF={self.conf}\nname: here\n"
        return head + "".join(f"{key}: {value}\n" for key, value in fields.items())

    def _accounting(self) -> dict[str, str]:
        return {
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "AccountingStorageHost": self.address,
            "AccountingStoragePort": str(self.database_ports[0]),
            "AccountingStoragePass": f"{self.folder}/run/munge.sock",  # its clients take it for munge's socket
            "AccountingStorageTRES": "gres/gpu",
            **({"AccountingStorageEnforce": "limits,qos"} if self.options.limited else {}),
        }


def put(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file atomically."""
    new = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
        file.write(data)
    new.replace(path)


def user_name() -> str:
    """Name of the current user."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        remedy = "Slurm wants one: add the user to /etc/passwd, or be root."
        raise ConfigError("this user has a number and no name", value=os.getuid(), remedy=remedy) from None


def loopback() -> tuple[str, bool]:
    """The address of the nodes, and whether Slurm can be told to listen on no other one.

    Slurm listens on all addresses or on the one that the host's name has, which need not be a loopback one.
    """
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1", False
    return (address, True) if address.startswith("127.") else ("127.0.0.1", False)


def free_block(count: int, first: int = 0) -> int:
    """First of ``count`` consecutive free ports: ``first``, or any."""
    if first:
        taken = [port for port in range(first, first + count) if not _free(port)]
        if taken:
            raise ConfigError("port in use", "option port", taken[0], f"{count} free ports in a row are needed.")
        return first
    for _ in range(200):
        first = random.choice(_PORTS)
        if all(_free(port) for port in range(first, first + count)):
            return first
    raise ConfigError("no free ports in a row", "option port", count, "Name the first of them with --port.")


def _free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the daemons do
        try:
            listener.bind(("", port))
            listener.listen(1)
        except (OSError, OverflowError):
            return False
    return True
