"""One call of ``flip evaluate``: a job next to each run is created, submitted and waited for; the results are a
table.

The job is a run directory, RUNS_ROOT/<sweep>/.evaluate/<run>-<token>/, with attempts, causes and logs like any other,
so backends, the restart policy, and `status`, `logs`, `cancel` (given its path) handle it. Its configuration is an
``EvaluationRequest`` (task.json). Results go to the run's eval/.
"""

import argparse
import json
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from flip.evaluation.datasets import catalog
from flip.evaluation.datasets.catalog import DatasetRequest
from flip.evaluation.metrics.result_files import is_of_published_model, precision
from flip.evaluation.metrics.score import score_of
from flip.files import deletion
from flip.files.creation import close_folders, closed_folder, new_folder, run_folder
from flip.runs.checks import require
from flip.runs.errors import COMPLETE, FlipError
from flip.runs.lifecycle import ENDED, RunState
from flip.runs.rundir import RUN_DEPTH, RunDir, load_record, read_lenient, write_text
from flip.runs.side_jobs import SIDE_JOBS
from jobs.backends.table import open_backend
from jobs.common import trust
from jobs.common.cli import INTERRUPTED, can_ask, command, confirm, note
from jobs.common.cluster_profile import (
    executed_files,
    load_profile,
    profile_path,
    require_trusted_programs,
    roots,
)
from jobs.common.filesystem import require_trusted, writing
from jobs.common.job import Job
from jobs.common.paths import REPOSITORY, runs_root
from jobs.common.terminal import Page, ProgressBar, TextTable, Verbatim, show
from jobs.common.text import duration, percent, plain
from jobs.planning import preflight
from jobs.submission.apply import lock
from jobs.submission.snapshot import take
from jobs.submitted_runs import select
from jobs.submitted_runs.clusters import poll_interval, states, worst_exit_code
from jobs.workloads import submitted
from jobs.workloads.evaluation import EvaluationWorkload
from jobs.workloads.evaluation_request import EvaluationBuilder, refuse_pickle
from jobs.workloads.workload import job_of


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


