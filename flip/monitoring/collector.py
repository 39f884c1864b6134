"""What the steps of an attempt are measured with, and the metric line that comes of it."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from flip import costs
from flip.checkpoint.manager import CheckpointManager
from flip.config.derived import Span
from flip.config.schema import Config
from flip.distributed import parallel
from flip.distributed.parallel import World
from flip.monitoring.profiler import Profiler
from flip.monitoring.shares import Verdict, Window
from flip.monitoring.tally import Tally
from flip.runs.rundir import RunDir

log = logging.getLogger(__name__)


def measure_matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """FLOP/s of a large product of random matrices on this device, measured now."""
    side = 4096 if device.type == "cuda" else 1024
    source = torch.Generator(device).manual_seed(0)  # training's random state stays as it is
    left, right = (torch.randn(side, side, device=device, generator=source).to(dtype) for _ in range(2))

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    left @ right
    begin, count = clock(), 0
    while (now := clock()) - begin < seconds:
        left @ right
        count += 1
    return count * 2 * side**3 / (now - begin)


class Utilisation:
    """How much of the devices' arithmetic a training speed uses.

    ``mfu`` is a share of the datasheet peak and None if that is unknown, as on CPUs. ``matmul_utilisation`` is a share
    of a matrix product that is measured when this object is made.
    """

    def __init__(self, device: torch.device, precision: str, world: int) -> None:
        if precision == "fp32" and torch.get_float32_matmul_precision() != "highest":
            precision = "tf32"
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self._datasheet, self._world = costs.peak_flops(name, precision), world
        self._measured = measure_matmul_flops(device, torch.bfloat16 if precision == "bf16" else torch.float32)

    def of(self, speed: float) -> dict[str, float | None]:
        """Both shares for ``speed``, the FLOP/s of all ranks together."""
        each = speed / self._world
        mfu = None if self._datasheet is None else each / self._datasheet
        return {"mfu": mfu, "matmul_utilisation": each / self._measured}


def _finite(value: Any) -> float | None:
    """None for weights that are not: the step after them, which is not taken, tells of it."""
    return float(value) if math.isfinite(value) else None


class Instruments:
    """One rank's. Making them is for when the model is there and nothing has been trained in this attempt."""

    def __init__(
        self, run: RunDir, attempt: int, config: Config, world: World, pair: nn.Module, tally: Tally,
        checkpoints: CheckpointManager,
    ) -> None:  # fmt: skip
        self._config, self._world, self._pair, self._tally, self._checkpoints = config, world, pair, tally, checkpoints
        told = config.monitor
        self._utilisation = Utilisation(world.device, config.compute.precision, world.size)
        steps, minutes = (told.profile_steps, told.sample_minutes) if world.first else (0, 0.0)
        self.profiler = Profiler(run.traces, attempt, world.size, world.device, told.profile_from, steps, minutes)
        self._verdict = Verdict(config.data.workers)
        # What has been imported and built lives to the end. Left to the collector, it is walked again and again, on
        # every rank at another step, and all wait for the one that does.
        gc.collect()
        gc.freeze()
        self.begin()

    def begin(self) -> None:
        """A stage, or the time after a metric line, begins."""
        self.window = Window()
        self._saved = self._checkpoints.blocked_seconds
        if self._world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around scores between steps."""
        begin = time.perf_counter()
        yield
        self.window.beside("evaluation", time.perf_counter() - begin)

    def line(
        self, span: Span, optimizer: Any, loss: Any, accuracy: Any, norms: Any, positions: float
    ) -> dict[str, Any]:
        """What a metric line says of the steps since the last one. Collective; it waits for the device.

        ``norms``: of the gradient, the weights and their change in the last step. ``positions``: of a caption of the
        newest batch, as in ``costs.forward_flops``.
        """
        window, model, mask = self.window, self._config.model, span.stage.mask
        window.beside("checkpoint", self._checkpoints.blocked_seconds - self._saved)
        speed = window.samples / window.seconds
        cost, whole = (costs.training_flops(model, ratio, positions)["total"] for ratio in (mask, "0"))
        shares = window.shares(self.profiler.communication)
        verdict, changed = self._verdict.judge(shares)
        if changed and self._world.first:
            log.info("%s", verdict)
        return {
            "loss": float(loss), "accuracy": float(accuracy), "lr": optimizer.param_groups[0]["lr"],
            "logit_scale": _finite(self._logit_scale()), **self._logit_bias(),
            "grad_norm": float(norms[0]), "param_norm": _finite(norms[1]), "update_norm": _finite(norms[2]),
            "samples_per_second": speed, "data_wait": window.waited / window.seconds,
            **self._utilisation.of(cost * speed), "masking_speedup": whole / cost,
            "shares": shares, "bound": self._verdict.bound, "verdict": verdict,
            "replaced": self._tally.replaced_everywhere(), "storage": self._tally.storage_everywhere(),
            "saves": self._checkpoints.saves, "saving": self._checkpoints.blocked_seconds,
            "save_wait": self._checkpoints.checkpointer.blocked_seconds, "memory": self._tally.peak_memory(),
            "device_memory": torch.cuda.max_memory_allocated() if self._world.device.type == "cuda" else None,
            "cpu_seconds": time.process_time(), "time": time.time(),
        }  # fmt: skip

    def _logit_bias(self) -> dict[str, float | None]:
        """SigLIP's bias of the logits, where there is one. A collective where it is sharded."""
        bias: Any = self._pair.logit_bias
        return {} if bias is None else {"logit_bias": _finite(float(parallel.whole(bias.detach())))}

    def _logit_scale(self) -> float:
        """The multiplier in use: the parameter's exponential, clamped. A collective where it is sharded."""
        raw = parallel.whole(self._pair.logit_scale.detach())  # type: ignore[operator, union-attr, arg-type]
        return float(raw.exp().clamp(1.0, self._config.model.max_logit_scale))
