"""One run of the storm's sweep: what faults need to know about it and do to it, and a record of each fault."""

import contextlib
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from flip.config import merge
from flip.config.derived import world_size
from flip.runs import checkpoint_folder
from flip.runs.errors import FlipError
from flip.runs.rundir import RunDir, read_json
from jobs.host import processes, sessions, slurm_cli
from jobs.slurm.backend import SlurmBackend
from tests.harness.slurm_scene import command_lines, is_owner, parent
from tests.harness.training_run import TrainingRun
from tests.s3.servers import BUCKET
from tests.storm.faults import EVERY

LOOK = 0.1
LONG = 600
"""Seconds between two checks of a run, and maximum time to wait for anything. Faults add up: with the slurmstepd of its
ranks gone, a run may notice a killed rank only after 160 s, and Slurm holds its node for a minute more."""


class GivenUp(Exception):
    """Another run has failed, so the storm ends early."""


@dataclass
class Done:
    """A fault as it happened."""

    strike: object
    seconds: float
    """Since the start of the storm."""
    step: int
    attempt: int
    what: str = ""
    trained: float | None = None
    """Seconds until the next logged step of the run."""
    trouble: str = ""
    intervention: str = ""
    """What a person did, and what ``status`` said before; "" if the run needed none."""
    began: float = field(default_factory=time.monotonic)


class Calm(TrainingRun):
    """The same run undisturbed, on this machine without Slurm, with its data in files."""

    def __init__(self, runs, name):
        self.run = RunDir(runs / "storm" / name)
        self.config = merge.read_config(self.run.config)
        self.world = world_size(self.config)


