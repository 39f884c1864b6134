"""Cluster profiles: YAML files that describe a cluster (``sweeps/clusters/NAME.yaml``)."""

import contextlib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import get_type_hints

from flip.common.host import Host, this_host
from flip.common.option import option
from flip.model_costs import find_accelerator
from flip.runs.errors import ConfigError, PermissionDenied, suggestion
from jobs.common.paths import PROFILES, other_kind, runs_root, use_of
from jobs.common.trust import require_trusted_file

KINDS = ("local", "slurm")
SWEEP_KEYS = {"recipe", "set", "runs", "list", "zip", "grid", "seeds"}
"""Keys of sweep files alone."""
CONTAINERS = ("pyxis", "apptainer")
MOST = 10**15
"""No number of a profile reaches it."""
SHELLS = (".", "source", "exec", "bash", "sh", "env")
"""Commands of a shell that also execute their first argument."""
KEYWORDS = ("if", "then", "else", "elif", "while", "until", "do", "!", "{")
"""Words of a shell line after which a command follows."""
RESERVED_OPTIONS = (
    "array", "chdir", "cpus-per-task", "distribution", "error", "export", "job-name", "nodes", "ntasks",
    "ntasks-per-node", "open-mode", "output", "requeue", "signal", "time", "wrap",
    "clusters", "parsable", "quiet", "test-only", "wait",
)  # fmt: skip
"""Options of sbatch that a profile may not set. The launcher sets the first two lines; the others change the output of
sbatch, the cluster that gets the job, or the time at which sbatch returns."""
BINDING_OPTIONS = ("gpu-bind", "gpus-per-task", "ntasks-per-gpu", "tres-bind", "tres-per-task")
"""Options of sbatch that hide GPUs from ranks: a rank selects its GPU by the number on the node."""


