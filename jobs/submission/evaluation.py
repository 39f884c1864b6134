"""One call of ``flip evaluate``: a job next to each run is created, submitted and waited for; the results are a
table.

The job is a run directory, RUNS_ROOT/<sweep>/.evaluate/<run>-<token>/, with attempts, causes and logs like any other,
so backends, the restart policy, and `status`, `logs`, `cancel` (given its path) handle it. Its configuration is an
``EvaluationRequest`` (task.json). Results go to the run's eval/.
"""

import argparse
import dataclasses
import json
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import cached_property
from pathlib import Path
from typing import Any

from flip.checkpoint.remote import refuse_foreign
from flip.config import merge
from flip.config.host import this_host
from flip.config.resolve import cache_root, resolve_arithmetic
from flip.config.schema import Compute, Config, EvaluationSet
from flip.data.manifest import labels
from flip.data.manifest.manifest import MARK, Manifest
from flip.evaluation.datasets import catalog
from flip.evaluation.datasets.catalog import DatasetRequest
from flip.evaluation.datasets.prompts import read_prompts
from flip.evaluation.encoding.open_clip_folder import claim, conversion, is_pickle
from flip.evaluation.metrics.result_files import is_of_published_model, precision
from flip.evaluation.metrics.score import score_of
from flip.evaluation.request import CONFIGURED, EvaluationRequest
from flip.files import deletion
from flip.files.creation import close_folders, closed_folder, new_folder, run_folder
from flip.runs import commit
from flip.runs.checks import Check, Rule, require
from flip.runs.errors import COMPLETE, ConfigError, FlipError
from flip.runs.job_kind import EVALUATE, EVALUATIONS
from flip.runs.lifecycle import ENDED, RunState
from flip.runs.rundir import RUN_DEPTH, RunDir, load_record, read_lenient
from jobs.common import next_commands, trust
from jobs.common.cli import INTERRUPTED, can_ask, command, confirm, note
from jobs.common.cluster_profile import (
    ClusterProfile,
    executed_files,
    load_profile,
    node,
    profile_path,
    require_trusted_programs,
    roots,
)
from jobs.common.filesystem import require_trusted, writing
from jobs.common.job import Job, JobResources
from jobs.common.paths import REPOSITORY, runs_root
from jobs.common.terminal import Page, ProgressBar, TextTable, Verbatim, show
from jobs.common.text import duration, percent, plain
from jobs.planning import environment_checks, preflight
from jobs.submission.apply import lock
from jobs.submission.snapshot import take
from jobs.submitted_runs import select
from jobs.submitted_runs.clusters import open_backend, poll_interval, states, worst_exit_code

OTHERS = "others"  # the sweep of models that were not trained here
KIND = "open_clip:"


def listing(data: str, as_json: bool = False) -> Page:
    """A table of the known data sets."""
    root = catalog.root(data)
    rows = [
        {
            "name": name,
            "task": entry["task"],
            "images": str(entry.get("count", "-")),
            "here": "no" if catalog.missing(DatasetRequest(name), root) else "yes",
            "get": catalog.source(entry),
        }
        for name, entry in catalog.entries().items()
    ]
    if as_json:
        return Page(Verbatim(json.dumps(rows, indent=1)))
    suites = (f"  {name}: {', '.join(members)}" for name, members in catalog.suites().items())
    return Page(f"data root: {root}", TextTable(rows, {"get": 12}, ("images", "task")), "suites:", *suites)


@dataclass(frozen=True)
class PlannedEvaluation:
    """A checked evaluation of one run or model."""

    subject: RunDir
    request: EvaluationRequest
    resources: JobResources