class StormRun(Calm):
    module = "jobs.worker"

    def __init__(self, scene, name, rng):
        super().__init__(scene.runs, name)
        self.scene = scene
        self.here = scene.here
        self.profile = scene.profile
        self.rng = rng
        self.line = scene.lines[name]
        self.cluster = SlurmBackend(self.profile)
        self.done = []
        self.seen = []
        """Faults; (state, attempt) as ``status`` showed them, in order, without repetitions."""
        self.quiet = threading.Event()
        self.trouble = ""
        self.attempt = 0
        self.cancelled = set()
        """Attempts that a person has cancelled."""

    # -- the storm ---------------------------------------------------------------------------------------------------

    def inject(self, strikes):
        """Inject all faults in order, each at its step, then wait for the end of the run."""
        for strike in strikes:
            self._strike(strike)
        self.wait_state("complete", "failed", seconds=LONG)

    def _strike(self, strike):
        self.wait_step(strike.step)
        self.attempt = self.run.newest_attempt()
        done = Done(strike, self.scene.seconds, self.last_step(), self.attempt)
        self.done.append(done)
        self.scene.say(f"{self.run.name} at step {done.step}: {strike.kind}")
        if self.over():
            raise AssertionError(f"{self.run.name} was over before {strike.kind} at step {strike.step}")
        done.what = EVERY[strike.kind].act(self)
        self.wait(lambda: self.trained_since(done), f"training after {strike.kind}")
        done.trained = time.monotonic() - done.began
        lasted = f"{self.run.name}: {strike.kind} is over after {done.trained:.0f} s"
        self.scene.say(f"{lasted}, attempt {self.run.newest_attempt()}")

    def trained_since(self, done):
        """Whether the run has logged a step since the fault, by a later attempt if the fault ends the attempt."""
        if self.over():
            return True
        n = self.run.newest_attempt()
        if done.strike.kind in LIVELY and n == done.attempt:
            return self.last_step() > done.step
        return n > done.attempt and bool(self.lines(n))

    def watch(self):
        """Record the state of the run from ``status`` until the storm is over."""
        quiet = False
        while not quiet:
            quiet = self.quiet.wait(0.5)
            state = self.state()
            if state.state != "unknown" and (not self.seen or self.seen[-1] != (state.state, state.attempt)):
                self.seen.append((state.state, state.attempt))

    @contextlib.contextmanager
    def hands(self):
        """The lock of the site. A run that waits for it trains slowly, so that it is not over before its fault."""
        self.line.pace = self.scene.SLOW
        with self.scene.hands:
            self.line.pace = self.scene.PACE
            yield

    # -- waiting -----------------------------------------------------------------------------------------------------

    def wait(self, condition, what, seconds=LONG, strict=True):
        end = time.monotonic() + seconds
        while not condition():
            if self.scene.failed:
                raise GivenUp("another run had failed")
            if time.monotonic() > end:
                assert not strict, f"timeout while waiting for {what}\n{self.story()}"
                return
            assert not self.stopped(), f"the run stopped while waiting for {what}\n{self.story()}"
            time.sleep(LOOK)

    def stopped(self):
        """Whether an attempt has ended for good, except by a person."""
        numbers = set(self.run.attempt_numbers()) - self.cancelled
        return any((read_json(self.run.attempt(n) / "end.json") or {}).get("action") == "stop" for n in numbers)

    def wait_queued(self):
        """Wait until Slurm has requeued the job."""

        def queued():
            job = self.job()
            return self.run.newest_attempt() > self.attempt or (job is not None and job.state in slurm_cli.WAITING)

        self.wait(queued, "a requeued job")

    def wait_shown(self, condition, what):
        """Wait until ``condition`` of the state that ``status`` shows is met, and return that state."""
        seen = []

        def met():
            seen.append(self.state())
            return condition(seen[-1])

        self.wait(met, what)
        return seen[-1]

    def wait_end(self):
        """Wait until the attempt with the fault has ended."""
        self.wait(self.ended, f"the end of attempt {self.attempt}")

    def ended(self):
        return (self.run.attempt(self.attempt) / "end.json").exists() or self.run.newest_attempt() > self.attempt

    def wait_steps_of(self, n, count):
        self.wait(lambda: len(self.lines(n)) >= count, f"{count} steps of attempt {n}")

    def over(self):
        return self.run.result.exists()

    # -- state -------------------------------------------------------------------------------------------------------

    def checkpoints(self):
        return checkpoint_folder.checkpoints(self.run)

    def last_step(self):
        """The last logged step of all attempts."""
        return max((line["step"] for n in self.run.attempt_numbers() for line in self.lines(n)), default=0)

    def ranks(self):
        """Rows {rank, pid, node} of the living processes of this run's newest attempt, from /proc; waits until all
        exist."""
        self.wait(lambda: len(self._ranks()) == self.world or self.over(), "all ranks")
        assert not self.over(), f"{self.run.name} was over before {self.done[-1].strike.kind}"
        return self._ranks()

    def _ranks(self):
        rows = []
        n = self.run.newest_attempt()
        for pid, environ in processes.own_environments().items():
            argv = processes.arguments(pid)
            if self.module not in argv or str(self.run.path) not in argv:
                continue
            if processes.AGENT_VARIABLE in environ:
                leads = processes.read_stat(pid)[1][3:4] == [str(pid)]  # its session, as agents do not
                if leads and processes.is_of_attempt(pid, str(self.run.path), n):
                    rows.append({"pid": pid, "node": environ["SLURMD_NODENAME"]})
            elif environ.get("FLIP_ATTEMPT") == str(n) and "RANK" in environ:
                rows.append({"rank": int(environ["RANK"]), "pid": pid, "node": environ["SLURMD_NODENAME"]})
        if all("rank" in row for row in rows):
            return sorted(rows, key=lambda row: row["rank"])
        rows.sort(key=lambda row: (row["node"], row["pid"]))  # agents fork ranks in their order
        return [{**row, "rank": rank} for rank, row in enumerate(rows)]

    @staticmethod
    def alive(pid):
        return sessions.alive(pid, sessions.start_time(pid))

    @staticmethod
    def pending(pid, number):
        """Whether a signal is pending for a process or one of its threads."""
        try:
            rows = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        except OSError:
            return False
        return any(int(rows[key], 16) >> (number - 1) & 1 for key in ("SigPnd", "ShdPnd"))

    def job(self):
        """The run's row in squeue, None if it is not listed."""
        record = read_json(self.run.path / "job.json")
        with self.hands():
            return slurm_cli.queue([record["name"]]).get((record["name"], record["index"]))

    def story(self):
        parts = [super().story(), str(self.seen)]
        for command in (("scontrol", "show", "job"), ("sinfo", "-N", "-h", "-p", "high", "-o", "%N %T %E")):
            try:
                parts.append(self.here.call(*command))
            except FlipError as error:
                parts.append(str(error))
        return "\n".join(parts)

    def job_number(self):
        """Slurm's number of the job. The last task of an array has the number of the array."""
        return slurm_cli.fields_of(self.slurm("scontrol", "show", "job", self.job().id))["JobId"]

    def owners(self, number):
        """Pids of the owners of job ``number``, and of batch shells that become owners, also of earlier starts."""
        both = self._of_first_node(number)
        return {pid for pid in both if parent(pid) not in both}

    def guards(self, number):
        """Pids of the guards of these owners."""
        return self._of_first_node(number) - self.owners(number)

    def _of_first_node(self, number):
        folders = [self.here.site.spool(node) for node in self.here.site.names]
        scripts = {f"{folder}/job{int(number):05d}/slurm_script" for folder in folders}
        return {
            pid
            for pid, words in command_lines().items()
            if (is_owner(words) and scripts.intersection(words)) or (len(words) == 2 and words[1] in scripts)
        }

    def intervene(self, what):
        """Record what a person had to do."""
        self.done[-1].intervention = what
        self.scene.say(f"{self.run.name}: by hand: {what}")

    def slurm(self, *args):
        with self.hands():
            return self.here.call(*args)

    # -- actions -----------------------------------------------------------------------------------------------------

    def disturb(self, faults, share, limit, **options):
        """Inject ``limit`` storage faults; returns when all have happened or the run is over."""
        self.line.plan(faults, share, seed=self.rng.randrange(1 << 30), limit=limit, **options)
        self.wait(
            lambda: sum(self.line.counts[name] for name in faults) >= limit or self.over(), f"{limit} of {faults}"
        )
        injected = ", ".join(f"{self.line.counts[name]} {name}" for name in faults)
        self.line.plan((), 0)
        return f"requests met {injected}"

    def damage(self, newest):
        """Flip one byte in the middle of the largest file of a checkpoint, on disk or on the S3 server."""
        files = newest.record["files"]
        name = max(files, key=lambda name: files[name]["bytes"])
        folder = newest.path
        if "url" in newest.record:
            folder = self.scene.server.folder / BUCKET / newest.record["url"].removeprefix(f"s3://{BUCKET}/")
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)


LIVELY = ("submitted_twice", "storage_restarts", "storage_throttles", "storage_flips", "storage_breaks_off",
          "storage_stalls", "stepd_killed", "batch_stepd_killed", "guard_killed")  # fmt: skip
"""Kinds that do not end the attempt, or not at once."""
