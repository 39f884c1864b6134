"""Fault injection for programs on a real Slurm: `python -m tests.storm.programs --rounds 1 [--agents] [--out page.md]`.

Two programs that import nothing of the toolkit run as jobs: `pair` by DistributedDataParallel on two nodes, and `half`,
which writes its checkpoints in place, in two parts with a pause. Each round injects each kind of fault once into each
run that it fits. At the end the tensors must equal those of a run without faults, with no hand but for the cancels.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from flip.runs.rundir import RunDir, read_json
from jobs.host import processes, slurm_cli
from tests.harness.common import ROOT, run_script
from tools.sandbox.cluster import SandboxCluster

LONG = 240
"""Seconds for anything to happen."""
NODES = 5
RUNS = {"pair": {"resources.nodes": 2, "pause": 0}, "half": {"resources.nodes": 1, "pause": 2}}
STEPS = {"pair": 70, "half": 30}
"""Steps of a run for each of its faults: enough that it is not over before the last. Those of `half` take longer."""
KINDS = {}


@dataclass
class Done:
    kind: str
    run: str
    what: str
    seconds: float
    """Until the next step."""
    lost: int
    """Steps that were repeated."""


def kind(*runs):
    def register(act):
        KINDS[act.__name__] = (act, runs or tuple(RUNS))
        return act

    return register


@kind()
def killed(run):
    """SIGKILL to a program or its rank, at any moment."""
    pid = run.rng.choice(run.programs())
    if run.rng.random() < 0.5:
        pid = int(processes.read_stat(pid)[1][1])
    os.kill(pid, signal.SIGKILL)
    return "SIGKILL"


@kind("half")
def half_written(run):
    """SIGKILL while a part of a checkpoint is on disk, after some looks of the launcher at it."""
    whole = max(path.stat().st_size for path in run.files())
    known = set(run.files())

    def part():
        return next((path for path in run.files() if path not in known and path.stat().st_size < whole), None)

    path = run.wait(part, "a part of a checkpoint")
    time.sleep(run.rng.uniform(0, 1.8))
    os.kill(run.programs()[0], signal.SIGKILL)
    return f"SIGKILL with {path.stat().st_size:,} of {whole:,} bytes written"


@kind()
def warned(run):
    """USR2 to all processes of the job's steps, as before a wall limit."""
    run.storm.slurm("scancel", "--signal=USR2", run.job().id)
    return "USR2"


@kind()
def preempted(run):
    grace = run.rng.choice((0, 20))
    with run.storm.hands:
        run.storm.here.set_grace(grace)
        run.storm.here.preempt(seconds=3, nodelist=run.job().nodes)
        run.wait(run.ended, "the end of the attempt")
    return f"a job of higher priority, GraceTime {grace} s"


@kind()
def cancelled(run):
    run.storm.type("cancel", f"storm/{run.name}", "--yes")
    run.wait(lambda: run.state() == "cancelled", "the cancelled state")
    run.storm.submit("--only", run.name, "--retry")
    return "cancel, then submit --retry"


@kind()
def node_lost(run):
    pid = run.rng.choice(run.programs())
    node = environment(pid)["SLURMD_NODENAME"]
    with run.storm.hands:
        run.storm.here.lose(node)
    run.wait(lambda: run.run.newest_attempt() > run.attempt, "the next attempt")
    with run.storm.hands:
        run.storm.here.bring_back(node)
    return f"the node {node} fails"


def environment(pid):
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(word.partition("=")[::2] for word in words if "=" in word)


