"""What the run directories of earlier submissions of a sweep contribute to the next one: their configuration, and where
their weights started."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from flip.config.derived import stage_at
from flip.config.identity import ConfigChange, changes_since, diff_identity, is_same_run
from flip.config.merge import read_config
from flip.config.schema import Config, Init
from flip.runs import commit
from flip.runs.errors import ConfigError
from flip.runs.rundir import RunDir, read_lenient, read_record
from flip.training import warm_start
from jobs.planning import extension
from jobs.planning import plan as planning
from jobs.planning.plan import NOT_YET
from jobs.sweeps.sweep_file import Run


class ExistingRuns:
    """The run directories in the folder of a sweep, whose runs have these names."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder = folder
        self.names = names

    def places(self, run: Run) -> list[Path]:
        """The directory of a run, and those of its forks."""
        return [self.folder / name for name in (run.name, *self._forks.get(run.name, ()))]

    def holder(self, run: Run, config: Config) -> Path | None:
        """The directory of the run, or of a fork of it, that has this configuration."""
        places = self.places(run)  # a damaged record is reported with the plan
        return next((place for place in places if is_same_run(read_lenient(place / "identity.json"), config)), None)

    def stored_config(self, run: Run, config: Config, ignored: list[ConfigChange]) -> Config:
        """The configuration of an existing run that stays as it is (``--changed keep``); ``config`` if there is none.

        Adds the changes in the sweep file that are ignored then to ``ignored``.
        """
        places = self.places(run)
        path = places[-1]
        if not all((place / "identity.json").exists() for place in (places[0], path)):
            return config
        try:
            known = [read_record(place / "identity.json") or {} for place in places]
            if any(is_same_run(stored, config) for stored in known):
                return config
            existing = read_config(path / "config.yaml")
            ignored += diff_identity(known[-1], config)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError("cannot be kept: its identity.json is damaged", str(path), str(error)) from error
        return existing

    def earlier_extensions(self, run: Run) -> Iterator[Config]:
        """The configuration of a run with the ``init`` of each fork that ``--changed extend`` made, newest first."""
        return extension.earlier_extensions(run.config, self.places(run))

    def extended(self, run: Run, config: Config) -> Config | None:
        """The configuration of a changed run that continues it from its newest commit; None if it cannot, or is new.

        ``config``: the resolved one, which the run's directory does not have.
        """
        current = RunDir(self.places(run)[-1])
        changes = changes_since(read_lenient(current.identity), config)
        if not current.path.exists() or extension.why_not_extended(current, changes):
            return None
        return extension.extended(run.config, current)

    def resolve_init(self, run: Run, dry_run: bool) -> Init:
        """``init``, resolved. A run that has started continues without its source if that is gone, and a dry run plans
        with a commit that a run of the sweep will make."""
        init = run.config.init
        known = self._stored_init(run, init)
        try:
            return warm_start.resolve_init(run.config, [self.folder, self.folder.parent])
        except warm_start.SourceMissing:
            will_come = init.run in self.names and init.samples and not self._has_passed(init)
            if known is None and dry_run and will_come:
                stage = init.stage or stage_at(run.config, init.samples).name
                known = replace(init, stage=stage, commit=NOT_YET)  # enough to plan: the sweep itself saves the commit
            if known is None:
                raise
            return known

    def _has_passed(self, init: Init) -> bool:
        """Whether the run that ``init`` names is complete or has a later commit, so that it never saves that one."""
        source = RunDir(self.folder / init.run)
        commits = commit.commits(source)
        return source.is_complete() or bool(commits and commits[-1].samples_seen >= init.samples)

    def _stored_init(self, run: Run, init: Init) -> Init | None:
        """The resolved ``init`` of a run, or of its newest fork, that has commits of its own."""
        stored = (warm_start.stored_init(init, RunDir(place)) for place in reversed(self.places(run)))
        return next(filter(None, stored), None)

    @cached_property
    def _forks(self) -> dict[str, list[str]]:
        return planning.forks([path.name for path in self.folder.glob("*-v*")], self.names)
