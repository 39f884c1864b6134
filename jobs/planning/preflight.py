"""Checks before a job is queued: data, tokenizer, paths, space, memory, checkpoints.

A failed check raises the error with which the job would have ended. What cannot be checked from here (a nominal data
set, a cluster's file system) is unknown, and plans list it. The lists of rules are at the end of this file.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flip import loss_kinds
from flip.checkpoint.remote import RemoteCheckpoint
from flip.common.host import Host, cores, others_since
from flip.config.derived import DatasetLanes, at_world, dataset_lanes, stage_spans, usable_nodes, world_sizes
from flip.config.resolve import DatasetFacts, manifest_record
from flip.config.schema import Config, TextTower
from flip.config.validate import warnings
from flip.data import order
from flip.data.chunk_reader import ChunkReader
from flip.data.decode import DecodeError
from flip.data.manifest import labels
from flip.data.manifest.labels import LabelCounts
from flip.data.manifest.manifest import MARK, Manifest
from flip.data.sample_members import captions_of, fields_of, image_of, json_fields, label_of, refuse_json_members
from flip.data.storage.base import is_remote
from flip.data.storage.retry import RetryPolicy
from flip.data.weighted_order import check_content
from flip.evaluation.datasets import prompts
from flip.evaluation.datasets.catalog import PROBE_REMEDY, probe_defect
from flip.runs import wall_limit as wall
from flip.runs.addresses import as_url
from flip.runs.checkpoint_folder import checkpoints
from flip.runs.checks import DEGRADED, OK, UNKNOWN, Check, Rule
from flip.runs.errors import ConfigError, DataError, PermissionDenied, StorageError
from flip.runs.rundir import RunDir
from jobs.common.cli import command
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.filesystem import OTHER_ROOT, probe, unwritable
from jobs.common.text import count, size
from jobs.planning import environment_checks, memory_fit, software_checks, step_time
from jobs.slurm import site
from jobs.slurm.batch_script import minutes

# evenly spread shards whose sizes are compared; an object takes a request each
MAX_SHARDS = 2000
MAX_OBJECTS = 64
IDLE = 0.15  # share of the cores in use below which a machine counts as idle
FIRST_SAMPLES = 8  # of a training set that are decoded


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


class CheckpointNeed(Protocol):
    """Where the checkpoints of a run go, and how large they are."""

    @property
    def url(self) -> str:
        """Empty: into its directory."""

    @property
    def bytes(self) -> int | None:
        """Most at any time; None: unknown, for they are a program's own."""


def _json_captions(start: Start) -> None:
    """ConfigError if the run would train on the source text of JSON members."""
    data = start.config.data
    shares = zip(dataset_lanes(data), start.data, strict=True)
    folders = [share.manifest for share, facts in shares if not facts.nominal]
    refuse_json_members(data.captions, "data.captions", (name for folder in folders for name in _fields(folder)))


def _unused_fields(start: Start) -> None:
    """ConfigError if the loss of the run would ignore ``data.fields``."""
    config = start.config
    objective = config.model.objective
    if config.data.fields and not loss_kinds.declared(objective).uses_fields:
        remedy = "Leave it out, or name a class with uses_fields = True as model.objective (docs/fields.md)."
        raise ConfigError(f"data.fields: objective {objective} ignores them", value=config.data.fields, remedy=remedy)


def _blank_blocks(start: Start) -> None:
    """DataError if the run would reach a block of which the manifest excludes every sample: training stops there."""
    config = start.config
    end = stage_spans(config)[-1].end
    for number, (share, facts) in enumerate(zip(dataset_lanes(config.data), start.data, strict=True)):
        if facts.nominal or (blank := _blank(config, number, share, 0, end)) is None:
            continue
        done = [] if start.anew else checkpoints(start.run)
        if done and (blank := _blank(config, number, share, done[-1].samples_seen, end)) is None:
            continue
        lane, place = blank
        samples = config.data.block * share.chunk
        what = f"all {samples} samples of the block of lane {lane} from S = {place} are excluded"
        drop = command("shards", "drop", share.manifest, "--out", "NEW_FOLDER")
        remedy = f"Write a manifest without the excluded samples: {drop}."
        remedy += " Name it in data.manifest, or raise data.block."
        raise DataError(f"{what}, so that training would stop there", share.manifest, remedy=remedy)


