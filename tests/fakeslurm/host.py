"""What a batch script does on its nodes: the lines of ``jobs.slurm.batch_script`` in Python, around the real
``jobs.host.batch_hooks``.

Golden texts of the script itself, and a real bash that runs it, are in tests/jobs/slurm/test_batch_script.py.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

from flip.runs.errors import STORAGE
from flip.runs.rundir import RunDir
from jobs.host import batch_hooks, slurm_cli
from tests.fakeslurm.clock import Process


@dataclass
class Script:
    """What is read of a text that sbatch was given: all that a life of the job needs to know."""

    folder: Path
    """RUNS_ROOT/<sweep>/.slurm/<token>."""
    tasks: int
    peer_seconds: float
    canary: bool = False
    """Whether others are held until it has passed."""
    text: str = ""
    late: float = float("inf")
    """Seconds after which its end is one that had the whole wall limit."""

    @classmethod
    def read(cls, text):
        """Keywords for ``Controller.submit``."""
        options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
        folder = re.search(r"^log=(\S+)/\$id$", text, re.MULTILINE)[1].strip("'")
        nodes, array = int(options["nodes"]), re.match(r"0-(\d+)", options.get("array", ""))
        tasks = nodes * int(options["ntasks-per-node"])
        late = re.search(r'"\$SECONDS" -lt (\d+)', text)
        peers, canary = float(re.search(r"--wait=(\d+)", text)[1]), "releaser=$!" in text
        return {
            "name": options["job-name"],
            "nodes_wanted": nodes,
            "limit": 60.0 * int(options["time"]),
            "lead": float(options["signal"].partition("@")[2]),
            "script": cls(Path(folder), tasks, peers, canary, text, float(late[1]) if late else float("inf")),
            "held": "hold" in options,
            "elements": int(array[1]) + 1 if array else None,
            "later": float(options.get("begin", "now+0").partition("+")[2]),
            "gpus": int(options.get("gpus-per-node", 0)),
        }

    def run(self, index):
        return Path((self.folder / "runs").read_text().splitlines()[index or 0])


@dataclass
class Place:
    """Who calls: a process of a life's batch script."""

    life: object
    by: str

    @property
    def reachable(self):
        return self.life.host.reachable


