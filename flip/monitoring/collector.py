"""Measures the steps of an attempt: metric lines, device utilisation, and what limits the training speed."""

import gc
import logging
import math
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from flip import model_costs
from flip.checkpoint.manager import CheckpointManager
from flip.config.derived import StageSpan, for_stage
from flip.config.schema import Config
from flip.distributed import parallel
from flip.distributed.parallel import World
from flip.monitoring.profiler import Profiler
from flip.monitoring.rank_counters import RankCounters
from flip.monitoring.utilisation import Utilisation

log = logging.getLogger(__name__)

PARTS = ("data_wait", "compute", "communication", "checkpoint", "evaluation", "other")
"""data_wait: the trainer had no batch. compute, communication: inside steps; the latter is time in which computation
waited for other ranks, by a sampled step (``flip.monitoring.profiler``). checkpoint: steps waited for a save. other:
between steps, such as writing metric lines."""

REMEDIES = {
    "data_wait": ("input-bound", "more data.workers (now {workers}), smaller stored images, or data.cache"),
    "communication": ("communication-bound", "a larger batch per rank, or fewer ranks on faster links"),
    "checkpoint": ("checkpoint-bound", "checkpoints further apart (checkpoint.minutes, checkpoint.samples)"),
    "evaluation": ("evaluation-bound", "scores further apart (evaluate.every) or smaller validation sets"),
    "other": ("bound by what is between steps", "metric lines further apart (monitor.log_every)"),
}  # fmt: skip
"""Part -> (verdict, what would help)."""

BOUND = 0.1
"""Share of the time from which the largest part but compute is reported as the bottleneck."""
MAX_RECOMPILATIONS = 8
"""Graphs compiled in a stage after its first metric line that are no reason for a warning: rare lengths of texts."""
LINES = 10
"""Number of metric lines over which shares are averaged."""


class TimeBreakdown:
    """Seconds since the last metric line by part; samples and seconds of the steps."""

    def __init__(self) -> None:
        self.samples = 0
        self.waited = 0.0
        self.seconds = 1e-9
        self._start_time = time.perf_counter()
        self._paused = dict.fromkeys(("checkpoint", "evaluation"), 0.0)

    def add(self, samples: int, waited: float, seconds: float) -> None:
        """Add a step of ``seconds``, in which the trainer ``waited`` for the batch."""
        self.samples += samples
        self.waited += waited
        self.seconds += seconds

    def add_paused(self, part: str, seconds: float) -> None:
        """Add time without steps; ``part``: checkpoint or evaluation."""
        self._paused[part] += seconds

    def shares(self, communication: float | None) -> dict[str, float | None]:
        """Shares of the time until now by part; they add up to 1.

        ``communication``: its share of a step without data wait. None: unknown; compute then contains it.
        """
        step = self.seconds - self.waited
        remote = communication or 0.0
        seconds = {"data_wait": self.waited, "compute": step * (1 - remote), "communication": step * remote}
        seconds |= self._paused
        total = max(time.perf_counter() - self._start_time, sum(seconds.values()))
        seconds["other"] = total - sum(seconds.values())
        shares: dict[str, float | None] = {part: seconds[part] / total for part in PARTS}
        if communication is not None:
            return shares
        return shares | {"communication": None}


