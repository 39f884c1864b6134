"""Seconds from a fault to the next step, on a real Slurm on this machine (``flip slurm_sandbox``).

A tiny model trains with two ranks on two virtual nodes. Cases:

  agents    a rank is killed; node agents restart the run in its job
  requeue   a rank is killed, without node agents: Slurm requeues the job
  spare     all processes of a node are killed, so that its connections end at once; the run goes on in its job on a
            spare node
  silent    all processes of a node are stopped, and no connection ends, as if its network were cut: the run goes on in
            its job on a spare node when Slurm has dropped the lost one, which takes its node timeout and, as it pings a
            stopped daemon, twice its MessageTimeout of 10 s or more
  submitit  SIGUSR2, after which submitit requeues its job; a job of it whose rank is killed is not restarted
  start     no fault: a run of one rank on one node, from its start to its first step, with and without node agents

submitit's ranks are a loop of all-reduces, without data, model or checkpoint. Slurm holds a requeued job back for
``requeue_delay`` seconds (120 s by default). For figures that mean something, no other program may run: five rounds
take about ten minutes on two idle cores.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import contextlib
import os
import shutil
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.lib import results, submitit_loop
from benchmarks.lib.results import ABSENT, rounded
from flip.runs import checkpoint_folder
from flip.runs.errors import FlipError
from flip.runs.rundir import read_json
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import JobResources
from jobs.host import processes
from jobs.host.slurm_cli import ENDED
from jobs.slurm.backend import SlurmBackend
from tests.harness.common import wait_until
from tests.harness.training_run import TrainingRun, configuration
from tests.jobs.host.agents.task import processes_of
from tests.synthetic import make_dataset, make_tokenizer
from tools.sandbox.cluster import SandboxCluster
from tools.sandbox.config import CRED_EXPIRE

ROOT = Path(__file__).resolve().parents[1]
STEPS = 12
"""Of an attempt before its fault, with two checkpoints: the cost of its start is then over."""
NODE_TIMEOUT = 8
KILL_WAIT = 5
PATIENCE = 180.0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="medians are over these (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), help="default: all cases")
    results.options(parser, "recovery")
    chosen = parser.parse_args(arguments)
    # Steps of Slurm become orphans: as children of this process they do not count as other programs.
    processes.prctl(processes.PR_SET_CHILD_SUBREAPER, 1)
    if chosen.quick:
        chosen.rounds = 1
    results.publish(measure(chosen.only, chosen.rounds), chosen)
    return 0


def measure(names: list[str], rounds: int) -> dict[str, Any]:
    """The report."""
    facts = results.machine()
    with tempfile.TemporaryDirectory(prefix="flip-recovery-") as name, slurm(Path(name)) as bench:
        cases = [{"case": case, **_measured(case, bench, rounds)} for case in names]
        return {
            "benchmark": "recovery",
            "machine": facts,
            "versions": results.versions(("torch", "submitit")),
            "slurm": {
                "version": bench.cluster.call("scontrol", "--version").split()[-1],
                "requeue_delay": CRED_EXPIRE + 1, "node_timeout": NODE_TIMEOUT, "kill_wait": KILL_WAIT,
            },
            "cases": cases,
        }  # fmt: skip


def _measured(case: str, bench: Bench, rounds: int) -> dict[str, Any]:
    """The result of a case. One that fails does not cost the others."""
    try:
        return CASES[case](bench, rounds)
    except (AssertionError, FlipError) as error:
        print(f"{case}: {error}", file=sys.stderr)
        bench.cancel_all()
        return {"note": str(error).splitlines()[0]}


class Bench:
    """A running Slurm, a folder for runs, and a configuration that trains longer than any case takes."""

    def __init__(self, cluster: SandboxCluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.data = make_dataset(folder / "data", samples=200, shards=3, chunk=4, classes=8)
        make_tokenizer(self.data / "tokenizer.json")

    def config(self, ranks: int) -> Any:
        config = configuration(self.data, ranks, samples=(10**6, 16))
        config.evaluate.sets = []
        return config

    def cancel(self, job: str) -> None:
        with contextlib.suppress(FlipError):  # it may have ended
            self.cluster.call("scancel", job)

    def cancel_all(self) -> None:
        with contextlib.suppress(FlipError):  # a busy machine: the next case waits for free nodes
            for job in self.cluster.call("squeue", "-h", "-o", "%F").split():
                self.cancel(job)

    def state(self, job: str) -> str:
        """The state of a job, as ``scontrol show job`` prints it."""
        return self._field(job, "JobState")

    def note_dropped_node(self, job: str, times: list[float]) -> None:
        """Wait until Slurm has taken a node out of a job; ``times`` receives the moment, or the one of giving up."""
        nodes = self._field(job, "NumNodes")
        with contextlib.suppress(AssertionError, FlipError):
            wait_until(lambda: self._field(job, "NumNodes") != nodes, "fewer nodes", PATIENCE, 0.5)
        times.append(time.perf_counter())

    def _field(self, job: str, name: str) -> str:
        words = self.cluster.call("scontrol", "show", "job", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[Bench]:
    cluster = SandboxCluster(
        folder / "slurm", nodes=4, user_signal=True, kill_wait=KILL_WAIT, node_timeout=NODE_TIMEOUT
    )
    before = dict(os.environ)
    os.environ.update(cluster.env(), PYTHONPATH=str(ROOT))
    try:
        cluster.start()
        yield Bench(cluster, folder)
    finally:
        cluster.stop()
        os.environ.clear()
        os.environ.update(before)


class Training(TrainingRun):
    """A run with a rank on each of its nodes."""

    def __init__(self, bench: Bench, name: str, agents: bool, spares: int = 0, nodes: int = 2) -> None:
        self.bench = bench
        self.agents = agents
        self.spares = spares
        self.nodes = nodes
        super().__init__(bench.folder, name, bench.config(nodes))
        self.submit()

    def open(self) -> SlurmBackend:
        return SlurmBackend(ClusterProfile(name="here", kind="slurm", partition="low", hours=0.5, agents=self.agents))

    def shape(self) -> JobResources:
        return JobResources(nodes=self.nodes, processes=1, cpus=1, hours=0.5, spares=self.spares)

    def ranks(self) -> list[dict[str, int]]:
        """Rows {pid}."""
        pids = processes_of(self.run)
        if self.agents:
            return [{"pid": pid} for pid in pids if _is_agent(pid) and _is_agent(_parent(pid))]
        return [{"pid": pid} for pid in pids if processes.arguments(pid)[1:3] == ["-m", "tests.kill_rank"]]

    def start_record(self) -> dict[str, Any]:
        record: dict[str, Any] = read_json(self.run.attempt(self.run.newest_attempt()) / "start.json") or {}
        return record

    def seconds_of_first_start(self) -> float:
        """From the record of the first attempt's start, without the queue, to its first step."""
        self.wait(lambda: bool(self.lines(1)), "the first step", PATIENCE)
        first: float = self.lines(1)[0]["time"]
        return first - (self.run.attempt(1) / "start.json").stat().st_mtime

    def settle(self) -> None:
        """Wait until the newest attempt has trained for a while and has saved a checkpoint."""

        def settled() -> bool:
            n = self.run.newest_attempt()
            checkpoints = checkpoint_folder.checkpoints(self.run)
            return (
                len(self.lines(n)) >= STEPS
                and bool(checkpoints)
                and checkpoints[-1].attempt == n
                and bool(self.ranks())
            )

        self.wait(settled, "a checkpoint", PATIENCE)

    def seconds_to_next_step(self, fault: Callable[[], Any]) -> float:
        """Cause a fault and wait for the first step of the next attempt."""
        n = self.run.newest_attempt()
        start = time.perf_counter()
        fault()
        self.wait(lambda: bool(self.lines(n + 1)), "the next step", PATIENCE)
        return time.perf_counter() - start

    def end(self) -> None:
        """Cancel the job, and wait for the end of all its processes."""
        self.bench.cancel(self.start_record()["job"])
        wait_until(lambda: not processes_of(self.run), "the end of its processes", PATIENCE)


