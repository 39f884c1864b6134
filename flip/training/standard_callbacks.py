"""The callbacks of every attempt, in the order in which the trainer calls them."""

from __future__ import annotations

import os

from flip.checkpoint.manager import CheckpointManager
from flip.common.shutdown import Watchdog
from flip.config.schema import Config
from flip.distributed.parallel import World
from flip.monitoring.profiler import Profiler
from flip.runs.rundir import RunDir
from flip.training import sample_log
from flip.training.callbacks import Callbacks
from flip.training.compiled_code import CompiledCode, is_copied
from flip.training.metrics_callback import MetricLines
from flip.training.scoring import Scoring
from flip.training.user_callbacks import UserCallbacks


def standard_callbacks(
    run: RunDir, attempt: int, config: Config, world: World, checkpoints: CheckpointManager, watchdog: Watchdog
) -> Callbacks:
    """The profiler, the log of samples, the copy of compiled code, the classes of the user, the metric lines and the
    scores.

    A metric line comes after the callbacks whose values it has.
    """
    monitor = config.monitor
    if world.is_rank0:
        steps = monitor.profile_steps
        minutes = monitor.sample_minutes
    else:
        steps = 0
        minutes = 0.0
    profiler = Profiler(run.traces, attempt, world.size, world.device, monitor.profile_from, steps, minutes)
    logs = []
    if os.environ.get(sample_log.VARIABLE) == "1":
        logs.append(sample_log.SampleLog(run, attempt, world.rank))
    copies = []
    if is_copied(config.compute):
        copies.append(CompiledCode(run, world))
    user_callbacks = UserCallbacks(config, world)
    metrics = MetricLines(run, attempt, config, world, checkpoints, profiler, user_callbacks)
    scoring = Scoring(run, attempt, config, world, checkpoints, watchdog, metrics)
    return Callbacks([profiler, *logs, *copies, user_callbacks, metrics, scoring])
