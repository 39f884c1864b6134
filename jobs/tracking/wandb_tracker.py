"""Weights & Biases, optional: ``pip install wandb``. WANDB_API_KEY, WANDB_MODE, WANDB_BASE_URL: its own documentation.

Online, the server knows which steps it holds. Offline (WANDB_MODE=offline), a session is written to
``trackers/wandb/from-<first step>/``. A session that was not closed is discarded and written again, so that each step
is in one of them. ``wandb sync RUN_DIR/trackers/wandb/from-*/wandb`` uploads all of them to one run.
"""

import secrets
from collections.abc import Mapping
from typing import Any

from flip.files import deletion
from flip.files.creation import run_folder
from flip.runs.errors import ConfigError, StorageError
from flip.runs.rundir import parse_file_number
from jobs.tracking.tracker import TrackedRun

SETTINGS: Mapping[str, Any] = {
    "console": "off", "silent": True, "disable_git": True, "disable_code": True, "x_disable_stats": True,
    "x_disable_meta": True,
}  # fmt: skip
"""The follower's own output, code and machine are not those of the run."""


class WandbTracker:
    """See ``jobs.tracking.tracker.Tracker``."""

    def open(self, run: TrackedRun, step: int) -> int:
        try:
            import wandb
        except ModuleNotFoundError as error:
            if error.name != "wandb":
                raise
            remedy = "Install it (pip install wandb), or remove monitor.wandb from the sweep."
            raise ConfigError("wandb is not installed for this Python", "monitor.wandb", run.project, remedy) from error
        for old in run.folder.glob("from-*"):
            first = parse_file_number(old.name.partition("-")[2])
            if first is not None and first > step:  # renamed, because a dying process may hold files of it open
                old = old.rename(old.with_name(f".{old.name}.{secrets.token_hex(4)}"))
                deletion.discard_own_folder(old)
        session = run_folder(run.folder / f"from-{step + 1:09d}")  # sorted by a shell, as `wandb sync` needs
        entity, _, project = run.project.rpartition("/")
        try:
            self._run = wandb.init(
                entity=entity or None, project=project, id=run.id, name=run.name, group=run.group,
                config=dict(run.config), dir=session, resume="allow", settings=wandb.Settings(**SETTINGS),
            )  # fmt: skip
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            remedy = "Run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline."
            raise ConfigError("wandb refused the run", "monitor.wandb", str(error), remedy) from error
        except wandb.errors.Error as error:
            raise StorageError("wandb does not answer", "monitor.wandb", str(error)) from error
        self._run.define_metric("*", step_metric="samples")
        if self._run.offline:
            return step
        return self._run.starting_step - 1

    def log(self, step: int, values: Mapping[str, float]) -> None:
        values = {"_timestamp" if name == "time" else name: value for name, value in values.items()}
        self._run.log(values, step=step, commit=True)

    def summary(self, values: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(values))

    def close(self) -> None:
        self._run.finish()