@dataclass
class ClusterProfile:
    """Description of a cluster. Paths must be the same on the submit host and on the nodes."""

    name: str = ""
    """Default: the stem of the file."""
    kind: str = option("local", choices=KINDS)
    """``local`` (this machine) or ``slurm``."""
    runs_root: str = ""
    """Where run directories live; empty: FLIP_RUNS, else ./runs."""
    parallel: int = option(0, ge=0, lt=MOST)
    """Most runs at once, on Slurm per array (shape of resources); 0: one locally, no limit on Slurm."""
    python: str = ""
    """Interpreter of the ranks; empty: the one that submits, in a container ``python3``."""
    host_python: str = ""
    """Slurm: any Python >= 3.6 on the hosts, for the batch script; empty: ``python``, with a container ``python3``."""

    cpus_per_node: int = option(0, ge=0, lt=MOST)
    """CPU cores a run may use on a node; 0: as on this machine."""
    threads_per_core: int = option(1, ge=1, le=8)
    """Slurm: CPUs that the site counts per core. 2 where it hands out hyperthreads (`sinfo -o %c` is twice the number
    of cores): jobs then request two CPUs for each core. Cores of the profile and of runs are always cores."""
    memory_gb: float = option(0.0, ge=0, lt=MOST)
    """Memory of a node, GB; 0: as on this machine."""
    gpus_per_node: int = option(0, ge=0, lt=MOST)
    gpu: str = ""
    """Name of the GPU, as shown in plans and looked up in ``flip/model_costs.py``."""
    gpu_memory_gb: float = option(0.0, ge=0, lt=MOST)
    """Memory of a GPU, GB; 0: from the table for ``gpu``, else unknown, and whether runs fit is not checked."""
    peak_tflops: float = option(0.0, ge=0, lt=MOST)
    """Dense bf16 peak of a GPU, TFLOP/s; 0: from the table for ``gpu``, else unknown, and plans show no GPU-hours."""
    nvlink_gbps: float = option(0.0, ge=0, lt=MOST)
    """Speed of NVLink, without it of PCIe, in Gbit/s per GPU and direction; 0: unknown."""
    network_gbps: float = option(0.0, ge=0, lt=MOST)
    """Speed of the network between nodes in Gbit/s per GPU and direction, so the node's divided by its GPUs; 0:
    unknown. Plans count the communication of runs whose links have a known speed."""
    utilisation: float = option(0.0, ge=0, le=1)
    """Share of the peak that plans assume for complete steps (FLOPs as in docs/recipe.md), for example the measured
    ``mfu``. 0: calculated from 40 % of the peak for the arithmetic, and from the speeds of the links."""
    core_gflops: float = option(100.0, gt=0, lt=MOST)
    """Speed that plans assume for a CPU core in training, GFLOP/s. With AVX-512 they reach 100 to 160, others less."""
    measured: str = ""
    """A file that `flip doctor --measure` has written, absolute or beside the profile. Its numbers replace those that
    plans assume (jobs/planning/assumptions.py), and ``nvlink_gbps``, ``network_gbps`` and ``core_gflops``; empty:
    nothing was measured."""
    price_per_gpu_hour: float = option(0.0, ge=0, lt=MOST)
    """In the currency of your choice; 0: plans show no price."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    hours: float = option(24.0, gt=0, lt=MOST)
    """Longest wall time of one attempt."""
    signal_seconds: int = option(90, ge=0, lt=MOST)
    """Time between the warning signal and the wall limit; locally the grace period of a cancel."""
    canary: int = option(50, ge=0, lt=MOST)
    """Steps that the first run of a shape of resources must pass before the others start; 0: all start at once."""
    peer_seconds: int = option(120, gt=0, lt=MOST)  # srun --wait=0 means no limit
    """Slurm: seconds that ranks get to end after the first has ended (``srun --wait``). With ``agents`` at most 20."""
    agents: bool = False
    """Slurm: start ranks from node agents, which restart a run in its job (docs/node_agents.md). Profiles of
    `flip doctor` have them if nothing on the site speaks against it; without this line there are none."""
    array_size: int = option(1000, gt=0, lt=MOST)
    """Slurm: most elements of an array (MaxArraySize - 1); more runs make more arrays."""
    master_addr: str = ""
    """Slurm: address of rank 0 for the others; empty: the name of the first node."""
    options: dict[str, str] = field(default_factory=dict)
    """Slurm: further options of sbatch by their long names: constraint, exclude, gres, mem, reservation ..."""

    env: list[str] = option([])
    """Names of environment variables to forward to jobs; their values are not written to files."""
    notify: list[str] = option([])
    """A command with arguments that gets an event as JSON on standard input when a run stops for good or a sweep ends
    (jobs/host/notify.py). It is stored in plain text: keep secrets in a file that the command reads."""
    modules: list[str] = option([])
    """Slurm: environment modules that are loaded before the ranks start."""
    setup: list[str] = option([])
    """Slurm: shell lines before the ranks start; append ``|| exit 78`` to a line that must succeed."""
    container: str = ""
    """Slurm: image for the ranks; the batch script runs on the host."""
    container_runtime: str = option("pyxis", choices=CONTAINERS)
    """``pyxis`` (srun --container-image) or ``apptainer``."""
    container_mounts: list[str] = option([])
    """Folders to mount, as PATH or PATH:TARGET, in addition to the runs root (which contains the code)."""

    @property
    def tflops(self) -> float:
        """Dense bf16 peak of a GPU, TFLOP/s; 0: unknown."""
        accelerator = find_accelerator(self.gpu)
        return self.peak_tflops or (accelerator.tflops if accelerator else 0.0)

    @property
    def gpu_bytes(self) -> int:
        """Memory of a GPU in bytes; 0: unknown."""
        accelerator = find_accelerator(self.gpu)
        return int(1e9 * (self.gpu_memory_gb or (accelerator.memory_gb if accelerator else 0)))

    def scheduler_cpus(self, cores: int) -> int:
        """The CPUs to request from Slurm for a number of cores."""
        return cores * self.threads_per_core

    @property
    def jobs_python(self) -> str:
        """Interpreter of the ranks: ``python`` or its default."""
        import sys

        return self.python or ("python3" if self.container else sys.executable)

    @property
    def hosts_python(self) -> str:
        """Interpreter of the batch script: ``host_python`` or its default."""
        return self.host_python or ("python3" if self.container else self.jobs_python)


def load_profile(name: str) -> ClusterProfile:
    """Load the profile ``name`` of sweeps/clusters, or the YAML file at that path.

    Raises ConfigError, or PermissionDenied if another user can change the file, because its lines are executed.
    """
    from flip.common import typed
    from flip.common.yaml_io import SourceLocation, read_yaml

    path = profile_path(name)
    require_trusted_file(path, "the cluster profile", f"Or read it, and name a copy of your own: cp {path} mine.yaml.")
    table = read_yaml(path)
    if table.keys() & SWEEP_KEYS:
        raise ConfigError("a sweep, not a cluster profile", str(path), remedy=use_of("sweep", str(path)))
    values = typed.read_section(ClusterProfile, table, SourceLocation(str(path)))
    profile = ClusterProfile(**{"name": path.stem, **values})
    _check(profile, path)
    if profile.measured:
        profile.measured = str(path.parent / Path(profile.measured).expanduser())
    return profile


def profile_path(name: str) -> Path:
    """The file of a profile: a YAML file that is given by its path, or a name in sweeps/clusters.

    Raises ConfigError if it does not exist, or if a profile of this name lies in the current folder too.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
    else:
        path = PROFILES / f"{name}.yaml"
    if not path.exists():
        names = sorted(p.stem for p in PROFILES.glob("*.yaml"))
        remedy = f"{suggestion(name, names)} There are: {', '.join(names)}; or give a YAML file.".strip()
        remedy = f"{other_kind(name, 'cluster profile')} {remedy}".strip()
        raise ConfigError("no such cluster profile", str(path), name, remedy)
    here = Path(f"{name}.yaml")
    if path.name == here.name and here.is_file() and not here.samefile(path) and _is_profile_file(here):
        raise ambiguous("cluster profile", name, [here, path])
    return path


