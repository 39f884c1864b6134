"""What a Slurm site says of itself, asked through its commands on this machine."""

from __future__ import annotations

import os
import pwd
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from flip.runs.errors import ConfigError
from jobs.common.cluster_profile import ClusterProfile, runs_root
from jobs.common.filesystem import probe
from jobs.host import slurm_cli
from jobs.host.slurm_cli import parse_int
from jobs.slurm.batch_script import FORWARDED_ENV, clean_environment, minutes

GPUS = re.compile(r"\bgpu:(?:([^:,()]+):)?([0-9]{1,9})(?=[,(\s]|$)")
"""In a node's gres: ``gpu:8``, ``gpu:h100:8(S:0-1)``, ``gpu:4090:4,gpu:a40:2``."""
COMMANDS = ("sbatch", "srun", "squeue", "scancel", "scontrol")
DEADLINE = 15.0
"""Seconds for one question of ``read``."""
PYTHON = "import sys; sys.version_info >= (3, 6) or sys.exit('it is Python %d.%d' % sys.version_info[:2])"
"""What the batch script's Python must get through."""
QOS_LIMITS = ("MaxSubmitJobsPerUser", "MaxSubmitJobsPerAccount", "GrpSubmitJobs")
ASSOCIATION_LIMITS = ("MaxSubmitJobs", "GrpSubmitJobs")
"""Limits on submitted jobs in Slurm's accounting database, as sacctmgr names them."""
SHARED = ("afs", "beegfs", "ceph", "cifs", "fuse", "gpfs", "lustre", "nfs", "orangefs", "panfs", "pvfs2", "wekafs")
"""Beginnings of the names of file systems that several machines see."""


def ready(profile: ClusterProfile, execute: bool = True) -> str:
    """A sentence about the Slurm that answers here. ConfigError where a submission from here cannot go through.

    ``execute``: also run the Python that the profile names for batch scripts.
    """
    _commands()
    unset = _unset(profile)
    if unset:
        what = f"env: the profile {profile.name} passes variables on that are not set here"
        raise ConfigError(what, value=", ".join(unset), remedy="Export them, or take their names out of the profile.")
    answer = _answer(profile.partition, profile.name)
    if execute:
        _interpreter(profile)
    else:
        answer += "; host_python is not executed by a dry run, because the sweep names the profile's file"
    disabled = "; no-requeue in the profile's options: each start is a new job, submitted by the one before"
    return answer + (disabled if "no-requeue" in profile.options else "")


def _interpreter(profile: ClusterProfile) -> None:
    """ConfigError where the batch script's Python is here and does not run with what jobs get: every node would be
    taken for one that lacks it. One that is on the nodes alone is not known of."""
    python = shutil.which(profile.hosts_python)
    if python is None:
        return
    try:
        with clean_environment([*FORWARDED_ENV, *profile.env]):
            slurm_cli.call(python, "-Ic", PYTHON)
    except slurm_cli.SlurmUnavailable as error:
        remedy = f"In the profile {profile.name} name another (host_python: /usr/bin/python3), or what it needs (env: "
        remedy += "[LD_LIBRARY_PATH]): modules are loaded after it has begun, for the ranks."
        what = "the batch script's Python does not run in the environment of jobs"
        raise ConfigError(what, python, str(error).removeprefix(f"{python}: "), remedy) from error


def _commands() -> None:
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        remedy = "Submit from a machine of the cluster; --dry-run plans anywhere."
        raise ConfigError("Slurm's commands are not on this machine", "PATH", ", ".join(missing), remedy)


def _unset(profile: ClusterProfile) -> list[str]:
    return [name for name in profile.env if name not in os.environ]


@lru_cache(maxsize=8)
def _answer(partition: str, name: str) -> str:
    try:
        called = slurm_cli.cluster_name()
    except slurm_cli.SlurmUnavailable as error:
        raise _silent(name, error) from error
    for part in filter(None, partition.split(",")):
        try:
            slurm_cli.call("scontrol", "-a", "show", "partition", part)
        except slurm_cli.SlurmUnavailable as error:
            remedy = "`sinfo` lists what there is."
            raise ConfigError("no such partition", f"{name}, partition", part, remedy) from error
    return f"the cluster {called} answers" + (f", it has the partition {partition}" if partition else "")


def _silent(name: str, error: slurm_cli.SlurmUnavailable) -> ConfigError:
    return ConfigError("Slurm does not answer", name, str(error), "Is its controller up?")


# -- what was read -----------------------------------------------------------------------------------------------------


class Node(NamedTuple):
    """The shape of a node, as sinfo tells it. Memory in MiB."""

    cpus: int
    memory: int
    gpus: int
    gpu: str

    @property
    def memory_gb(self) -> int:
        return self.memory * 2**20 // 10**9


