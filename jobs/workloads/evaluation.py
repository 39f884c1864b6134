"""``EvaluationWorkload``: a side job that scores checkpoints of a run, or a published model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flip.common.cache import cache_root
from flip.config.schema import Config, EvaluationSet
from flip.data.manifest import labels
from flip.data.manifest.manifest import MARK, Manifest
from flip.evaluation.datasets import catalog
from flip.evaluation.datasets.catalog import DatasetRequest
from flip.evaluation.datasets.prompts import read_prompts
from flip.evaluation.encoding.open_clip_folder import claim
from flip.evaluation.request import CONFIGURED, EvaluationRequest
from flip.runs import checkpoint_folder
from flip.runs.checks import Check, Rule, run_rules
from flip.runs.errors import ConfigError
from flip.runs.rundir import RunDir
from flip.runs.side_jobs import REQUEST
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import JobResources
from jobs.planning import environment_checks


@dataclass(frozen=True)
class EvaluationWorkload:
    """An evaluation of one run or model. ``jobs.workloads.workload.Workload`` describes it."""

    request: EvaluationRequest
    resources: JobResources
    profile: ClusterProfile
    config: Config | None = None
    """Of the run; None for a published model."""

    kind = "evaluate"
    rank_module = "jobs.evaluator"
    has_steps = True

    @property
    def subject(self) -> RunDir:
        """The run directory that gets the scores."""
        return RunDir(self.request.subject)

    @property
    def env(self) -> Mapping[str, str]:
        return {"FLIP_CACHE": str(cache_root())}

    @property
    def trackers(self) -> Sequence[str]:
        return ()

    def checks(self) -> Iterator[Check]:
        return run_rules(RULES, self.request, self.config, self.profile)

    def files(self) -> Mapping[str, str]:
        return {REQUEST: self.request.text()}

    def pin(self, run: RunDir) -> None:
        for name in self.request.commits:
            _pin(self.subject, run, name)

    def claim(self) -> None:
        """Create the run directory of a published model, which has none before its first evaluation."""
        if self.request.model:
            claim(self.subject, self.request.model.partition(":")[2])


def _pin(subject: RunDir, job: RunDir, name: str) -> None:
    """Keep a checkpoint for the job. ConfigError if the run, which may be training, has deleted it meanwhile."""
    stage, _, place = name.partition("/")
    checkpoint_folder.pin(subject, job, stage, int(place.partition("-")[0]))
    if not (subject.checkpoints / name / checkpoint_folder.COMMIT_FILE).exists():
        raise ConfigError("this checkpoint has been deleted meanwhile", name, remedy="Name a newer one.")


def _configured_defect(item: EvaluationSet) -> str:
    """Why the labels of a run's own zero-shot set do not fit its class names; empty if its manifest is not here."""
    if item.task != "zeroshot" or not (Path(item.manifest) / MARK).is_file():
        return ""
    return labels.defect_of(Manifest.load(item.manifest), len(read_prompts(item.classes).names))


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
