"""The real worker with hooks that only tests want; it stands in job.json's ``module`` in place of jobs.runtime.worker.

KILL_STEP_SECONDS: a pause in every step, so that a fault can be aimed at one. KILL_BEFORE_COMMIT: path of a file; rank
0 takes it away and dies by SIGKILL when all shards of a checkpoint are written and its commit.json is not.
KILL_FILE_BYTES: no file may grow beyond it, as on a disk that fills. KILL_GRADIENT: RANK:STEP; that rank's gradient has
a NaN in that step.
KILL_REQUESTS: with-loss; requests to stop travel as on GPUs. KILL_STALL: RANK:STEP; that rank waits in that step
without end, as for a GPU.
FLIP_WITNESS (of the trainer itself): the ids and the hashes of the decoded images of every step.
"""

import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

from jobs.runtime import worker


def arm() -> None:
    """Put the hooks in. Imports the trainer only after the worker's signal handlers stand."""
    from flip.checkpoint import saver
    from flip.distributed import parallel
    from flip.runs import commit
    from flip.training import trainer

    pause = float(os.environ.get("KILL_STEP_SECONDS", "0"))
    trap = Path(os.environ.get("KILL_BEFORE_COMMIT", "/nonexistent"))
    step, mark, save = trainer.Trainer.train_step, commit.commit, saver.Checkpointer.save

    if os.environ.get("KILL_REQUESTS") == "with-loss":
        stop = trainer.CoordinatedStop
        trainer.CoordinatedStop = lambda group, size, _: stop(group, size, True)  # type: ignore[misc, assignment]

    def slow_step(self, *rest):
        time.sleep(pause)
        if os.environ.get("KILL_STALL") == f"{self.world.rank}:{self.step + 1}" and self.attempt == 1:
            threading.Event().wait()
        return step(self, *rest)

    hurt, gradients = os.environ.get("KILL_GRADIENT", ""), trainer.grad_cache.grad_cache_backward

    def hurt_step(self, *rest):
        trainer.grad_cache.grad_cache_backward = (
            hurt_gradients if hurt == f"{self.world.rank}:{self.step + 1}" else gradients
        )
        return slow_step(self, *rest)

    def hurt_gradients(pair, *rest):
        found = gradients(pair, *rest)
        parallel.local(pair.text.blocks[0].mlp.fc1.weight.grad)[-1, -1] = float("nan")
        return found

    def deadly_mark(path, record, known):
        if trap.exists():
            trap.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return mark(path, record, known)

    def cramped_save(self, *rest, **record):
        limit = int(os.environ["KILL_FILE_BYTES"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        save(self, *rest, **record)

    if "KILL_FILE_BYTES" in os.environ:
        saver.Checkpointer.save = cramped_save  # type: ignore[method-assign]
    trainer.Trainer.train_step, commit.commit = hurt_step, deadly_mark  # type: ignore[method-assign]


if __name__ == "__main__":
    check = worker._check_snapshot

    def check_and_arm() -> None:
        check()
        arm()

    worker._check_snapshot = check_and_arm
    worker.exit_process(worker.main(sys.argv[1]))