class Life:
    """One start of a job on nodes. ``body(life, run, n, over)`` makes its ranks; ``over(code)`` is srun's end."""

    def __init__(self, controller, job, body, storage=None):
        self.controller, self.clock, self.job, self._make = controller, controller.clock, job, body
        self.nodes, self.host, self.script = list(job.nodes), job.nodes[0], job.script
        self.restarts, self.path = job.restarts, job.script.run(job.index)
        self.attempt, self.body, self._processes, self._over = None, None, [], False
        self.events = []
        """(time, what) that happened to it, known only to the simulation."""
        self.born, self.began, self.ended = self.clock.now, None, float("inf")
        """When its attempt began, and when the last of its ranks ended."""
        self.through = float("inf")
        """When its exit trap was through."""
        self.alone = False
        """Whether its wall limit came while Slurm had not yet found that its node is away."""
        self._shell = True
        self._storage = storage or (lambda life: contextlib.nullcontext())
        self._resting = None
        self.clock.at(0.2, self._begin)

    @property
    def unseen(self):
        """Whether it has ended, or will, without an end of its exit trap."""
        return self.through == float("inf")

    def happened(self, what):
        self.events.append((self.clock.now, what))

    # -- the script --------------------------------------------------------------------------------------------------

    def _environ(self):
        job = self.job
        found = {"SLURM_JOB_ID": str(job.id), "SLURM_JOB_NAME": job.name, "SLURMD_NODENAME": self.host.name}
        found |= {"SLURM_NTASKS": str(self.script.tasks), "SLURM_JOB_NODELIST": ",".join(n.name for n in self.nodes)}
        if job.index is not None:
            found |= {"SLURM_ARRAY_JOB_ID": str(job.array), "SLURM_ARRAY_TASK_ID": str(job.index)}
        if self.restarts:
            found["SLURM_RESTART_COUNT"] = str(self.restarts)
        if job.follows:
            found["FLIP_FOLLOWS"] = job.follows
        return found

    def _process(self, by, do, over):
        made = Process(self.clock, do, self._environ(), over, lambda: self._storage(self), Place(self, by))
        self._processes.append(made)
        return made

    def _python(self, by, over, what, **given):
        """``python jobs/host/batch_hooks.py WHAT RUN ...``"""
        words = {"token": None, "attempt": self.attempt, "code": None, "state": None, "late": False, **given}
        args = argparse.Namespace(what=what, run=str(self.path), **words)
        return self._process(by, lambda: batch_hooks.act(args, self._rest), over)

    def _rest(self, seconds):
        """How the watcher waits: TERM wakes it."""
        self._resting = self.clock.current
        self._resting.wait(seconds)
        self._resting = None

    def _begin(self):
        if not self._over:
            self._process("shell", self._say, self._opened)

    def _say(self):
        """Where the script's own words go."""
        (self.script.folder / "runs").stat()
        return 0

    def _opened(self, code, out):
        if code:
            self._elsewhere(code)
        else:
            self._python("begin", self._begun, "begin", token=self.script.folder.name)

    def _begun(self, code, out):
        if code in (1, 2, 4, 126, 127, *range(130, 140)):
            self._elsewhere(code)
        elif code or not out.strip():
            self._done(code)
        else:
            self.attempt, self.began = int(out), self.clock.now
            self._beside = [self._python("watcher", lambda code, out: None, "watch")]
            if self.script.canary:
                self._beside.append(self._python("releaser", lambda code, out: None, "release"))
            self.body = self._make(self, RunDir(self.path), self.attempt, self._srun_ended)

    def _elsewhere(self, code):
        def give_back():
            mark = (
                slurm_cli.read_failed_starts(job, self.restarts, slurm_cli.OUTAGE_SECONDS) or slurm_cli.FailedStarts()
            )
            if mark.starts < slurm_cli.MAX_FAILED_STARTS:
                slurm_cli.record_failed_starts(job, self.restarts, mark._replace(starts=mark.starts + 1))
                again()
                with contextlib.suppress(slurm_cli.SlurmUnavailable):
                    shown = slurm_cli.fields_of(slurm_cli.call("scontrol", "show", "job", job))["ExcNodeList"]
                    kept = re.sub(r"(^|,)([^][,]+),\2(,|$)", r"\1", shown.replace("(null)", "")).rstrip(",")
                    out = ",".join(filter(None, [kept, self.host.name, self.host.name]))
                    wishes = f"ExcNodeList={out}", f"StartTime=now+{60 * mark.starts}"
                    slurm_cli.call("scontrol", "update", f"JobId={job}", *wishes)

        def again():
            refused = 0
            for _ in range(1440):
                with contextlib.suppress(slurm_cli.SlurmUnavailable):
                    return slurm_cli.call("scontrol", "requeue", job)
                self.clock.sleep(30.0)
                with contextlib.suppress(slurm_cli.SlurmUnavailable):
                    if f"Restarts={self.restarts} " not in slurm_cli.call("scontrol", "show", "job", job):
                        raise SystemExit(code)
                    refused += 1
                if refused == 20:
                    return

        def ask(*words):
            for _ in range(5):
                with contextlib.suppress(slurm_cli.SlurmUnavailable):
                    return slurm_cli.call("scontrol", *words)
                self.clock.sleep(30.0)

        job = self.job.key
        self._process("shell", give_back, lambda *_: self._done(code))

    def _srun_ended(self, code):
        def seen(said, _):
            self.through = self.clock.now
            if said == STORAGE:  # the end itself could not be written
                self.happened("storage")
            for process in self._beside:
                if process.alive:
                    process.kill()
            self._done(code)

        if not self._shell:
            self._done(code, killed=True)
        elif not self._over:
            self._python("trap", seen, "end", code=code, late=self.clock.now - self.born >= self.script.late)

    def _done(self, code, killed=False):
        if not self._over:
            self._over = True
            self.controller.batch_done(self, code, killed)

    # -- what comes from outside -------------------------------------------------------------------------------------

    def signal_steps(self, name):
        if self.body is not None:
            self.body.signal(name, {node.name for node in self.nodes if node.alive and node.reachable})

    def signal_shell(self, name, full):
        """The shell forwards it to the ranks; ``full``: they get it as well."""
        self.happened("warned")
        for sent in {"USR1" if name == "TERM" else "USR2", *([name] if full else [])}:
            self.signal_steps(sent)

    def kill_shell(self):
        """SIGKILL to the batch shell alone: it has no exit trap then. The watcher lives on."""
        self.happened("shell")
        self._shell = False
        self.controller.shell_killed(self.job)
        for process in self._beside:
            process.interrupt(batch_hooks.ShellGone())

    def end(self):
        """TERM to all, which the shell outlives."""
        self.signal_steps("TERM")
        if self._resting is not None and self._resting.alive:
            self._resting.wake()
        if self.body is not None:
            self.body.node_down({node.name for node in self.nodes if not node.up})

    def kill(self):
        """KILL, wherever it can be sent to."""
        if self.body is not None:
            self.body.kill({node.name for node in self.nodes if node.alive and node.reachable})
        if not (self.host.alive and self.host.reachable):
            self.controller.detached(self)
            return
        self._end_processes()
        self._done(137, killed=True)

    def lose(self, node):
        if self.controller.jobs.get(self.job.id) is not self.job:
            self.happened("node")  # else the controller notes it when it finds out
        if self.body is not None:
            self.body.lose(node.name)
        if node is self.host:
            self._over = True
            self._end_processes()

    def _end_processes(self):
        for process in self._processes:
            if process.alive:
                process.kill()
