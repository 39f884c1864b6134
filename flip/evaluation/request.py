"""The request of an evaluation job: its configuration, ``task.json``. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flip.config.schema import Compute, Data, Monitor
from flip.runs import formats
from flip.runs.errors import ConfigError, DataError
from flip.runs.formats import EVALUATION, EVALUATION_NUMBER
from flip.runs.rundir import RunDir, load_record, to_json, write_text
from flip.runs.side_jobs import REQUEST

CONFIGURED = "run"
"""Instead of a path: the data set is one of the run's own evaluate.sets."""


@dataclass(frozen=True)
class EvaluationRequest:
    """What an evaluation job does and how it computes: the configuration of the job."""

    subject: str
    """The run directory with the checkpoints to score, and with the results in eval/; created for an open_clip
    folder."""
    compute: Compute
    """Resolved. Settings that only training has keep their defaults."""
    model: str = ""
    """``open_clip:FOLDER``; empty: the run's own checkpoints."""
    commits: tuple[str, ...] = ()
    """STAGE/S-n each; empty: the newest when the job starts."""
    sets: tuple[Mapping[str, str], ...] = ()
    """Fields of ``flip.evaluation.datasets.DatasetRequest``."""
    data: str = ""
    """The data root."""
    views: tuple[tuple[str, bool], ...] = (("0", False),)
    """(mask, ensemble) each."""
    batch: int = 256
    cost: float = 0.0
    """C of a probe; 0: chosen on held-out training images."""
    cache: str = ""
    """Folder of cached features; empty: no cache."""
    url: str = ""
    """Checkpoint files below this URL are read even if another user wrote the record that names them."""
    deadline: float = Data.deadline
    """Seconds for which storage is retried."""
    timeout: float = Data.timeout
    """Seconds of one request to storage."""
    hang_minutes: float = Monitor.hang_minutes
    """Minutes without progress after which a rank ends."""

    @classmethod
    def read(cls, job: RunDir) -> EvaluationRequest:
        """The request of a job.

        Raises ConfigError if there is none, FormatError if another version wrote it, DataError if it is damaged.
        """
        record = load_record(job.path / REQUEST)
        if not record:
            raise ConfigError("there is no evaluation here: task.json is missing", job.path)
        try:
            fields = {name: value for name, value in record.items() if name != EVALUATION.key}
            return cls(**{**fields, **_sequences(fields), "compute": Compute(**fields["compute"])})
        except KeyError as error:
            raise formats.missing(error.args[0], job.path / REQUEST, EVALUATION.remedy) from error
        except (TypeError, ValueError) as error:
            raise DataError("is no request of an evaluation", job.path / REQUEST, str(error)) from error

    def write(self, job: RunDir) -> None:
        """Write task.json, which marks the directory as a run directory."""
        write_text(job.path / REQUEST, self.text())

    def text(self) -> str:
        """The text of task.json."""
        return to_json({**dataclasses.asdict(self), EVALUATION.key: EVALUATION_NUMBER})


def _sequences(record: Mapping[str, Any]) -> dict[str, Any]:
    """The lists of a record as tuples."""
    views = tuple((mask, bool(ensemble)) for mask, ensemble in record["views"])
    return {"commits": tuple(record["commits"]), "sets": tuple(record["sets"]), "views": views}
