"""A rank is killed while a small run trains: seconds to the next step, and its weights beside an undisturbed run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from flip.checkpoint.remote import local_copy
from flip.data.manifest.build import index
from flip.runs import commit
from flip.runs.files import output_folder
from flip.runs.metric_lines import metric_file
from flip.runs.rundir import RunDir, read_json, write_text
from flip.tokenizer import train
from jobs.local.backend import live_ranks
from jobs.measuring.limited import TIMED_OUT
from jobs.submission.api import SubmittedRuns
from tools.measuring import photo_shards

STEPS = 60
BATCH = 16
INTERVAL = 10
"""Steps between checkpoints."""
SAMPLES = 128
POLL = 0.02


def killed_rank(folder: str, device: str, processes: int, seconds: float) -> dict[str, Any]:
    """Train the same steps twice; of one run a rank is killed after a checkpoint. Raises SystemExit with the reason."""
    place = Path(folder)
    os.environ["FLIP_RUNS"] = str(place / "runs")
    import flip

    end = time.monotonic() + seconds
    with contextlib.redirect_stdout(sys.stderr):
        runs = flip.submit(_sweep(place, device, processes), cluster=str(_profile(place)), yes=True)
    try:
        calm, killed = runs.runs
        _wait(lambda: len(commit.commits(killed)) > 0 and bool(live_ranks(killed)), runs, end, "a first checkpoint")
        moment = time.monotonic()
        os.kill(live_ranks(killed)[-1]["pid"], signal.SIGKILL)
        _wait(lambda: any(metric_file(killed, 2)), runs, end, "the first step after the kill")
        pause = time.monotonic() - moment
        states = runs.wait(max(0.0, end - time.monotonic()))
    except TimeoutError:
        _stop(runs)
        _end_in_time(f"the runs did not end within {seconds:.0f} s")
    bad = [f"{name} {state.state}: {state.detail}" for name, state in states.items() if state.state != "complete"]
    if bad:
        raise SystemExit("; ".join(bad))
    return {
        "device": device,
        "processes": processes,
        "steps": STEPS,
        "next_step_seconds": round(pause, 1),
        "attempts": killed.newest_attempt(),
        "different_tensors": different_tensors(calm, killed),
        "cause": (read_json(killed.attempt(1) / "end.json") or {}).get("cause", ""),
    }


def different_tensors(first: RunDir, second: RunDir) -> list[str]:
    """Names of weights and moments that differ in any bit between the last commits of two runs."""
    before, after = _tensors(first), _tensors(second)
    return [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]


def _tensors(run: RunDir) -> dict[str, bytes]:
    from safetensors import safe_open

    tensors = {}
    with local_copy(commit.commits(run)[-1]) as folder:
        for path in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(path, "np") as file:
                for name in file.keys():  # noqa: SIM118
                    tensors[f"{path.name} {name}"] = file.get_tensor(name).tobytes()
    return tensors


def _wait(condition: Callable[[], bool], runs: SubmittedRuns, end: float, event: str) -> None:
    """Wait for an event. Raises SystemExit if it does not come, or if the runs end before."""
    while not condition():
        if time.monotonic() > end:
            _stop(runs)
            _end_in_time(f"no time was left for {event}")
        failed = [state for state in runs.states().values() if state.state == "failed"]
        if failed:
            _stop(runs)
            raise SystemExit(f"a run has failed before {event}: {failed[0].detail}")
        time.sleep(POLL)


def _end_in_time(why: str) -> NoReturn:
    """End this process as one that has reached its limit."""
    print(why, file=sys.stderr)
    raise SystemExit(TIMED_OUT)


def _stop(runs: SubmittedRuns) -> None:
    """End the runs, as their folder is deleted next."""
    runs.cancel("the measurement has ended")
    with contextlib.suppress(TimeoutError):
        runs.wait(20)


def _profile(place: Path) -> Path:
    path = place / "machine.yaml"
    write_text(path, "kind: local\nparallel: 1\ncanary: 0\n")
    return path


def _sweep(place: Path, device: str, processes: int) -> Path:
    """A sweep of two equal runs of a tiny model on synthetic photographs."""
    pairs = photo_shards.samples(photo_shards.KINDS[0], SAMPLES, 0)
    paths = photo_shards.write(pairs, place / "photos", 2)
    index([str(path) for path in paths], place / "manifest", chunk=4)
    train((text for _, text in pairs), 300, place / "tokenizer.json")
    output_folder(place / "runs")
    settings = {
        "model": {"size": "tiny"},
        "data": {
            "manifest": str(place / "manifest"), "tokenizer": str(place / "tokenizer.json"),
            "workers": 1, "chunk": 4, "block": 2, "lanes": 8, "buffer": 1 << 28,
        },
        "stages": [{"name": "pretrain", "samples": STEPS * BATCH, "batch": BATCH, "mask": "0.5", "base_lr": 0.01}],
        "compute": {"device": device, "precision": "fp32", "threads": 1, "deterministic": "yes", "compile": "no"},
        "checkpoint": {"samples": INTERVAL * BATCH},
        "evaluate": {"sets": []},
        "monitor": {"log_every": 1, "status_seconds": 0.1},
        "resources": {"processes": processes, "gpus": processes if device == "cuda" else 0},
    }  # fmt: skip
    path = place / "measure.yaml"
    write_text(
        path,
        json.dumps({"title": "Measurement", "recipe": "paper", "set": settings, "runs": {"calm": {}, "killed": {}}}),
    )
    return path
