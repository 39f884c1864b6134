"""Reads the properties of a Slurm site through its commands on this machine, and checks profiles against them."""

import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from flip.files.ownership import user_name
from flip.runs.errors import ConfigError, StorageError
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.filesystem import probe
from jobs.common.paths import runs_root
from jobs.host import slurm_cli
from jobs.host.slurm_cli import UNUSABLE, parse_int
from jobs.slurm.batch_script import FORWARDED_ENV, clean_environment, minutes

#: In a node's gres: ``gpu:8``, ``gpu:h100:8(S:0-1)``, ``gpu:4090:4,gpu:a40:2``.
GPUS = re.compile(r"\bgpu:(?:([^:,()]+):)?([0-9]{1,9})(?=[,(\s]|$)")
COMMANDS = ("sbatch", "srun", "squeue", "scancel", "scontrol")
DEADLINE = 15.0  # seconds for one query of ``read``
KILL_WAIT = 30  # Slurm's default, seconds
#: Executed by the batch script's Python as a test.
PYTHON = "import sys; sys.version_info >= (3, 6) or sys.exit('it is Python %d.%d' % sys.version_info[:2])"
#: Limits on submitted jobs in Slurm's accounting database, as sacctmgr names them.
QOS_LIMITS = ("MaxSubmitJobsPerUser", "MaxSubmitJobsPerAccount", "GrpSubmitJobs")
ASSOCIATION_LIMITS = ("MaxSubmitJobs", "GrpSubmitJobs")
#: What a job that requests no memory gets, by a partition or by the site.
MEMORY_DEFAULTS = ("DefMemPerCPU", "DefMemPerNode", "DefMemPerGPU")
#: Modes of preemption, the worst for a run first: a cancelled job does not come back.
PREEMPT_MODES = ("CANCEL", "SUSPEND", "REQUEUE", "OFF")
#: Prefixes of the types of shared file systems.
SHARED = ("afs", "beegfs", "ceph", "cifs", "fuse", "gpfs", "lustre", "nfs", "orangefs", "panfs", "pvfs2", "wekafs")


def check_ready(profile: ClusterProfile, execute: bool = True) -> str:
    """Check that jobs can be submitted from here, and describe the Slurm that answers.

    ``execute``: also run the Python that the profile names for batch scripts. Raises ConfigError, or StorageError if
    none answers.
    """
    _commands()
    unset = _unset(profile)
    if unset:
        what = f"env: variables that the profile {profile.name} forwards are not set here"
        raise ConfigError(what, value=", ".join(unset), remedy="Export them, or remove them from the profile.")
    answer = _describe_cluster(profile.partition, profile.name)
    if execute:
        _check_python(profile)
    else:
        answer += "; host_python is not executed: others can exchange it, or a dry run has its profile from the sweep"
    if "no-requeue" in profile.options:
        answer += "; no-requeue in the profile's options: each start is a new job, submitted by the previous one"
    return answer


def _check_python(profile: ClusterProfile) -> None:
    """ConfigError if the batch script's Python exists here but does not run in the environment of jobs: every node
    would be taken for one that lacks it. A Python that only the nodes have is not checked."""
    python = shutil.which(profile.hosts_python)
    if python is None:
        return
    try:
        with clean_environment([*FORWARDED_ENV, *profile.env]):
            slurm_cli.call(python, "-Ic", PYTHON)
    except slurm_cli.SlurmUnavailable as error:
        remedy = f"In the profile {profile.name} name another (host_python: /usr/bin/python3), or what it needs (env: "
        remedy += "[LD_LIBRARY_PATH]): modules are loaded later, for the ranks."
        what = "the batch script's Python does not run in the environment of jobs"
        raise ConfigError(what, python, str(error).removeprefix(f"{python}: "), remedy) from error


