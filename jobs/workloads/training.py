"""``TrainingWorkload``: a run of a sweep that trains a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from flip import model_costs
from flip.checkpoint.remote_folder import RemoteFolder
from flip.common.plain_data import ConfigChange
from flip.common.yaml_io import dump_yaml, read_yaml
from flip.config.derived import usable_nodes
from flip.config.identity import changed_class_names, changes_since, concern_only_data, identity, is_same_run
from flip.config.merge import dump, to_dict
from flip.config.schema import Config
from flip.data.storage.retry import RetryPolicy
from flip.runs import checkpoint_folder
from flip.runs.checks import OK, Check, run_rules
from flip.runs.rundir import RunDir, read_record, write_json, write_text
from flip.training import warm_start
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import JobResources
from jobs.planning import preflight, step_time, user_files
from jobs.planning.run_cost import Estimate
from jobs.tracking import tracker
from jobs.workloads import extension, training_page
from jobs.workloads.workload import RunDescription

NOT_YET = "0" * 16
"""Stands for the digest of a checkpoint that another run of the sweep will save (``init.commit``)."""
MOST_CHANGES = 5
"""Most changes that a sentence lists."""


@dataclass(frozen=True)
class TrainingWorkload:
    """A run of the sweep file: resolved, validated, estimated. ``jobs.workloads.workload.SweepRun`` describes it."""

    name: str
    config: Config
    identity: Mapping[str, Any]
    estimate: Estimate
    differs: Mapping[str, Any] = field(default_factory=dict)
    against_base: Sequence[ConfigChange] = ()
    given: frozenset[str] = frozenset()
    """Keys that the sweep sets."""
    notes: Sequence[str] = ()
    profile: ClusterProfile = field(default_factory=ClusterProfile)
    ignored_changes: Sequence[ConfigChange] = ()
    extends: bool = False
    code: Mapping[str, bytes] = field(default_factory=dict)
    start: preflight.Start | None = None
    """What is checked; None: nothing."""

    kind = "train"
    rank_module = "jobs.worker"
    has_steps = True

    @property
    def cluster(self) -> str:
        return self.profile.name

    @property
    def resources(self) -> JobResources:
        return resources_of(self.config)

    @property
    def env(self) -> Mapping[str, str]:
        return {}

    @property
    def trackers(self) -> Sequence[str]:
        return trackers_of(self.config)

    def checks(self) -> Iterator[Check]:
        for entry in self.config.monitor.callbacks:
            yield Check(OK, entry, name="callbacks")
        for text in user_files.described(self.config):
            yield Check(OK, text, name="user classes")
        if self.start is not None:
            yield from run_rules(preflight.TRAINING, self.start)

    def files(self) -> Mapping[str, str]:
        return {"config.yaml": dump(self.config)}

    def pin(self, run: RunDir) -> None:
        if self.starts_from_checkpoint:
            warm_start.pin(self.config.init, run)

    # -- the plan

    @property
    def is_nominal(self) -> bool:
        return self.start is not None and self.start.nominal

    @property
    def checkpoints(self) -> TrainingCheckpoints:
        return TrainingCheckpoints(self.config)

    @cached_property
    def description(self) -> RunDescription:
        # each seed may start from a source of its own seed
        init = self.config.init
        of_any_seed = replace(init, run=init.run.removesuffix(f"-s{self.config.seed}"), commit="")
        return RunDescription(
            design=repr(replace(self.config, seed=0, init=of_any_seed)),
            seed=self.config.seed,
            page=training_page.lines(self.config, self.estimate, self.against_base),
            differs=self.differs,
            against_base=self.against_base,
            notes=self.notes,
            warnings=self._warnings(),
        )

    def _warnings(self) -> list[str]:
        """What the plan warns of, a sentence each."""
        rows = run_rules(preflight.TRAINING_WARNINGS, self.config, self.profile)
        texts = [row.text for row in rows]
        if self.profile.kind == "local":
            texts += tracker.warnings(self.trackers)
        return texts

    # -- comparison with its directory

    def matches(self, stored: Mapping[str, Any]) -> bool:
        return stored.get("hash") == self.identity["hash"] or is_same_run(stored, self.config)

    def changes_since(self, stored: Mapping[str, Any] | None) -> list[ConfigChange]:
        return changes_since(stored, self.config)

    def in_words(self, changes: Sequence[ConfigChange]) -> str:
        sentences = []
        for change in changes[:MOST_CHANGES]:
            sentence = str(change)
            if change.key != "world" and change.key not in self.given:
                sentence += ", which the sweep does not set: a default moved"
            sentences.append(sentence)
        if len(changes) > MOST_CHANGES:
            sentences.append(f"and {len(changes) - MOST_CHANGES} more")
        return "; ".join(sentences)

    def outdated(self, stored: Mapping[str, Any]) -> str:
        names = ", ".join(changed_class_names(stored, self.config))
        if not names:
            return ""
        return f"class names of {names} have changed: its scores have the earlier ones (flip evaluate scores again)"

    # -- continuing

    def adopts(self, changes: Sequence[ConfigChange]) -> bool:
        return concern_only_data(changes)

    def adopt(self, run: RunDir, changes: Sequence[ConfigChange]) -> None:
        """Give a run new data; ``before`` in identity.json records until which S it had others.

        identity.json is written before config.yaml: the next submission repairs one that ends between the two.
        """
        stored = read_record(run.identity) or {}
        done = checkpoint_folder.checkpoints(run)
        until: dict[str, Any] = {"samples": done[-1].samples_seen if done else 0, "hash": stored.get("hash")}
        until["changes"] = [change._asdict() for change in changes]
        write_json(run.identity, {**self._renewed(stored), "before": [*stored.get("before", []), until]})

    def why_not_extended(self, run: RunDir, changes: Sequence[ConfigChange]) -> str:
        return extension.why_not_extended(run, changes)

    def update(self, run: RunDir, older: bool) -> None:
        """Write config.yaml of a run that continues: settings outside of its identity may be new.

        A run that keeps ``older`` code gets no key that its config.yaml lacks, because that code may not know it, and
        no callback that it does not have yet, because that code does not contain it.
        """
        stored = read_record(run.identity) or {}
        if stored and is_same_run(stored, self.config):
            renewed = self._renewed(stored)
            if renewed != stored:
                write_json(run.identity, renewed)  # class names were corrected; before config.yaml, as in ``adopt``
        settings = to_dict(self.config)
        if older and run.config.exists():
            stored_settings = read_yaml(run.config)
            settings = _without_new_keys(settings, stored_settings)
            missing = self._callbacks_without_code(stored_settings)
            if "callbacks" in settings["monitor"]:
                entries = settings["monitor"]["callbacks"]
                settings["monitor"]["callbacks"] = [entry for entry in entries if entry not in missing]
        write_text(run.config, dump_yaml(settings))

    def missing_code(self, run: RunDir) -> Sequence[str]:
        if not self.config.monitor.callbacks or not run.config.exists():
            return []
        return self._callbacks_without_code(read_yaml(run.config))

    @property
    def lacks_checkpoint(self) -> bool:
        return self.config.init.commit == NOT_YET

    @property
    def starts_from_checkpoint(self) -> bool:
        return bool(self.config.init.run)

    def check_source(self) -> None:
        warm_start.open_checkpoint(self.config.init)

    def _renewed(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """A stored identity with this configuration."""
        wanted = identity(self.config, "")
        del wanted["code"]
        return {**stored, **wanted}

    def _callbacks_without_code(self, stored: Mapping[str, Any]) -> list[str]:
        """Entries of ``monitor.callbacks`` that the code of a run does not contain. ``stored``: its config.yaml."""
        stored_entries = (stored.get("monitor") or {}).get("callbacks") or []
        return [entry for entry in self.config.monitor.callbacks if entry not in stored_entries]


@dataclass(frozen=True)
class TrainingCheckpoints:
    """Where the checkpoints of a training go."""

    config: Config

    @property
    def url(self) -> str:
        return self.config.checkpoint.url

    @property
    def bytes(self) -> int:
        """Of those kept, the last of every stage, and the one being written."""
        settings = self.config.checkpoint
        number = settings.keep + len(settings.keep_at) + len(self.config.stages) + 1
        return model_costs.state_bytes(self.config) * number

    def take_over(self, run: RunDir) -> None:
        RemoteFolder(run, self.url, RetryPolicy.of(self.config.data)).take_over()


def resources_of(config: Config) -> JobResources:
    """The resources that a resolved run requests."""
    asked = config.resources
    cpus = asked.cpus or config.compute.threads + config.data.workers
    least = min(usable_nodes(config))
    if not asked.least_nodes:
        least = 0
    return JobResources(
        asked.nodes,
        asked.processes,
        asked.gpus,
        cpus,
        asked.hours,
        least_nodes=least,
        spares=asked.spares,
        usable=tuple(usable_nodes(config)),
    )


def trackers_of(config: Config) -> list[str]:
    """Names of the trackers of a run."""
    return [name for name in tracker.TRACKERS if getattr(config.monitor, name)]


def advice(config: Config, profile: ClusterProfile) -> list[str]:
    """Notes about settings that would make the steps shorter."""
    return list(filter(None, [step_time.advice(config, profile)]))


def _without_new_keys(settings: Any, stored: Any) -> Any:
    """``settings`` without keys that ``stored`` lacks, at every depth."""
    if isinstance(settings, dict) and isinstance(stored, dict):
        return {key: _without_new_keys(value, stored[key]) for key, value in settings.items() if key in stored}
    if isinstance(settings, list) and isinstance(stored, list) and len(settings) == len(stored):
        return [_without_new_keys(new, old) for new, old in zip(settings, stored, strict=True)]
    return settings