def ambiguous(kind: str, name: str, paths: Sequence[Path]) -> ConfigError:
    """The error for a bare name that means several files; the remedy has a path to type for each."""
    typed = [str(path) if path.is_absolute() else f"./{path}" for path in paths]
    what = f"ambiguous: {kind}s of this name are {' and '.join(str(path.absolute()) for path in paths)}"
    return ConfigError(what, value=name, remedy=f"Type the path: {' or '.join(typed)}.")


def require_trusted_programs(profile: ClusterProfile) -> None:
    """Raise PermissionDenied if another user can change a program or script that a profile names."""
    for key, path in executed_files(profile):
        remedy = f"Or name another file in the profile {profile.name}."
        require_trusted_file(path, f"{key}, in the cluster profile {profile.name},", remedy)


def executed_files(profile: ClusterProfile) -> list[tuple[str, Path]]:
    """(key, path) of the programs and scripts on this machine that a profile names by absolute paths.

    The interpreter of this command is left out, because it runs already, and so are environment modules (``modules``),
    because they belong to the site.
    """
    import sys

    named = [("python", profile.python), ("host_python", profile.host_python), ("container", profile.container)]
    named += [("notify", word) for word in profile.notify]
    named += [("setup", word) for line in profile.setup for word in _executed_words(line)]
    rows = [(key, Path(word).expanduser()) for key, word in named if word.startswith(("/", "~"))]
    here = [
        (key, path) for key, path in dict.fromkeys(rows) if path.is_file() or (key == "container" and path.exists())
    ]
    return [(key, path) for key, path in here if str(path) != sys.executable]


def roots(given: str | None = None) -> list[Path]:
    """Folders to search for runs: only ``given`` (the value of --root), else RUNS_ROOT and those of all profiles.

    An unreadable profile is skipped: submit reports it.
    """
    from flip.common.yaml_io import read_yaml

    if given:
        return [Path(given).absolute()]
    folders = [runs_root()]
    for path in sorted(PROFILES.glob("*.yaml")):
        with contextlib.suppress(ConfigError, PermissionDenied):
            if isinstance(chosen := read_yaml(path).get("runs_root"), str) and chosen:
                folders.append(Path(chosen).expanduser().absolute())
    return list(dict.fromkeys(folders))


def node(profile: ClusterProfile) -> Host:
    """The share of a node that one run gets: from the profile, or this machine."""
    here = this_host()
    if profile.kind == "local":
        cores = min(profile.cpus_per_node or here.cores, here.cores)
        memory = int(profile.memory_gb * 1e9) or here.memory
        together = profile.parallel or 1
        return Host(max(1, cores // together), memory // together, here.bf16, here.cuda)
    memory = int(profile.memory_gb * 1e9) or here.memory
    cores = profile.cpus_per_node or here.cores
    hours = min(Host.hours, profile.hours)
    return Host(cores, memory, bf16=True, cuda=profile.gpus_per_node > 0, hours=hours)


def is_profile(table: Mapping[str, object]) -> bool:
    """Whether the mapping of a YAML file, which may be a sweep, has only keys of a profile."""
    return bool(table.keys() - {"name"}) and table.keys() <= get_type_hints(ClusterProfile).keys()


def _is_profile_file(path: Path) -> bool:
    from flip.common.yaml_io import read_yaml

    with contextlib.suppress(ConfigError, PermissionDenied):
        return is_profile(read_yaml(path))
    return False


def _executed_words(line: str) -> Iterator[str]:
    """The words of a shell line that are commands, or files that a shell executes."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    before = ";"
    with contextlib.suppress(ValueError):  # an open quotation, which the shell refuses
        for word in lexer:
            if re.fullmatch(r"\w+=.*", word) and before == ";":
                continue  # a variable for the command that follows
            if before in (";", *SHELLS):
                yield word
            if not (word.startswith("-") and before in SHELLS):
                if set(word) <= set("();&|") or word in KEYWORDS:
                    before = ";"
                else:
                    before = word


def _check(profile: ClusterProfile, path: Path) -> None:
    """Raise ConfigError for the first value that fits its field, but not a job. ``path``: the file, for the error."""
    for name in profile.options:
        if name in RESERVED_OPTIONS:
            what = "the launcher sets or forbids this option of sbatch"
            raise ConfigError(what, f"{path}, options", name, "Remove it.")
        if name in BINDING_OPTIONS:
            remedy = "Remove it: ranks choose among all GPUs of their node."
            raise ConfigError("this option hides GPUs from ranks", f"{path}, options", name, remedy)
    for item in fields(profile):
        value = getattr(profile, item.name)
        if isinstance(value, dict):
            texts = [*value, *value.values()]
        else:
            texts = value if isinstance(value, list) else [value]
        if item.name != "setup" and any(isinstance(text, str) and not text.isprintable() for text in texts):
            raise ConfigError(
                "a control character, which would end its line of a script", f"{path}, {item.name}", value
            )
    for name in profile.env:
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
            remedy = "Give only the name; the value is taken from the environment of submit."
            raise ConfigError("not the name of an environment variable", f"{path}, env", name, remedy)