def _commands() -> None:
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        remedy = "Submit from a machine of the cluster; --dry-run plans anywhere."
        what = f"these commands of Slurm are not on this machine: {', '.join(missing)}"
        raise ConfigError(what, "PATH", remedy=remedy)


def _unset(profile: ClusterProfile) -> list[str]:
    return [name for name in profile.env if name not in os.environ]


@lru_cache(maxsize=8)
def _describe_cluster(partition: str, name: str) -> str:
    try:
        cluster = slurm_cli.cluster_name()
    except slurm_cli.SlurmUnavailable as error:
        raise _no_answer(name, error) from error
    for part in filter(None, partition.split(",")):
        try:
            slurm_cli.call("scontrol", "-a", "show", "partition", part)
        except slurm_cli.SlurmUnavailable as error:
            where = f"{name}, partition"
            raise ConfigError("no such partition", where, part, "`sinfo` lists all partitions.") from error
    answer = f"the cluster {cluster} answers"
    if partition:
        answer += f", it has the partition {partition}"
    return answer


def _no_answer(name: str, error: slurm_cli.SlurmUnavailable) -> StorageError:
    remedy = "Run it on a login node (or set SLURM_CONF); if the controller is down, try later."
    text = re.sub(r"^(\w+: )\1", r"\1", str(error))  # the command names itself, too
    return StorageError("Slurm does not answer", name, text, remedy)


class Node(NamedTuple):
    """The resources of a node, as sinfo lists them. Memory in MiB. ``cpus``: what Slurm counts, cores or hardware
    threads. ``cores``: 0 if unknown."""

    cpus: int
    memory: int
    gpus: int
    gpu: str
    cores: int = 0

    @property
    def threads_per_core(self) -> int:
        """CPUs that Slurm counts per core; 1 if the cores are not known."""
        return max(1, self.cpus // self.cores) if self.cores else 1

    @property
    def memory_gb(self) -> int:
        return self.memory * 2**20 // 10**9


class AgentsTrial(NamedTuple):
    """The result of a try of node agents (``agents_trial.try_agents``)."""

    nodes: Sequence[str] = ()
    """Names of the nodes whose agents were accepted."""
    problem: str = ""
    """Why node agents do not work here, by node; empty: they do, if ``unable`` is empty."""
    remedy: str = ""
    """A sentence for ``problem``."""
    unable: str = ""
    """Why nothing is known: Slurm refused the step, or no nodes were free in time."""
    store: str | None = None
    """Address at which the store of rank 0 listens on the first node; empty: on all interfaces; None: not known."""
    coordinator: str | None = None
    """The same of the coordinator of node agents."""


@dataclass(frozen=True)
class Site:
    """Texts as Slurm prints them; the properties parse them.

    ``errors``: query -> "" if it was answered, else what went wrong. ``filesystems``: ``runs root`` and ``python`` ->
    type of the file system below. ``python``: version of the batch script's Python on this machine.
    """

    config: Mapping[str, str] = field(default_factory=dict)  # scontrol show config
    partition: Mapping[str, str] = field(default_factory=dict)  # scontrol show partition; of several the strictest
    qos: Mapping[str, str] = field(default_factory=dict)  # preempt, grace, wall, QOS_LIMITS of the jobs' QOS, if known
    association: Mapping[str, str] = field(default_factory=dict)  # account, qos, ASSOCIATION_LIMITS of the user
    nodes: Mapping[Node, int] = field(default_factory=dict)  # resources -> number of usable nodes of the partition
    errors: Mapping[str, str] = field(default_factory=dict)
    python: str = ""
    filesystems: Mapping[str, str] = field(default_factory=dict)
    unset: tuple[str, ...] = ()  # variables of the profile's ``env`` that are not set here
    agents_trial: AgentsTrial | None = None  # None: node agents were not tried

    @property
    def version(self) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"[0-9]{1,9}", self.config.get("SLURM_VERSION", ""))[:2])

    @property
    def preemption(self) -> tuple[str, int]:
        """(REQUEUE, CANCEL, SUSPEND or OFF; "" if unknown: what happens to a preempted job, GraceTime in seconds)."""
        kind = self.config.get("PreemptType", "")
        if kind in ("preempt/none", "(null)"):
            return "OFF", 0
        if kind == "preempt/qos" and not self.qos:
            return "", 0
        modes = self.partition.get("PreemptMode", "").upper()
        grace = self.partition.get("GraceTime", "")
        if kind == "preempt/qos":
            modes = self.qos.get("preempt", "").upper()
            grace = self.qos.get("grace", "")
        if not modes or modes == "CLUSTER":
            modes = self.config.get("PreemptMode", "").upper()
        mode = next((mode for mode in ("REQUEUE", "CANCEL", "SUSPEND", "OFF") if mode in modes), "")
        return mode, _seconds(grace)

    @property
    def kill_wait(self) -> int:
        """Seconds between TERM and KILL."""
        seconds = parse_int(self.config.get("KillWait", ""))
        if seconds is None:
            return KILL_WAIT
        return seconds

    @property
    def max_seconds(self) -> int | None:
        """Seconds that a job may request; None: no limit."""
        limits = [
            slurm_cli.parse_duration(text) for text in (self.partition.get("MaxTime", ""), self.qos.get("wall", ""))
        ]
        return min((limit for limit in limits if limit), default=None)

    @property
    def submit_limit(self) -> tuple[str, int]:
        """The lowest limit on submitted jobs that have not ended, as (name, limit); ("", 0): none."""
        limits = [(parse_int(self.qos.get(key, "")), f"{key} of the QOS") for key in QOS_LIMITS]
        limits += [
            (parse_int(self.association.get(key, "")), f"{key} of the association") for key in ASSOCIATION_LIMITS
        ]
        least = min(((limit, source) for limit, source in limits if limit is not None), default=(0, ""))
        return least[1], least[0]

    @property
    def common_node(self) -> Node | None:
        """The resources of most nodes; only nodes with GPUs count if there are any."""
        return max(self.nodes, key=lambda node: (node.gpus > 0, self.nodes[node], node), default=None)

    @property
    def memory_share(self) -> str:
        """The memory of a job that requests none, in words; "": all, or memory is not counted."""
        if "MEMORY" not in self.config.get("SelectTypeParameters", "").upper():
            return ""
        for source in (self.partition, self.config):
            for key in MEMORY_DEFAULTS:
                if parse_int(source.get(key, "")):
                    return f"{key}={source[key]}"
        return ""


