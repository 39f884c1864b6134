"""Observers of runs on a real Slurm: states, signals, and the calls, answers and decisions of the owner of a job.

Calls of the owner and its guard are recorded by a ``scontrol`` and a ``squeue`` that come first on the PATH of jobs.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

from flip.runs.rundir import create_json, read_json
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import Job, JobResources
from jobs.host import processes
from jobs.host.slurm_cli import ENDED
from jobs.slurm.backend import SlurmBackend
from jobs.submitted_runs import clusters
from tests.harness.common import ROOT, make_run, wait_until

CALLS = ("scontrol", "squeue")
SHOW_JOB = ["show", "job"]
READ = ("JobState", "Reason", "Restarts", "RunTime", "TimeLimit", "EndTime", "PreemptTime")
SETTLED = 2.0
"""Seconds for which a final state must last: a requeued job is PENDING by then."""


def profile(**fields):
    """Return a profile for ``flip slurm_sandbox``."""
    base = {"name": "here", "kind": "slurm", "partition": "low", "hours": 0.5}
    return ClusterProfile(**{**base, "signal_seconds": 60, "peer_seconds": 20, **fields})


SHIM = """#!{python} -SE
# Records calls of the owner and its guard, and the output of squeue --json at that moment.
import json, os, subprocess, sys
name, words = {name!r}, sys.argv[1:]
run, attempt = os.environ.get("FLIP_RUN"), os.environ.get("FLIP_ATTEMPT")
real = {real}
if not run or not attempt:
    os.execv(real[name], [name, *words])
def note(**facts):
    with open("%s/calls/%s.%s.jsonl" % (run, attempt, by), "a") as file:
        file.write(json.dumps(facts) + "\\n")
by = open("/proc/%d/cmdline" % os.getppid()).read()
by = "owner" if "/job.py" in by else "task"
id_ = os.environ["SLURM_JOB_ID"]
try:
    said = subprocess.run([real["squeue"], "--json", "-j", id_], stdout=subprocess.PIPE, timeout=20).stdout
    states = [job["job_state"] for job in json.loads(said)["jobs"] if job["job_id"] == int(id_)]
except (ValueError, KeyError, subprocess.TimeoutExpired):
    states = []
note(words=[name] + words, restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0), json=states[0] if states else [])
if name == "squeue" and "--json" in words and os.path.exists(run + "/no-json"):
    note(code=1, out="", err="squeue: error: no such plugin")
    sys.exit("squeue: error: no such plugin")
