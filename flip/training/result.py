"""result.json, which completes a run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from flip import model_costs
from flip.config.derived import stage_spans
from flip.config.schema import Config
from flip.files import deletion
from flip.runs import checkpoint_folder
from flip.runs.rundir import RunDir, create_json
from flip.training.callbacks import Training


def write_result(
    run: RunDir, attempt: int, config: Config, training: Training, world_size: int, replaced: int,
    evaluations: Sequence[dict[str, Any]],
) -> None:  # fmt: skip
    """Write result.json of a run whose last position is saved, and delete its compiled code.

    Args:
        replaced: samples of all ranks and attempts that could not be decoded.
        evaluations: the results of all evaluation sets.
    """
    last = checkpoint_folder.checkpoints(run)[-1]
    cost = sum((span.end - span.start) * model_costs.stage_flops(config, span.stage) for span in stage_spans(config))
    create_json(run.result, {
        "run": run.name, "stage": last.stage, "samples": training.samples_seen, "steps": training.step,
        "seconds": training.seconds, "samples_per_second": training.samples_seen / training.seconds,
        "world": world_size,
        "parameters": model_costs.parameters(config.model), "flops": cost, "evaluations": evaluations,
        "commit": {"path": str(last.path.relative_to(run.path)), "samples": last.samples_seen},
        "attempts": attempt, "replaced": replaced, "manifest": training.loader.digest,
        "peak_memory": training.counters.peak_memory(), "time": time.time(),
    })  # fmt: skip
    deletion.discard_own_folder(run.compiled)