@dataclass(frozen=True)
class Site:
    """Texts as Slurm prints them. What a promise needs of them, in numbers, are the properties."""

    config: Mapping[str, str] = field(default_factory=dict)
    """``scontrol show config``."""
    partition: Mapping[str, str] = field(default_factory=dict)
    """``scontrol show partition`` of one."""
    qos: Mapping[str, str] = field(default_factory=dict)
    """preempt, grace, wall and the limits on submitted jobs (QOS_LIMITS) of the QOS that jobs get; empty: not known."""
    association: Mapping[str, str] = field(default_factory=dict)
    """account, qos and the limits on submitted jobs (ASSOCIATION_LIMITS) of the user's association; empty: unknown."""
    nodes: Mapping[Node, int] = field(default_factory=dict)
    """Shape -> how many there are in the partition that are not down or drained."""
    said: Mapping[str, str] = field(default_factory=dict)
    """Question -> "" where the answer is well, else what went wrong."""
    python: str = ""
    """Version of the Python that the batch script calls, as it is on this machine."""
    places: Mapping[str, str] = field(default_factory=dict)
    """``runs root`` and ``python`` -> the type of the file system below."""
    unset: tuple[str, ...] = ()
    """Names of the profile's ``env`` that are not set here."""

    @property
    def version(self) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"[0-9]{1,9}", self.config.get("SLURM_VERSION", ""))[:2])

    @property
    def preemption(self) -> tuple[str, int]:
        """What becomes of a job that is preempted (REQUEUE, CANCEL, SUSPEND, OFF; "": not known), and GraceTime."""
        kind = self.config.get("PreemptType", "")
        if kind in ("preempt/none", "(null)"):
            return "OFF", 0
        source, key = (self.qos, "preempt") if kind == "preempt/qos" else (self.partition, "PreemptMode")
        if kind == "preempt/qos" and not self.qos:
            return "", 0
        words = source.get(key, "").upper()
        if not words or words == "CLUSTER":
            words = self.config.get("PreemptMode", "").upper()
        grace = source.get("grace" if kind == "preempt/qos" else "GraceTime", "")
        mode = next((mode for mode in ("REQUEUE", "CANCEL", "SUSPEND", "OFF") if mode in words), "")
        return mode, slurm_cli.parse_duration(grace) or parse_int(grace) or 0

    @property
    def kill_wait(self) -> int:
        """Seconds between TERM and KILL."""
        seconds = parse_int(self.config.get("KillWait", ""))
        return 30 if seconds is None else seconds

    @property
    def longest(self) -> int | None:
        """Seconds that a job may ask for; None: no limit."""
        limits = [
            slurm_cli.parse_duration(text) for text in (self.partition.get("MaxTime", ""), self.qos.get("wall", ""))
        ]
        return min((limit for limit in limits if limit), default=None)

    @property
    def submit_limit(self) -> tuple[str, int]:
        """The lowest limit on jobs that are submitted and have not ended, with the words for it; ("", 0): none."""
        found = [(parse_int(self.qos.get(key, "")), f"{key} of the QOS") for key in QOS_LIMITS]
        found += [(parse_int(self.association.get(key, "")), f"{key} of the association") for key in ASSOCIATION_LIMITS]
        least = min(((limit, words) for limit, words in found if limit is not None), default=(0, ""))
        return least[1], least[0]

    @property
    def shape(self) -> Node | None:
        """The shape of most nodes, of those with GPUs where there are such."""
        return max(self.nodes, key=lambda node: (node.gpus > 0, self.nodes[node], node), default=None)

    @property
    def memory_share(self) -> str:
        """What a job gets that does not ask, in words; "": all there is, or memory is not counted."""
        if "MEMORY" not in self.config.get("SelectTypeParameters", "").upper():
            return ""
        for source in (self.partition, self.config):
            for key in ("DefMemPerCPU", "DefMemPerNode", "DefMemPerGPU"):
                if parse_int(source.get(key, "")):
                    return f"{key}={source[key]}"
        return ""


# -- asking ------------------------------------------------------------------------------------------------------------


def read(profile: ClusterProfile) -> Site:
    """Ask everything. ConfigError where there is nobody to ask; a question in vain stands in ``said``."""
    _commands()
    said: dict[str, str] = {}
    try:
        config = slurm_cli.config()
    except slurm_cli.SlurmUnavailable as error:
        raise _silent(profile.name or "scontrol", error) from error
    partition = _partition(profile)
    association = _association(said, profile, config)
    qos = _qos(said, profile.qos or association.get("qos", ""))
    name = partition["PartitionName"]
    rows = ask(said, "nodes", "sinfo", "-h", "-N", "-p", name, "-o", "%N|%c|%m|%G|%T")
    ask(said, "squeue --json", "squeue", "--json", "--name=none")
    ask(said, "sacct", "sacct", "-n", "-X", "-S", "now")
    python = shutil.which(profile.hosts_python) or profile.hosts_python
    with clean_environment([*FORWARDED_ENV, *profile.env]):
        version = ask(said, "python", python, "-Ic", "import sys; print('%d.%d.%d' % sys.version_info[:3])").strip()
    said["submitit"] = "" if find_spec("submitit") else "not installed"
    root = runs_root(profile)
    said["runs root"] = unusable(root)
    places = {"runs root": filesystem(root), "python": filesystem(Path(python))}
    unset = tuple(_unset(profile))
    return Site(config, partition, qos, association, nodes_of(rows), said, version, places, unset)