class ProgramRun:
    def __init__(self, storm, name, seed):
        self.storm = storm
        self.name = name
        self.run = RunDir(storm.runs / "storm" / name)
        self.rng = random.Random(f"{seed} {name}")
        self.done = []
        self.trouble = ""
        self.attempt = 0

    def inject(self, kinds):
        try:
            for name in kinds:
                self._strike(name)
            self._until_over()
        except Exception as error:  # each run reports its own
            self.trouble = f"{type(error).__name__}: {error}"
            self.storm.failed = True
            self.storm.say(f"{self.name}: {self.trouble}")

    def _until_over(self):
        """Wait for the end while steps follow each other: a run without faults left may have many before it."""
        while not self.run.is_complete():
            before = self._position()
            self.wait(lambda now=before: self.run.is_complete() or self._position() != now, "end and no step")

    def _position(self):
        return self.run.newest_attempt(), len(self._lines())

    def _strike(self, name):
        self.attempt = self.wait(self._saved, "a checkpoint of the newest attempt")
        time.sleep(self.rng.uniform(0, 1.5))
        assert not self.run.is_complete(), f"over before {name}"
        before = self._last_step(self.attempt)
        self.storm.say(f"{self.name} at step {before}: {name}")
        began = time.monotonic()
        what = KINDS[name][0](self)
        self.wait(lambda: self.run.newest_attempt() > self.attempt and self._lines(), "the next step")
        first = self._lines()[0]
        lost = self._last_step(self.attempt) + 1 - first["step"]
        done = Done(name, self.name, what, time.monotonic() - began, max(0, lost))
        self.done.append(done)
        self.storm.say(f"{self.name}: {name} is over after {done.seconds:.0f} s, {done.lost} steps repeated")

    def wait(self, condition, what):
        end = time.monotonic() + LONG
        while True:
            value = condition()
            if value:
                return value
            assert not self.storm.failed, "another run has failed"
            assert time.monotonic() < end, f"no {what} within {LONG} s; {self.state()}"
            time.sleep(0.05)

    def _saved(self):
        n = self.run.newest_attempt()
        return n if list(self.run.checkpoints.glob(f"command/*-{n}/commit.json")) and self.programs() else 0

    def _lines(self, n=None):
        path = self.run.metrics / f"{n or self.run.newest_attempt()}.jsonl"
        rows = path.read_text().splitlines() if path.exists() else []
        return [json.loads(row) for row in rows if row.endswith("}")]

    def _last_step(self, n):
        return self._lines(n)[-1]["step"]

    def ended(self):
        return (self.run.attempt(self.attempt) / "end.json").exists() or self.run.newest_attempt() > self.attempt

    def programs(self):
        """Pids of the programs of the newest attempt, by rank."""
        n = str(self.run.newest_attempt())
        rows = []
        for path in Path("/proc").glob("[0-9]*"):
            pid = int(path.name)
            if "ddp.py" not in processes.arguments(pid):
                continue
            environ = environment(pid)
            if environ.get("RUN_DIR") == str(self.run.path) and environ.get("RUN_ATTEMPT") == n:
                rows.append((environ["RANK"], pid))
        return [pid for _, pid in sorted(rows)]

    def files(self):
        return sorted((self.run.path / "work" / "out").glob("step-*.pt"))

    def job(self):
        record = read_json(self.run.path / "job.json")
        with self.storm.hands:
            return slurm_cli.queue([record["name"]])[record["name"], record["index"]]

    def state(self):
        rows = json.loads(self.storm.type("status", "storm", "--json"))
        return next(row["state"] for row in rows if row["run"] == self.name)


