"""Kills an agent, its task, the owner of the job, its guard, and both in every state of the owner: real processes,
without Slurm.

Two attempts never run at once, and each run goes on: here, or after a requeue, which this test carries out.
``tests/fakeslurm/test_kill_at_every_state.py`` does it on the simulated Slurm, with several nodes.
"""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flip.runs.rundir import RunDir, read_json, write_json
from jobs.host import processes, sessions
from tests.harness.common import wait_until
from tests.harness.job_records import write_job
from tests.jobs.host.agents.task import ROOT, TASK, has_connection, has_unread_message, processes_of
from tests.jobs.host.scontrol_answers import show

pytestmark = pytest.mark.long

STATES = ("gather", "run", "kill", "decide", "between", "left")
"""Before kill and decide a rank was killed. between: the next attempt is prepared, after the agent was killed. left:
the run is complete, and the agent ends."""

EXPECTED = {
    "agent": (["complete"], ["node", "complete"], ["node", "complete"], ["crash", "complete"], ["node", "complete"]),
    "task": (
        ["crash", "complete"],
        ["node", "complete"],
        ["node", "complete"],
        ["crash", "complete"],
        ["node", "complete"],
    ),
    "owner": (
        ["node", "complete"],
        ["node", "complete"],
        ["node", "complete"],
        ["node", "complete"],
        ["node", "complete"],
    ),
    "guard": (
        ["complete"],
        ["complete"],
        ["crash", "complete"],
        ["crash", "complete"],
        ["node", "complete"],
    ),
}
"""Process that is killed -> causes of the attempts, by state. When all have left, the run is complete in any case."""
EXPECTED["owner and guard"] = EXPECTED["owner"]
REQUEUES = {"agent": "000000", "task": "111110", "owner": "111110", "guard": "000000", "owner and guard": "111110"}
"""How often the job is requeued, by state: without its owner and its guard by the task of its agent."""

STEP = """cd /
exec env {variables} {python} -I {root}/jobs/host/rank_entry.py tests.jobs.runtime.agent_rank
"""
SCONTROL = """
restarts=$(cat {folder}/restarts)
case $1 in
show)
    touch {folder}/asked
    while [ -e {folder}/held ]; do sleep 0.05; done
    if [ -e {folder}/ended ]; then
    {ended}
    else
    {show}
    fi;;
requeue) rm -f {folder}/ended; echo $((restarts + 1)) > {folder}/restarts;;
esac
"""


