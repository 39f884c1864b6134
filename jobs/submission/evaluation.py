"""What ``jobs/evaluate.py`` does: words -> a job of its own beside the run -> submitted -> waited for -> a table.

The job is a run directory, RUNS_ROOT/<sweep>/.evaluate/<run>-<token>/, with attempts, causes and logs like any other,
so that clusters, the policy and `status`, `logs`, `cancel` (given its path) know it. Its results go to the run's eval/.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import secrets
import shlex
import shutil
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

from flip.checkpoint.remote import refuse_foreign
from flip.config import merge
from flip.config.host import Host
from flip.config.resolve import DatasetFacts, cache_root, resolve
from flip.config.schema import SCHEMA, Config, Stage
from flip.evaluation import datasets
from flip.evaluation.datasets import DatasetRequest
from flip.evaluation.task import CONFIGURED, Task, precision
from flip.runs import commit
from flip.runs.errors import COMPLETE, STOPPED, ConfigError, FlipError
from flip.runs.ownership import closed_folder
from flip.runs.rundir import RunDir, load_record, write_json, write_text
from jobs.common.cluster_profile import load_profile, roots, runs_root
from jobs.common.filesystem import require_trusted, writing
from jobs.common.job import Job
from jobs.common.paths import REPOSITORY
from jobs.common.text import duration, percent, plain, table
from jobs.planning import environment_checks, preflight
from jobs.planning.plan import EVALUATIONS, resources_of
from jobs.runs import select
from jobs.runs.clusters import ENDED, INTERRUPTED, exit_code_of, open_backend, poll_interval, states
from jobs.submission import submission
from jobs.submission.snapshot import take

OTHERS = "others"
"""The sweep in which other people's models stand."""
KIND = "open_clip:"


def listing(data: str, as_json: bool = False) -> str:
    """The data sets that go by a name."""
    root, rows = datasets.root(data), []
    for name, entry in datasets.entries().items():
        absent = datasets.missing(DatasetRequest(name), root)
        get = datasets.source(entry)
        images = entry.get("count", "-")
        rows.append(
            {"name": name, "task": entry["task"], "images": str(images), "here": "no" if absent else "yes", "get": get}
        )
    return json.dumps(rows, indent=1) if as_json else f"data root: {root}\n" + table(rows)