def killed_rank(bench: Bench, rounds: int, agents: bool) -> dict[str, Any]:
    run = Training(bench, f"killed-{agents}", agents)
    start = run.seconds_of_first_start()
    seconds = []
    restarts = []
    for _ in range(rounds):
        run.settle()
        pid = run.ranks()[0]["pid"]
        seconds.append(run.seconds_to_next_step(lambda pid=pid: os.kill(pid, signal.SIGKILL)))  # type: ignore[misc]
        restarts.append(int(run.start_record().get("restarts") or 0))
    run.end()
    return _summary(seconds) | {"requeues": restarts[-1], "start_seconds": rounded(start)}


def lost_node(bench: Bench, rounds: int) -> dict[str, Any]:
    """A new run for each round: a lost node does not come back to its job."""
    seconds = []
    requeues = 0
    for number in range(rounds):
        with losing_a_node(bench, f"spare-{number}") as (run, lost):
            seconds.append(run.seconds_to_next_step(lambda node=lost: bench.cluster.lose(node)))  # type: ignore[misc]
            requeues += int(run.start_record().get("restarts") or 0)
    return _summary(seconds) | {"requeues": requeues}


def silent_node(bench: Bench, rounds: int) -> dict[str, Any]:
    seconds = []
    dropped = []
    requeues = 0
    for number in range(rounds):
        with losing_a_node(bench, f"silent-{number}") as (run, lost):
            start = time.perf_counter()
            times = list[float]()
            watch = threading.Thread(target=bench.note_dropped_node, args=(run.start_record()["job"], times))
            watch.start()
            seconds.append(run.seconds_to_next_step(lambda node=lost: bench.cluster.silence(node)))  # type: ignore[misc]
            watch.join()
            dropped.append(times[0] - start)
            requeues += int(run.start_record().get("restarts") or 0)
    beside = [all_of_it - slurm for all_of_it, slurm in zip(seconds, dropped, strict=True)]
    fields = {"until_dropped": rounded(statistics.median(dropped)), "beside": results.spread(beside)}
    return _summary(seconds) | fields | {"requeues": requeues}


