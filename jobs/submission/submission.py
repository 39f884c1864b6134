"""What ``jobs/submit.py`` does: sweep -> resolved runs -> checks -> plan -> (yes?) -> one commit -> (watch)."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from flip.config.host import Host, this_host
from flip.config.identity import ConfigChange, diff_identity, flatten, identity
from flip.config.merge import read_config, to_dict
from flip.config.resolve import DatasetFacts, dataset_facts
from flip.config.schema import Config, Init
from flip.config.validate import validate, warnings
from flip.runs.errors import COMPLETE, STORAGE, ConfigError, FlipError
from flip.runs.rundir import RunDir, load_record, read_record
from flip.training import warm_start
from jobs.common.cli import suggestion
from jobs.common.cluster_profile import ClusterProfile, load_profile, runs_root
from jobs.common.paths import REPOSITORY, SWEEPS
from jobs.planning import plan as planning
from jobs.planning import preflight
from jobs.planning.cost import estimate, total
from jobs.planning.plan import Plan, ResolvedRun
from jobs.runs import resubmit
from jobs.runs.clusters import MultiBackend
from jobs.submission import render
from jobs.submission.apply import apply, called_off, lock, prune
from jobs.submission.dry_run import PlannedJob, batches
from jobs.submission.snapshot import take
from jobs.sweeps.sweep_file import Run, Sweep, load, no_match

CONFIRM_ABOVE = 100.0
"""GPU-hours that start without a question."""


class Submission:
    """One call of the command."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.file = sweep_file(args.sweep)
        self.prunes: bool = args.prune or args.prune_most
        self.sweep: Sweep = load(self.file, args.overrides, args.only, args.seeds, none=self.prunes)
        self.profile = load_profile(args.cluster or self.sweep.cluster)
        self.folder = runs_root(self.profile) / self.sweep.name
        self.places: dict[str, tuple[ClusterProfile, Host]] = {}
        """Name of a profile, as the sweep says it -> the profile, and a node of it."""
        self.checks: dict[preflight.Check, list[str]] = {}
        """What was looked at, each once and in order, and the names of the runs that it is about (none: all)."""
        self.nominal = False
        """Whether a dry run plans with claims about data that are not here."""
        self.batches: Sequence[PlannedJob] = ()
        """What Slurm would get, known in a dry run."""
        if not str(self.folder).isprintable():
            raise ConfigError("no folder for runs: a control character is in its path", value=str(self.folder))

    def run(self) -> tuple[int, list[Path] | None]:
        """The exit code, and with --watch the directories of the runs to watch."""
        dry, wanted = self.args.dry_run, self.wanted()
        new = not self.folder.exists()
        if new:  # a refusal must not leave the folder that the lock makes
            self._space(self._plan(wanted))
        with nullcontext() if dry else lock(self.folder):
            plan = self._plan(wanted)
            if not new:
                self._space(plan)
            question = self._question(plan)
            self._show(plan, question)
            plan.refuse_changed()
            plan.refuse_prune(self.args.prune_most)
            plan.refuse_pinned()
            if not dry:
                self._confirm(question)
                self._commit(plan)
        if plan.actions and all(action.kind == "unknown" for action in plan.actions):
            return STORAGE, None
        if self.args.watch and not dry:
            return COMPLETE, [self.folder / action.name for action in plan.actions]
        if not (dry or self.args.json):
            print(render.after(plan))
        return COMPLETE, None

    def wanted(self) -> list[ResolvedRun]:
        """The runs, resolved and checked."""
        for run in self.sweep.runs:
            self._place(run)
        for profile in self._profiles():
            self._checked(preflight.scheduler(profile, self.args.dry_run, self._may_execute(profile)))
        return [self._want(run) for run in self.sweep.runs]

    def _may_execute(self, profile: ClusterProfile) -> bool:
        """Whether programs that a profile names may run: in a dry run not if the sweep alone names its file."""
        by_sweep = [self.sweep.cluster, *(run.config.resources.cluster for run in self.sweep.runs)]
        files = [name for name in by_sweep if name.endswith((".yaml", ".yml"))]
        return not (self.args.dry_run and not self.args.cluster and profile in map(load_profile, files))

    def _place(self, run: Run) -> tuple[ClusterProfile, Host]:
        """The profile of the cluster that a run goes to, and a node there."""
        asked = "" if self.args.cluster else run.config.resources.cluster
        if asked not in self.places:
            profile = load_profile(asked) if asked else self.profile
            if runs_root(profile) != runs_root(self.profile):
                what = f"resources.cluster: the runs root of {asked} is another one than that of {self.profile.name}"
                remedy = "Runs of a sweep share a folder: give the profiles one runs_root, or make it two sweeps."
                raise ConfigError(what, f"run {run.name}", str(runs_root(profile)), remedy)
            self.places[asked] = profile, node(profile)
        return self.places[asked]

    def _profiles(self) -> list[ClusterProfile]:
        """Each once, in the order of the runs."""
        return list({profile.name: profile for profile, _ in self.places.values()}.values())

    def _want(self, run: Run) -> ResolvedRun:
        """Resolve, validate and check one run; its errors name it."""
        try:
            dry = self.args.dry_run
            if run.config.init.run or run.config.init.export:
                run.config.init = self._origin(run)
            data = dataset_facts(
                run.config, nominal=dry
            )  # what a configuration claims of its data is good for a plan alone
            profile, on = self._place(run)
            config, kept = self._settled(run, data, on)
            notes = validate(config)
            self.nominal = self.nominal or any(one.nominal for one in data)
            try:
                preflight.captions(config, data)
            except ConfigError:
                if not self._exists(run, config):
                    raise
            anew = self.args.changed in ("restart", "fork")
            preflight.blocks(config, data, None if anew else RunDir(self.folder / run.name))
            self._checked(preflight.check(config, data, profile, on, self.folder, dry), run.name)
            self._checked(preflight.saving(profile, RunDir(self.folder / run.name)), run.name)
            self._checked(preflight.wall_limit(config, profile, RunDir(self.folder / run.name)), run.name)
        except FlipError as error:
            where = f"run {run.name}, {error.where}" if error.where else f"run {run.name}"
            raise type(error)(error.what, where, error.value, error.remedy) from error
        resolved = flatten(to_dict(config))
        return ResolvedRun(
            run.name,
            config,
            identity(config, ""),
            estimate(config, profile),
            differs=run.differs,
            against_base=[change._replace(now=resolved.get(change.key, change.now)) for change in run.against_base],
            given=run.given,
            notes=notes,
            warnings=warnings(config),
            cluster=profile.name,
            kept=kept,
        )

    def _checked(self, checks: Sequence[preflight.Check], *names: str) -> None:
        for check in checks:
            self.checks.setdefault(check, []).extend(names)

    def _space(self, plan: Plan) -> None:
        """Check the room for checkpoints of what starts, and of what runs, which still grows."""
        grows = [action for action in plan.actions if action.starts or action.kind in ("running", "waiting")]
        # a run that goes to the trash first keeps its bytes there
        paths = {plan.folder / f"{action.name}{'.new' if action.moves else ''}": action.wanted for action in grows}
        configs = {path: wanted.config for path, wanted in paths.items()}
        self._checked(preflight.space(configs, self.profile, self.folder, self.args.dry_run and self.nominal))

    def _origin(self, run: Run) -> Init:
        """``init`` with what it means; where that is gone, a run that has begun goes on without it."""
        try:
            return warm_start.resolve_init(run.config, [self.folder, self.folder.parent])
        except ConfigError:
            known = warm_start.stored_init(run.config.init, RunDir(self.folder / run.name))
            if known is None:
                raise
            return known

    def _settled(self, run: Run, data: Sequence[DatasetFacts], on: Host) -> tuple[Config, Sequence[ConfigChange]]:
        """The resolved configuration (the directory's where that is to be kept), and what the file says else."""
        path, there = self.folder / run.name, [other.name for other in self.folder.glob(f"{run.name}-v*")]
        beside = planning.forks(run.name, there, self.sweep.names)
        places = [path, *(self.folder / fork for fork in beside)]
        config = planning.resolve_stable(run.config, on, data, places)
        if self.args.changed != "keep" or not (path / "identity.json").exists():
            return config, ()
        try:
            known = [read_record(place / "identity.json") or {} for place in places]
            if identity(config, "")["hash"] in [stored.get("hash") for stored in known]:
                return config, ()
            return read_config(path / "config.yaml"), diff_identity(known[0], config)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError("cannot be kept: its identity.json is damaged", str(path), str(error)) from error

    def _exists(self, run: Run, config: Config) -> bool:
        """Whether this run, or a fork of it, is there with this very configuration."""
        wanted = identity(config, "")["hash"]
        for place in [self.folder / run.name, *self.folder.glob(f"{run.name}-v*")]:
            with suppress(OSError, ValueError, AttributeError):  # a damaged one is reported with the plan
                if (read_record(place / "identity.json") or {}).get("hash") == wanted:
                    return True
        return False

    def _asking(self) -> bool:
        """A plan for a Slurm that is not here is made from the files alone."""
        slurm = any(profile.kind == "slurm" for profile in self._profiles())
        return not (self.args.dry_run and slurm and shutil.which("squeue") is None)

    def _plan(self, wanted: Sequence[ResolvedRun]) -> Plan:
        args = self.args
        found = planning.scan_runs(self.folder, [run.name for run in wanted], self._asking())
        names, changed, only = self.sweep.names, args.changed or "", args.only or "*"
        plan = planning.plan(wanted, found, self.folder, names, args.retry, changed, self.prunes, only)
        if not (plan.actions or plan.dropped):
            raise no_match(self.file, only, names)
        return plan

    def _show(self, plan: Plan, question: str) -> None:
        everyone = len(self.sweep.runs)
        checks = [
            replace(check, runs=tuple(names) if len(names) < everyone else ()) for check, names in self.checks.items()
        ]
        answers = any(check.name == "Slurm" and not check.skipped for check in checks)
        for profile in self._profiles():
            if self.args.dry_run and profile.kind == "slurm":
                part = [action for action in plan.actions if action.wanted.cluster == profile.name]
                self.batches = [*self.batches, *batches(replace(plan, actions=part), profile, answers)]
        if self.args.json:
            shown = render.as_dict(plan, self.sweep, self.profile, checks, question, self.batches)
            print(json.dumps(shown, indent=1))
        elif self.args.dry_run:
            print(render.details(plan, self.sweep, self.profile, checks, question, self.batches, self.args.script))
        else:
            print(render.summary(plan, self.sweep, self.profile))

    def _question(self, plan: Plan) -> str:
        """What must be confirmed before anything starts; empty: nothing."""
        asked = []
        if plan.pruned:
            active = [name for name, found in plan.pruned.items() if found.active]
            stopped = f" ({', '.join(active)}: cancelled first)" if active else ""
            asked.append(f"moves {_runs(len(plan.pruned))} to the trash: {', '.join(plan.pruned)}{stopped}")
        moved = [f"{action.name} ({action.existing})" for action in plan.starting if action.moves]
        if moved:
            them = "it" if len(moved) == 1 else "them"
            asked.append(f"moves {_runs(len(moved))} to the trash and starts {them} from zero: {', '.join(moved)}")
        unknown = [action.name for action in plan.starting if action.wanted.estimate.cost.gpu_hours is None]
        known = [action for action in plan.starting if action.wanted.estimate.cost.gpu_hours is not None]
        cost = total(action.wanted.estimate.cost for action in known)
        if cost.gpu_hours is not None and cost.gpu_hours > CONFIRM_ABOVE:
            price = "" if cost.price is None else f", a price of {cost.price:,.0f}"
            asked.append(f"starts {_runs(len(known))} of {cost.gpu_hours:,.0f} GPU-hours{price}")
        if unknown:
            asked.append(f"starts {_runs(len(unknown))} of unknown GPU-hours ({', '.join(unknown)})")
        return f"This {' and '.join(asked)}." if asked else ""

    def _confirm(self, question: str) -> None:
        if self.args.yes or not question:
            return
        if not sys.stdin.isatty():
            raise ConfigError("a person is asked first, and nobody is there", value=question, remedy="Add --yes.")
        try:
            answer = input(f"{question} Go on? [y/N] ")
        except EOFError:
            answer = ""
        if answer.strip().lower() not in ("y", "yes"):
            raise ConfigError("nothing was done", remedy="Answer y, or add --yes.")

    def _commit(self, plan: Plan) -> None:
        if plan.pruned:
            active = ", ".join(name for name, found in plan.pruned.items() if found.active)
            self._say(f"cancelled, and waited for until they have saved: {active}" if active else "")
            left = prune(plan, f"no longer in the sweep {self.sweep.name}", self._trashed)
            self._say(f"cancelled, but still saving: {', '.join(left)}; --prune again moves them" if left else "")
        if plan.starting:
            snapshot = take(REPOSITORY, self.folder / ".code")
            hidden = ", ".join(snapshot.left_out)
            self._say(f"not copied, because they are no code or look like secrets: {hidden}" if hidden else "")
            steps = 0 if self.args.no_canary else self.profile.canary
            cluster = MultiBackend(self._profiles())
            again = resubmit.typed(self.args, self.file)
            jobs = apply(plan, snapshot, cluster, self._about(plan), steps, again, self._trashed)
            self._say(render.canaries(jobs))
            late = ", ".join(called_off(plan))
            self._say(f"cancelled meanwhile, and so not started: {late}" if late else "")

    def _trashed(self, path: Path, target: Path) -> None:
        """Report a run directory that was moved to the trash. With --json standard output holds the plan alone."""
        replaced = path.name in [run.name for run in self.sweep.runs]
        print(render.trashed(path, target, replaced), file=sys.stderr if self.args.json else sys.stdout)

    def _say(self, words: str) -> None:
        if words and not self.args.json:
            print(words)

    def _about(self, plan: Plan) -> dict[str, Any]:
        """sweep.json: what a report shows of the sweep. Runs submitted before keep a place in the order."""
        names = [name for action in plan.actions for name in dict.fromkeys([action.wanted.name, action.name])]
        before = load_record(self.folder / "sweep.json").get("runs", [])
        order = [*before, *names] if self.args.only else [*names, *before]
        forked = {action.fork: self.sweep.paper.get(action.wanted.name) for action in plan.actions if action.fork}
        paper = self.sweep.paper | {fork: numbers for fork, numbers in forked.items() if numbers}
        about = {key: getattr(self.sweep, key) for key in ("name", "title", "notes")}
        order = list(dict.fromkeys(order))
        return {**about, "cluster": self.profile.name, "runs": order, "paper": paper, "rows": self.sweep.rows}