def read(profile: ClusterProfile) -> Site:
    """Query everything. Raises StorageError if Slurm does not answer; failures of single queries go to ``errors``."""
    _commands()
    errors: dict[str, str] = {}
    try:
        config = slurm_cli.config()
    except slurm_cli.SlurmUnavailable as error:
        raise _no_answer(profile.name, error) from error
    partition = _partition(profile, config)
    association = _association(errors, profile, config)
    qos = _qos(errors, profile.qos or association.get("qos", ""))
    name = partition["PartitionName"]
    rows = query(errors, "nodes", "sinfo", "-h", "-N", "-p", name, "-o", "%N|%c|%m|%G|%T|%z")
    python = shutil.which(profile.hosts_python) or profile.hosts_python
    with clean_environment([*FORWARDED_ENV, *profile.env]):
        version = query(errors, "python", python, "-Ic", "import sys; print('%d.%d.%d' % sys.version_info[:3])").strip()
    if find_spec("submitit"):
        errors["submitit"] = ""
    else:
        errors["submitit"] = "not installed"
    root = runs_root(profile.runs_root)
    errors["runs root"] = write_problem(root)
    places = {"runs root": filesystem_type(root), "python": filesystem_type(Path(python))}
    unset = tuple(_unset(profile))
    return Site(config, partition, qos, association, parse_nodes(rows), errors, version, places, unset)