def _progress(jobs: Sequence[RunDir], state_by_run: Mapping[Path, RunState]) -> tuple[int, int, str]:
    """(images or texts done, their number, what is done) of one job; of several jobs, how many have ended."""
    if len(jobs) > 1:
        return sum(state_by_run[job.path].state in ENDED for job in jobs), len(jobs), "jobs"
    state = state_by_run[jobs[0].path]
    status = read_lenient(jobs[0].status)
    if status.get("attempt") != state.attempt or not status.get("total"):
        return 0, 0, ": ".join(filter(None, [state.state, state.reason]))
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
        self.builder = EvaluationBuilder(args, self.profile, self.root)

    def run(self) -> int:
        """Returns the exit code."""
        if self.args.root:
            roots_to_search = [self.root]
        else:
            roots_to_search = list(dict.fromkeys([self.root, *roots()]))
        folder_of_model = (self.args.model or "").partition(":")[2]
        for word in (*self.args.target, folder_of_model):
            refuse_pickle(word)
        if self.args.model:
            subjects = [self.builder.published_model()]
        else:
            subjects = select.select_many(self.args.target, roots_to_search)
        programs = [path for _, path in executed_files(self.profile)]
        folders = [subject.path.parent for subject in subjects]
        trust.settle([*folders, profile_path(self.args.cluster), *programs], confirm if can_ask() else None)
        require([preflight.SCHEDULER], self.profile, False, True)
        self.builder.check_resources()
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
            row["next"] = [command("status", job.path), *submitted.of_run(job).next_commands("queued")]
        print(json.dumps(rows, indent=1))
        return COMPLETE

    def _plan(self, subject: RunDir) -> EvaluationWorkload:
        """The evaluation of a run, checked."""
        evaluation = self.builder.evaluation(subject)
        for _ in evaluation.checks():
            pass
        with writing(subject.path.parent):
            require_trusted(closed_folder(subject.path.parent))
        return evaluation

    def _submit(self, planned: Sequence[EvaluationWorkload]) -> None:
        """Create the jobs of all runs, then submit those of each folder together. Jobs that are refused or interrupted
        are removed, but for an interrupted one with a job.json: the scheduler may have accepted it."""
        folders = list(dict.fromkeys(each.subject.path.parent for each in planned))
        snapshots = {folder: take(REPOSITORY, folder / ".code").path for folder in folders}
        prepared = dict[RunDir, Job]()
        try:
            for each in planned:
                job = _make(each)
                code = snapshots[each.subject.path.parent]
                prepared[each.subject] = job_of(each, job, code)
            for folder in folders:
                members = [subject for subject in prepared if subject.path.parent == folder]
                for i in range(0, len(members), self.profile.array_size):  # an array: accepted or refused as a whole
                    array = members[i : i + self.profile.array_size]
                    with writing(folder / SIDE_JOBS):
                        open_backend(self.profile).submit([prepared[subject] for subject in array])
                    self.jobs |= {subject: prepared[subject].run for subject in array}
        except BaseException as error:  # Ctrl-C included
            if self.jobs:
                note("submitted before: " + ", ".join(str(job.path) for job in self.jobs.values()))
            for subject in prepared.keys() - self.jobs:  # their pins would keep checkpoints; the next pin deletes them
                job = prepared[subject].run
                if not isinstance(error, FlipError) and (job.path / "job.json").exists():
                    note(f"may have been submitted; to end it: {command('cancel', job.path)}")
                else:
                    deletion.discard_own_folder(job.path)
            raise

    def _wait(self) -> int:
        """Print the results when all jobs have ended. Returns the exit code, that of the worst job."""
        jobs = list(self.jobs.values())
        try:
            with ProgressBar("evaluating") as bar:
                state_by_run = states(jobs)
                while not all(state.state in ENDED for state in state_by_run.values()):
                    bar(*_progress(jobs, state_by_run))
                    time.sleep(poll_interval(jobs))
                    state_by_run = states(jobs)
        except KeyboardInterrupt:
            note(f"\nthe jobs continue: {command('status', *(job.path for job in jobs))}")
            return INTERRUPTED
        results = list[dict[str, Any]]()
        for subject, job in self.jobs.items():
            state = state_by_run[job.path]
            if state.state == "complete":
                named = {}
                if len(jobs) > 1:
                    named = {"run": _name(subject)}
                scores = load_record(job.result).get("evaluations", [])
                results += [{**named, **score, "next": [command("report", subject.path.parent)]} for score in scores]
                continue
            reason = f"{state.state}: {state.reason} ({command('logs', job.path)})"
            print(plain(reason), file=sys.stderr)
        if self.args.json:
            print(json.dumps(results, indent=1))
        elif results:
            notes = dict.fromkeys(f"{result['name']}: {result['note']}" for result in results if "note" in result)
            drop = ("time", "precision", "stage", "n", "S", "chance", "top-10", "top-5")
            show(Page(TextTable([row(result) for result in results], drop=drop), *notes))
        return worst_exit_code((job, state_by_run[job.path].state) for job in jobs)


def _make(evaluation: EvaluationWorkload) -> RunDir:
    """Create the complete directory of the job, with pins on its checkpoints; nothing is left if that fails."""
    subject = evaluation.subject
    name = f"{subject.name}-{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    job = RunDir(subject.path.parent / SIDE_JOBS / name)
    with writing(job.path):
        evaluation.claim()
        close_folders(subject.path, RUN_DEPTH)
        run_folder(job.path.parent)
        new_folder(job.path)
    try:
        with writing(job.path):
            for file, text in evaluation.files().items():
                write_text(job.path / file, text)
            evaluation.pin(job)
    except BaseException:  # Ctrl-C included
        deletion.discard_own_folder(job.path)  # the next pin deletes stale pins
        raise
    return job


def _name(run: RunDir) -> str:
    return f"{run.sweep}/{run.name}"


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
