"""Kills the node agent and the coordinator of a job in every state of the coordinator: real processes, without Slurm.

After a killed agent the run goes on in the same job. After a killed coordinator the ranks save, nothing is left, and
the exit trap requeues the job. Two attempts never run at once.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flip.runs import attempts
from flip.runs.rundir import RunDir, read_json, write_json
from jobs.host import batch_hooks, processes, sessions
from tests.jobs.host.agents.task import ROOT, end_task, processes_of, start_task
from tests.jobs.host.scontrol_answers import show

pytestmark = pytest.mark.long

CAUSES_OF_ATTEMPT_1 = {"gather": None, "run": "node", "kill": "node", "decide": "crash"}
"""If the agent is killed in this state. In the last two a rank was killed before."""


class AgentJob:
    """A start of job 57 on one node: its watcher with the coordinator, and the task with its agent and two ranks."""

    def __init__(self, run, folder):
        self.run = run
        self.held = folder / "held"
        self.asked = folder / "asked"
        self.log = folder / "watch.log"
        attempts.start_attempt(run, batch_hooks.start_record())
        run.open_logs(1)
        hooks = ROOT / "jobs" / "host" / "batch_hooks.py"
        command = [sys.executable, hooks, "watch", run.path, "--agents", "2", "--peer-seconds", "1"]
        with open(self.log, "w") as log:
            self.watch = subprocess.Popen(command, stderr=log, env={**os.environ, "FLIP_RUN": str(run.path)})
        self.task = start_task(run)

    def until(self, condition, seconds=90.0):
        limit = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < limit, self.printed()
            time.sleep(0.02)

    def printed(self):
        """What the watcher has printed, and logged for attempt 1."""
        return "\n".join(path.read_text() for path in (self.log, self.run.logs / "1" / "job.err") if path.exists())

    def agent(self):
        """Pid of the agent when it has connected to the coordinator."""
        agents = []

        def is_connected():
            agents[:] = children(self.task.pid)
            if not agents:
                return False
            return sum("socket:" in name for name in open_files(agents[0])) == 2  # one is its lifeline

        self.until(is_connected)
        return agents[0]

    def ranks(self, n):
        """The records of the ranks of attempt n, when they have started."""
        files = [self.run.path / f"rank.{n}.{rank}" for rank in (0, 1)]
        self.until(lambda: all(file.exists() for file in files))
        return [read_json(file) for file in files]

    def enter(self, state):
        """Wait until the coordinator is in a state, and hold it there."""
        agent = self.agent()
        if state == "gather":
            return
        records = self.ranks(1)
        if state == "run":
            return
        if state == "decide":  # it asks for the state of the job
            self.held.touch()
            self.asked.unlink(missing_ok=True)
        os.kill(records[1]["pid"], signal.SIGKILL)
        if state == "decide":
            self.until(self.asked.exists)
            return
        self.until(lambda: "rank 1 ended with 137" in self.printed())
        for pid in (self.task.pid, agent):  # the agent does not kill the other rank
            os.kill(pid, signal.SIGSTOP)
        self.until(lambda: "its remaining ranks are killed" in self.printed())

    def release(self):
        self.held.unlink(missing_ok=True)
        self.task.send_signal(signal.SIGCONT)
        for pid in children(self.task.pid):
            os.kill(pid, signal.SIGCONT)

    def finish(self, n):
        """Let the ranks of attempt n end well; returns the exit code of the task."""
        for rank in (0, 1):
            (self.run.path / f"end.{rank}").write_text("0")
        return self.task.wait(60)

    def close(self):
        self.held.unlink(missing_ok=True)
        self.watch.kill()
        self.watch.wait()
        self.task.send_signal(signal.SIGCONT)
        end_task(self.task, self.run)


def children(pid):
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def open_files(pid):
    folder = Path(f"/proc/{pid}/fd")
    names = []
    for entry in sorted(folder.iterdir()):
        try:
            names.append(os.readlink(entry))
        except OSError:
            continue
    return names


@pytest.fixture
def job(tmp_path, monkeypatch, commands):
    run = RunDir(tmp_path / "sweep" / "run")
    run.path.mkdir(parents=True)
    write_json(run.path / "job.json", {"token": "t", "after": 0})
    for name in ("SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SLURM_JOB_ID": "57", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "2"}.items():
        monkeypatch.setenv(name, value)
    wait = f"[ $1 != show ] || {{ touch {tmp_path}/asked; while [ -e {tmp_path}/held ]; do sleep 0.1; done; }}"
    commands("scontrol", f"{wait}\n{show()}")
    job = AgentJob(run, tmp_path)
    yield job
    job.close()


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("state", [slow("gather"), slow("run"), "kill", slow("decide")])
def test_run_goes_on_after_killed_agent(job, state):
    job.enter(state)
    started = {}
    if state != "gather":
        started = {row["pid"]: sessions.start_time(row["pid"]) for row in job.ranks(1)}
    os.kill(job.agent(), signal.SIGKILL)
    job.release()
    cause = CAUSES_OF_ATTEMPT_1[state]
    n = 1
    if cause is not None:
        n = 2
    job.ranks(n)
    assert not any(sessions.alive(pid, start) for pid, start in started.items()), "two attempts run"
    assert (read_json(job.run.attempt(1) / "end.json") or {}).get("cause") == cause
    assert job.finish(n) == 0 and job.run.newest_attempt() == n
    job.until(lambda: not living(job))


@pytest.mark.parametrize("state", [slow("gather"), "run", slow("kill"), slow("decide")])
def test_job_is_requeued_after_killed_coordinator(job, state, commands):
    job.enter(state)
    job.watch.kill()
    job.watch.wait()
    job.release()
    code = job.task.wait(120)
    job.until(lambda: not living(job))
    assert code == 70 and job.run.newest_attempt() == 1
    assert [(job.run.path / f"stopped.{rank}").exists() for rank in (0, 1)] == [state == "run"] * 2
    assert batch_hooks.end(str(job.run.path), 1, code, None) == 0
    assert "scontrol requeue 57" in commands.calls()
    assert read_json(job.run.attempt(1) / "end.json")["action"] == "requeue"


def living(job):
    """Pids of the processes of the run, without the watcher and the commands that it has called."""
    return [pid for pid in processes_of(job.run) if "batch_hooks.py" not in " ".join(processes.arguments(pid))]
