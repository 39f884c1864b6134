"""The real rank process with hooks for tests; job.json names it as ``module`` in place of jobs.runtime.rank_process.

KILL_STEP_SECONDS: a pause in every step, so that a test can inject a fault at a given step.
KILL_BEFORE_COMMIT_FILE: path of a file; rank 0 deletes it and dies by SIGKILL when all shards of a checkpoint exist
and its commit.json does not.
KILL_FILE_BYTES: the maximum size of a file, as on a full disk. KILL_GRADIENT: RANK:STEP; that rank's gradient has
a NaN in that step.
KILL_REQUESTS: with-statistics; requests to stop travel as on GPUs. KILL_STALL: RANK:STEP; that rank waits in that step
without end, as for a GPU.
FLIP_WITNESS (of the trainer itself): the ids and the hashes of the visible patches of every step.
"""

import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

from flip.runs.checks import Rule
from jobs.runtime import rank_process
from jobs.worker import PRELOAD  # noqa: F401


def arm() -> None:
    """Install the hooks. Import the trainer only after the rank process has installed its signal handlers."""
    from flip.checkpoint import saver
    from flip.distributed import parallel
    from flip.runs import checkpoint_folder
    from flip.training import trainer

    pause = float(os.environ.get("KILL_STEP_SECONDS", "0"))
    trap = Path(os.environ.get("KILL_BEFORE_COMMIT_FILE", "/nonexistent"))
    original_step = trainer.Trainer.train_step
    original_complete = checkpoint_folder.complete_checkpoint
    original_save = saver.Checkpointer.save

    if os.environ.get("KILL_REQUESTS") == "with-statistics":
        stop = trainer.CoordinatedStop
        trainer.CoordinatedStop = lambda group, size, _: stop(group, size, True)  # type: ignore[misc, assignment]

    def slow_step(self, *rest):
        time.sleep(pause)
        if os.environ.get("KILL_STALL") == f"{self.world.rank}:{self.step + 1}" and self.attempt == 1:
            threading.Event().wait()
        return original_step(self, *rest)

    gradient_fault = os.environ.get("KILL_GRADIENT", "")
    original_backward = trainer.grad_cache.grad_cache_backward

    def corrupt_step(self, *rest):
        if gradient_fault == f"{self.world.rank}:{self.step + 1}":
            trainer.grad_cache.grad_cache_backward = corrupt_gradients
        else:
            trainer.grad_cache.grad_cache_backward = original_backward
        return slow_step(self, *rest)

    def corrupt_gradients(pair, *rest):
        result = original_backward(pair, *rest)
        parallel.local(pair.text.blocks[0].mlp.fc1.weight.grad)[-1, -1] = float("nan")
        return result

    def killing_complete(path, record, known):
        if trap.exists():
            trap.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return original_complete(path, record, known)

    def limited_save(self, *rest, **record):
        limit = int(os.environ["KILL_FILE_BYTES"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        original_save(self, *rest, **record)

    if "KILL_FILE_BYTES" in os.environ:
        saver.Checkpointer.save = limited_save  # type: ignore[method-assign]
    trainer.Trainer.train_step, checkpoint_folder.complete_checkpoint = corrupt_step, killing_complete  # type: ignore[method-assign]


if __name__ == "__main__":
    rules = rank_process.OF_ALL_WORK
    rank_process.OF_ALL_WORK = (*rules, Rule("hooks", arm))
    rank_process.exit_process(rank_process.main(sys.argv[1]))
