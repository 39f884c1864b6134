"""``TrainingRequest``: a training as its sweep file asks for it, and how its existing directories resolve it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from flip.common import user_classes
from flip.common.plain_data import ConfigChange, flatten
from flip.config.derived import stage_at
from flip.config.finish import FinishedConfig, finish
from flip.config.identity import changes_since, diff_identity, identity, is_same_run
from flip.config.merge import read_config, to_dict
from flip.config.resolve import DatasetFacts, dataset_facts
from flip.config.schema import Config, Init
from flip.export import timm_source
from flip.runs import checkpoint_folder
from flip.runs.errors import ConfigError
from flip.runs.rundir import RunDir, read_lenient, read_record
from flip.training import warm_start
from jobs.planning import preflight, step_time, user_files
from jobs.planning.run_cost import estimate
from jobs.sweeps.sweep_file import Run
from jobs.workloads import extension
from jobs.workloads.training import NOT_YET, TrainingWorkload, advice
from jobs.workloads.workload import Place, RunOfSweepFile


@dataclass(frozen=True)
class TrainingRequest(RunOfSweepFile[Run]):
    """A run of a sweep file. ``jobs.workloads.workload.RequestedRun`` describes it."""

    @property
    def cluster(self) -> str:
        return self.run.config.resources.cluster

    @property
    def settings(self) -> str:
        return repr(self.run.config)

    @property
    def programs(self) -> Sequence[Path]:
        return user_files.paths(self.run.config, self.file.absolute().parent)

    def is_default(self, key: str) -> bool:
        section = key.partition(".")[0]
        return section in Config.__dataclass_fields__ and not any(
            name == key or name.startswith(f"{key}.") or key.startswith(f"{name}.") for name in self.run.chosen
        )

    def workload_at(self, place: Place) -> TrainingWorkload:
        return _Resolution(self.run, self.file, place).workload()


def settings_of_checkpoints(run: RunDir) -> list[str]:
    """``KEY=VALUE`` of the settings without which the checkpoints of a run cannot be resumed: its own lanes."""
    if not run.config.exists():
        return []
    stored = read_config(run.config)
    if stored.data.sets:
        return []
    return [f"data.lanes={stored.data.lanes}"]


class _Resolution:
    """Resolves one run at a place, so that its existing directories stay the same run if possible."""

    def __init__(self, run: Run, file: Path, place: Place) -> None:
        self.run = replace(run, config=user_files.pinned(run.config, file.absolute().parent))
        self.file = file
        self.place = place
        self.directories = place.directories(run.name)
        # nominal data are for plans only
        self.data: Sequence[DatasetFacts] = dataset_facts(run.config, nominal=place.dry)

    def workload(self) -> TrainingWorkload:
        """The run, with its source, its extension and its files of the user. Raises FlipError."""
        run = self.run
        profile = self.place.profile
        config, notes, ignored = self._finish_at_place(run.config)
        extends = False
        if extension_ := self._extension(config):
            extends = self._holder(extension_.config) is None
            config, notes = extension_
        start = self._start(config)
        code = user_files.read(config, self.file.absolute().parent, self._copies())
        resolved = flatten(to_dict(config))
        return TrainingWorkload(
            run.name,
            config,
            identity(config, ""),
            estimate(config, profile),
            differs=run.differs,
            against_base=[change._replace(now=resolved.get(change.key, change.now)) for change in run.against_base],
            given=run.given,
            notes=[*notes, *extension.notes(config), *advice(config, profile)],
            profile=profile,
            ignored_changes=ignored,
            extends=extends,
            code=code,
            start=start,
        )

    def _copies(self) -> list[Path]:
        """The folders with copies of the user's files in the snapshots of the existing directories."""
        codes = [str((read_lenient(each / "identity.json") or {}).get("code")) for each in self.directories]
        return [self.place.folder / ".code" / code / user_classes.FOLDER for code in codes if code.isalnum()]

    def _start(self, config: Config) -> preflight.Start:
        """What is checked of a configuration that may have a directory already."""
        place = self.place
        current = RunDir(self._holder(config) or self.directories[-1])
        anew = place.changed in ("restart", "fork")
        return preflight.Start(
            config, self.data, place.profile, place.node, place.folder, current, anew, place.dry
        )  # fmt: skip

    def _finish_at_place(self, asked: Config) -> tuple[Config, list[str], list[ConfigChange]]:
        """(resolved configuration, notes on it, changes of the sweep that ``--changed keep`` ignores)."""
        ignored: list[ConfigChange] = []
        if asked.init.run or asked.init.export:
            asked = replace(asked, init=self._resolve_init(asked))

        def adjust(resolved: Config) -> Config:
            if self.place.changed == "keep":
                resolved = self._stored_config(resolved, ignored)
            step_time.fit_cluster(asked, resolved, self.place.profile)
            return resolved

        config, notes = finish(asked, self.place.node, self.data, self.directories, adjust)
        if from_timm := timm_source.note(config.init.export):
            notes.append(from_timm)
        init = config.init
        if init.commit == NOT_YET:
            later = self.place.resubmit_command.line(self.place.folder.parent, "--only", self.run.name)
            notes.append(
                f"it cannot start: {init.run} has no checkpoint at S = {init.samples} yet,"
                f" {extension.newest_checkpoint(RunDir(self.place.folder / init.run))}; when it has one, submit again:"
                f" {later}"
            )
        return config, notes, ignored

    def _holder(self, config: Config) -> Path | None:
        """The directory of the run, or of a fork of it, that has this configuration."""
        for directory in self.directories:  # a damaged record is reported with the plan
            if is_same_run(read_lenient(directory / "identity.json"), config):
                return directory
        return None

    def _stored_config(self, config: Config, ignored_out: list[ConfigChange]) -> Config:
        """The configuration of an existing run that stays as it is (``--changed keep``); ``config`` if there is none.

        Adds the changes in the sweep file that are ignored then to ``ignored_out``.
        """
        path = self.directories[-1]
        if not all((each / "identity.json").exists() for each in (self.directories[0], path)):
            return config
        try:
            stored_identities = [read_record(each / "identity.json") or {} for each in self.directories]
            if any(is_same_run(stored, config) for stored in stored_identities):
                return config
            existing = read_config(path / "config.yaml")
            ignored_out += diff_identity(stored_identities[-1], config)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError("cannot be kept: its identity.json is damaged", str(path), str(error)) from error
        return existing

    def _extension(self, config: Config) -> FinishedConfig | None:
        """A changed run, continued: as an earlier ``--changed extend`` did, or as this one does. None: neither."""
        if self._holder(config) is not None:
            return None
        for earlier in extension.earlier_extensions(self.run.config, self.directories):
            with suppress(ConfigError):  # the new settings do not fit that extension: it is another run
                finished, notes, _ = self._finish_at_place(earlier)
                if self._holder(finished) is not None:
                    return FinishedConfig(finished, notes)
        if self.place.changed != "extend":
            return None
        own = self._extended(config)
        if own is None:
            return None
        finished, notes, _ = self._finish_at_place(own)
        return FinishedConfig(finished, notes)

    def _extended(self, config: Config) -> Config | None:
        """The configuration of a changed run that continues it from its newest checkpoint; None if it cannot, or is
        new.

        ``config``: the resolved one, which the run's directory does not have.
        """
        current = RunDir(self.directories[-1])
        changes = changes_since(read_lenient(current.identity), config)
        if not current.path.exists() or extension.why_not_extended(current, changes):
            return None
        return extension.extended(self.run.config, current)

    def _resolve_init(self, asked: Config) -> Init:
        """``init``, resolved. A run that has started continues without its source if that is gone, and a dry run plans
        with a checkpoint that a run of the sweep will make."""
        init = asked.init
        folder = self.place.folder
        own_init = self._stored_init(init)
        try:
            return warm_start.resolve_init(asked, [folder, folder.parent])
        except warm_start.SourceMissing:
            will_come = init.run in self.place.names and init.samples and not self._has_passed(init)
            if own_init is None and self.place.dry and will_come:
                stage = init.stage or stage_at(asked, init.samples).name
                own_init = replace(
                    init, stage=stage, commit=NOT_YET
                )  # enough to plan: the sweep itself saves the checkpoint
            if own_init is None:
                raise
            return own_init

    def _has_passed(self, init: Init) -> bool:
        """Whether the run that ``init`` names is complete or has a later checkpoint, so that it never saves that
        one."""
        source = RunDir(self.place.folder / init.run)
        checkpoints = checkpoint_folder.checkpoints(source)
        return source.is_complete() or bool(checkpoints and checkpoints[-1].samples_seen >= init.samples)

    def _stored_init(self, init: Init) -> Init | None:
        """The resolved ``init`` of a run, or of its newest fork, that has checkpoints of its own."""
        stored = (warm_start.stored_init(init, RunDir(each)) for each in reversed(self.directories))
        return next(filter(None, stored), None)