def _progress(jobs: Sequence[RunDir], known: Mapping[Path, RunState]) -> tuple[int, int, str]:
    """(images or texts done, their number, what is done) of one job; of several jobs, how many have ended."""
    if len(jobs) > 1:
        return sum(known[job.path].state in ENDED for job in jobs), len(jobs), "jobs"
    state = known[jobs[0].path]
    status = read_lenient(jobs[0].status)
    if status.get("attempt") != state.attempt or not status.get("total"):
        return 0, 0, ": ".join(filter(None, [state.state, state.detail]))
    return status["samples"], status["total"], status["phase"]


class EvaluateCommand:
    """One call of the command."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.profile = load_profile(args.cluster)
        require_trusted_programs(self.profile)
        if args.root:
            self.root = Path(args.root).absolute()
        else:
            self.root = runs_root(self.profile.runs_root)
        self.data = catalog.root(args.data)

    def run(self) -> int:
        """Returns the exit code."""
        if self.args.root:
            known = [self.root]
        else:
            known = list(dict.fromkeys([self.root, *roots()]))
        folder_of_model = (self.args.model or "").partition(":")[2]
        for word in (*self.args.target, folder_of_model):
            _refuse_pickle(word)
        if self.args.model:
            subjects = [self._published_model()]
        else:
            subjects = select.select_many(self.args.target, known)
        programs = [path for _, path in executed_files(self.profile)]
        folders = [subject.path.parent for subject in subjects]
        trust.settle([*folders, profile_path(self.args.cluster), *programs], confirm if can_ask() else None)
        require([preflight.SCHEDULER], self.profile, False, True)
        resources = self._resources()
        preflight.check_request(resources.nodes, resources.gpus, self.profile, this_host(), "--")
        for subject in subjects:  # a refusal writes nothing, not even a lock
            self._plan(subject)
        self.jobs: dict[RunDir, RunDir] = {}
        with ExitStack() as locks:  # a submit that moves a run to the trash must see the pins of its evaluation
            for folder in dict.fromkeys(folders):
                locks.enter_context(lock(folder, shared=True))
            self._submit([self._plan(subject) for subject in subjects])
        rows: list[dict[str, Any]] = [
            {"run": _name(subject), "job": str(job.path)} for subject, job in self.jobs.items()
        ]
        if not self.args.detach:
            note("\n".join("{run}: the job is {job}".format(**row) for row in rows))
            return self._wait()
        if not self.args.json:
            show(Page(TextTable(rows)))
            return COMPLETE
        for row, job in zip(rows, self.jobs.values(), strict=True):
            row["next"] = [command("status", job.path), *next_commands.of_run(job.path, "queued", trains=False)]
        print(json.dumps(rows, indent=1))
        return COMPLETE

    def _plan(self, subject: RunDir) -> PlannedEvaluation:
        """What the job of a run does, and with which resources, checked."""
        config = None
        if not self.args.model:
            config = merge.read_config(subject.config)
        resources = self._resources()
        request = self._request(subject, config, resources)
        require(RULES, request, config, self.profile)
        with writing(subject.path.parent):
            require_trusted(closed_folder(subject.path.parent))
        return PlannedEvaluation(subject, request, resources)

    def _submit(self, planned: Sequence[PlannedEvaluation]) -> None:
        """Create the jobs of all runs, then submit those of each folder together. Jobs that are refused or interrupted
        are removed, but for an interrupted one with a job.json: the scheduler may have accepted it."""
        folders = list(dict.fromkeys(each.subject.path.parent for each in planned))
        snapshots = {folder: take(REPOSITORY, folder / ".code").path for folder in folders}
        environment = {"FLIP_CACHE": str(cache_root())}
        prepared = dict[RunDir, Job]()
        try:
            for each in planned:
                job = self._make(each)
                code = snapshots[each.subject.path.parent]
                prepared[each.subject] = Job(job, code, each.resources, environment, EVALUATE)
            for folder in folders:
                members = [subject for subject in prepared if subject.path.parent == folder]
                for i in range(0, len(members), self.profile.array_size):  # an array: accepted or refused as a whole
                    array = members[i : i + self.profile.array_size]
                    with writing(folder / EVALUATIONS):
                        open_backend(self.profile).submit([prepared[subject] for subject in array])
                    self.jobs |= {subject: prepared[subject].run for subject in array}
        except BaseException as error:  # Ctrl-C included
            if self.jobs:
                note("submitted before: " + ", ".join(str(job.path) for job in self.jobs.values()))
            for subject in prepared.keys() - self.jobs:  # their pins would keep commits; the next pin deletes them
                job = prepared[subject].run
                if not isinstance(error, FlipError) and (job.path / "job.json").exists():
                    note(f"may have been submitted; to end it: {command('cancel', job.path)}")
                else:
                    deletion.discard_own_folder(job.path)
            raise

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
            commits=self._commits(subject),
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

    def _commits(self, subject: RunDir) -> tuple[str, ...]:
        """STAGE/S-n of the chosen commits; empty: the newest when the job starts. Refuses what the job would refuse."""
        wanted = self.args.commit
        commits = commit.commits(subject)
        if self.args.model:
            return ()
        if not commits:
            raise commit.no_commit(subject)
        names = {f"{entry.stage}/{entry.path.name}": entry for entry in commits}
        chosen = [name for name, entry in names.items() if wanted in ("all", "newest", name, str(entry.samples_seen))]
        if not chosen:
            raise ConfigError("no such commit", "--commit", wanted, f"There are: {', '.join(names)}.")
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

    def _published_model(self) -> RunDir:
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

    def _make(self, planned: PlannedEvaluation) -> RunDir:
        """Create the complete directory of the job, with pins on its commits; nothing is left if that fails."""
        subject = planned.subject
        request = planned.request
        name = f"{subject.name}-{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        job = RunDir(subject.path.parent / EVALUATIONS / name)
        with writing(job.path):
            if request.model:
                claim(subject, request.model.partition(":")[2])
            close_folders(subject.path, RUN_DEPTH)
            run_folder(job.path.parent)
            new_folder(job.path)
        try:
            with writing(job.path):
                request.write(job)
                for commit_name in request.commits:
                    self._pin(subject, job, commit_name)
        except BaseException:  # Ctrl-C included
            deletion.discard_own_folder(job.path)  # the next pin deletes stale pins
            raise
        return job

    @staticmethod
    def _pin(subject: RunDir, job: RunDir, name: str) -> None:
        """Keep a commit for the job. ConfigError if the run, which may be training, has deleted it meanwhile."""
        stage, _, place = name.partition("/")
        commit.pin(subject, job, stage, int(place.partition("-")[0]))
        if not (subject.checkpoints / name / commit.COMMIT_FILE).exists():
            raise ConfigError("this checkpoint has been deleted meanwhile", name, remedy="Name a newer one.")

    def _wait(self) -> int:
        """Print the results when all jobs have ended. Returns the exit code, that of the worst job."""
        jobs = list(self.jobs.values())
        try:
            with ProgressBar("evaluating") as bar:
                known = states(jobs)
                while not all(state.state in ENDED for state in known.values()):
                    bar(*_progress(jobs, known))
                    time.sleep(poll_interval(jobs))
                    known = states(jobs)
        except KeyboardInterrupt:
            note(f"\nthe jobs continue: {command('status', *(job.path for job in jobs))}")
            return INTERRUPTED
        results = list[dict[str, Any]]()
        for subject, job in self.jobs.items():
            state = known[job.path]
            if state.state == "complete":
                named = {}
                if len(jobs) > 1:
                    named = {"run": _name(subject)}
                scores = load_record(job.result).get("evaluations", [])
                results += [{**named, **score, "next": [command("report", subject.path.parent)]} for score in scores]
                continue
            detail = f"{state.state}: {state.detail} ({command('logs', job.path)})"
            print(plain(detail), file=sys.stderr)
        if self.args.json:
            print(json.dumps(results, indent=1))
        elif results:
            notes = dict.fromkeys(f"{result['name']}: {result['note']}" for result in results if "note" in result)
            drop = ("time", "precision", "stage", "n", "S", "chance", "top-10", "top-5")
            show(Page(TextTable([row(result) for result in results], drop=drop), *notes))
        return worst_exit_code((job, known[job.path].state) for job in jobs)


def _name(run: RunDir) -> str:
    return f"{run.sweep}/{run.name}"


def _configured_defect(item: EvaluationSet) -> str:
    """Why the labels of a run's own zero-shot set do not fit its class names; empty if its manifest is not here."""
    if item.task != "zeroshot" or not (Path(item.manifest) / MARK).is_file():
        return ""
    return labels.defect_of(Manifest.load(item.manifest), len(read_prompts(item.classes).names))