def _runs(number: int) -> str:
    return "1 run" if number == 1 else f"{number} runs"


def sweep_file(typed: str) -> Path:
    """The sweep file meant: a path from here, one from the repository, or a name in sweeps/. Raises ConfigError."""
    places = [Path(typed).expanduser(), REPOSITORY / typed, SWEEPS / f"{typed}.yaml"]
    for place in places:
        if place.exists():
            return place
    names = sorted(path.stem for path in SWEEPS.glob("*.yaml"))
    remedy = suggestion(Path(typed).stem, names) or f"In sweeps/ there are: {', '.join(names)}."
    raise ConfigError("no such sweep file", str(places[0].absolute()), remedy=remedy)


def node(profile: ClusterProfile) -> Host:
    """One run's share of a node of the cluster: as the profile says, or this machine."""
    here = this_host()
    if profile.kind == "local":
        cores = min(profile.cpus_per_node or here.cores, here.cores)
        memory = int(profile.memory_gb * 1e9) or here.memory
        together = profile.parallel or 1
        return Host(max(1, cores // together), memory // together, here.bf16, here.cuda)
    memory = int(profile.memory_gb * 1e9) or here.memory
    return Host(profile.cpus_per_node or here.cores, memory, bf16=True, cuda=profile.gpus_per_node > 0)
