"""A fault while a small run trains: seconds to the next step, and its weights beside those of an undisturbed run.

A rank is killed, the agent of one node is killed, or the run is asked to stop, as before a preemption. On this machine,
or as jobs of a Slurm cluster. The rows of a measurement share a folder, and with it the undisturbed run.

The time is that of the launcher, of processes and of a restore: the model is tiny, and its loader processes do without
torch, whose import would take longer than all else.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn

from flip.checkpoint.remote import local_copy
from flip.data.manifest.build import index
from flip.files.creation import output_folder
from flip.monitoring.results import read_run
from flip.runs import checkpoint_folder
from flip.runs.errors import FlipError
from flip.runs.lifecycle import RunState
from flip.runs.metric_lines import metric_file
from flip.runs.rundir import RunDir, exists, read_json, write_text
from flip.tokenizer import train
from jobs.common.cluster_profile import ClusterProfile, load_profile
from jobs.host import slurm_cli
from jobs.local.backend import live_ranks
from jobs.measuring.functions import agents, photo_shards
from jobs.measuring.limited import TIMED_OUT
from jobs.reporting import goodput
from jobs.submission.api import SubmittedRuns, submit
from jobs.submitted_runs.clusters import poll_interval

STEPS = 200
BATCH = 8
"""Pairs of a step, of all ranks together."""
INTERVAL = 50
"""Steps between checkpoints."""
SAMPLES = 128
PHOTOS = photo_shards.Kind("64 px", 64, True, 1.75)
"""The images, as large as the model's."""
HOURS = 0.5
"""Time limit of a job of a cluster, at most."""
MISSED = "the run ended before the fault"
UNDISTURBED = "undisturbed"
RANK = "rank"
AGENT = "agent"
PREEMPTION = "preemption"
LOCAL = {"kind": "local", "parallel": 1, "canary": 0}
"""Fields of the profile of this machine."""


def fault(
    folder: str,
    device: str,
    ranks: int,
    seconds: float,
    kind: str,
    nodes: int = 1,
    profile: Mapping[str, Any] = LOCAL,
) -> dict[str, Any]:
    """Train the same steps twice, and disturb one run after a checkpoint. Raises SystemExit with the reason.

    Args:
        folder: of the runs; an undisturbed run that is complete there is used again.
        ranks: of a node.
        seconds: until the runs are ended.
        kind: RANK, AGENT or PREEMPTION.
        profile: fields of the cluster profile.
    """
    place = Path(folder)
    runs_root = place / "runs"
    os.environ["FLIP_RUNS"] = str(runs_root)

    end = time.monotonic() + seconds
    cluster = place / "machine.yaml"
    write_text(cluster, json.dumps({**profile, "runs_root": str(runs_root), "canary": 0}))
    sweep = place / "measure.yaml"
    if not sweep.exists():
        _write_sweep(place, device, ranks, nodes, profile)
    with contextlib.redirect_stdout(sys.stderr):
        runs = submit(sweep, cluster=str(cluster), only=f"{UNDISTURBED} {kind}", retry=True, yes=True)
    disturbed = RunDir(runs.folder / kind)
    scheduler = str(profile["kind"])
    try:
        pause = _disturbed_seconds(disturbed, kind, load_profile(str(cluster)), runs, end)
        _wait(lambda: all(map(_is_over, runs.runs)), runs, end, "the end of the runs", scheduler)
        states = runs.wait(max(0.0, end - time.monotonic()))
    except TimeoutError:
        _stop(runs)
        _end_in_time(f"the runs did not end within {seconds:.0f} s")
    except BaseException:
        _stop(runs)
        raise
    unfinished = {name: state for name, state in states.items() if state.state != "complete"}
    bad = [f"{name} {_described(state, scheduler)}" for name, state in unfinished.items()]
    if bad:
        raise SystemExit("; ".join(bad))
    conditions = {"device": device, "scheduler": scheduler, "nodes": nodes, "ranks": nodes * ranks}
    return conditions | _result(runs.folder, disturbed, pause)