def _threads(gpus: int, cores: int) -> int:
    """Threads of a rank that may use so many cores: with GPUs the CPU does little."""
    return 4 if gpus else cores


def _integer(number: int | None) -> str:
    if number is None:
        return "-"
    return f"{number:,}"


def row(result: dict[str, Any]) -> dict[str, str]:
    """One result as cells of the table."""
    score = score_of(result)
    low, high = score.interval or (None, None)
    stage = str(result.get("stage", "-"))
    if is_of_published_model(result):
        stage = "published model"
    interval = ""
    if low is not None:
        interval = f" ({percent(low)}-{percent(high)})"
    return {
        **({"run": result["run"]} if "run" in result else {}),
        "stage": stage,
        "S": _integer(result.get("samples")),
        "set": str(result["name"]),
        "n": _integer(result.get("n")),
        "metric": score.label,
        "score": f"{percent(score.value)}{interval}",
        "chance": percent(score.chance),
        "top-5": percent(result.get("top5")),
        "top-10": percent(result.get("top10")),
        "precision": precision(result),
        "time": duration(result.get("seconds")),
    }


def _refuse_pickle(word: str) -> None:
    """Raise ConfigError for a file of pickled weights, after the lines that convert it."""
    if not is_pickle(word):
        return
    lines, folder = conversion(word)
    note(lines)
    what = "holds pickled weights, which are not opened, because they can execute code"
    remedy = f"Convert it by the lines above, in Python, then score it: --model {KIND}{folder}"
    raise ConfigError(what, word, remedy=remedy)


