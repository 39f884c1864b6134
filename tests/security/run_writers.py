"""Runs as a user: every writer of an attempt of a run, one after the other. Prints writer -> error or "" as JSON.

python tests/security/run_writers.py RUN_DIR SNAPSHOT
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from flip.checkpoint.saver import Checkpointer
from flip.common import shutdown
from flip.config import schema
from flip.distributed import parallel
from flip.evaluation.encoding.features import FeatureCache
from flip.evaluation.metrics import result_files
from flip.evaluation.metrics.predictions import Predictions
from flip.monitoring.metrics_writer import MetricsWriter
from flip.monitoring.profiler import Profiler
from flip.runs import checkpoint_folder
from flip.runs.rundir import RunDir
from flip.training.sample_log import SampleLog
from jobs.host import notify
from jobs.local import agents, supervisor
from jobs.runtime import rank_process
from jobs.tracking import follower


def main(path: str, code: str) -> None:
    run = RunDir(path)
    errors = {}
    n = run.start_attempt({})

    def attempt(name, write):
        try:
            write()
            errors[name] = ""
        except Exception as error:  # the test judges them
            errors[name] = f"{type(error).__name__}: {error}"

    attempt("rank log", lambda: start_rank(run, n))
    attempt("node log", lambda: node_log(run, n, Path(code)))
    attempt("metrics", lambda: metrics(run, n))
    attempt("samples", lambda: SampleLog(run, n, 0))
    attempt("checkpoint", lambda: checkpoint(run, n))
    attempt("flight record", lambda: flight_record(run, n))
    attempt("features", lambda: features(run))
    attempt("trace", lambda: trace(run, n))
    attempt(
        "score", lambda: result_files.write_result(run, {"name": "set"}, {"stage": "pretrain", "samples": 64}, "job")
    )
    attempt("predictions", lambda: predictions(run))
    attempt("pin", lambda: checkpoint_folder.pin(run, run, "pretrain", 64))
    attempt("lock of follower", lambda: hold(follower.lock(run, "wandb")))
    attempt("lock of supervisor", lambda: supervisor.take_lock(run.path.parent))
    attempt("notification", lambda: notify.send_events(run, "done"))
    print(json.dumps(errors))


def start_rank(run, n):
    """``echo`` in place of Python prints its arguments to the log."""
    job = {"python": "/bin/echo", "module": "a log line", "snapshot": "/", "world": 1, "env": {}}
    attempt = agents.start(run, n, job, grace=10.0)
    while not attempt.poll():
        pass
    attempt.close()


def node_log(run, n, code):
    """As a task of a Slurm step does, in a process of its own."""
    lines = (
        "import os; from jobs.host import rank_entry; "
        f"rank_entry.open_log({{'FLIP_RUN': {str(run.path)!r}, 'FLIP_ATTEMPT': '{n}', 'NODE_RANK': '1'}}); "
        "os.write(1, b'a log line')"
    )
    done = subprocess.run([sys.executable, "-c", lines], cwd=code, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.stderr.strip().splitlines()[-1])


def metrics(run, n):
    writer = MetricsWriter(run, n, 64, 4, 0.0)
    writer._lines.write('{"samples": 64}\n')
    writer.evaluation = None
    writer.close("complete")


def checkpoint(run, n):
    world = parallel.start(schema.Compute(device="cpu", threads=1, deterministic="no"))
    Checkpointer(run, n, world, keep=2).save({"model.a": torch.zeros(1 << 10)}, "pretrain", 64)
    parallel.stop()


def flight_record(run, n):
    shutdown.flight_record = lambda: b"{}"
    rank_process._write_flight_record(run, n, 0)


def features(run):
    cache = FeatureCache(run.path / "cache", "model")
    cache.put(cache.path("images", 1), {"features": torch.zeros(2, 3)})


def trace(run, n):
    profiler = Profiler(run.traces, n, 1, torch.device("cpu"), first=1, steps=1, minutes=0)
    training = SimpleNamespace(samples_seen=0, step=0, span=SimpleNamespace(stage=SimpleNamespace(batch=8)))
    profiler.before_step(training)
    torch.zeros(2).sum()
    profiler.step(training)


def predictions(run):
    import numpy as np

    values = np.zeros((1, 1))
    Predictions("digest", "/", ["a"], ["b"], np.zeros(1, np.int64), np.zeros((1, 1), np.int64), values).write(
        run.eval / "pretrain-64" / "set.predictions.jsonl"
    )


def hold(lock):
    with lock:
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])
