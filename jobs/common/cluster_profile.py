"""Cluster profiles: what a cluster is, from a YAML file of plain fields (``sweeps/clusters/NAME.yaml``)."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from flip.costs import find_accelerator
from flip.runs.errors import ConfigError, PermissionDenied
from jobs.common.paths import PROFILES
from jobs.common.text import suggestion

KINDS = ("local", "slurm")
CONTAINERS = ("pyxis", "apptainer")


@dataclass
class ClusterProfile:
    """All paths mean the same on the host that submits and on the nodes."""

    name: str = ""
    """The file's stem where the file does not say."""
    kind: str = "local"
    """``local`` (this machine) or ``slurm``."""
    runs_root: str = ""
    """Where run directories live; empty: FLIP_RUNS, else ./runs."""
    parallel: int = 0
    """Runs at once; 0: one locally, on Slurm as many as there is room for. There it holds for each array, that is for
    each shape of resources."""
    python: str = ""
    """Interpreter of the ranks; empty: the one that submits, in a container ``python3``."""
    host_python: str = ""
    """Slurm: any Python >= 3.6 on the hosts, for the batch script; empty: ``python``, with a container ``python3``."""

    cpus_per_node: int = 0
    """CPU cores a run may use on a node; 0: as this machine says."""
    memory_gb: float = 0.0
    """Memory of a node, GB; 0: as this machine says."""
    gpus_per_node: int = 0
    gpu: str = ""
    """Name of the card, as shown in plans and looked up in ``flip/costs.py``."""
    gpu_memory_gb: float = 0.0
    """Memory of a card, GB; 0: as the table says of ``gpu``, else unknown: whether a run fits is not checked then."""
    peak_tflops: float = 0.0
    """Dense bf16 peak of a card, TFLOP/s; 0: as the table says, else unknown: plans then show no GPU-hours."""
    utilisation: float = 0.4
    """Share of the peak that plans assume (of the FLOPs in docs/recipe.md)."""
    price_per_gpu_hour: float = 0.0
    """In the currency of your choice; 0: plans show no price."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    hours: float = 24.0
    """Longest wall time of one attempt."""
    signal_seconds: int = 90
    """How long before the wall limit the warning signal comes; locally the grace after a cancel."""
    canary: int = 50
    """Steps that the first run of a new shape of resources must pass before the others start; 0: all start at once."""
    peer_seconds: int = 120
    """Slurm: what ranks get to end by themselves once the first of them has ended (``srun --wait``)."""
    array_size: int = 1000
    """Slurm: elements of an array at most (MaxArraySize - 1); more runs make more arrays."""
    master_addr: str = ""
    """Slurm: address of rank 0 for the others; empty: the name of the first node."""
    options: dict[str, str] = field(default_factory=dict)
    """Slurm: further options of sbatch by their long names: constraint, exclude, gres, mem, reservation ..."""

    env: list[str] = field(default_factory=list)
    """Names of environment variables that jobs need; their values stay out of files."""
    notify: list[str] = field(default_factory=list)
    """A command and its arguments that gets an event as JSON on standard input when a run stops for good and when a
    sweep has ended (jobs/host/notify.py). It stands in files: a secret belongs to a file that the command reads."""
    modules: list[str] = field(default_factory=list)
    """Slurm: environment modules that are loaded before the ranks start."""
    setup: list[str] = field(default_factory=list)
    """Slurm: shell lines of the batch script before the ranks start; one that must succeed ends in ``|| exit 78``."""
    container: str = ""
    """Slurm: image in which the ranks run; the batch script stays on the host."""
    container_runtime: str = "pyxis"
    """``pyxis`` (srun --container-image) or ``apptainer``."""
    container_mounts: list[str] = field(default_factory=list)
    """Folders seen in the container, as PATH or PATH:PLACE, besides the runs root (which holds the code as well)."""

    @property
    def tflops(self) -> float:
        """Dense bf16 peak of a card, TFLOP/s; 0: unknown."""
        card = find_accelerator(self.gpu)
        return self.peak_tflops or (card.tflops if card else 0.0)

    @property
    def gpu_bytes(self) -> int:
        """Memory of a card; 0: unknown."""
        card = find_accelerator(self.gpu)
        return int(1e9 * (self.gpu_memory_gb or (card.memory_gb if card else 0)))

    @property
    def jobs_python(self) -> str:
        import sys

        return self.python or ("python3" if self.container else sys.executable)

    @property
    def hosts_python(self) -> str:
        return self.host_python or ("python3" if self.container else self.jobs_python)


def load_profile(name: str) -> ClusterProfile:
    """The profile called ``name`` in sweeps/clusters, or in the YAML file at that path. Mistakes raise ConfigError."""
    from flip.config.yaml_io import read_yaml

    path = Path(name) if name.endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"
    if not path.exists():
        known = sorted(p.stem for p in PROFILES.glob("*.yaml"))
        remedy = f"{suggestion(name, known)} There are: {', '.join(known)}; or give a YAML file.".strip()
        raise ConfigError("no such cluster profile", str(path), name, remedy)
    values = dict(read_yaml(path))
    hints = get_type_hints(ClusterProfile)
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), list(hints), n=3) or list(hints)
            raise ConfigError("unknown key in a cluster profile", str(path), key, f"Nearest: {', '.join(near)}.")
        values[key] = _typed(value, hints[key], f"{path}, {key}")
    profile = ClusterProfile(**{"name": path.stem, **values})
    _check(profile, path)
    return profile


def _typed(value: Any, hint: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**300:
        return float(value)
    if hint == list[str]:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value
        raise ConfigError("must be a list of texts", where, value)
    if hint == dict[str, str]:
        if isinstance(value, dict) and not any(isinstance(item, dict | list) for item in value.values()):
            return {str(key): "" if item in (None, True) else str(item) for key, item in value.items()}
        raise ConfigError("must be options and their values, without dashes", where, value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"must be {hint.__name__}", where, value)
    return value


OURS = (
    "array", "chdir", "cpus-per-task", "error", "export", "job-name", "nodes", "ntasks", "ntasks-per-node", "open-mode",
    "output", "requeue", "signal", "time", "wrap",
)  # fmt: skip
"""Options of sbatch that follow from the run and from our protocol."""
BOUND = ("gpu-bind", "gpus-per-task", "ntasks-per-gpu")
"""With these a rank sees one card alone, and not those by whose number it is called."""


def _check(profile: ClusterProfile, path: Path) -> None:
    for name in profile.options:
        if name in OURS:
            raise ConfigError("sbatch's option is set by us", f"{path}, options", name, "Take it out.")
        if name in BOUND:
            remedy = "Take it out: ranks choose their card among all of their node."
            raise ConfigError("an option that hides cards from ranks", f"{path}, options", name, remedy)
    if profile.kind not in KINDS:
        raise ConfigError("unknown kind of cluster", f"{path}, kind", profile.kind, f"Kinds: {', '.join(KINDS)}.")
    if profile.container_runtime not in CONTAINERS:
        remedy = f"There are: {', '.join(CONTAINERS)}."
        raise ConfigError("unknown container runtime", f"{path}, container_runtime", profile.container_runtime, remedy)
    if not 0 < profile.utilisation <= 1:
        raise ConfigError("must be above 0 and at most 1", f"{path}, utilisation", profile.utilisation)
    for item in fields(profile):
        value = getattr(profile, item.name)
        if isinstance(value, int | float) and not 0 <= value < 1e15:
            raise ConfigError("must lie in 0 .. 1e15", f"{path}, {item.name}", value)
        texts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]
        if item.name != "setup" and any(isinstance(text, str) and not text.isprintable() for text in texts):
            raise ConfigError(
                "a control character, which would end its line of a script", f"{path}, {item.name}", value
            )
    for key in ("array_size", "hours", "peer_seconds"):  # srun takes a wait of 0 as for ever
        if not getattr(profile, key):
            raise ConfigError("must be above 0", f"{path}, {key}", 0)
    for name in profile.env:
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
            remedy = "Give the name alone; the value is taken from the environment that submits."
            raise ConfigError("not the name of an environment variable", f"{path}, env", name, remedy)


def runs_root(profile: ClusterProfile | None = None) -> Path:
    """RUNS_ROOT: the profile's, else FLIP_RUNS, else ./runs."""
    chosen = (profile.runs_root if profile else "") or os.environ.get("FLIP_RUNS", "") or "runs"
    return Path(chosen).expanduser().absolute()


def roots(given: str | None = None) -> list[Path]:
    """Folders in which a command that reads looks for runs: ``given``, the value of --root, alone; else RUNS_ROOT, then
    the runs_root of each profile in sweeps/clusters. A profile that cannot be read is skipped: submit reports it.
    """
    from flip.config.yaml_io import read_yaml

    if given:
        return [Path(given).absolute()]
    found = [runs_root()]
    for path in sorted(PROFILES.glob("*.yaml")):
        with contextlib.suppress(ConfigError, PermissionDenied):
            if isinstance(chosen := read_yaml(path).get("runs_root"), str) and chosen:
                found.append(Path(chosen).expanduser().absolute())
    return list(dict.fromkeys(found))