class EvaluationRequest:
    """One call of the command."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.profile = args, load_profile(args.cluster)
        self.root = Path(args.root).absolute() if args.root else runs_root(self.profile)
        self.data = datasets.root(args.data)

    def run(self) -> int:
        """The exit code."""
        known = [self.root] if self.args.root else [self.root, *roots()]
        subject = self._foreign() if self.args.model else select.select_one(self.args.run, known)
        task = self._task(subject)
        config = self._config(subject, task)
        self._check(config, task)
        with writing(subject.path.parent):
            require_trusted(closed_folder(subject.path.parent))
        job = self._make(subject, task, config)
        snapshot = take(REPOSITORY, subject.path.parent / ".code")
        cache = {"FLIP_CACHE": str(cache_root())}
        with writing(job.path):
            open_backend(self.profile).submit([Job(job, snapshot.path, resources_of(config), cache, "jobs.evaluator")])
        if not self.args.json:
            print(f"{subject.sweep}/{subject.name}: the job is {job.path}", flush=True)
        if self.args.detach:
            return COMPLETE
        return self._wait(job)

    # -- what is asked -----------------------------------------------------------------------------------------------

    def _task(self, subject: RunDir) -> Task:
        args = self.args
        sets = [DatasetRequest.parse(text) for text in args.sets] or self._own(subject)
        words = args.classes and str(Path(args.classes).expanduser().absolute())
        chosen = [self._located(one, words or args.templates) for one in sets]
        names = [one.name for one in chosen]
        if len({(one.name, one.task) for one in chosen}) < len(chosen):
            raise ConfigError("a set is named twice", "--sets", " ".join(names), "Give one of them another NAME=PATH.")
        if args.batch < 1 or args.cost < 0:
            raise ConfigError(
                "must be above 0", "--batch" if args.batch < 1 else "--probe-c", min(args.batch, args.cost)
            )
        return Task(
            str(subject.path), self._model(), self._commits(subject), tuple(dataclasses.asdict(one) for one in chosen),
            self.data, self._views(), args.batch, args.cost, "" if args.no_cache else str(cache_root() / "features"),
            args.url,
        )  # fmt: skip

    def _own(self, subject: RunDir) -> list[DatasetRequest]:
        if self.args.model:
            raise ConfigError("a model brings no data sets of its own", "--sets", remedy="Name some: see --list.")
        names = [item.name for item in merge.read_config(subject.config).evaluate.sets]
        if not names:
            raise ConfigError("the run has no evaluation sets of its own", "--sets", remedy="Name some: see --list.")
        return [DatasetRequest(name, path=CONFIGURED) for name in names]

    def _located(self, wanted: DatasetRequest, templates: str) -> DatasetRequest:
        if wanted.path == CONFIGURED:
            return wanted
        if wanted.path and "://" not in wanted.path:
            wanted = dataclasses.replace(wanted, path=str(Path(wanted.path).expanduser().absolute()))
        absent = datasets.missing(wanted, self.data) if self.profile.kind == "local" else ""
        if absent:
            raise ConfigError(absent)
        return dataclasses.replace(wanted, templates=templates)

    def _views(self) -> tuple[tuple[str, bool], ...]:
        found = [("0", False)]
        for text in self.args.mask:
            try:
                ratio = Fraction(text)
            except (ValueError, ZeroDivisionError):
                ratio = Fraction(-1)
            if not 0 < ratio < 1:
                raise ConfigError("a mask is a share of the patches above 0 and below 1", "--mask", text)
            found += [(text, False), *([(text, True)] if self.args.ensemble else [])]
        if self.args.ensemble and not self.args.mask:
            raise ConfigError("an ensemble is of masks", "--ensemble", remedy="Add --mask RATIO.")
        return tuple(dict.fromkeys(found))

    def _commits(self, subject: RunDir) -> tuple[str, ...]:
        """STAGE/S-n of the chosen ones; none: the newest when the job starts. Refuses what the job would refuse."""
        wanted, found = self.args.commit, commit.commits(subject)
        if not self.args.model and not found:
            raise ConfigError(
                "this run has no checkpoint yet", subject.checkpoints, remedy="Let it train to its first."
            )
        if self.args.model:
            return ()
        names = {f"{one.stage}/{one.path.name}": one for one in found}
        chosen = [name for name, one in names.items() if wanted in ("all", "newest", name, str(one.samples))]
        if not chosen:
            raise ConfigError("there is no such commit", "--commit", wanted, f"There are: {', '.join(names)}.")
        chosen = chosen if wanted == "all" else chosen[-1:]
        for one in map(names.__getitem__, chosen):
            if "url" in one.record:
                refuse_foreign(one, self.args.url)
        return () if wanted == "newest" else tuple(chosen)

    # -- somebody else's model ---------------------------------------------------------------------------------------

    def _model(self) -> str:
        if not self.args.model:
            return ""
        kind, _, folder = self.args.model.partition(":")
        if kind + ":" != KIND or not folder:
            raise ConfigError("a model is given as open_clip:FOLDER", "--model", self.args.model)
        return KIND + str(Path(folder).expanduser().absolute())

    def _foreign(self) -> RunDir:
        """The run directory of the model among runs: the job makes it (``open_clip_folder.register``) with its scores.

        Raises ConfigError or DataError if the folder is no model, or if another run is at that place.
        """
        from flip.evaluation import open_clip_folder

        model = self._model()
        folder = Path(model.partition(":")[2])
        if not folder.is_dir():
            raise ConfigError(
                "there is no such folder", "--model", str(folder), "It holds open_clip_config.json and weights."
            )
        sweep, _, name = (self.args.into or f"{OTHERS}/{folder.name}").partition("/")
        open_clip_folder.check(str(folder))
        subject = RunDir(self.root / sweep / (name or folder.name))
        open_clip_folder.refuse_another(subject, str(folder))
        return subject

    # -- the job -----------------------------------------------------------------------------------------------------

    def _config(self, subject: RunDir, task: Task) -> Config:
        """The run's, as the evaluation computes it."""
        config = Config() if task.model else merge.read_config(subject.config)
        args, profile, node = self.args, self.profile, submission.node(self.profile)
        gpus = profile.gpus_per_node if args.gpus < 0 else args.gpus
        asked = config.resources
        asked.nodes, asked.gpus, asked.hours = args.nodes, gpus, min(args.hours, profile.hours)
        asked.processes = args.processes or gpus or 1
        asked.cpus = max(1, node.cores // asked.processes) if profile.kind == "slurm" else 0
        config.compute.device = "cuda" if gpus else "cpu"
        config.compute.threads = 4 if gpus else max(1, node.cores // asked.processes)
        config.compute.replicate, config.compute.compile = 1, "no"  # for the steps of its training, on other ranks
        config.data.workers = 0
        config.compute.precision = args.precision
        if task.model:
            config = _resolved(config, node)
        return config

    def _check(self, config: Config, task: Task) -> None:
        """What would end the job before it has scored anything, as for runs. Raises ConfigError."""
        preflight.scheduler(self.profile, dry=False)
        own = {item.name: (item.manifest, item.train) for item in config.evaluate.sets}
        places = [config.checkpoint.url]
        for one in task.sets:
            places += own[one["name"]] if one["path"] == CONFIGURED else [one["path"] or task.data]
        environment_checks.check_variables(places, self.profile)

    def _make(self, subject: RunDir, task: Task, config: Config) -> RunDir:
        """Its directory, complete, with pins on its commits, before it is handed over; or nothing of it."""
        name = f"{subject.name}-{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        job = RunDir(subject.path.parent / EVALUATIONS / name)
        try:
            with writing(job.path):
                closed_folder(job.path.parent)
                job.path.mkdir(mode=0o755)
                write_text(job.config, merge.dump(config))
                task.write(job)
                write_json(job.identity, {"hash": "", "schema": SCHEMA, "code": "", "config": {}})
                for commit_name in task.commits:
                    self._pin(subject, job, commit_name)
        except FlipError:
            shutil.rmtree(job.path, ignore_errors=True)  # nobody has seen it; the next pin clears away its own
            raise
        return job

    @staticmethod
    def _pin(subject: RunDir, job: RunDir, name: str) -> None:
        """Keep a commit for the job. ConfigError where the run, which may train, has deleted it since it was found."""
        stage, _, place = name.partition("/")
        commit.pin(subject, job, stage, int(place.partition("-")[0]))
        if not (subject.checkpoints / name / commit.COMMIT_FILE).exists():
            raise ConfigError("this checkpoint has been deleted meanwhile", name, remedy="Name a newer one.")

    def _wait(self, job: RunDir) -> int:
        try:
            while True:
                state = states([job])[job.path]
                if state.state in ENDED:
                    break
                time.sleep(poll_interval([job]))
        except KeyboardInterrupt:
            print(f"\nit goes on without you: python jobs/status.py {shlex.quote(str(job.path))}")
            return INTERRUPTED
        if state.state != "complete":
            print(plain(f"{state.state}: {state.detail} (python jobs/logs.py {shlex.quote(str(job.path))})"))
            return exit_code_of(job) if state.state == "failed" else STOPPED
        results = load_record(job.result).get("evaluations", [])
        print(json.dumps(results, indent=1) if self.args.json else table([row(one) for one in results]))
        if not self.args.json:
            for note in dict.fromkeys(f"{one['name']}: {one['note']}" for one in results if "note" in one):
                print(plain(note))
        return COMPLETE


def _resolved(config: Config, node: Host) -> Config:
    """Without ``auto``: of a job that trains nothing, so that no data are asked after."""
    config.stages = [Stage(samples=1, batch=config.resources.nodes * config.resources.processes)]
    config.data.lanes = config.data.samples = config.data.chunk = 1
    return resolve(config, node, [DatasetFacts(1, 1, 1.0, "", True)])


def _whole(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def row(result: dict[str, Any]) -> dict[str, str]:
    """One result as cells of the table."""
    low, high = result.get("interval", (None, None))
    return {
        "stage": str(result.get("stage", "-")),
        "S": _whole(result.get("samples")),
        "set": str(result["name"]),
        "n": _whole(result.get("n")),
        "top-1": f"{percent(result['top1'])} ({percent(low)}-{percent(high)})",
        "top-5": percent(result.get("top5")),
        "top-10": percent(result.get("top10")),
        "chance": percent(result.get("chance")),
        "precision": precision(result),
        "time": duration(result.get("seconds")),
    }
