"""``EvaluationBuilder``: from the options of ``flip evaluate`` to the work of its jobs."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from functools import cached_property
from pathlib import Path

from flip.checkpoint.remote import refuse_foreign
from flip.common.cache import cache_root
from flip.common.host import this_host
from flip.config import merge
from flip.config.resolve import resolve_arithmetic
from flip.config.schema import Compute, Config
from flip.evaluation.datasets import catalog
from flip.evaluation.datasets.catalog import DatasetRequest
from flip.evaluation.encoding.open_clip_folder import conversion, is_pickle
from flip.evaluation.request import CONFIGURED, EvaluationRequest
from flip.runs import checkpoint_folder, command_record
from flip.runs.errors import ConfigError
from flip.runs.rundir import RunDir
from jobs.common.cli import note
from jobs.common.cluster_profile import ClusterProfile, node
from jobs.common.job import JobResources
from jobs.planning import preflight
from jobs.workloads.evaluation import EvaluationWorkload

OTHERS = "others"  # the sweep of models that were not trained here
KIND = "open_clip:"


class EvaluationBuilder:
    """Makes evaluations with the options of one command line. ``root``: RUNS_ROOT."""

    def __init__(self, args: argparse.Namespace, profile: ClusterProfile, root: Path) -> None:
        self.args = args
        self.profile = profile
        self.root = root
        self.data = catalog.root(args.data)

    def evaluation(self, subject: RunDir) -> EvaluationWorkload:
        """What the job of a run does, and with which resources. Raises FlipError if it cannot."""
        config = None
        command_record.refuse(subject, "Only trainings and published models are evaluated.")
        if not self.args.model:
            config = merge.read_config(subject.config)
        resources = self._resources()
        return EvaluationWorkload(self._request(subject, config, resources), resources, self.profile, config)

    def published_model(self) -> RunDir:
        """The run directory for the model, which the job creates (``open_clip_folder.register``) with its scores.

        Raises ConfigError or DataError if the folder is no model, or if another run has that directory.
        """
        from flip.evaluation.encoding import open_clip_folder

        model = self._model()
        folder = Path(model.partition(":")[2])
        if not folder.is_dir():
            raise ConfigError("no such folder", "--model", str(folder), "It holds open_clip_config.json and weights.")
        sweep, _, name = (self.args.into or f"{OTHERS}/{folder.name}").partition("/")
        open_clip_folder.check(str(folder))
        subject = RunDir(self.root / sweep / (name or folder.name))
        open_clip_folder.refuse_another(subject, str(folder))
        return subject

    def _request(self, subject: RunDir, config: Config | None, resources: JobResources) -> EvaluationRequest:
        """``config``: of the run; None for an open_clip model."""
        args = self.args
        sets = self._requested or self._own(config)
        classes = args.classes and str(Path(args.classes).expanduser().absolute())
        own = [item.name for item in config.evaluate.sets] if config else []
        requests = [self._located(request, classes or args.templates, own) for request in sets]
        names = [request.name for request in requests]
        if len({(request.name, request.task) for request in requests}) < len(requests):
            raise ConfigError("a set is named twice", "--sets", " ".join(names), "Give one of them another NAME=PATH.")
        of_training = config or Config()
        return EvaluationRequest(
            subject=str(subject.path),
            compute=self._compute(of_training.compute, resources),
            model=self._model(),
            commits=self._checkpoints(subject),
            sets=tuple(dataclasses.asdict(request) for request in requests),
            data=self.data,
            views=self._views(),
            batch=args.batch,
            cost=args.cost,
            cache="" if args.no_cache else str(cache_root() / "features"),
            url=args.url,
            deadline=of_training.data.deadline,
            timeout=of_training.data.timeout,
            hang_minutes=of_training.monitor.hang_minutes,
        )

    def check_resources(self) -> None:
        """Raise ConfigError if the nodes of the profile cannot have what the options ask for."""
        resources = self._resources()
        preflight.check_request(resources.nodes, resources.gpus, self.profile, this_host(), "--")

    def _resources(self) -> JobResources:
        args = self.args
        if args.gpus < 0:
            gpus = self.profile.gpus_per_node
        else:
            gpus = args.gpus
        processes = args.processes or gpus or 1
        cpus = self._cores_of_process(processes)
        if self.profile.kind == "local":
            cpus = _threads(gpus, cpus)
        return JobResources(args.nodes, processes, gpus, cpus, min(args.hours, self.profile.hours))

    def _cores_of_process(self, processes: int) -> int:
        return max(1, node(self.profile).cores // processes)

    def _compute(self, of_training: Compute, resources: JobResources) -> Compute:
        """How the ranks of the job compute, by the settings of the run's training."""
        compute = dataclasses.replace(
            of_training,
            device="cuda" if resources.gpus else "cpu",
            precision=self.args.precision,
            threads=_threads(resources.gpus, self._cores_of_process(resources.processes)),
            replicate=1,  # these are for training
            compile="no",
        )
        resolve_arithmetic(compute, fast_bf16=False)
        return compute

    @cached_property
    def _requested(self) -> list[DatasetRequest]:
        """The data sets of --sets. Members of a suite that are not here are named and left out."""
        suites = catalog.suites()
        result = list[DatasetRequest]()
        absent = dict[str, str]()
        for text in self.args.sets:
            members = [DatasetRequest.parse(member) for member in suites.get(text, [text])]
            here = text in suites and (self.profile.kind == "local" or Path(self.data).is_dir())
            missing = {m.name: why for m in members if here and (why := catalog.missing(m, self.data))}
            absent |= missing
            result += [m for m in members if m.name not in missing and not (text in suites and m in result)]
        for why in absent.values():
            note(f"left out: {why}")
        if absent and not result:
            raise ConfigError("no data set of the suite is here", "--sets", " ".join(self.args.sets), "See --list.")
        return result

    def _own(self, config: Config | None) -> list[DatasetRequest]:
        if config is None:
            raise ConfigError("a model has no data sets of its own", "--sets", remedy="Name some: see --list.")
        if given := self.args.classes or self.args.templates:
            remedy = "Name data sets with --sets."
            raise ConfigError("the run's own sets have their class names", "--classes, --templates", given, remedy)
        names = [item.name for item in config.evaluate.sets]
        if not names:
            raise ConfigError("the run has no evaluation sets of its own", "--sets", remedy="Name some: see --list.")
        return [DatasetRequest(name, path=CONFIGURED) for name in names]

    def _located(self, wanted: DatasetRequest, templates: str, own: Sequence[str]) -> DatasetRequest:
        """``own``: names of the run's own data sets."""
        if wanted.path == CONFIGURED:
            return wanted
        if wanted.path and "://" not in wanted.path:
            wanted = dataclasses.replace(wanted, path=str(Path(wanted.path).expanduser().absolute()))
        missing = ""
        if self.profile.kind == "local":
            missing = catalog.missing(wanted, self.data)
        if missing and not wanted.path and wanted.name in own:
            remedy = f"Leave out --sets, which scores all of them: {', '.join(own)}."
            raise ConfigError("this is one of the run's own sets", "--sets", wanted.name, remedy)
        if missing:
            raise ConfigError(missing)
        return dataclasses.replace(wanted, templates=templates)

    def _views(self) -> tuple[tuple[str, bool], ...]:
        if self.args.model and self.args.mask:
            raise ConfigError("only runs of this toolkit are evaluated with a mask", "--mask", self.args.mask[0])
        views = [("0", False)]
        for text in self.args.mask:
            try:
                ratio = Decimal(text)
                valid = 0 < ratio < 1
            except InvalidOperation:
                valid = False
            if not valid:
                raise ConfigError("a mask is a decimal number between 0 and 1, the share of patches", "--mask", text)
            mask = format(ratio.normalize(), "f")  # 0.50 and .5 have the column of 0.5
            views += [(mask, False), *([(mask, True)] if self.args.ensemble else [])]
        if self.args.ensemble and not self.args.mask:
            raise ConfigError("an ensemble needs masks", "--ensemble", remedy="Add --mask RATIO.")
        return tuple(dict.fromkeys(views))

    def _checkpoints(self, subject: RunDir) -> tuple[str, ...]:
        """STAGE/S-n of the chosen checkpoints; empty: the newest when the job starts. Refuses what the job would
        refuse."""
        wanted = self.args.checkpoint
        checkpoints = checkpoint_folder.checkpoints(subject)
        if self.args.model:
            return ()
        if not checkpoints:
            raise checkpoint_folder.no_checkpoint(subject)
        names = {f"{entry.stage}/{entry.path.name}": entry for entry in checkpoints}
        chosen = [name for name, entry in names.items() if wanted in ("all", "newest", name, str(entry.samples_seen))]
        if not chosen:
            raise ConfigError("no such checkpoint", "--checkpoint", wanted, f"There are: {', '.join(names)}.")
        if wanted != "all":
            chosen = chosen[-1:]
        for entry in map(names.__getitem__, chosen):
            if "url" in entry.record:
                refuse_foreign(entry, self.args.url)
        if wanted == "newest":
            return ()
        return tuple(chosen)

    def _model(self) -> str:
        if not self.args.model:
            return ""
        kind, _, folder = self.args.model.partition(":")
        if kind + ":" != KIND or not folder:
            raise ConfigError("a model is given as open_clip:FOLDER", "--model", self.args.model)
        return KIND + str(Path(folder).expanduser().absolute())


def _threads(gpus: int, cores: int) -> int:
    """Threads of a rank that may use so many cores: with GPUs the CPU does little."""
    return 4 if gpus else cores


def refuse_pickle(word: str) -> None:
    """Raise ConfigError for a file of pickled weights, after the lines that convert it."""
    if not is_pickle(word):
        return
    lines, folder = conversion(word)
    note(lines)
    what = "holds pickled weights, which are not opened, because they can execute code"
    remedy = f"Convert it by the lines above, in Python, then score it: --model {KIND}{folder}"
    raise ConfigError(what, word, remedy=remedy)