def _blank(config: Config, number: int, share: DatasetLanes, start: int, end: int) -> tuple[int, int] | None:
    """(lane of the run, S) of the start of the first block without a usable sample; None if there is none."""
    if config.data.weights:  # excluded samples have the weight 0
        return None
    chunks = _blank_chunks(share.manifest)
    lanes = config.data.lanes
    source = order.SampleOrder.of_set(
        number, config.seed, share.dataset_size, share.chunk, config.data.block, len(share.lanes)
    )
    first = source.block_within(chunks, start // lanes, -(-end // lanes))
    return first and (share.lanes[first[0]], first[1] * source.block_samples * lanes)


@lru_cache(maxsize=64)
def _blank_chunks(folder: str) -> NDArray[np.int64]:
    """Full chunks of which a manifest excludes every sample."""
    manifest = Manifest.load(folder, check=False)
    ids = np.fromiter(manifest.exceptions, dtype=np.int64, count=len(manifest.exceptions))
    chunks, counts = np.unique(ids // manifest.chunk, return_counts=True)
    return chunks[(counts == manifest.chunk) & (chunks < manifest.samples // manifest.chunk)]


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


def _data_set(config: Config, share: DatasetLanes, facts: DatasetFacts) -> Check:
    name = f"data set {share.name}".rstrip()
    if facts.nominal:
        return Check(
            UNKNOWN, f"the {count(facts.dataset_size)} samples are nominal: there is no manifest yet", name=name
        )
    detail = _check_shards(share.manifest)
    _first_samples(share.manifest, tuple(config.data.captions), tuple(config.data.fields))
    if facts.weights:
        check_content(config.data.weights)
        detail += f"; weights: {facts.weights.described(stage_spans(config)[-1].end)}"
    return Check(OK, detail, name=name)


@lru_cache(maxsize=64)
def _check_shards(folder: str) -> str:
    """Load a manifest and compare the shards' sizes. Raises DataError, PermissionDenied, StorageError."""
    manifest = Manifest.load(folder)
    reader = ChunkReader(deadline=10.0)
    shards = len(manifest.keys)
    if shards and not is_remote(manifest.keys[0]):
        most = MAX_SHARDS
    else:
        most = MAX_OBJECTS
    for i in range(0, shards, max(1, shards // most)):
        key = manifest.keys[i]
        expected = int(manifest.shards[i, 1])
        actual = reader.stat(key).size
        if actual != expected:
            remedy = "It is not the file that was indexed: restore it, or index the shards again."
            raise DataError(f"the shard has {actual} bytes, indexed were {expected}", key, remedy=remedy)
    return f"{manifest.samples:,} samples in {shards:,} shards, {folder}"


def _tokenizer(config: Config, nominal: bool) -> Check:
    from flip.data.text_masking import TEXT_MASKINGS
    from flip.data.token_table import TokenTable

    path = config.data.tokenizer
    if nominal and not (path and Path(path).exists()):
        return Check(UNKNOWN, f"{path or 'none is named'}: not on this machine")
    pieces = _tokenizer_size(path, config.model.text.causal)
    rows = config.model.text.vocabulary
    if pieces > rows:
        what = f"the tokenizer has {pieces} pieces, the model {rows} rows"
        raise ConfigError(what, path, remedy=f"Set model.text.vocabulary to {pieces}, or take a smaller tokenizer.")
    for stage in config.stages:
        if stage.text_masking in TEXT_MASKINGS:  # a user's class is not executed here
            TEXT_MASKINGS[stage.text_masking].of(config.data)  # raises if the token table does not serve it
        if stage.classification:
            TokenTable.read(config.data.token_table, config.data.tokenizer).rarities()
    return Check(OK, f"{pieces:,} pieces, {path}")


@lru_cache(maxsize=16)
def _tokenizer_size(path: str, causal: bool) -> int:
    from flip.tokenizer import Tokenizer

    return Tokenizer.of(path, TextTower(causal=causal)).size


def _evaluations(config: Config, nominal: bool) -> list[Check]:
    checks = []
    for item in config.evaluate.sets:
        name = f"evaluation set {item.name}"
        if nominal and not (Path(item.manifest) / "manifest.json").exists():
            checks.append(Check(UNKNOWN, f"{item.manifest}: not on this machine", name=name))
            continue
        shards = _check_shards(item.manifest)
        if item.task == "zeroshot":
            classes = len(prompts.read_prompts(item.classes).names)
            checks.append(Check(OK, f"{shards}; {_labels(item.manifest, item.classes, classes)}", name=name))
        elif item.task == "probe":
            checks.append(Check(OK, f"{shards}; fitted on {_check_shards(item.train)}", name=name))
        else:
            _first_samples(item.manifest, ("txt",))
            checks.append(Check(OK, f"{shards}; images and captions", name=name))
    return checks


def _probe_warnings(config: Config, profile: ClusterProfile) -> list[Check]:
    """Linear probes whose scores would mean nothing, of data sets on this machine."""
    probes = [item for item in config.evaluate.sets if item.task == "probe"]
    here = [item for item in probes if all((Path(path) / MARK).exists() for path in (item.manifest, item.train))]
    defects = {item.name: probe_defect(item.manifest, item.train) for item in here}
    texts = [f"evaluate.sets.{name}: {defect}. {PROBE_REMEDY}" for name, defect in defects.items() if defect]
    return _degraded(texts)


def _training_data_warnings(config: Config, profile: ClusterProfile) -> list[Check]:
    """Evaluation sets that are the training data: their scores say nothing about other images."""
    trained = {_digest(share.manifest) for share in dataset_lanes(config.data)} - {""}
    scored = [item.name for item in config.evaluate.sets if _digest(item.manifest) in trained]
    remedy = "Score other images: `flip shards make --split 0.2` sets some apart"
    return _degraded(f"evaluate.sets.{name}: is the data set that the run trains on. {remedy}" for name in scored)


@lru_cache(maxsize=64)
def _digest(folder: str) -> str:
    """The digest of a manifest on this machine; empty if there is none."""
    return str((manifest_record(folder) or {}).get("digest", ""))


@lru_cache(maxsize=64)
def _first_samples(folder: str, captions: tuple[str, ...], numbers: tuple[str, ...] = ()) -> None:
    """DataError if none of the first samples is usable; training replaces single bad ones."""
    bad: list[tuple[int, DecodeError]] = []
    manifest = Manifest.load(folder)
    for id, sample in islice(ChunkReader(deadline=10.0).samples(manifest), FIRST_SAMPLES):
        try:
            image_of(sample, "pillow")
            captions_of(sample, list(captions))
            fields_of(sample, numbers)
            return
        except DecodeError as error:
            bad.append((id, error))
    if bad:
        shard, ordinal = manifest.locate(bad[0][0])
        what = f"none of the first {len(bad)} samples can be trained on; the first: {bad[0][1]}"
        fields = ", ".join(dict.fromkeys(_fields(folder)))
        remedy = f"Name what holds captions in data.captions{f'; JSON fields with text: {fields}' if fields else ''}."
        if numbers:
            remedy += " Name fields with numbers in data.fields."
        raise DataError(what, f"{shard}, sample {ordinal}", remedy=remedy)


def _fields(folder: str) -> Iterator[str]:
    """Fields of JSON members of the first samples that ``data.captions`` could name."""
    for _, sample in islice(ChunkReader(deadline=10.0).samples(Manifest.load(folder)), FIRST_SAMPLES):
        yield from json_fields(sample)


@lru_cache(maxsize=64)
def _labels(folder: str, path: str, classes: int) -> str:
    """How the labels of a set fit its class names, by the counts of its manifest, without reading the set.

    DataError if they do not, or if the first sample is not an image with a label: evaluation replaces no samples.
    """
    manifest = Manifest.load(folder)
    if defect := labels.defect_of(manifest, classes):
        raise DataError(f"{defect} ({path})", folder, remedy=labels.REMEDY)
    _first_label(manifest, path, classes)
    counts = LabelCounts.of_manifest(manifest)
    if counts.known:
        return f"{len(counts.counts)} of {classes} classes"
    return f"{classes} classes; the manifest has no counts of labels: the job compares them before its first step"


def _first_label(manifest: Manifest, path: str, classes: int) -> None:
    for id, sample in islice(ChunkReader(deadline=10.0).samples(manifest), 1):
        shard, ordinal = manifest.locate(id)
        try:
            image_of(sample, "pillow")
            label = label_of(sample)
        except DecodeError as error:
            raise DataError(str(error), f"{shard}, sample {ordinal}", remedy="Is this an evaluation set?") from error
        if not 0 <= label < classes:
            what = f"the label has no class name: {path} has {classes}"
            raise DataError(what, f"{shard}, sample {ordinal}", label, "Name the classes of this data set.")


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


def _existing_folder(profile: ClusterProfile, folder: Path) -> Path | None:
    """The nearest folder that exists; None if a cluster's file system is not on this machine."""
    # os.path answers False, as pathlib does not, below a folder that this user cannot enter and on a stale mount
    above = [path for path in (folder, *folder.parents) if os.path.isdir(path)]
    if above and (profile.kind == "local" or os.path.exists(folder.parent)):
        return above[0]
    return None


def _writable(profile: ClusterProfile, folder: Path, dry: bool) -> Check:
    """Probe the folder where runs will be stored; a dry run checks only the permissions."""
    place = _existing_folder(profile, folder)
    if place is None:
        return Check(UNKNOWN, f"{folder.parent}: not on this machine")
    blocking = next(
        (path for path in (folder, *folder.parents) if os.path.exists(path) and not os.path.isdir(path)), None
    )
    if blocking is not None:
        raise ConfigError("a file is where a folder must be", str(blocking), remedy=OTHER_ROOT)
    if dry:
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionDenied("not writable", str(place), remedy=OTHER_ROOT)
        return Check(OK, f"{folder.parent}: writable")
    try:
        probe(place)
    except OSError as error:
        raise unwritable(error, place) from error
    return Check(OK, f"{folder.parent}: files can be created, locked, renamed, linked and deleted")


def _space(
    checkpoints: Mapping[Path, CheckpointNeed], profile: ClusterProfile, folder: Path, plan: bool
) -> list[Check]:
    """Space for the checkpoints of all runs that start or continue, by path of the run.

    Per run: the most that it needs at any time, less what its directory holds already.
    ``plan``: a dry run without data on any machine, which too little space does not refuse.
    """
    unknown = sum(need.bytes is None for need in checkpoints.values())
    here = {path: need.bytes for path, need in checkpoints.items() if not need.url and need.bytes is not None}
    if unknown and not here:
        return [Check(UNKNOWN, "a program's checkpoints have a size that only it knows")]
    if not here:
        urls = dict.fromkeys(need.url for need in checkpoints.values())
        if urls:
            return [Check(UNKNOWN, f"checkpoints go to {', '.join(urls)}")]
        return []
    place = _existing_folder(profile, folder)
    if place is None:
        return [Check(UNKNOWN, f"{folder.parent}: not on this machine")]
    needed = sum(max(0, most - _bytes_below(path / "checkpoints")) for path, most in here.items())
    free = shutil.disk_usage(place).free
    runs = "1 run" if len(here) == 1 else f"{len(here)} runs"
    if needed > free:
        what = f"{size(free)} are free, up to {size(needed)} are needed for the checkpoints of {runs}"
        if plan:
            return [Check(UNKNOWN, f"{place}: only {what}")]
        remedy = f"Free space there, lower checkpoint.keep, or start fewer runs with --only. {OTHER_ROOT}"
        raise StorageError(what, str(place), remedy=remedy)
    text = f"{size(needed)} for the checkpoints of {runs}, of {size(free)} free"
    if unknown:
        text += "; without those of programs, whose size is unknown"
    return [Check(OK, text)]


def _bytes_below(folder: Path) -> int:
    """Bytes of all files below a folder."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError, PermissionError):  # just deleted by its job; another user's
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def _bucket(config: Config, dry: bool) -> list[Check]:
    url = config.checkpoint.url
    if url and dry:
        return [Check(UNKNOWN, f"{url}: not written to in a dry run")]
    if url:
        return [Check(OK, probe_url(url))]
    return []


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


@lru_cache(maxsize=16)
def probe_url(url: str, deadline: float = 10.0) -> str:
    """Write and delete an object below the URL of checkpoints. Raises the error of a save, after the deadline."""
    name = f".probe-{secrets.token_hex(8)}"
    remote = RemoteCheckpoint(as_url(url), RetryPolicy(deadline=deadline))
    remote.put(name, b"probe")
    remote.delete(name)
    return f"{url}: objects can be written and deleted"


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
    return [_data_set(start.config, share, facts) for share, facts in shares]


def _environment(start: Start) -> list[Check]:
    places = environment_checks.required_places(start.config)
    return environment_checks.check_variables(places, start.profile, plan=start.plan)


SCHEDULER = Rule("Slurm", _scheduler, "can jobs be submitted from here?")
"""Of a submission to a cluster, for (profile, whether it is a dry run, whether its programs may run)."""
SPACE = Rule("free space", _space, "does the file system have it for the checkpoints of all runs that start?")
"""Of all runs of a submission, for the arguments of its function."""
CAPTIONS = Rule("captions", _json_captions, "is no source text of JSON members a caption?")
FIELDS = Rule("fields of samples", _unused_fields, "does the loss use `data.fields`?")
BLOCKS = Rule("blocks", _blank_blocks, "does no block of the order lack usable samples?")
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
    "tokenizer", lambda start: _tokenizer(start.config, start.nominal), "is it here, and not larger than the model's?"
)
EVALUATION_SETS = Rule(
    "evaluation set",
    lambda start: _evaluations(start.config, start.nominal),
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
    lambda start: _writable(start.profile, start.folder, start.dry),
    "can files be created, locked, renamed, linked and deleted?",
)
BUCKET = Rule(
    "checkpoint.url", lambda start: _bucket(start.config, start.dry), "can objects be written there and deleted?"
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
    Rule("linear probes", _probe_warnings, "can their scores mean something?"),
    Rule("evaluation data", _training_data_warnings, "is it not the training data?"),
    Rule(
        "input of GPUs",
        lambda config, profile: _degraded([step_time.input_warning(config, profile)]),
        "can the cores of a node feed its GPUs?",
    ),
)
"""Of a run that trains, for (configuration, cluster profile): what the plan shows with the run."""
