"""One call of ``flip submit``: sweep file -> resolved runs -> checks -> plan -> confirmation -> commit."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from flip.config.host import core_seconds
from flip.files.ownership import Exposure
from flip.runs.checks import DEGRADED, UNKNOWN, Check, rows_of
from flip.runs.errors import COMPLETE, STORAGE, ConfigError, FlipError
from flip.runs.lifecycle import ACTIVE_STATES
from flip.runs.rundir import RunDir, load_record, read_lenient
from jobs.common import next_commands, trust
from jobs.common.cli import can_ask, confirm, note
from jobs.common.cluster_profile import (
    ClusterProfile,
    executed_files,
    load_profile,
    node,
    profile_path,
    require_trusted_programs,
)
from jobs.common.paths import REPOSITORY, runs_root
from jobs.common.terminal import show
from jobs.common.text import counted
from jobs.planning import preflight
from jobs.planning.run_cost import total
from jobs.submission import plan as planning
from jobs.submission import render
from jobs.submission.apply import apply, cancelled_meanwhile, lock, prune, snapshot_of
from jobs.submission.dry_run import PlannedJob, planned_jobs
from jobs.submission.plan import Plan
from jobs.submission.snapshot import take
from jobs.submitted_runs import resubmit
from jobs.submitted_runs.clusters import MultiBackend
from jobs.sweeps.sweep_file import Sweep, find, no_match
from jobs.workloads.loading import load
from jobs.workloads.workload import Place, RequestedRun, SweepRun

CONFIRM_ABOVE = 100.0  # GPU-hours that start without a question


@dataclass
class SubmitOptions:
    """The options of ``flip submit``, which describes them."""

    sweep: str = ""
    cluster: str | None = None
    only: str | None = None
    seeds: list[int] | None = None
    overrides: list[str] = field(default_factory=list)
    changed: str | None = None
    dry_run: bool = False
    retry: bool = False
    take_over: bool = False
    prune: bool = False
    prune_most: bool = False
    no_canary: bool = False
    watch: bool = False
    yes: bool = False
    script: bool = False
    json: bool = False
    root: str | None = None

    @classmethod
    def of(cls, args: argparse.Namespace) -> SubmitOptions:
        """The options of a parsed command line, which has further ones."""
        return cls(**{option.name: getattr(args, option.name) for option in fields(cls)})


class Submission:
    """One call of the command.

    ``places``: profile name in the sweep -> where its runs are. ``profile_files``: the same names -> files.
    ``exposed``: folders in which other users can exchange the runs, their code or what a profile names. ``checks``:
    each passed check once, in order, with the names of its runs (none: all). ``nominal``: whether a dry run plans with
    nominal data sets. ``code``: path -> content of files of the user for the snapshot. ``batches``: the Slurm jobs of a
    dry run. ``managed``: the directories of the runs, from the moment in which they may start.
    ``outcome``: what was done, for --json. ``start``: ``core_seconds`` at the start.
    """

    def __init__(self, options: SubmitOptions) -> None:
        self.options = options
        self.start = core_seconds()
        self.file = find(options.sweep)
        self.prunes = options.prune or options.prune_most
        self.sweep: Sweep[RequestedRun] = load(
            self.file, options.overrides, options.only, options.seeds, none=self.prunes
        )
        self._refuse_equal_runs()
        self._resubmit_command = resubmit.submit_command(options, self.file, self.sweep.folder)
        self.profile = load_profile(options.cluster or self.sweep.cluster)
        self.profile_files = {"": profile_path(options.cluster or self.sweep.cluster).absolute()}
        root = runs_root(self.profile.runs_root)
        if options.root:
            root = Path(options.root).absolute()
        self.folder = root / self.sweep.name
        self.places: dict[str, Place] = {}
        self.exposed: list[Exposure] = []
        self.checks: dict[Check, list[str]] = {}
        self.code: dict[str, bytes] = {}
        self.nominal = False
        self.batches: Sequence[PlannedJob] = ()
        self.managed: list[Path] = []
        self.outcome: dict[str, Any] = {"started": [], "trashed": {}, "still_saving": [], "cancelled_meanwhile": []}
        if not str(self.folder).isprintable():
            raise ConfigError("the path of the runs contains a control character", value=str(self.folder))

    def _refuse_other_file(self) -> None:
        """ConfigError if another sweep file, which exists and differs, has put its runs into the folder."""
        before = read_lenient(self.folder / "sweep.json").get("file", "")
        if before in ("", resubmit.recorded_path(self.file)):
            return
        other = REPOSITORY / before
        try:
            if other.read_bytes() == self.file.read_bytes():
                return
        except OSError:  # it was moved or deleted: this is the sweep file now
            return
        remedy = "Give one of the two files another `name`, or use --root. If this one replaces it, delete the other."
        what = f"its runs have the folder of another sweep file, {other}"
        raise ConfigError(what, self.file, self.sweep.name, remedy)

    def _refuse_equal_runs(self) -> None:
        """ConfigError if options override what the sweep varies: runs of other names would train the same thing.

        Without options a sweep may repeat a run on purpose.
        """
        if not self.options.overrides and self.options.seeds is None:
            return
        seen: dict[str, str] = {}
        for run in self.sweep.runs:
            other = seen.setdefault(run.settings, run.name)
            if other != run.name:
                what = f"with these options {other} and {run.name} are the same run"
                remedy = "Do not override what the sweep varies: select runs with --only, or seeds with --seeds."
                raise ConfigError(what, str(self.file), remedy=remedy)

    def run(self) -> tuple[int, list[Path] | None]:
        """Returns the exit code, and with --watch the directories of the runs to watch."""
        self._refuse_other_file()
        dry = self.options.dry_run
        runs = self.resolve_runs()
        new = not os.path.exists(self.folder)
        if new:  # a refusal must not leave the folder that the lock creates
            plan = self._plan(runs)
            self._check_space(plan)
            self._check_trust(plan)
        with nullcontext() if dry else lock(self.folder):
            plan = self._plan(runs)
            if not new:
                self._check_space(plan)
                self._check_trust(plan)
            question = self._question(plan)
            shown = self._show(plan, question)
            following: list[str] = []
            try:
                plan.refuse_changed()
                plan.refuse_prune(self.options.prune_most)
                plan.refuse_pinned()
                following = self._next_commands(plan, question)
                if not dry:
                    self._trust(plan)
                    self._confirm(question)
                    self.managed = [self.folder / action.name for action in plan.actions]
                    self._commit(plan)
                    following = _of_submitted(plan)
            finally:
                if self.options.json:
                    print(json.dumps({**shown, "outcome": self.outcome, "next": following}, indent=1))
        if plan.actions and all(action.kind == "unknown" for action in plan.actions):
            return STORAGE, None
        if self.options.watch and not dry:
            return COMPLETE, self.managed
        if following and not dry:
            note("\n  ".join(["next:", *following]))
        return COMPLETE, None

    def resolve_runs(self) -> list[SweepRun]:
        """The runs, resolved and checked."""
        for run in self.sweep.runs:
            self._place(run)
        for profile in self._profiles():
            require_trusted_programs(profile)
        self.exposed = trust.open_places(self._executed())
        self._add_checks([Check(DEGRADED, warning, name="code") for warning in trust.checkout_warnings()])
        for profile in self._profiles():
            self._add_checks(rows_of(preflight.SCHEDULER, profile, self.options.dry_run, self._may_execute(profile)))
        return [self._resolve(run) for run in self.sweep.runs]

    def _may_execute(self, profile: ClusterProfile) -> bool:
        """Whether programs of a profile may run: not if others can exchange them, nor in a dry run if only the sweep
        names the profile's file."""
        if trust.open_places(path for _, path in executed_files(profile)):
            return False
        by_sweep = [self.sweep.cluster, *(run.cluster for run in self.sweep.runs)]
        files = [name for name in by_sweep if name.endswith((".yaml", ".yml"))]
        return not (self.options.dry_run and not self.options.cluster and profile in map(load_profile, files))

    def _place(self, run: RequestedRun) -> Place:
        """Where a run is, and on what it runs."""
        asked = ""
        if not self.options.cluster:
            asked = run.cluster
        if asked not in self.places:
            profile = load_profile(asked) if asked else self.profile
            if asked:
                self.profile_files[asked] = profile_path(asked).absolute()
            if not self.options.root and runs_root(profile.runs_root) != runs_root(self.profile.runs_root):
                what = f"resources.cluster: the runs root of {asked} differs from that of {self.profile.name}"
                remedy = "Runs of a sweep share a folder: give the profiles the same runs_root, or use two sweeps."
                raise ConfigError(what, f"run {run.name}", str(runs_root(profile.runs_root)), remedy)
            others = [self.profile, *(other.profile for other in self.places.values())]
            if any(other.name == profile.name and other != profile for other in others):
                what = "two different cluster profiles have this name"
                remedy = "Give each its own `name`."
                raise ConfigError(what, f"run {run.name}", profile.name, remedy)
            self.places[asked] = Place(
                self.folder,
                self.sweep.names,
                profile,
                node(profile),
                self.options.changed or "",
                self.options.dry_run,
                self._resubmit_command,
            )
        return self.places[asked]

    def _profiles(self) -> list[ClusterProfile]:
        """Each once, in the order of the runs."""
        return list({place.profile.name: place.profile for place in self.places.values()}.values())

    def _resolve(self, run: RequestedRun) -> SweepRun:
        """Resolve, validate and check one run; its errors name it."""
        with self._naming(run):
            resolved = run.resolve(self._place(run))
            self.nominal = self.nominal or resolved.is_nominal
            self.code |= resolved.code
            self._add_checks(resolved.checks(), run.name)
        return resolved

    @contextmanager
    def _naming(self, run: RequestedRun) -> Iterator[None]:
        """Errors in the block name the sweep file and the run, and say if the value at fault is a default."""
        try:
            yield
        except FlipError as error:
            where = ", ".join(filter(None, [str(self.file), f"run {run.name}", error.where]))
            remedy = error.remedy
            if run.is_default(error.where or error.what.partition(":")[0]):
                remedy = f"It is a default value, of the recipe or of the program. {remedy}".rstrip()
            raise type(error)(error.what, where, error.value, remedy) from error

    def _add_checks(self, checks: Iterable[Check], *names: str) -> None:
        for check in checks:
            self.checks.setdefault(check, []).extend(names)

    def _check_space(self, plan: Plan) -> None:
        """Check the space for checkpoints of runs that start or have an active job."""
        grows = [action for action in plan.actions if action.starts or action.kind in ACTIVE_STATES]
        # the checkpoints of a run that goes to the trash first stay on the disk
        paths = {plan.folder / f"{action.name}{'.new' if action.moves else ''}": action.wanted for action in grows}
        checkpoints = {path: wanted.checkpoints for path, wanted in paths.items()}
        plan_only = self.options.dry_run and self.nominal
        self._add_checks(rows_of(preflight.SPACE, checkpoints, self.profile, self.folder, plan_only))

    def _executed(self) -> list[Path]:
        """The folder of the runs, which contains their code, the files of the profiles that are executed, and those of
        the user's classes, which are copied."""
        programs = [path for profile in self._profiles() for _, path in executed_files(profile)]
        classes = [path for run in self.sweep.runs for path in run.programs]
        return [self.folder, *self.profile_files.values(), *programs, *dict.fromkeys(classes)]

    def _check_trust(self, plan: Plan) -> None:
        """Raise PermissionDenied if new runs would start where other users can exchange their code, unless the user can
        be asked about it. Runs that exist continue, with a warning."""
        if not (self.exposed and plan.starting):
            return
        if not _starts_new(plan):
            for place in self.exposed:
                if not self.options.dry_run:
                    note(trust.warning(place))
                self._add_checks([Check(DEGRADED, trust.warning(place), name="folders")])
            return
        asks = trust.is_answerable(self.exposed) and can_ask() and not self.options.yes
        dry = trust.is_answerable(self.exposed) and self.options.dry_run  # it shows the question
        if not (asks or dry):
            trust.refuse(self.exposed)

    def _trust_question(self, plan: Plan) -> str:
        """The question whether to trust a group; empty if there is none."""
        if _starts_new(plan):
            return trust.question(self.exposed)
        return ""

    def _trust(self, plan: Plan) -> None:
        """Ask whether to trust a group, once: the answer is recorded. ``--yes`` does not answer it."""
        if self._trust_question(plan):
            trust.settle(self._executed(), confirm if can_ask() else None)
            self.exposed = []

    @property
    def _canary_steps(self) -> int:
        """Steps of a canary; 0: no canaries."""
        if self.options.no_canary:
            return 0
        return self.profile.canary

    def _plan(self, runs: Sequence[SweepRun]) -> Plan:
        options = self.options
        names = self.sweep.names
        existing = planning.scan_runs(self.folder, [run.name for run in runs])
        changed = options.changed or ""
        only = options.only or "*"
        plan = planning.plan(runs, existing, self.folder, names, options.retry, changed, self.prunes, only)
        if not (plan.actions or plan.dropped):
            raise no_match(self.file, only, names)
        return plan

    def _show(self, plan: Plan, question: str) -> dict[str, Any]:
        """Print the plan, unless --json prints it in the end with the outcome. Returns it for programs."""
        all_runs = len(self.sweep.runs)
        if self.options.dry_run:
            self._list_unknown(plan)
        checks = {row: names if len(names) < all_runs else [] for row, names in self.checks.items()}
        answers = any(row.name == "Slurm" and row.state != UNKNOWN for row in checks)
        for profile in self._profiles():
            if self.options.dry_run and profile.kind == "slurm":
                part = [action for action in plan.actions if action.wanted.cluster == profile.name]
                part_plan = replace(plan, actions=part)
                jobs = planned_jobs(part_plan, profile, answers, self._canary_steps, self.code)
                self.batches = [*self.batches, *jobs]
        files = [self.file.absolute(), *dict.fromkeys(self.profile_files.values())]
        asked = " ".join(filter(None, [self._trust_question(plan), question]))
        if self.options.dry_run and not self.options.json:
            script = self.options.script
            takes = self.options.take_over
            show(render.details(plan, self.sweep, self.profile, checks, asked, self.batches, script, files, takes))
        elif not self.options.json:
            show(render.summary(plan, self.sweep, self.profile, files, self.options.take_over))
        return render.as_dict(plan, self.sweep, self.profile, checks, asked, self.batches, files)

    def _next_commands(self, plan: Plan, question: str) -> list[str]:
        """Before anything is done: the submission itself, or if it would start nothing, what shows the runs."""
        if not plan.starting and not plan.pruned:
            return _of_submitted(plan)
        options = self.options
        words: list[str] = []
        if options.only is not None:
            words += ["--only", *options.only.split()]
        if options.changed:
            words += ["--changed", options.changed]
        flags = {
            "--retry": options.retry,
            "--take-over": options.take_over,
            "--prune": options.prune,
            "--no-canary": options.no_canary,
        }
        flags |= {"--allow-prune-majority": options.prune_most, "--yes": bool(question)}
        words += [flag for flag, is_given in flags.items() if is_given]
        return [self._resubmit_command.line(self.folder.parent, *words)]

    def _list_unknown(self, plan: Plan) -> None:
        """List runs of unknown state as not checked: a dry run does not guess what would start."""
        for action in plan.actions:
            if action.kind == "unknown":
                self._add_checks([Check(UNKNOWN, action.reason, name="state")], action.name)
            elif action.existing == "unknown":
                self._add_checks([Check(UNKNOWN, "it is unknown whether it runs", name="state")], action.name)

    def _question(self, plan: Plan) -> str:
        """The question to confirm before anything starts; empty if there is none."""
        asked = []
        if plan.pruned:
            active = [name for name, existing in plan.pruned.items() if existing.active]
            stopped = ""
            if active:
                stopped = f" ({', '.join(active)}: cancelled first)"
            asked.append(f"moves {counted(len(plan.pruned), 'run')} to the trash: {', '.join(plan.pruned)}{stopped}")
        moved = [f"{action.name} ({action.existing})" for action in plan.starting if action.moves]
        if moved:
            them = "it" if len(moved) == 1 else "them"
            asked.append(
                f"moves {counted(len(moved), 'run')} to the trash and starts {them} from zero: {', '.join(moved)}"
            )
        if self.options.take_over and plan.inherited:
            names = ", ".join(plan.inherited)
            asked.append(f"lets {names} delete inherited checkpoints, which no other run directory may need")
        unknown = [action.name for action in plan.starting if action.wanted.estimate.cost.gpu_hours is None]
        known = [action for action in plan.starting if action.wanted.estimate.cost.gpu_hours is not None]
        cost = total(action.wanted.estimate.cost for action in known)
        if cost.gpu_hours is not None and cost.gpu_hours > CONFIRM_ABOVE:
            price = ""
            if cost.price is not None:
                price = f", a price of {cost.price:,.0f}"
            asked.append(f"starts {counted(len(known), 'run')} of {cost.gpu_hours:,.0f} GPU-hours{price}")
        if unknown:
            asked.append(f"starts {counted(len(unknown), 'run')} of unknown GPU-hours ({', '.join(unknown)})")
        if asked:
            return f"This {' and '.join(asked)}."
        return ""

    def _confirm(self, question: str) -> None:
        if question and not self.options.yes and not confirm(f"{question} Go on?"):
            raise ConfigError("nothing was done", remedy="Answer y, or add --yes.")

    def _commit(self, plan: Plan) -> None:
        if self.options.take_over:
            self._take_over(plan)
        if plan.pruned:
            self._prune(plan)
        if plan.starting:
            self._start(plan)

    def _take_over(self, plan: Plan) -> None:
        """Give continuing runs the remote folders of the checkpoints that they have inherited."""
        checkpoints = {action.name: action.wanted.checkpoints for action in plan.starting}
        for name in plan.inherited:
            checkpoints[name].take_over(RunDir(self.folder / name))

    def _prune(self, plan: Plan) -> None:
        active = ", ".join(name for name, existing in plan.pruned.items() if existing.active)
        if active:
            note(f"cancelled; waiting until they have saved: {active}")
        left = prune(plan, f"no longer in the sweep {self.sweep.name}", self._trashed)
        self.outcome["still_saving"] = left
        if left:
            note(f"cancelled, but still saving: {', '.join(left)}; --prune again moves them")

    def _start(self, plan: Plan) -> None:
        running = any(action.kind == "running" for action in plan.actions)  # those would count as other processes
        gpus = any(action.wanted.resources.gpus for action in plan.starting)
        if self.profile.kind == "local" and not (running or gpus):
            note(preflight.load_note(self.start))
        note("\n".join(trust.checkout_warnings()))
        snapshot = take(REPOSITORY, self.folder / ".code", self.code)
        if snapshot.left_out:
            hidden = ", ".join(snapshot.left_out)
            note(f"not copied, because they are no files of code, or look like secrets: {hidden}")
        cluster = MultiBackend(self._profiles())
        replaced = partial(self._trashed, replaced=True)
        exposed = list(dict.fromkeys(place.place for place in self.exposed))
        without_code = _without_code(plan)
        jobs = apply(
            plan,
            snapshot,
            cluster,
            self._sweep_record(plan),
            self._canary_steps,
            self._resubmit_command,
            replaced,
            exposed,
        )
        note(render.canaries(jobs))
        note("\n".join(without_code))
        late = cancelled_meanwhile(plan)
        if late:
            note(f"cancelled meanwhile, so not started: {', '.join(late)}")
        self.outcome |= {"started": [job.run.name for job in jobs], "cancelled_meanwhile": late}

    def _trashed(self, path: Path, target: Path, replaced: bool = False) -> None:
        """Report a run directory that was moved to the trash. ``replaced``: another one takes its place."""
        self.outcome["trashed"][path.name] = str(target)
        note(render.trashed(path, target, replaced))

    def _sweep_record(self, plan: Plan) -> dict[str, Any]:
        """sweep.json, for reports. Runs that were submitted earlier keep a place in the order."""
        names = [name for action in plan.actions for name in dict.fromkeys([action.wanted.name, action.name])]
        stored = load_record(self.folder / "sweep.json")
        only = self.options.only
        before = stored.get("runs", [])
        order = [*before, *names] if only else [*names, *before]
        arms = {run.name: run.arm for run in self.sweep.runs}
        forked = {action.fork: self.sweep.paper.get(arms[action.wanted.name]) for action in plan.actions if action.fork}
        # the plan lacks the forks of runs that --only excludes
        earlier = {}
        if only:
            earlier = stored.get("paper", {})
        others = {name: numbers for name, numbers in earlier.items() if name not in self.sweep.names}
        paper = others | self.sweep.paper | {fork: numbers for fork, numbers in forked.items() if numbers}
        about = {key: getattr(self.sweep, key) for key in ("name", "title", "notes", "baselines")}
        order = list(dict.fromkeys(order))
        file = resubmit.recorded_path(self.file)
        varied = dict.fromkeys(key for run in self.sweep.runs for key in run.differs)
        about |= {"file": file, "cluster": self.profile.name, "varied": list(varied)}
        return {**about, "runs": order, "paper": paper, "rows": self.sweep.rows}


def _of_submitted(plan: Plan) -> list[str]:
    names = [action.name for action in plan.actions if os.path.exists(plan.folder / action.name)]
    if not names:
        return []
    return next_commands.of_sweep(plan.folder, names[0])


def _without_code(plan: Plan) -> list[str]:
    """Lines about runs that continue with code that lacks files which the sweep file names."""
    lines = []
    for action in plan.starting:
        if action.moves:
            continue
        missing = action.wanted.missing_code(RunDir(plan.folder / action.name))
        if missing and snapshot_of(action, plan.folder) is not None:
            lines.append(f"{action.name} continues with its code, which does not have {', '.join(missing)}")
    return lines


def _starts_new(plan: Plan) -> bool:
    """Whether a run starts that has no directory yet, or whose directory goes to the trash."""
    return any(action.kind == "new" or action.moves for action in plan.starting)