@contextlib.contextmanager
def losing_a_node(bench: Bench, name: str) -> Iterator[tuple[Training, str]]:
    """A run with a spare node, and the name of its second node, which the caller loses; it is back at the end."""
    run = Training(bench, name, agents=True, spares=1)
    run.settle()
    lost = bench.cluster.call("scontrol", "show", "hostnames", run.start_record()["nodes"]).split()[1]
    try:
        yield run, lost
    finally:
        bench.cluster.lose(lost)  # ends what was stopped
        run.end()
        bench.cluster.bring_back(lost)


def submitit_requeue(bench: Bench, rounds: int) -> dict[str, Any]:
    if not results.is_installed("submitit"):
        return {"note": ABSENT}
    folder = bench.folder / "submitit"
    job = submitit_loop.submit(folder, "low")
    loop = submitit_loop.Loop(folder)
    seconds = []
    for number in range(rounds):
        wait_until(lambda n=number: loop.steps(n) >= STEPS, "the steps of submitit's job", PATIENCE, 0.01)
        start = time.perf_counter()
        bench.cluster.call("scancel", "--signal=USR2", job)
        wait_until(lambda n=number: loop.steps(n + 1), "the next step of submitit's job", PATIENCE, 0.01)
        seconds.append(time.perf_counter() - start)
    os.kill(loop.pid(1), signal.SIGKILL)
    wait_until(lambda: bench.state(job) in ENDED, "the end of submitit's job", PATIENCE)
    state = bench.state(job)
    bench.cancel(job)
    shutil.rmtree(folder)
    return _summary(seconds) | {"requeues": rounds, "after_killed_rank": state}


def start_up(bench: Bench, rounds: int) -> dict[str, Any]:
    """Both ways in turn, so that other load affects them alike."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds):
        for agents, values in seconds.items():
            run = Training(bench, f"start-{agents}-{number}", agents, nodes=1)
            values.append(run.seconds_of_first_start())
            run.end()
    extra = [own - without for own, without in zip(seconds[True], seconds[False], strict=True)]
    without = rounded(statistics.median(seconds[False]))
    return _summary(seconds[True]) | {"without_agents": without, "extra": results.spread(extra)}


CASES: dict[str, Callable[[Bench, int], dict[str, Any]]] = {
    "agents": lambda bench, rounds: killed_rank(bench, rounds, agents=True),
    "requeue": lambda bench, rounds: killed_rank(bench, rounds, agents=False),
    "spare": lost_node,
    "silent": silent_node,
    "submitit": submitit_requeue,
    "start": start_up,
}


def _summary(seconds: list[float]) -> dict[str, Any]:
    return {
        "seconds": rounded(statistics.median(seconds)), "least": rounded(min(seconds)), "most": rounded(max(seconds)),
        "rounds": len(seconds),
    }  # fmt: skip


def _is_agent(pid: int) -> bool:
    """Whether a process is an agent, or was forked by one."""
    return any(word.endswith("node_agent") for word in processes.arguments(pid))


def _parent(pid: int) -> int:
    return int(processes.read_stat(pid)[1][1])


if __name__ == "__main__":
    sys.exit(main())
