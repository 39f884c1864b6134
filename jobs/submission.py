"""What ``jobs/submit.py`` does: sweep -> resolved runs -> checks -> plan -> (yes?) -> one commit -> (watch)."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flip.config.identity import identity
from flip.config.resolve import Host, facts, host
from flip.config.validate import validate
from flip.exitcodes import ConfigError, FlipError
from flip.rundir import read_json
from jobs import plan as planning
from jobs import preflight, show
from jobs.cluster import open_cluster
from jobs.cost import estimate
from jobs.plan import Plan, Wanted
from jobs.profile import Profile, load_profile, runs_root
from jobs.snapshot import take
from jobs.sweep import SWEEPS, Run, Sweep, load

REPOSITORY = Path(__file__).resolve().parents[1]

CONFIRM_ABOVE = 100.0
"""GPU-hours that start without a question."""


class Submission:
    """One call of the command."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.sweep: Sweep = load(sweep_file(args.sweep), args.overrides, args.only, args.seeds)
        self.profile = load_profile(args.cluster or self.sweep.cluster)
        self.folder = runs_root(self.profile) / self.sweep.name
        self.node = node(self.profile)
        self.checks: dict[preflight.Check, None] = {}
        """What was looked at, over all runs, each once and in order."""

    def run(self) -> int:
        """The exit code."""
        wanted = [self._want(run) for run in self.sweep.runs]
        dry = self.args.dry_run
        with nullcontext() if dry else planning.lock(self.folder):
            plan = self._plan(wanted)
            self._show(plan)
            if not dry:
                plan.refuse_changed()
                if plan.starting:
                    self._confirm(plan)
                    self._commit(plan)
        if dry:
            return 0
        if self.args.watch:
            from jobs.watch import watch

            return watch([self.folder / run.name for run in wanted], sys.stdout, again=show.again())
        if not self.args.json:
            print(show.after(plan))
        return 0

    def _want(self, run: Run) -> Wanted:
        """Resolve, validate and check one run; its errors name it."""
        try:
            dry = self.args.dry_run
            data = facts(run.config, nominal=dry)  # what a configuration claims of its data is good for a plan alone
            config = planning.settle(run.config, self.node, data, self.folder / run.name)
            notes = validate(config)
            self.checks |= dict.fromkeys(preflight.check(config, data, self.profile, self.node, self.folder, dry))
        except FlipError as error:
            where = f"run {run.name}, {error.where}" if error.where else f"run {run.name}"
            raise type(error)(error.what, where, error.value, error.remedy) from error
        return Wanted(run.name, config, identity(config, ""), estimate(config, self.profile), run.differs, notes)

    def _asking(self) -> bool:
        """A plan for a Slurm that is not here is made from the files alone."""
        return not (self.args.dry_run and self.profile.kind == "slurm" and shutil.which("squeue") is None)

    def _plan(self, wanted: Sequence[Wanted]) -> Plan:
        found, others = planning.observe(self.folder, [run.name for run in wanted], self._asking())
        restart = self.args.restart == "changed"
        dropped = [] if self.args.only else others
        return planning.plan(wanted, found, self.folder, self.args.retry, restart, dropped)

    def _show(self, plan: Plan) -> None:
        if self.args.json:
            print(json.dumps(show.as_dict(plan, self.sweep, self.profile, list(self.checks)), indent=1))
        elif self.args.dry_run:
            print(show.details(plan, self.sweep, self.profile, list(self.checks)))
        else:
            print(show.summary(plan, self.sweep, self.profile))

    def _confirm(self, plan: Plan) -> None:
        hours = plan.cost.gpu_hours
        if self.args.yes or hours is None or hours <= CONFIRM_ABOVE:
            return
        asked = f"This starts {len(plan.starting)} runs of {hours:,.0f} GPU-hours."
        if not sys.stdin.isatty():
            raise ConfigError(
                f"above {CONFIRM_ABOVE:g} GPU-hours it asks first, and nobody is there",
                value=asked,
                remedy="Add --yes.",
            )
        try:
            answer = input(f"{asked} Go on? [y/N] ")
        except EOFError:
            answer = ""
        if answer.strip().lower() not in ("y", "yes"):
            raise ConfigError("nothing was started", remedy="Answer y, or add --yes.")

    def _commit(self, plan: Plan) -> None:
        snapshot = take(REPOSITORY, self.folder / ".code")
        if snapshot.left_out and not self.args.json:
            print(f"left out of the copied code, as they look like secrets: {', '.join(snapshot.left_out)}")
        planning.apply(plan, snapshot, open_cluster(self.profile), self._about())

    def _about(self) -> dict[str, Any]:
        """sweep.json: what a report shows of the sweep. Runs submitted before keep a place in the order."""
        names = [run.name for run in self.sweep.runs]
        before = (read_json(self.folder / "sweep.json") or {}).get("runs", [])
        order = [*before, *names] if self.args.only else [*names, *before]
        about = asdict(self.sweep) | {"runs": list(dict.fromkeys(order)), "cluster": self.profile.name}
        return {key: about[key] for key in ("name", "title", "notes", "cluster", "runs", "paper")}


def sweep_file(typed: str) -> Path:
    """The sweep file meant: a path from here, a path from the repository, or a name in sweeps/."""
    places = [Path(typed).expanduser(), REPOSITORY / typed, SWEEPS / f"{typed}.yaml"]
    return next((place for place in places if place.exists()), places[0])


def node(profile: Profile) -> Host:
    """One run's share of a node of the cluster: as the profile says, or this machine."""
    here = host()
    if profile.kind == "local":
        cores = min(profile.cpus_per_node or here.cores, here.cores)
        memory = int(profile.memory_gb * 1e9) or here.memory
        together = profile.parallel or 1
        return Host(max(1, cores // together), memory // together, here.bf16, here.cuda)
    memory = int(profile.memory_gb * 1e9) or here.memory
    return Host(profile.cpus_per_node or here.cores, memory, bf16=True, cuda=profile.gpus_per_node > 0)