done = subprocess.run([real[name]] + words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
note(code=done.returncode, out=done.stdout, err=done.stderr)
sys.stdout.write(done.stdout)
sys.stderr.write(done.stderr)
sys.exit(done.returncode)
"""


def install(folder):
    """Write the shims, and return the folder that must come first on PATH. The current PATH finds the real commands."""
    real = {name: shutil.which(name) for name in CALLS}
    folder.mkdir(parents=True)
    for name in CALLS:
        (folder / name).write_text(SHIM.format(python=sys.executable, name=name, real=real))
        (folder / name).chmod(0o755)
    return folder


TRACER = """
import ctypes, os, sys
PTRACE_ATTACH = 16
pid = int(sys.argv[1])
assert ctypes.CDLL(None).ptrace(PTRACE_ATTACH, pid, 0, 0) == 0
os.waitpid(pid, 0)
print("hangs", flush=True)
os.waitpid(pid, 0)
"""


class SlurmScene:
    """A submission to the Slurm ``sandbox``, whose SLURM_CONF and shims are in this process's environment."""

    def __init__(self, sandbox, squeue, folder, name):
        self.here = sandbox
        self.squeue = squeue
        self.folder = folder / name
        self.name = name
        self.env = {}
        """Variables of the ranks."""
        self.runs = []
        self.seen = []
        self.rows = {}
        self.patience = 120.0
        self._over = threading.Event()

    # -- actions ----------------------------------------------------------------------------------------------------

    def submit(self, *plays, hours=0.5, cpus=1, gpus=0, shape=None, **fields):
        """Submit one run per play, all in one array, and watch them. ``shape``: fields of JobResources to change."""
        for index, play in enumerate(plays):
            run = make_run(self.folder / f"run{index}", "", play)
            (run.path / "calls").mkdir()
            self.runs.append(run)
            self.seen.append([])
        self.cluster = SlurmBackend(profile(hours=hours, **fields))
        resources = JobResources(nodes=2, processes=1, gpus=gpus, cpus=cpus, hours=hours)
        resources = replace(resources, **(shape or {}))
        fields = {"env": self.env, "module": "tests.slurm.scripted"}
        self.cluster.submit([Job(run, ROOT, resources, **fields) for run in self.runs])
        self.watch()

    def ready(self, n=1):
        """Wait until all ranks of attempt n have installed their signal handlers."""
        self.until(lambda: all(len(self.signals(run, n)) == 2 for run in self.runs), f"the ranks of attempt {n}")

    def preempt(self, index=0, seconds=3):
        """Submit a job of higher priority to the nodes of a run."""
        return self.here.preempt(nodes=2, seconds=seconds, nodelist=",".join(self.nodes(index)))

    def kill(self, rank, index=0, n=1):
        """Send SIGKILL to a rank of attempt n, as the kernel does when memory runs out."""
        os.kill(self.facts(rank, n, index)["pid"], signal.SIGKILL)

    def agent(self, rank, n=1):
        """Pid of the node agent that has started a rank."""
        return parent(self.facts(rank, n)["pid"])

    def kill_agent(self, rank, n=1):
        os.kill(self.agent(rank, n), signal.SIGKILL)

    def kill_task(self, rank):
        """Send SIGKILL to Slurm's task in which the agent of a rank runs."""
        os.kill(parent(self.agent(rank)), signal.SIGKILL)

    def lose(self, rank):
        """Lose the node of a rank; returns its name."""
        node = self.facts(rank)["node"]
        self.here.lose(node)
        return node

    def owner_and_guard(self):
        """Return the pids of the owner of the job and of its guard."""
        return owner_and_guard(self.here, fields_of(self.call("scontrol", "show", "job", self.id())))

    def kill_shell(self):
        """Send SIGKILL to the owner of the job only."""
        os.kill(self.owner_and_guard()[0], signal.SIGKILL)

    def kill_batch_step(self, spared=""):
        """Send SIGKILL to the owner and all of its descendants, as cgroups do: guard and srun. ``spared``: name of a
        command that is left."""
        for pid in family(self.owner_and_guard()[0]):
            if not spared or processes.arguments(pid)[0] != spared:
                os.kill(pid, signal.SIGKILL)

    def cancel(self):
        """Cancel the runs as ``flip cancel`` does."""
        create_json(self.runs[0].cancel, {"who": "tester", "why": "test", "time": time.time()})
        self.cluster.cancel(self.runs)

    def call(self, *arguments):
        return self.here.call(*arguments)

    # -- observations ------------------------------------------------------------------------------------------------

    def id(self, index=0):
        return self.rows[index]["id"]

    def facts(self, rank, n=1, index=0):
        """Return {pid, node} of a rank."""
        return self.signals(self.runs[index], n)[str(rank)][0]

    def nodes(self, index=0):
        return [self.facts(rank, index=index)["node"] for rank in (0, 1)]

    @staticmethod
    def signals(run, n):
        """Return rank -> lines of its log."""
        logs = {}
        for path in sorted((run.path / "signals").glob(f"{n}.*.jsonl")):
            logs[path.name.split(".")[1]] = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
        return {rank: lines for rank, lines in logs.items() if lines}

    def until(self, condition, event):
        wait_until(condition, f"{event} ({self.name})", self.patience, 0.05, self.story)

    def over(self):
        """Wait until every job is in its final state."""
        self.until(lambda: len(self.rows) == len(self.runs) and all(map(self._settled, self.rows.values())), "the end")
        self.unwatch()

    @staticmethod
    def _settled(row):
        return row["state"] in ENDED and time.monotonic() - row["since"] > SETTLED

    def watch(self):
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()

    def unwatch(self):
        self._over.set()
        self.watcher.join()

    def _watch(self):
        name = read_json(self.runs[0].path / "job.json")["name"]
        command = [self.squeue, "-h", "-r", "-t", "all", f"--name={name}", "-o", "%K|%i|%T"]
        while not self._over.wait(0.03):
            attempts = [run.newest_attempt() for run in self.runs]
            with contextlib.suppress(subprocess.TimeoutExpired):
                done = subprocess.run(command, capture_output=True, text=True, timeout=20)
                rows = [line.split("|") for line in done.stdout.splitlines()]
                for place, id_, state in sorted(rows, key=lambda row: -int(row[1].partition("_")[0])):
                    self._note(int(place) if place.isdigit() else 0, id_, state, attempts)

    def _note(self, index, id_, state, attempts):
        if attempts[index] != self.runs[index].newest_attempt():
            return  # it may belong to either attempt
        number = int(id_.partition("_")[0])
        if number < self.rows.get(index, {}).get("number", 0):
            return  # this job has a successor
        if self.rows.get(index, {}).get("state") != state:
            self.rows[index] = {"id": id_, "number": number, "state": state, "since": time.monotonic()}
        if (attempts[index], state) not in self.seen[index][-1:]:
            self.seen[index].append((attempts[index], state))

    # -- record ------------------------------------------------------------------------------------------------------

    def record(self, index=0):
        run = self.runs[index]
        state = clusters.states([run])[run.path]
        job = fields_of(self.call("scontrol", "show", "job", self.id(index)))
        return {
            "queued": self._states(index, 0),
            "attempts": [self._attempt(index, n) for n in run.attempt_numbers()],
            "end": {"state": state.state, "detail": state.reason},
            "job": {key: job.get(key, "") for key in ("JobState", "Restarts", "ExitCode")},
            "own_id": job.get("JobId") == job.get("ArrayJobId"),
        }

    def _states(self, index, n):
        return [state for attempt, state in self.seen[index] if attempt == n]

    def _attempt(self, index, n):
        run = self.runs[index]
        end = read_json(run.attempt(n) / "end.json") or {}
        calls = self._calls(run, n, "owner")
        acts = [call for call in calls if call["words"][1] != "show"]
        before = calls[: calls.index(acts[0])] if acts else calls
        lines = self.signals(run, n)
        return {
            "states": self._states(index, n),
            "signals": {rank: [line["signal"] for line in rows if "signal" in line] for rank, rows in lines.items()},
            "gpus": sorted({rows[0]["gpus"] for rows in lines.values()}),
            "code": end.get("code"),
            "read": next((call["read"] for call in reversed(before) if "read" in call), None),
            "words": end.get("state"),
            "decision": {key: end.get(key) for key in ("action", "cause", "reason", "delay")} if end else None,
            "calls": [_answer(call) for call in acts],
        }

    @staticmethod
    def _calls(run, n, by):
        """Return rows {words, code, said}, and ``read`` if the call queried the job. A killed caller has no code."""
        path = run.path / "calls" / f"{n}.{by}.jsonl"
        calls = []
        for line in map(json.loads, path.read_text().splitlines() if path.exists() else []):
            if "words" in line:
                calls.append({"words": masked(line["words"]), "code": None, "said": "", "asked": line})
                continue
            calls[-1] |= {"code": line["code"], "said": line["err"].strip()}
            if calls[-1]["words"][1:3] == SHOW_JOB:
                fields = fields_of(line["out"])
                query = calls[-1]["asked"]
                read = {key: fields.get(key) for key in READ}
                calls[-1]["read"] = {**read, "SLURM_RESTART_COUNT": query["restarts"], "json": query["json"]}
        return calls

    def story(self):
        parts = [str(self.rows), str(self.seen)]
        for run in self.runs:
            for path in sorted([*run.path.glob("attempts/*/*.json"), *run.path.glob("logs/*/*.*")]):
                parts.append(f"--- {path}\n{path.read_text()[-1500:]}")
        parts += [f"--- {path}\n{path.read_text()[-800:]}" for path in sorted(self.folder.glob(".slurm/*/*.err"))]
        return "\n".join(parts)

    def close(self):
        """Cancel all jobs in the queue."""
        self._over.set()
        for id_ in self.here.call("squeue", "-h", "-o", "%A").split():
            with contextlib.suppress(Exception):
                self.here.call("scancel", id_)


def pids(text):
    """Return pids of processes whose first two arguments contain ``text``."""
    return [pid for pid, words in command_lines().items() if text in " ".join(words[:2])]


def command_lines():
    """Return pid -> command line of all processes."""
    lines = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines[int(path.parent.name)] = path.read_text().split("\0")[:-1]
    return lines


def batch_script(sandbox, job):
    """Return the path of the batch script of a job with these fields: another Slurm may have a job of its number."""
    return f"{sandbox.site.spool(job['BatchHost'])}/job{int(job['JobId']):05d}/slurm_script"


def owner_and_guard(sandbox, job):
    """Return the pids of the owner of a job with these fields and of its guard, which it has forked; those that run."""
    script = batch_script(sandbox, job)
    both = {pid for pid, words in command_lines().items() if is_owner(words) and script in words}
    return sorted(both, key=lambda pid: parent(pid) in both)


def is_owner(words):
    """Whether this is the command line of the owner of a job, or of its guard."""
    return any(word.endswith("/jobs/host/job.py") for word in words[:4])


def parent(pid):
    """Return the pid of the parent of a process; 0 if that process is gone."""
    fields = processes.read_stat(pid)[1]
    if len(fields) == 1:
        return 0
    return int(fields[1])


@contextlib.contextmanager
def hanging(pid):
    """Let a process hang as in a call of a file system: of all signals it obeys SIGKILL alone, also if Slurm continues
    the processes of a job that it ends."""
    tracer = subprocess.Popen([sys.executable, "-c", TRACER, str(pid)], stdout=subprocess.PIPE)
    try:
        assert tracer.stdout.readline() == b"hangs\n"
        yield
    finally:
        tracer.kill()
        tracer.wait()


def family(pid):
    """Return the pid of a process and those of all of its descendants, which come first."""
    pids = [pid]
    for member in pids:  # it grows
        for path in Path(f"/proc/{member}/task").glob("*/children"):
            pids.extend(int(child) for child in path.read_text().split())
    return pids[::-1]


def masked(arguments):
    """Return a command line with masked job numbers and names."""
    arguments = [re.sub(r"^--name=.*", "--name=NAME", argument) for argument in arguments]
    return [re.sub(r"\b\d+(_\d+)?\b", "ID", argument) if "now" not in argument else argument for argument in arguments]


def _answer(call):
    return {key: call[key] for key in ("words", "code", "said")}


def fields_of(text):
    fields = {}
    for key, value in re.findall(r"(\w+)=(\S*)", text):
        fields.setdefault(key, value)
    return fields


@contextlib.contextmanager
def slurm(folder, **options):
    """Provide a Slurm for scenes: (sandbox, the real squeue). Set this process's environment for it, and restore it."""
    from tools.sandbox.cluster import SandboxCluster

    squeue = shutil.which("squeue")
    before = dict(os.environ)
    sandbox = SandboxCluster(folder / "slurm", nodes=4, **options)
    os.environ["PATH"] = f"{install(folder / 'bin')}{os.pathsep}{os.environ['PATH']}"
    os.environ.update(sandbox.env())
    try:
        sandbox.start()
        yield sandbox, squeue
    finally:
        sandbox.stop()
        os.environ.clear()
        os.environ.update(before)