def _association(said: dict[str, str], profile: ClusterProfile, config: Mapping[str, str]) -> dict[str, str]:
    """The user's association in the profile's account, or in the default one; empty where there is no accounting."""
    if config.get("AccountingStorageType", "(null)") in ("(null)", "accounting_storage/none"):
        return {}
    names = ("default", "account", "qos", *ASSOCIATION_LIMITS)
    form = f"format=DefaultAccount,Account,DefaultQOS,{','.join(ASSOCIATION_LIMITS)}"
    of = (f"name={_user()}", f"cluster={config.get('ClusterName', '')}")
    text = ask(said, "association", "sacctmgr", "-n", "-P", "show", "user", *of, "withassoc", form)
    rows = [dict(zip(names, line.split("|"), strict=False)) for line in text.splitlines() if line.strip()]
    return next((row for row in rows if row.get("account") == (profile.account or row["default"])), {})


def _qos(said: dict[str, str], name: str) -> dict[str, str]:
    if not name:
        return {}
    form = f"format=PreemptMode,GraceTime,MaxWall,{','.join(QOS_LIMITS)}"
    line = ask(said, "qos", "sacctmgr", "-n", "-P", "show", "qos", f"name={name}", form).strip()
    return dict(zip(("preempt", "grace", "wall", *QOS_LIMITS), line.split("|"), strict=False)) if line else {}


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def ask(said: dict[str, str], question: str, *words: str) -> str:
    """Standard output; "" where it went wrong, with the words in ``said``."""
    said[question] = ""
    try:
        return slurm_cli.call(*words, deadline=DEADLINE)
    except slurm_cli.SlurmUnavailable as error:
        said[question] = str(error)
        return ""


def _partition(profile: ClusterProfile) -> dict[str, str]:
    """The fields of the profile's (first) partition, or of the site's default one."""
    name = profile.partition.partition(",")[0]
    try:
        text = slurm_cli.call("scontrol", "-a", "-o", "show", "partition", *([name] if name else []), deadline=DEADLINE)
    except slurm_cli.SlurmUnavailable as error:
        if not name or "did not answer" in str(error):
            raise _silent(profile.name or "scontrol", error) from error
        raise ConfigError("no such partition", "--partition", name, "`sinfo` lists what there is.") from error
    rows = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in text.splitlines() if line.startswith("PartitionName=")]
    for row in rows:
        if name or row.get("Default") == "YES":
            return row
    known = ", ".join(row["PartitionName"] for row in rows)
    raise ConfigError("the site has no default partition", "--partition", remedy=f"Name one of: {known or 'none'}.")


def nodes_of(text: str) -> Counter[Node]:
    """Lines of ``sinfo -N -o %N|%c|%m|%G|%T``; a node may stand there twice, and in no state to run jobs."""
    found: dict[str, Node] = {}
    for line in text.splitlines():
        name, cpus, memory, gres, state = (line.split("|") + [""] * 5)[:5]
        if re.match("down|drain|fail|inval|unk", state):
            continue
        gpus = GPUS.findall(gres)
        kinds = "+".join(dict.fromkeys(kind for kind, _ in gpus if kind))
        found[name] = Node(parse_int(cpus) or 0, parse_int(memory) or 0, sum(int(count) for _, count in gpus), kinds)
    return Counter(found.values())


def accepts(profile: ClusterProfile) -> str:
    """What sbatch says against a job of one node with the profile's options; "" where it would take it."""
    options: dict[str, str] = {key: getattr(profile, key) for key in ("partition", "account", "qos")}
    options |= {"nodes": "1", "ntasks": "1", "time": str(minutes(profile.hours)), "requeue": ""}
    if profile.gpus_per_node and not {"gres", "gpus", "gpus-per-node"} & profile.options.keys():
        options["gpus-per-node"] = str(profile.gpus_per_node)
    given = {key: value for key, value in options.items() if value or key == "requeue"} | profile.options
    words = [f"--{key}={value}" if value else f"--{key}" for key, value in given.items()]
    said: dict[str, str] = {}
    with clean_environment([*FORWARDED_ENV, *profile.env]):
        ask(said, "sbatch", "sbatch", "--test-only", *words, "--wrap=true")
    return said["sbatch"]


def filesystem(path: Path) -> str:
    """The type of the file system that holds a path, "" where nobody says."""
    try:
        mounts = [line.split()[1:3] for line in os.fsdecode(Path("/proc/self/mounts").read_bytes()).splitlines()]
    except OSError:
        return ""
    above = {str(folder) for folder in (path.resolve(), *path.resolve().parents)}
    inside = [(len(place), -i, kind) for i, (place, kind) in enumerate(reversed(mounts)) if place in above]
    return max(inside)[2] if inside else ""


def unusable(root: Path) -> str:
    """Why runs cannot live below ``root``: create, lock, rename and link a file there; "" where they can."""
    place = next(folder for folder in (root, *root.parents) if folder.exists())
    try:
        probe(place)
    except ConfigError as error:
        return f"{place}: {error.what}"
    except OSError as error:
        return f"{error.filename or place}: {error.strerror}"
    return ""