class ProgramStorm:
    def __init__(self, folder, rounds, agents, seed):
        self.folder = folder
        self.rounds = rounds
        self.agents = agents
        self.runs = folder / "runs"
        self.here = SandboxCluster(folder / "slurm", nodes=NODES, gpus=0, cpus=2, node_timeout=20)
        self.hands = threading.RLock()
        """Only one run changes the cluster at a time."""
        self.failed = False
        self.began = time.monotonic()
        rng = random.Random(seed)
        self.kinds = {name: [] for name in RUNS}
        for _ in range(rounds):
            for name in RUNS:
                fitting = [each for each, (_, runs) in KINDS.items() if name in runs]
                self.kinds[name] += rng.sample(fitting, len(fitting))
        self.members = [ProgramRun(self, name, seed) for name in RUNS]

    def say(self, text):
        print(f"{time.monotonic() - self.began:5.0f} s  {text}", flush=True)

    def type(self, command, *arguments):
        done = run_script("jobs", command, *arguments, cwd=self.folder, runs=self.runs, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, *arguments):
        return self.type("submit", "storm.yaml", "--yes", "--no-canary", *arguments)

    def slurm(self, *words):
        with self.hands:
            return self.here.call(*words)

    def start(self):
        self.here.start()
        os.environ.update(self.here.env())
        os.environ["OMP_NUM_THREADS"] = "1"
        profile = self.here.profile.read_text() + "options: {exclusive: ''}\n"
        if self.agents:
            profile += "agents: true\n"
        (self.folder / "here.yaml").write_text(profile)
        code = self.folder / "code"
        code.mkdir()
        shutil.copy(ROOT / "tests" / "programs" / "ddp.py", code)
        for file, cluster, seconds in (("storm.yaml", "here.yaml", 0.1), ("calm.yaml", "local", 0)):
            text = yaml.safe_dump(self._sweep(cluster, seconds), sort_keys=False)
            (self.folder / file).write_text(text)
        self.submit()
        self.type("submit", "calm.yaml", "--yes", "--no-canary")

    def _sweep(self, cluster, seconds):
        words = [sys.executable, "ddp.py", "--steps", "{steps}", "--seconds", "{seconds}", "--pause", "{pause}"]
        runs = {name: {**row, "steps": STEPS[name] * len(self.kinds[name])} for name, row in RUNS.items()}
        if cluster == "local":
            for row in runs.values():
                nodes = row.pop("resources.nodes")
                row |= {"resources.processes": nodes, "pause": 0}
        return {
            "cluster": cluster,
            "command": words,
            "code": "code",
            "set": {"seconds": seconds},
            "runs": runs,
            "resume": {"folder": "out", "pattern": "step-*.pt", "arguments": ["--resume", "{checkpoint}"]},
            "metrics": {"pattern": r"step (?P<step>\d+) loss (?P<loss>\S+)"},
            "resources": {"cpus": 1, "hours": 0.5},
        }

    def inject(self):
        threads = [threading.Thread(target=run.inject, args=[self.kinds[run.name]]) for run in self.members]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    # -- properties

    def prove(self):
        """(property, whether it holds, evidence) of each."""
        rows = []
        for check in (self._complete, self._equal, self._whole, self._causes):
            try:
                rows.append((check.__doc__, True, check()))
            except Exception as error:  # a check that fails in any way does not hold
                rows.append((check.__doc__, False, f"{type(error).__name__}: {error}"))
        return rows

    def _complete(self):
        """each run is complete, without a hand but the retry after a cancel"""
        for run in self.members:
            assert not run.trouble and run.run.is_complete(), f"{run.name}: {run.trouble}"
        return f"{sum(len(run.done) for run in self.members)} faults"

    def _equal(self):
        """the tensors of model and optimiser equal those of a run without faults"""
        for run in self.members:
            other = RunDir(self.runs / "calm" / run.name)
            run.wait(other.is_complete, "the undisturbed run")
            step = STEPS[run.name] * len(self.kinds[run.name])
            both = [torch.load(each.path / "work" / "out" / f"step-{step}.pt") for each in (run.run, other)]
            first, second = (dict(tensors(state)) for state in both)
            assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
        return "all of them"

    def _whole(self):
        """each attempt continued from a whole checkpoint, at the step that it holds"""
        starts = 0
        for run in self.members:
            for n in run.run.attempt_numbers():
                chosen = read_json(run.run.attempt(n) / "resume.json") or {}
                if chosen:
                    assert torch.load(chosen["path"])["step"] == chosen["samples"], chosen
                    starts += 1
        return f"{starts} starts"

    def _causes(self):
        """no attempt failed by itself: each crash is a kill"""
        for run in self.members:
            for n in run.run.attempt_numbers():
                end = read_json(run.run.attempt(n) / "end.json")
                assert end["cause"] != "crash" or "SIGKILL" in end["reason"] or end["code"] == 137, end
        return f"{sum(len(run.run.attempt_numbers()) for run in self.members)} attempts"

    def page(self, proved):
        how = "with" if self.agents else "without"
        lines = [f"# Faults over programs, {how} node agents", ""]
        lines += [f"- {'yes' if holds else 'NO'}: {text}: {evidence}" for text, holds, evidence in proved]
        lines += ["", "| fault | times | seconds to the next step, median | most | steps repeated, most |"]
        lines += ["|---|---:|---:|---:|---:|"]
        for name in KINDS:
            rows = [done for run in self.members for done in run.done if done.kind == name]
            if rows:
                times = sorted(row.seconds for row in rows)
                middle = times[len(times) // 2]
                lost = max(row.lost for row in rows)
                lines.append(f"| {name} | {len(rows)} | {middle:.1f} | {times[-1]:.1f} | {lost} |")
        return "\n".join([*lines, ""])


def tensors(value, path=()):
    """(path, tensor) of all tensors of a state."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, each in value.items():
            name = str(key).removeprefix("module.")
            yield from tensors(each, (*path, name))
    elif isinstance(value, list):
        for i, each in enumerate(value):
            yield from tensors(each, (*path, i))


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tests.storm.programs", description=__doc__)
    parser.add_argument("--rounds", type=int, default=1, help="times that each kind strikes each run")
    parser.add_argument("--agents", action="store_true", help="with node agents")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="also write the result page to this file")
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything that was started is stopped
    folder = Path(tempfile.mkdtemp(prefix="s-"))
    storm = ProgramStorm(folder, args.rounds, args.agents, args.seed)
    holds = False
    try:
        storm.start()
        storm.inject()
        proved = storm.prove()
        holds = all(row[1] for row in proved)
        text = storm.page(proved)
        print(text)
        if args.out:
            args.out.write_text(text, encoding="utf-8")
    finally:
        storm.failed = True
        storm.here.stop()
        if holds:
            shutil.rmtree(folder)
        else:
            print(f"all files are kept in {folder}")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
