"""``BACKENDS``, the table of all backends, and ``open_backend``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flip.runs.errors import ConfigError
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import Backend


@dataclass(frozen=True)
class BackendRow:
    """One kind of backend."""

    open: Callable[[ClusterProfile], Backend]
    """Imports and opens it."""
    poll_seconds: float
    """Between two queries of the states of its runs."""


def open_local(profile: ClusterProfile) -> Backend:
    """Processes of this machine."""
    from jobs.local.backend import LocalBackend

    return LocalBackend(profile)


def open_slurm(profile: ClusterProfile) -> Backend:
    """Batch jobs of Slurm."""
    from jobs.slurm.backend import SlurmBackend

    return SlurmBackend(profile)


BACKENDS: Mapping[str, BackendRow] = {
    "local": BackendRow(open_local, poll_seconds=0.5),
    "slurm": BackendRow(open_slurm, poll_seconds=10.0),  # its controller is shared
}
"""Kind of a cluster profile (``cluster_profile.KINDS``), and in job.json -> its backend."""


def why_unknown(kind: str) -> str:
    """Why there is no backend of this kind, as a sentence without a full stop; empty: there is one."""
    if kind in BACKENDS:
        return ""
    return f"there is no backend {kind}, only {' and '.join(BACKENDS)}"


def row_of(kind: str) -> BackendRow:
    """The row of a kind. Raises ConfigError if there is none."""
    why = why_unknown(kind)
    if why:
        remedy = "It is the kind of the cluster profile, or in job.json. Use the version that submitted the run."
        raise ConfigError(why, "kind", kind, remedy)
    return BACKENDS[kind]


def open_backend(profile: ClusterProfile) -> Backend:
    """The backend of a profile. Raises ConfigError if its kind is unknown."""
    return row_of(profile.kind).open(profile)
