"""The owner of a job in this process: its scheduler and the end of its step are written by a test."""

from flip.runs.rundir import read_json
from jobs.host.failed_starts import FailedStarts
from jobs.host.job import JobOptions, Owner
from jobs.host.scheduler import RUNNING, JobSeen, Scheduler

NODE = "n7"
ON_NODES = JobSeen(RUNNING, failed=FailedStarts())


class WrittenStep:
    """In place of subprocess.Popen: a step that ends with a code after a number of polls."""

    pid = 4711

    def __init__(self, code, polls=0):
        self.signals = []
        self._code = code
        self._polls = polls

    def poll(self):
        if self._polls:
            self._polls -= 1
            return None
        return self._code

    def wait(self, seconds):
        """It ends after a number of polls, at once."""

    def send_signal(self, number):
        self.signals.append(number)


class SilentGuard:
    """In place of ``jobs.host.guard.Guard``: it only keeps the ``facts`` of the owner."""

    def __init__(self, on_gone, on_silent):
        self.facts = {}

    def say(self, **facts):
        self.facts.update(facts)

    def beat(self):
        """Nothing looks at an owner in this process."""

    def hurry(self):
        """Nothing looks at an owner in this process."""


class WrittenScheduler(Scheduler):
    """``code``: of the step of each attempt. ``play()`` is called as the step."""

    def __init__(self, code=0, seen=ON_NODES, play=None):
        self.seen = seen
        """The answer from now on; a test or ``play`` changes it."""
        self.did = []
        """What was done to the job, each as a tuple, in order."""
        self.steps = []
        """The arguments of the batch script of each step."""
        self.refusal = None
        """The error of ``requeue``."""
        self.answers_in = 0
        """Unanswered queries from now on."""
        self.polls = 0
        """For how many polls a step runs."""
        self._code = code
        self._play = play

    def see(self, deadline=30.0):
        if self.answers_in:
            self.answers_in -= 1
            return JobSeen()
        return self.seen

    def requeue(self, delay, exclude, attempt, urgent=False, failed=None):
        self.did.append(("requeue", delay, exclude, attempt))
        if self.refusal is not None:
            raise self.refusal
        return "requeued"

    def held_nodes(self, seen):
        return None

    def delay_start(self, delay):
        self.did.append(("delay", delay))
        return ""

    def note_failed_start(self, failed, patience=0.0):
        self.did.append(("note", *failed))

    def nodes_without(self, node, previous):
        return [node]

    def end_leftovers(self, path, n):
        self.did.append(("end leftovers", n))

    def start_step(self, argv, environ, logs, name="job"):
        self.steps.append(list(argv[2:]))
        if self._play is not None:
            self._play()
        return WrittenStep(self._code, self.polls)


def owner(run, scheduler, token=None, trackers=()):
    """The owner of a start of the job of a run whose ranks srun starts."""
    return Owner(run, JobOptions(token, trackers=trackers, script="/nowhere/script"), scheduler, SilentGuard)


def serve(run, scheduler=None, token=None):
    """Own a start of the job to its end; returns its exit code."""
    return owner(run, scheduler or WrittenScheduler(), token).serve()


def end_of(run, n):
    """end.json of an attempt; None without one."""
    return read_json(run.attempt(n) / "end.json")
