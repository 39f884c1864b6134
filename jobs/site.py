"""What a Slurm site says of itself, asked through its commands on this machine."""

from __future__ import annotations

import os
import shutil
from functools import lru_cache

from flip.exitcodes import ConfigError
from jobs import scheduler
from jobs.profile import Profile


def ready(profile: Profile) -> str:
    """A sentence about the Slurm that answers here. ConfigError where a submission from here cannot go through."""
    missing = [name for name in ("sbatch", "squeue", "scancel", "scontrol") if shutil.which(name) is None]
    if missing:
        remedy = "Submit from a machine of the cluster; --dry-run plans anywhere."
        raise ConfigError("Slurm's commands are not on this machine", "PATH", ", ".join(missing), remedy)
    unset = [name for name in profile.env if name not in os.environ]
    if unset:
        what = f"env: the profile {profile.name} passes variables on that are not set here"
        raise ConfigError(what, value=", ".join(unset), remedy="Export them, or take their names out of the profile.")
    return _answer(profile.partition, profile.name)


@lru_cache(maxsize=8)
def _answer(partition: str, name: str) -> str:
    try:
        called = scheduler.cluster_name()
    except scheduler.Unanswered as error:
        raise ConfigError("Slurm does not answer", name, str(error), "Is its controller up?") from error
    if partition:
        try:
            scheduler.call("scontrol", "show", "partition", partition)
        except scheduler.Unanswered as error:
            remedy = "`sinfo` lists what there is."
            raise ConfigError("no such partition", f"{name}, partition", partition, remedy) from error
    return f"the cluster {called} answers" + (f", it has the partition {partition}" if partition else "")