def _disturbed_seconds(run: RunDir, kind: str, profile: ClusterProfile, runs: SubmittedRuns, end: float) -> float:
    """Disturb the run after its first checkpoint; returns the seconds from there to its next step."""
    _wait(lambda: exists(run.attempt(1)), runs, end, "the start of the run", profile.kind, run)
    with DISTURB[kind](run, profile, end) as disturb:
        _wait(lambda: _is_ready(run), runs, end, "a first checkpoint", profile.kind, run)
        start_time = time.monotonic()
        try:
            disturb()
        except (Exception, SystemExit):
            if not run.is_complete():  # else it has ended meanwhile: _wait says so
                raise
        _wait(lambda: any(metric_file(run, 2)), runs, end, "the first step after the fault", profile.kind, run)
        return time.monotonic() - start_time


def _result(folder: Path, disturbed: RunDir, pause: float) -> dict[str, Any]:
    """The numbers of the row."""
    return {
        "steps": STEPS,
        "next_step_seconds": round(pause, 1),
        "attempts": disturbed.newest_attempt(),
        "different_tensors": different_tensors(RunDir(folder / UNDISTURBED), disturbed),
        "cause": (read_json(disturbed.attempt(1) / "end.json") or {}).get("cause", ""),
        **_parts(disturbed),
    }


def _parts(disturbed: RunDir) -> dict[str, float]:
    """The seconds of each part of the first fault of a run, as `flip status --goodput` shows them."""
    for fault in goodput.of_run(read_run(disturbed.path)).faults[:1]:
        return {f"{part}_seconds": round(spent, 1) for part, spent in fault.seconds.items() if spent is not None}
    return {}


def _described(state: RunState, kind: str) -> str:
    """The state of a run, for the page. The reason of a job goes to standard error: it may name hosts."""
    if kind == "local":
        return f"{state.state}: {state.reason}"
    print(state.reason, file=sys.stderr)
    return state.state


def _is_ready(run: RunDir) -> bool:
    """Whether the run trains and has a checkpoint."""
    return len(checkpoint_folder.checkpoints(run)) > 0 and not (run.attempt(1) / "end.json").exists()


def _is_over(run: RunDir) -> bool:
    """Whether the run is complete and its launcher has recorded that: its folder may be deleted next."""
    return run.is_complete() and (run.attempt(run.newest_attempt()) / "end.json").exists()


Disturb = Callable[[], object]
"""Causes a fault of a run that has a checkpoint."""


@contextlib.contextmanager
def _rank_to_kill(run: RunDir, _: ClusterProfile, __: float) -> Iterator[Disturb]:
    yield lambda: os.kill(live_ranks(run)[-1]["pid"], signal.SIGKILL)


@contextlib.contextmanager
def _agent_to_kill(run: RunDir, profile: ClusterProfile, end: float) -> Iterator[Disturb]:
    """The agent of the last node.

    On a cluster a program waits on its node for the checkpoint: srun may take longer than the rest of the run.
    """
    if profile.kind == "local":
        yield lambda: agents.end_agents(str(run.path))
        return
    job = _job(run)
    node = slurm_cli.call("scontrol", "show", "hostnames", job.nodes).split()[-1]
    words = [profile.hosts_python, "-m", agents.__name__, str(run.path), str(max(0.0, end - time.monotonic()))]
    place = [f"--jobid={job.id}", f"--nodelist={node}", "--nodes=1", "--ntasks=1"]
    share = ["--overlap", "--gres=none", "--mem=0"]  # the ranks of the run hold all of the job
    step = subprocess.Popen([shutil.which("srun") or "srun", *place, *share, *words], stderr=subprocess.PIPE, text=True)
    try:
        yield lambda: _succeeded(step)
    finally:
        step.terminate()  # if the run has ended before
        step.wait()


def _succeeded(step: subprocess.Popen[str]) -> None:
    """Wait until a job step has ended. Raises SystemExit with its last line on standard error if it failed."""
    _, errors = step.communicate()
    if step.returncode:
        raise SystemExit((errors.strip().splitlines() or [f"srun ended with code {step.returncode}"])[-1])


@contextlib.contextmanager
def _run_to_stop(run: RunDir, profile: ClusterProfile, _: float) -> Iterator[Disturb]:
    """The signal that Slurm sends before a preemption."""
    if profile.kind == "local":
        yield lambda: _ask_to_stop(run)
        return
    job = _job(run).id
    yield lambda: slurm_cli.call("scancel", "--signal=USR2", job)


def _ask_to_stop(run: RunDir) -> None:
    for pid in agents.agents(str(run.path)):
        os.kill(pid, signal.SIGUSR2)


