"""Cluster profiles, and the one small protocol that both kinds of cluster keep: submit, states, cancel, requeue."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, get_type_hints

from flip.exitcodes import ConfigError
from flip.rundir import RunDir

KINDS = ("local", "slurm")
PROFILES = Path(__file__).resolve().parents[1] / "sweeps" / "clusters"


@dataclass
class Profile:
    """What a cluster is, from a YAML file of these fields (``sweeps/clusters/NAME.yaml``)."""

    name: str = ""
    """The file's stem where the file does not say."""
    kind: str = "local"
    """``local`` (this machine) or ``slurm``."""
    runs_root: str = ""
    """Where run directories live; empty: FLIP_RUNS, else ./runs."""
    parallel: int = 1
    """Local: runs at once."""
    python: str = ""
    """Interpreter of the jobs; empty: the one that submits."""
    cpus_per_node: int = 0
    """CPU cores a run may use on a node; 0: as this machine says."""
    memory_gb: float = 0.0
    """Memory of a node, GB; 0: as this machine says."""
    gpus_per_node: int = 0
    gpu: str = ""
    """Name of the card, as shown in plans."""
    peak_tflops: float = 0.0
    """Dense bf16 peak of one card, TFLOP/s; 0: unknown, plans then show no GPU-hours."""
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
    env: list[str] = field(default_factory=list)
    """Names of environment variables that jobs need; their values stay out of files."""
    setup: list[str] = field(default_factory=list)
    """Slurm: shell lines of the batch script before the worker starts."""


@dataclass(frozen=True)
class Job:
    """One run to be started: its directory (complete, with config.yaml), its code, its ranks."""

    run: RunDir
    snapshot: Path
    """The folder that holds flip/ and jobs/ as they were when submitted: working directory and PYTHONPATH of ranks."""
    world: int = 1
    """W, ranks; locally all on this machine."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the environment of ranks; stands in job.json, so never a secret."""
    module: str = "jobs.worker"
    """Run by every rank as ``python -m MODULE RUN_DIR``."""


@dataclass(frozen=True)
class JobState:
    """Where a run stands. ``state`` is one of STATES; ``detail`` is a sentence for people."""

    state: str
    attempt: int = 0
    detail: str = ""


STATES = ("queued", "running", "waiting", "complete", "failed", "cancelled", "stopped", "unknown")
"""``waiting``: starts again after a delay. ``stopped``: nobody looks after it, submit again. ``failed``: for good."""


class Cluster(Protocol):
    """Runs given to one call of ``submit`` or ``states`` belong to one sweep folder."""

    def submit(self, jobs: Sequence[Job]) -> None:
        """Start them, in this order as room allows. A failed or cancelled one begins a new allowance."""

    def states(self, runs: Sequence[RunDir]) -> dict[str, JobState]:
        """Run name -> state."""

    def cancel(self, run: RunDir) -> None:
        """See to it that a run whose cancel.json is written ends and stays ended. Returns at once."""

    def requeue(self, run: RunDir) -> None:
        """Let the running attempt save, stop and start again."""


def load_profile(name: str) -> Profile:
    """The profile called ``name`` in sweeps/clusters, or in the YAML file at that path. Mistakes raise ConfigError."""
    from flip.config.load import read_yaml  # brings OmegaConf, which the commands that read no profile do not pay for

    path = Path(name) if name.endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"
    if not path.exists():
        known = sorted(p.stem for p in PROFILES.glob("*.yaml"))
        raise ConfigError(
            "no such cluster profile", str(path), name, f"There are: {', '.join(known)}; or give a YAML file."
        )
    values = dict(read_yaml(path))
    hints = get_type_hints(Profile)
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), list(hints), n=3) or list(hints)
            raise ConfigError("unknown key in a cluster profile", str(path), key, f"Nearest: {', '.join(near)}.")
        values[key] = _typed(value, hints[key], f"{path}, {key}")
    profile = Profile(**{"name": path.stem, **values})
    _check(profile, path)
    return profile


def _typed(value: Any, hint: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint == list[str]:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value
        raise ConfigError("must be a list of texts", where, value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"must be {hint.__name__}", where, value)
    return value


def _check(profile: Profile, path: Path) -> None:
    if profile.kind not in KINDS:
        raise ConfigError("unknown kind of cluster", f"{path}, kind", profile.kind, f"Kinds: {', '.join(KINDS)}.")
    if profile.parallel < 1:
        raise ConfigError("at least one run at a time", f"{path}, parallel", profile.parallel)
    if not 0 < profile.utilisation <= 1:
        raise ConfigError("must be above 0 and at most 1", f"{path}, utilisation", profile.utilisation)
    for item in fields(profile):
        value = getattr(profile, item.name)
        if isinstance(value, int | float) and value < 0:
            raise ConfigError("must not be negative", f"{path}, {item.name}", value)


def runs_root(profile: Profile | None = None) -> Path:
    """RUNS_ROOT: the profile's, else FLIP_RUNS, else ./runs."""
    chosen = (profile.runs_root if profile else "") or os.environ.get("FLIP_RUNS", "") or "runs"
    return Path(chosen).expanduser().absolute()


def open_cluster(profile: Profile) -> Cluster:
    """The cluster of a profile."""
    if profile.kind != "local":
        raise ConfigError(
            "submission to Slurm is not available yet", profile.name, profile.kind, "Use --cluster local or --dry-run."
        )
    from jobs.local import LocalCluster

    return LocalCluster(profile)