class BottleneckDetector:
    """Finds the part that limits the speed, by the shares of the last LINES metric lines."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._lines: deque[Mapping[str, float | None]] = deque(maxlen=LINES)
        self.bound = ""
        """The limiting part; empty before the first line."""

    def update(self, shares: Mapping[str, float | None]) -> tuple[str, bool]:
        """Add the shares of a metric line. Returns a sentence on the bottleneck, and whether it has changed."""
        self._lines.append(shares)
        means = {part: sum(line[part] or 0.0 for line in self._lines) / len(self._lines) for part in PARTS}
        largest = max((part for part in PARTS if part != "compute"), key=means.__getitem__)
        bound = largest if means[largest] >= BOUND else "compute"
        changed = bound != self.bound
        self.bound = bound
        if bound == "compute":
            return f"compute-bound: {100 * means['compute']:.0f} % of the time is arithmetic", changed
        name, help = REMEDIES[bound]
        share = f"{bound.replace('_', '-')} is {100 * means[bound]:.0f} % of the time"
        return f"{name}: {share}; {help.format(workers=self._workers)}", changed


class CompiledGraphs:
    """Counts the graphs that torch has compiled in this process, and detects shapes that keep changing in a stage."""

    def __init__(self) -> None:
        self._stage = ""
        self._first = 0
        self._limit = math.inf

    @staticmethod
    def count() -> int:
        dynamo: Any = sys.modules.get("torch._dynamo.utils")  # loading it takes a second
        if dynamo is None:
            return 0
        return int(dynamo.counters["stats"]["unique_graphs"])

    def update(self, stage: str, graphs: int) -> str:
        """A warning, once per stage, if more than MAX_RECOMPILATIONS graphs came after its first metric line."""
        if stage != self._stage:
            self._stage = stage
            self._first = graphs
            self._limit = MAX_RECOMPILATIONS
        more = graphs - self._first
        if more <= self._limit:
            return ""
        self._limit = math.inf
        return f"stage {stage}: {more} graphs were compiled after its first steps, since shapes of its batches change"


class MetricsCollector:
    """Collects the metric lines of one rank. Create it when the model exists and before the first step."""

    def __init__(
        self, config: Config, world: World, model: nn.Module, counters: RankCounters, checkpoints: CheckpointManager,
        profiler: Profiler,
    ) -> None:  # fmt: skip
        self._config = config
        self._world = world
        self._counters = counters
        self._checkpoints = checkpoints
        self._profiler = profiler
        self._utilisation = Utilisation(world.device, config.compute.precision, world.size)
        self._bottleneck = BottleneckDetector(config.data.workers)
        self._graphs = CompiledGraphs()
        self.use_model(model)
        self.reset()

    def use_model(self, model: nn.Module) -> None:
        """Read the logit scale of this model from now on. Call it when the model of the last stage is free."""
        self._model = model
        # Objects that exist now live to the end of the stage. The collector would traverse them again and again, at a
        # different step on every rank, and all ranks would wait for the slow one.
        gc.unfreeze()
        gc.collect()
        gc.freeze()

    def reset(self) -> None:
        """Start measuring, at the start of a stage or after a metric line."""
        self.window = TimeBreakdown()
        self._saved = self._checkpoints.blocked_seconds
        if self._world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def collect(
        self, span: StageSpan, optimizer: Any, loss: Any, accuracy: Any, norms: Any, text_tokens: float, replaced: int,
        storage: Mapping[str, float],
    ) -> dict[str, Any]:  # fmt: skip
        """The metric line of the steps since the last one. Collective; waits for the device.

        ``norms``: of the gradient, the weights and their last change. ``text_tokens``: mean number of tokens per
        caption in the newest batch. ``replaced``, ``storage``: as ``RankCounters.totals`` returns them.
        """
        window = self.window
        model = for_stage(self._config, span.stage).model
        mask = span.stage.mask
        window.add_paused("checkpoint", self._checkpoints.blocked_seconds - self._saved)
        speed = window.samples / window.seconds
        flops, unmasked_flops = (
            model_costs.training_flops(model, ratio, text_tokens)["total"] for ratio in (mask, "0")
        )
        shares = window.shares(self._profiler.communication)
        verdict, changed = self._bottleneck.update(shares)
        if changed and self._world.is_rank0:
            log.info("%s", verdict)
        checkpoints = self._checkpoints
        on_gpu = self._world.device.type == "cuda"
        return {
            "loss": float(loss), "accuracy": float(accuracy), "lr": optimizer.param_groups[0]["lr"],
            "logit_scale": _finite(self._logit_scale()), **self._loss_parameters(),
            "grad_norm": float(norms[0]), "param_norm": _finite(norms[1]), "update_norm": _finite(norms[2]),
            "samples_per_second": speed, "data_wait": window.waited / window.seconds,
            **self._utilisation.of(flops * speed), "masking_speedup": unmasked_flops / flops,
            "shares": shares, "bound": self._bottleneck.bound, "verdict": verdict,
            **self._compiled(span.stage.name),
            "replaced": replaced, "storage": storage, "saves": checkpoints.saves,
            "saving": checkpoints.blocked_seconds, "save_wait": checkpoints.waited_seconds,
            "memory": self._counters.peak_memory(),
            "device_memory": torch.cuda.max_memory_allocated() if on_gpu else None,
            "cpu_seconds": time.process_time(), "time": time.time(),
        }  # fmt: skip

    def _compiled(self, stage: str) -> dict[str, int]:
        """The graphs that rank 0 has compiled in this attempt, if the run compiles its blocks."""
        if self._config.compute.compile != "yes":
            return {}
        graphs = self._graphs.count()
        warning = self._graphs.update(stage, graphs)
        if warning and self._world.is_rank0:
            log.warning("%s", warning)
        return {"compiled_graphs": graphs}

    def _loss_parameters(self) -> dict[str, float | None]:
        """The learned parameters of the loss. Collective if they are sharded."""
        parameters = self._model.loss_parameters()  # type: ignore[operator, union-attr]
        return {name: _finite(float(parallel.full_tensor(value.detach()))) for name, value in parameters.items()}

    def _logit_scale(self) -> float:
        """The factor of the logits: the parameter's exponential, clamped. Collective if it is sharded."""
        raw = parallel.full_tensor(self._model.logit_scale.detach())  # type: ignore[operator, union-attr, arg-type]
        return float(raw.exp().clamp(1.0, self._config.model.max_logit_scale))


def _finite(value: Any) -> float | None:
    """None for a number that is not finite, which JSON lacks; the next step stops the run then."""
    if math.isfinite(value):
        return float(value)
    return None