def _check_variables(request: EvaluationRequest, config: Config | None, profile: ClusterProfile) -> list[Check]:
    """Checks of environment variables, as for runs. Raises ConfigError."""
    own: dict[str, tuple[str, str]] = {}
    places = []
    if config:
        own = {item.name: (item.manifest, item.train) for item in config.evaluate.sets}
        places = [config.checkpoint.url]
    for row in request.sets:
        if row["path"] == CONFIGURED:
            places += own[row["name"]]
        else:
            places += [row["path"] or request.data]
    return environment_checks.check_variables(places, profile)


def _check_labels(request: EvaluationRequest, config: Config | None, profile: ClusterProfile) -> None:
    """Raise ConfigError if the counted labels of a set do not fit its class names: the job would end with that.

    The job reads the labels of sets without counts, or in other places.
    """
    configured = {}
    if config:
        configured = {item.name: item for item in config.evaluate.sets}
    for row in request.sets:
        wanted = DatasetRequest(**row)
        if wanted.path == CONFIGURED:
            item = configured[wanted.name]
            where = item.manifest
            names = item.classes
            defect = _configured_defect(item)
        else:
            where = wanted.path or wanted.name
            names = wanted.templates or "its own class names"
            defect = catalog.label_defect(wanted, request.data)
        if defect:
            raise ConfigError(f"{defect} ({names})", where, remedy=labels.REMEDY)


RULES = (
    Rule("environment", _check_variables, "do jobs get the variables for object storage that are set here?"),
    Rule("labels", _check_labels, "do the counted labels of each set fit its class names?"),
)
"""Of an evaluation, for (request, configuration of its run or None, cluster profile)."""