def _association(errors: dict[str, str], profile: ClusterProfile, config: Mapping[str, str]) -> dict[str, str]:
    """The user's association in the profile's account or the default one; empty without accounting."""
    if config.get("AccountingStorageType", "(null)") in ("(null)", "accounting_storage/none"):
        return {}
    names = ("default", "account", "qos", *ASSOCIATION_LIMITS)
    form = f"format=DefaultAccount,Account,DefaultQOS,{','.join(ASSOCIATION_LIMITS)}"
    of = (f"name={user_name(os.geteuid())}", f"cluster={config.get('ClusterName', '')}")
    text = query(errors, "association", "sacctmgr", "-n", "-P", "show", "user", *of, "withassoc", form)
    rows = [dict(zip(names, line.split("|"), strict=False)) for line in text.splitlines() if line.strip()]
    return next((row for row in rows if row.get("account") == (profile.account or row["default"])), {})


def _qos(errors: dict[str, str], name: str) -> dict[str, str]:
    if not name:
        return {}
    form = f"format=PreemptMode,GraceTime,MaxWall,{','.join(QOS_LIMITS)}"
    line = query(errors, "qos", "sacctmgr", "-n", "-P", "show", "qos", f"name={name}", form).strip()
    if not line:
        return {}
    return dict(zip(("preempt", "grace", "wall", *QOS_LIMITS), line.split("|"), strict=False))


def query(errors: dict[str, str], name: str, *argv: str) -> str:
    """Standard output of a command; "" if it failed, with the error text in ``errors[name]``."""
    errors[name] = ""
    try:
        return slurm_cli.call(*argv, deadline=DEADLINE)
    except slurm_cli.SlurmUnavailable as error:
        errors[name] = str(error)
        return ""


def _partition(profile: ClusterProfile, config: Mapping[str, str]) -> dict[str, str]:
    """The fields of the profile's partition, of several the strictest, or the fields of the site's default one."""
    names = list(filter(None, profile.partition.split(",")))
    if names:
        return strictest([_show_partitions(profile, name)[0] for name in names], config)
    rows = _show_partitions(profile)
    for row in rows:
        if row.get("Default") == "YES":
            return row
    partition_names = ", ".join(row["PartitionName"] for row in rows)
    raise ConfigError(
        "the site has no default partition", "--partition", remedy=f"Name one of: {partition_names or 'none'}."
    )


def _show_partitions(profile: ClusterProfile, name: str = "") -> list[dict[str, str]]:
    """The fields of the partition, or of all; ConfigError if there is none of this name."""
    names = [name] if name else []
    unknown = ConfigError("no such partition", "--partition", name, "`sinfo` lists all partitions.")
    try:
        text = slurm_cli.call("scontrol", "-a", "-o", "show", "partition", *names, deadline=DEADLINE)
    except slurm_cli.SlurmUnavailable as error:
        if not name or "did not answer" in str(error):
            raise _no_answer(profile.name, error) from error
        raise unknown from error
    rows = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in text.splitlines() if line.startswith("PartitionName=")]
    if name and not rows:
        raise unknown
    return rows


def strictest(rows: Sequence[Mapping[str, str]], config: Mapping[str, str]) -> dict[str, str]:
    """Fields that hold in each of the partitions: Slurm starts a job in any of them.

    The shortest wall limit and grace time, the worst mode of preemption, and a default of memory if any has one.
    """
    fields = dict(rows[0])
    if len(rows) == 1:
        return fields
    fields["PartitionName"] = ",".join(row["PartitionName"] for row in rows)
    limits = [(slurm_cli.parse_duration(row.get("MaxTime", "")), row.get("MaxTime", "")) for row in rows]
    if finite := [limit for limit in limits if limit[0]]:
        fields["MaxTime"] = min(finite)[1]
    modes = [_preempt_mode(row.get("PreemptMode", ""), config) for row in rows]
    fields["PreemptMode"] = min(modes, key=_badness)
    fields["GraceTime"] = str(min(_seconds(row.get("GraceTime", "")) for row in rows))
    for key in MEMORY_DEFAULTS:
        fields[key] = next((row[key] for row in rows if parse_int(row.get(key, ""))), fields.get(key, ""))
    return fields


