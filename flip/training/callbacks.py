"""The seam of the training loop: the hooks that the trainer calls, and what they may read.

The trainer owns the loop, the step, the stop and the save. Everything else is a callback: the profiler, the metric
lines, the log of samples, the scores along the way (``flip.training.standard_callbacks`` lists them) and the classes
that ``monitor.callbacks`` names (``flip.training.user_callbacks``).

No callback changes the training: weights, moments and the order of samples are the same bits with and without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from flip.config.derived import StageSpan
    from flip.config.schema import Config
    from flip.data.loader import Batch, Loader
    from flip.models.clip import CLIPModel
    from flip.monitoring.rank_counters import RankCounters
    from flip.training.grad_cache import PairFeatures

HOOKS = ("start", "start_stage", "before_step", "step", "save", "evaluate", "stop", "end")
"""Names of the hooks."""


class TrainingStopped(Exception):
    """All ranks agreed to stop, and the position is saved."""


class Training(Protocol):
    """The training as callbacks see it. They read it; the trainer alone changes it."""

    @property
    def samples_seen(self) -> int:
        """S, the samples seen: after the step in ``step``, before it in ``before_step``."""

    @property
    def step(self) -> int:
        """Steps of the run until S."""

    @property
    def seconds(self) -> float:
        """Training time of the run until S, over all attempts, without saves and evaluation."""

    @property
    def waited(self) -> float:
        """Seconds of the newest step in which this rank had no batch and the device nothing to compute."""

    @property
    def span(self) -> StageSpan:
        """The stage, and its range of S."""

    @property
    def stage_config(self) -> Config:
        """The configuration with the image size and text length of the present model."""

    @property
    def model(self) -> CLIPModel:
        """The present model. Its parameters may be sharded."""

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimiser of the stage; None outside of stages."""

    @property
    def batch(self) -> Batch | None:
        """This rank's batch, in ``step``; None in other hooks."""

    @property
    def features(self) -> PairFeatures | None:
        """The features of ``batch`` before the step, if ``monitor.callbacks`` names a class; None like ``batch``."""

    @property
    def loss(self) -> Tensor | None:
        """() of the newest step, over the global batch, on the device; None before the first step."""

    @property
    def classification_loss(self) -> Tensor | None:
        """As ``loss``: of the text classification head; None in a stage without it."""

    @property
    def accuracy(self) -> Tensor | None:
        """As ``loss``: share of images whose own caption is the nearest in the global batch."""

    @property
    def gradient_norm(self) -> Tensor | None:
        """As ``loss``: 2-norm of all gradients before clipping."""

    @property
    def loader(self) -> Loader:
        """The loader of this rank."""

    @property
    def counters(self) -> RankCounters:
        """Replaced samples and peak memory."""

    def wait_for_device(self) -> None:
        """Wait until the device has finished the newest step, and count this time as the step's. Raises Diverged."""

    def stop_if_requested(self) -> None:
        """Raise TrainingStopped if a rank requests a stop. Waits for the slowest rank. Collective."""


class Callback:
    """The hooks of a callback, which all do nothing here. The trainer calls each on all ranks, at the same step.

    Hooks of this project may be collective, because every rank has the same callbacks in the same order.
    """

    def start(self, training: Training) -> None:
        """The weights are restored or initialised, at ``training.samples_seen``. Once per attempt, before all other
        hooks but ``end``."""

    def start_stage(self, training: Training) -> None:
        """A stage starts, or continues after a restart: model and optimiser are ready."""

    def before_step(self, training: Training) -> None:
        """The batch has arrived, and the step comes next."""

    def step(self, training: Training) -> None:
        """A step was launched; a GPU may still compute it. Gradients are those that the optimiser used."""

    def save(self, training: Training) -> None:
        """A save of the present position was started: the state is copied, and the checkpoint may not be complete
        yet."""

    def evaluate(self, training: Training) -> Sequence[dict[str, Any]] | None:
        """The configuration asks for scores of the present weights, which are saved or being saved.

        Returns results for result.json, if any. Raises TrainingStopped if the ranks agree to stop meanwhile.
        """

    def stop(self, training: Training) -> None:
        """This attempt takes no further step: all stages have ended, or the ranks agreed to stop. Once per attempt, not
        after an error."""

    def end(self, training: Training, phase: str, reason: str) -> None:
        """The attempt ends, in any case. ``phase``: complete, interrupted, cancelled or failed; ``reason``: why, unless
        complete. After an error other ranks may not be here: not collective."""


class Callbacks:
    """Calls the hooks of several callbacks, in their order. An object may lack hooks."""

    def __init__(self, members: Sequence[object]) -> None:
        self.members = members
        self._hooks = {name: [getattr(each, name) for each in members if hasattr(each, name)] for name in HOOKS}

    def call(self, hook: str, training: Training, *values: Any) -> None:
        """Call this hook of all callbacks."""
        for function in self._hooks[hook]:
            function(training, *values)

    def evaluate(self, training: Training) -> list[dict[str, Any]]:
        """Call ``evaluate`` of all callbacks and return the results of all."""
        results = list[dict[str, Any]]()
        for function in self._hooks["evaluate"]:
            results += function(training) or ()
        return results