DISTURB: Mapping[str, Callable[[RunDir, ClusterProfile, float], AbstractContextManager[Disturb]]] = {
    RANK: _rank_to_kill,
    AGENT: _agent_to_kill,
    PREEMPTION: _run_to_stop,
}
"""Kind of a fault -> what prepares it for a run that has started, until the time ``end`` of the monotonic clock."""


def _job(run: RunDir) -> slurm_cli.QueueRow:
    record = read_json(run.path / "job.json") or {}
    return slurm_cli.queue([record["name"]])[record["name"], record["index"]]


def different_tensors(first: RunDir, second: RunDir) -> list[str]:
    """Names of weights and moments that differ in any bit between the last checkpoints of two runs."""
    before = _tensors(first)
    after = _tensors(second)
    return [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]


def _tensors(run: RunDir) -> dict[str, bytes]:
    from safetensors import safe_open

    tensors = {}
    with local_copy(checkpoint_folder.checkpoints(run)[-1]) as folder:
        for path in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(path, "np") as file:
                for name in file.keys():  # noqa: SIM118
                    tensors[f"{path.name} {name}"] = file.get_tensor(name).tobytes()
    return tensors


def _wait(
    condition: Callable[[], bool], runs: SubmittedRuns, end: float, event: str, kind: str, run: RunDir | None = None
) -> None:
    """Wait for an event. Raises SystemExit if it does not come, if a run fails, or if ``run`` ends before it.

    It looks at files often, and seldom at the scheduler, which others share.
    """
    next_query = 0.0
    while not condition():
        if time.monotonic() > end:
            _end_in_time(f"no time was left for {event}")
        if run is not None and run.is_complete() and not condition():
            _end_in_time(MISSED)
        if time.monotonic() > next_query:
            failed = [state for state in runs.states().values() if state.state in ("failed", "cancelled")]
            if failed:
                raise SystemExit(f"before {event}, a run has {_described(failed[0], kind)}")
            next_query = time.monotonic() + poll_interval(runs.runs)
        time.sleep(agents.POLL)


def _end_in_time(why: str) -> NoReturn:
    """End this process as one that has reached its limit."""
    print(why, file=sys.stderr)
    raise SystemExit(TIMED_OUT)


def _stop(runs: SubmittedRuns) -> None:
    """End the runs, as their folder is deleted next."""
    try:
        runs.cancel("the measurement has ended")
        runs.wait(20)
    except TimeoutError:
        pass
    except FlipError as error:  # such as Slurm that does not answer
        print(error, file=sys.stderr)


def _write_sweep(place: Path, device: str, ranks: int, nodes: int, profile: Mapping[str, Any]) -> None:
    """A sweep of equal runs of a tiny model on synthetic photographs."""
    pairs = photo_shards.samples(PHOTOS, SAMPLES, 0)
    paths = photo_shards.write(pairs, place / "photos", 2)
    index([str(path) for path in paths], place / "manifest", chunk=4)
    train((text for _, text in pairs), 300, place / "tokenizer.json")
    output_folder(place / "runs")
    settings: dict[str, Any] = {
        # a step costs processor time for each operation, not for each pair: few layers
        "model": {"size": "tiny", "image": {"layers": 1}, "text": {"layers": 1}},
        "data": {
            "manifest": str(place / "manifest"), "tokenizer": str(place / "tokenizer.json"),
            "workers": 1, "chunk": 4, "block": 2, "lanes": 8, "buffer": 1 << 28, "resize": "pillow",
        },
        "stages": [{"name": "pretrain", "samples": STEPS * BATCH, "batch": BATCH, "mask": "0.75", "base_lr": 0.01}],
        "compute": {"device": device, "precision": "fp32", "threads": 1, "deterministic": "yes", "compile": "no"},
        "checkpoint": {"samples": INTERVAL * BATCH},
        "evaluate": {"sets": []},
        "monitor": {"log_every": 1},
        "resources": {"nodes": nodes, "processes": ranks, "gpus": ranks if device == "cuda" else 0},
    }  # fmt: skip
    if "hours" in profile:  # a short job starts earlier
        settings["resources"]["hours"] = min(HOURS, profile["hours"])
    runs: dict[str, dict[str, Any]] = {name: {} for name in (UNDISTURBED, *DISTURB)}
    content = {"title": "Measurement", "recipe": "paper", "set": settings, "runs": runs}
    write_text(place / "measure.yaml", json.dumps(content))