def _preempt_mode(mode: str, config: Mapping[str, str]) -> str:
    if mode.upper() in ("", "CLUSTER"):
        return config.get("PreemptMode", "")
    return mode


def _badness(mode: str) -> int:
    """The place of a mode in PREEMPT_MODES; an unknown one stands last."""
    places = [place for place, name in enumerate(PREEMPT_MODES) if name in mode.upper()]
    return min(places, default=len(PREEMPT_MODES))


def _seconds(text: str) -> int:
    return slurm_cli.parse_duration(text) or parse_int(text) or 0


def parse_nodes(text: str) -> Counter[Node]:
    """Count usable nodes in lines of ``sinfo -N -o %N|%c|%m|%G|%T|%z``, which may list a node twice."""
    nodes: dict[str, Node] = {}
    for line in text.splitlines():
        name, cpus, memory, gres, state, layout = (line.split("|") + [""] * 6)[:6]
        if UNUSABLE.match(state):
            continue
        gpus = GPUS.findall(gres)
        kinds = "+".join(dict.fromkeys(kind for kind, _ in gpus if kind))
        count = sum(int(number) for _, number in gpus)
        nodes[name] = Node(parse_int(cpus) or 0, parse_int(memory) or 0, count, kinds, _cores(layout))
    return Counter(nodes.values())


def _cores(layout: str) -> int:
    """Cores of a node by sinfo's ``sockets:cores:threads``; 0: unknown."""
    sockets, cores, _ = (layout.split(":") + [""] * 3)[:3]
    return (parse_int(sockets) or 0) * (parse_int(cores) or 0)


def rejection(profile: ClusterProfile) -> str:
    """Why sbatch would refuse a job of one node with the profile's options; "" if it accepts it."""
    options: dict[str, str] = {key: getattr(profile, key) for key in ("partition", "account", "qos")}
    options |= {"nodes": "1", "ntasks": "1", "time": str(minutes(profile.hours)), "requeue": ""}
    if profile.gpus_per_node and not {"gres", "gpus", "gpus-per-node"} & profile.options.keys():
        options["gpus-per-node"] = str(profile.gpus_per_node)
    given = {key: value for key, value in options.items() if value or key == "requeue"} | profile.options
    arguments = [f"--{key}={value}" if value else f"--{key}" for key, value in given.items()]
    errors: dict[str, str] = {}
    with clean_environment([*FORWARDED_ENV, *profile.env]):
        query(errors, "sbatch", "sbatch", "--test-only", *arguments, "--wrap=true")
    return errors["sbatch"]


def filesystem_type(path: Path) -> str:
    """The type of the file system that holds a path, "" if unknown."""
    try:
        mounts = [line.split()[1:3] for line in os.fsdecode(Path("/proc/self/mounts").read_bytes()).splitlines()]
    except OSError:
        return ""
    above = {str(folder) for folder in (path.resolve(), *path.resolve().parents)}
    inside = [(len(place), -i, kind) for i, (place, kind) in enumerate(reversed(mounts)) if place in above]
    if not inside:
        return ""
    return max(inside)[2]


def write_problem(root: Path) -> str:
    """Why runs cannot be stored below ``root``, by a file that is created, locked, renamed and linked; "": they can."""
    place = next(folder for folder in (root, *root.parents) if folder.exists())
    try:
        probe(place)
    except ConfigError as error:
        return f"{place}: {error.what}"
    except OSError as error:
        return f"{error.filename or place}: {error.strerror}"
    return ""