class AgentJob:
    """Job 57 on one node, with an agent that starts two ranks. This class starts it again after a requeue."""

    def __init__(self, run, folder):
        self.run = run
        self.folder = folder
        self.held = folder / "held"
        self.asked = folder / "asked"
        self.restarts = 0
        """Of the start that lives."""
        self.started = {}
        """Attempt -> pid -> start time, of its ranks."""
        self.imports(True)
        self.start()

    def start(self):
        environ = {**os.environ, "FLIP_RUN": str(self.run.path), "SLURM_RESTART_COUNT": str(self.restarts)}
        program = ROOT / "jobs" / "host" / "job.py"
        script = self.folder / "script"
        command = [sys.executable, "-I", program, self.run.path, "--token", "t", "--script", script, "--agents"]
        with open(self.folder / "owner.log", "a") as log:
            self.owner = subprocess.Popen(
                [*command, "--peer-seconds", "1"], stderr=log, env=environ, start_new_session=True
            )

    def until(self, condition, event, seconds=100.0):
        return wait_until(condition, event, seconds, 0.02, self.printed)

    def printed(self):
        """What the owners have printed, and logged for their attempts."""
        paths = [self.folder / "owner.log", *sorted(self.run.logs.glob("*/job.err"))]
        return "\n".join(path.read_text() for path in paths if path.exists())

    # -- its processes

    def child_of_owner(self, program):
        """Pid of the oldest child that executes a program: others are about to execute a command of Slurm."""
        pids = [pid for pid in children(self.owner.pid) if any(program in word for word in processes.arguments(pid))]
        return min(pids, key=lambda pid: int(processes.start_time(pid) or 0), default=0)

    def guard(self):
        return self.until(lambda: self.child_of_owner("/job.py"), "the guard")

    def task(self):
        return self.until(lambda: self.child_of_owner("/rank_entry.py"), "the task")

    def agent(self):
        """Pid of the agent when it has connected to the owner."""
        agents = []

        def is_connected():
            agents[:] = children(self.task())
            return bool(agents) and has_connection(agents[0])

        self.until(is_connected, "an agent")
        return agents[0]

    def ranks(self, n):
        """The records of the ranks of attempt n, when they have started."""
        files = [self.run.path / f"rank.{n}.{rank}" for rank in (0, 1)]
        self.until(lambda: self.go_on() or all(file.exists() for file in files), f"the ranks of attempt {n}")
        older = [row for attempt, ranks in self.started.items() if attempt < n for row in ranks.items()]
        assert not any(sessions.alive(pid, start) for pid, start in older), "two attempts run"
        records = [read_json(file) for file in files]
        self.started[n] = {record["pid"]: sessions.start_time(record["pid"]) for record in records}
        return records

    def living(self):
        """Pids of the processes of the run, without owners and guards, and the commands that these have called."""
        pids = processes_of(self.run)
        return [pid for pid in pids if "scontrol" not in "".join(processes.arguments(pid)) and not is_owner(pid)]

    # -- its states

    def enter(self, state):
        """Wait until the owner is in a state, and hold it there."""
        if state == "gather":
            self.imports(False)
            self.agent()
            return
        agent = self.agent()
        records = self.ranks(1)
        if state == "between":
            self.imports(False)
            os.kill(agent, signal.SIGKILL)
            self.until((self.run.attempt(1) / "end.json").exists, "the end of attempt 1")
            self.agent()
        elif state == "kill":
            os.kill(records[1]["pid"], signal.SIGKILL)
            self.until(lambda: "rank 1 ended with 137" in self.printed(), "the end of a rank")
            self.signal_node(signal.SIGSTOP)  # the agent does not kill the other rank
            self.until(lambda: "its remaining ranks are killed" in self.printed(), "an owner that kills ranks")
        elif state in ("decide", "left"):
            self.held.touch()  # it asks for the state of the job
            self.asked.unlink(missing_ok=True)
            if state == "decide":
                os.kill(records[1]["pid"], signal.SIGKILL)
            else:
                self.finish_ranks()
            self.until(self.asked.exists, "a question to Slurm")
        if state == "left":
            self.signal_node(signal.SIGSTOP)
            self.held.unlink()
            self.until((self.run.attempt(1) / "end.json").exists, "the end of attempt 1")
            # Its guard knows by then that nothing is left to do. An owner that is killed before that is requeued.
            self.until(lambda: has_unread_message(agent), "the message that the agent may leave")

    def imports(self, may_end):
        """Whether agents get ready that start from now on."""
        if may_end:
            (self.run.path / "imported").touch()
        else:
            (self.run.path / "imported").unlink()

    def signal_node(self, number):
        for pid in (self.task(), *children(self.task())):
            os.kill(pid, number)

    def kill(self, victim):
        if victim == "agent":
            os.kill(self.agent(), signal.SIGKILL)
        elif victim == "task":
            os.kill(self.task(), signal.SIGKILL)
        elif victim == "guard":
            os.kill(self.guard(), signal.SIGKILL)
        else:
            guard = self.guard()
            if victim == "owner and guard":
                os.kill(guard, signal.SIGSTOP)  # else it is faster than this test
            os.kill(self.owner.pid, signal.SIGKILL)
            if victim == "owner and guard":
                os.kill(guard, signal.SIGKILL)
                (self.folder / "ended").touch()  # Slurm notices the end of the batch script
            self.owner.wait()

    def release(self):
        self.imports(True)
        self.held.unlink(missing_ok=True)
        for pid in processes_of(self.run):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    # -- what follows

    def go_on(self):
        """Start the job again if it was requeued, and all of its processes have ended."""
        if self.requeues() == self.restarts or self.owner.poll() is None or self.living():
            return
        self.restarts = self.requeues()
        self.start()

    def requeues(self):
        return int((self.folder / "restarts").read_text())

    def finish_ranks(self):
        write_json(self.run.result, {})
        for rank in (0, 1):
            write_json(self.run.path / f"end.{rank}", 0)

    def causes(self):
        return [read_json(self.run.attempt(n) / "end.json")["cause"] for n in self.run.attempt_numbers()]

    def close(self):
        self.owner.kill()
        self.owner.wait()
        self.held.unlink(missing_ok=True)
        for pid in processes_of(self.run):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def is_owner(pid):
    """Whether a process is an owner or a guard."""
    return any(word.endswith("/jobs/host/job.py") for word in processes.arguments(pid))


def children(pid):
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


@pytest.fixture
def job(tmp_path, monkeypatch, commands):
    run = RunDir(tmp_path / "sweep" / "run")
    run.path.mkdir(parents=True)
    write_job(run, processes=2)
    for name in ("SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID", "FLIP_ATTEMPT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SLURM_JOB_ID": "57", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "2"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "restarts").write_text("0\n")
    shown = {
        "show": show(restarts="$restarts"),
        "ended": show(restarts="$restarts", state="FAILED", reason="RaisedSignal:9(Killed)"),
    }
    texts = {name: text.replace("'X'", "X") for name, text in shown.items()}
    commands("scontrol", SCONTROL.format(folder=tmp_path, **texts))
    variables = {
        **TASK, "SLURM_JOB_ID": "57", "FLIP_SNAPSHOT": str(ROOT), "FLIP_AGENTS": "1", "PYTHONPATH": str(ROOT),
        "TEST_PRELOAD": "tests.jobs.runtime.held_import",
    }  # fmt: skip
    words = " ".join(f"{name}={value}" for name, value in variables.items())
    (tmp_path / "script").write_text(STEP.format(variables=words, python=sys.executable, root=ROOT))
    job = AgentJob(run, tmp_path)
    yield job
    job.close()


def case(state, victim):
    """Those of ``make test`` are the others."""
    usual = {("run", "owner"), ("kill", "agent"), ("decide", "guard"), ("gather", "task")}
    return pytest.param(state, victim, marks=[] if (state, victim) in usual else pytest.mark.slow)


@pytest.mark.parametrize("state, victim", [case(state, victim) for state in STATES for victim in EXPECTED])
def test_run_goes_on_after_kill_in_state(job, state, victim):
    number = STATES.index(state)
    expected = (*EXPECTED[victim], ["complete"])[number]
    job.enter(state)
    job.kill(victim)
    job.release()
    if state != "left":
        job.ranks(len(expected))
        job.finish_ranks()
    if victim not in ("owner", "owner and guard") or state != "left":
        assert job.owner.wait(100) == 0, job.printed()
    job.until(lambda: not job.living(), "the end of all processes")
    assert job.causes() == expected, job.printed()
    if state == "run" and victim.startswith("owner"):
        assert all((job.run.path / f"stopped.{rank}").exists() for rank in (0, 1)), "its ranks have not saved"
    assert job.requeues() == int(REQUEUES[victim][number])
