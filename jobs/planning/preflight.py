"""Checks before a job is queued, and the lists of them.

A failed check raises the error with which the job would have ended. What cannot be checked from here (a nominal data
set, a cluster's file system) is unknown, and plans list it. The lists of rules are at the end of this file;
``data_checks`` has the checks of what a run reads, ``storage_checks`` those of what it writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flip.common.host import Host, cores, others_since
from flip.config.derived import at_world, dataset_lanes, usable_nodes, world_sizes
from flip.config.resolve import DatasetFacts
from flip.config.schema import Config
from flip.config.validate import warnings
from flip.runs import wall_limit as wall
from flip.runs.checkpoint_folder import checkpoints
from flip.runs.checks import DEGRADED, OK, UNKNOWN, Check, Rule
from flip.runs.errors import ConfigError, StorageError
from flip.runs.rundir import RunDir
from jobs.common.cluster_profile import ClusterProfile
from jobs.planning import data_checks, environment_checks, memory_fit, software_checks, step_time, storage_checks
from jobs.slurm import site
from jobs.slurm.batch_script import minutes

IDLE = 0.15  # share of the cores in use below which a machine counts as idle


@dataclass(frozen=True)
class Start:
    """A start of a resolved run, which is checked.

    ``data``: of its training sets. ``on``: a node of its ranks. ``folder``: of its sweep. ``run``: where it continues
    or will be. ``anew``: whether it starts at S = 0. ``dry``: write no files; otherwise probe files are deleted again.
    """

    config: Config
    data: Sequence[DatasetFacts]
    profile: ClusterProfile
    on: Host
    folder: Path
    run: RunDir
    anew: bool = False
    dry: bool = False

    @property
    def nominal(self) -> bool:
        """Whether a data set is not there yet."""
        return any(facts.nominal for facts in self.data)

    @property
    def plan(self) -> bool:
        """Whether this is a plan on a machine without the data."""
        return self.dry and self.nominal


def _scheduler(profile: ClusterProfile, dry: bool, execute: bool) -> list[Check]:
    """Whether jobs can be submitted to Slurm from here: ConfigError, StorageError if not; a dry run only reports it.

    Called once per submission, because it takes long if Slurm does not answer. ``execute``: whether programs that the
    profile names may be run.
    """
    if profile.kind != "slurm":
        return []
    try:
        return [Check(OK, site.check_ready(profile, execute))]
    except (ConfigError, StorageError) as error:
        if dry:
            return [Check(UNKNOWN, str(error).rstrip("."))]
        raise


def _memory(config: Config, profile: ClusterProfile, on: Host) -> Iterator[Check]:
    """Memory on every number of nodes of a range, on which accumulation and the parts of the weights differ."""
    for nodes, ranks in zip(usable_nodes(config), world_sizes(config), strict=True):
        try:
            rows = memory_fit.check(at_world(config, ranks), profile, on)
        except ConfigError as error:
            if nodes == config.resources.nodes:
                raise
            remedy = f"Begin the range with more nodes. {error.remedy}"
            raise ConfigError(f"resources.nodes: on {nodes} nodes {error.what}", remedy=remedy) from error
        for row in rows:
            if config.resources.least_nodes:
                row = row._replace(name=f"{row.name}, {nodes} nodes")
            yield row


def check_request(nodes: int, gpus: int, profile: ClusterProfile, on: Host, prefix: str = "resources.") -> None:
    """Raise ConfigError if the nodes of a profile cannot have these GPUs. ``prefix``: of the settings in errors."""
    if profile.kind == "local" and nodes > 1:
        raise ConfigError(f"{prefix}nodes: this machine is one node", value=nodes, remedy="Set it to 1.")
    if gpus and profile.kind == "local" and not on.cuda:
        raise ConfigError(f"{prefix}gpus: no NVIDIA driver on this machine", value=gpus, remedy="Set it to 0.")
    if profile.gpus_per_node and gpus > profile.gpus_per_node:
        raise ConfigError(f"{prefix}gpus: a node of {profile.name} has {profile.gpus_per_node}", value=gpus)


def _machine(config: Config, profile: ClusterProfile, on: Host) -> Check:
    """GPUs must exist; too few cores are only reported."""
    resources = config.resources
    check_request(resources.nodes, resources.gpus, profile, on)
    if resources.spares and not profile.agents:
        what = f"resources.spares: {profile.name} has no node agents, which restart a run on them"
        raise ConfigError(what, value=resources.spares, remedy="Set `agents: true` in the profile, or spares to 0.")
    if resources.hours > profile.hours:
        what = f"resources.hours: an attempt on {profile.name} may last {profile.hours:g} h"
        raise ConfigError(what, value=resources.hours, remedy="Request less: a run continues in the next attempt.")
    needed = resources.processes * (config.compute.threads + config.data.workers)
    if profile.kind == "slurm" and not profile.cpus_per_node:
        detail = f"{needed} threads and loader processes a node; the profile {profile.name} gives no cpus_per_node"
        return Check(
            UNKNOWN, f"{detail}: values that depend on the cores were planned with the {on.cores} of this machine"
        )
    text = f"{needed} threads and loader processes on {on.cores} cores a node"
    if needed <= on.cores:
        return Check(OK, text)
    if profile.kind == "slurm" and not resources.cpus:
        share = max(1, on.cores // resources.processes)
        what = f"more than the node has, and the job requests them all; set resources.cpus to {share}"
        return Check(DEGRADED, f"{text}: {what}")
    return Check(DEGRADED, f"{text}: more than the node has, so it will be slow")


def load_note(before: tuple[float, float]) -> str:
    """What the load of this machine since ``before`` (``core_seconds``) means for its runs; empty if nearly idle."""
    used, total = others_since(before)
    if total:
        share = used / total
    else:
        share = min(1.0, os.getloadavg()[0] / cores())
    if share < IDLE:
        return ""
    return (
        f"other processes use {share * cores():.1f} of {cores()} cores: expect {1 + share:.1f} times the usual time, or"
        " more; do not compare seconds and samples/s of these runs with those of others"
    )


def wall_limit(config: Config, profile: ClusterProfile, run: RunDir) -> list[Check]:
    """A warning if the wall limit leaves no time to train between start-up and the signal to save."""
    limit = 60 * minutes(config.resources.hours)
    start = wall.startup_seconds(run)
    left = limit - profile.signal_seconds - start
    if profile.kind != "slurm" or left > 0:
        return []
    takes = ""
    if start:
        takes = f" and a start takes {wall.format_seconds(start)}"
    lead = wall.format_seconds(profile.signal_seconds)
    what = f"warning: {wall.format_seconds(limit)}, but the signal to save comes {lead} before its end"
    return [Check(DEGRADED, f"{what}{takes}: no time is left to train; raise hours or lower signal_seconds")]


def save_time(profile: ClusterProfile, run: RunDir) -> list[Check]:
    """The longest save of a run that continues, compared with the time between the warning and the end.

    A stop waits for the save in progress, trains to the end of up to three steps (ranks agree two steps late on GPUs,
    one on CPUs), and saves once more, unless S is the one that is being saved.
    """
    records = [checkpoint.record for checkpoint in checkpoints(run)]
    seconds = profile.signal_seconds
    save = max((float(record.get("saving", 0.0)) for record in records), default=0.0)
    step = max((record["seconds"] / record["step"] for record in records if record.get("step")), default=0.0)
    if not save:
        return []
    state = OK
    warning = ""
    if 2 * save + 3 * step > seconds:
        state = DEGRADED
        warning = ": too late for a save under way, three steps and one more save; raise signal_seconds"
    steps = ""
    if step:
        steps = f", a step {step:.1f} s"
    detail = f"{save:.1f} s at most until now{steps}, the warning comes {seconds:g} s before the end{warning}"
    return [Check(state, detail)]


def _degraded(texts: Iterable[str]) -> list[Check]:
    return [Check(DEGRADED, text) for text in texts if text]


def _data_sets(start: Start) -> list[Check]:
    shares = zip(dataset_lanes(start.config.data), start.data, strict=True)
    return [data_checks.check_data_set(start.config, share, facts) for share, facts in shares]


def _environment(start: Start) -> list[Check]:
    places = environment_checks.required_places(start.config)
    return environment_checks.check_variables(places, start.profile, plan=start.plan)


SCHEDULER = Rule("Slurm", _scheduler, "can jobs be submitted from here?")
"""Of a submission to a cluster, for (profile, whether it is a dry run, whether its programs may run)."""
SPACE = Rule(
    "free space", storage_checks.check_space, "does the file system have it for the checkpoints of all runs that start?"
)
"""Of all runs of a submission, for the arguments of its function."""
CAPTIONS = Rule(
    "captions",
    lambda start: data_checks.check_captions(start.config, start.data),
    "is no source text of JSON members a caption?",
)
FIELDS = Rule(
    "fields of samples", lambda start: data_checks.check_fields(start.config), "does the loss use `data.fields`?"
)
BLOCKS = Rule(
    "blocks",
    lambda start: data_checks.check_blocks(start.config, start.data, start.run, start.anew),
    "does no block of the order lack usable samples?",
)
LIBRARIES = Rule(
    "libraries",
    lambda start: software_checks.check_libraries(start.config, start.profile),
    "are decoder and resizer installed, if jobs run this Python?",
)
ENVIRONMENT = Rule("environment", _environment, "do jobs get the variables for object storage that are set here?")
DATA_SETS = Rule("data set", _data_sets, "have the shards the indexed sizes, and can a first sample be decoded?")
KERNEL = Rule(
    "visible-patch kernel",
    lambda start: software_checks.check_kernel(start.config, start.profile),
    "do loaders compute visible patches alone, and of which images?",
)
TOKENIZER = Rule(
    "tokenizer",
    lambda start: data_checks.check_tokenizer(start.config, start.nominal),
    "is it here, and not larger than the model's?",
)
EVALUATION_SETS = Rule(
    "evaluation set",
    lambda start: data_checks.check_evaluation_sets(start.config, start.nominal),
    "are its shards as indexed, and do labels fit class names?",
)
CONTAINER = Rule(
    "container",
    lambda start: environment_checks.check_container(start.config, start.profile, start.folder, plan=start.plan),
    "does it see all that the run reads?",
)
CORES = Rule(
    "cores",
    lambda start: _machine(start.config, start.profile, start.on),
    "has a node the GPUs, hours and cores that are asked for?",
)
GPU_SOFTWARE = Rule(
    "GPU software",
    lambda start: software_checks.check_gpu_software(
        start.profile, start.config.compute.device == "cuda", start.config.compute.compile == "yes"
    ),
    "do torch, driver and compiler fit together?",
)
MEMORY = Rule(
    "memory", lambda start: _memory(start.config, start.profile, start.on), "do GPUs and hosts have enough of it?"
)
RUNS_ROOT = Rule(
    "runs root",
    lambda start: storage_checks.check_folder(start.profile, start.folder, start.dry),
    "can files be created, locked, renamed, linked and deleted?",
)
BUCKET = Rule(
    "checkpoint.url",
    lambda start: storage_checks.check_bucket(start.config, start.dry),
    "can objects be written there and deleted?",
)
SAVE_TIME = Rule(
    "time to save",
    lambda start: save_time(start.profile, start.run),
    "does a save fit between the signal to save and the end?",
)
HOURS = Rule(
    "resources.hours",
    lambda start: wall_limit(start.config, start.profile, start.run),
    "is time left to train before the signal to save?",
)
TRAINING = (
    LIBRARIES, ENVIRONMENT, CAPTIONS, FIELDS, BLOCKS, DATA_SETS, KERNEL, TOKENIZER, EVALUATION_SETS, CONTAINER, CORES,
    GPU_SOFTWARE, MEMORY, RUNS_ROOT, BUCKET, SAVE_TIME, HOURS,
)  # fmt: skip
"""Of a run that trains, for a ``Start``. Another kind of work has a list of its own, with rules of this file or new
ones."""
TRAINING_WARNINGS = (
    Rule("configuration", lambda config, profile: _degraded(warnings(config)), "are its numbers usual?"),
    Rule(
        "linear probes",
        lambda config, profile: _degraded(data_checks.probe_warnings(config)),
        "can their scores mean something?",
    ),
    Rule(
        "evaluation data",
        lambda config, profile: _degraded(data_checks.training_data_warnings(config)),
        "is it not the training data?",
    ),
    Rule(
        "input of GPUs",
        lambda config, profile: _degraded([step_time.input_warning(config, profile)]),
        "can the cores of a node feed its GPUs?",
    ),
)
"""Of a run that trains, for (configuration, cluster profile): what the plan shows with the run."""
