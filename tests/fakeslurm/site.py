"""State of the simulated Slurm controller: its settings, nodes and jobs."""

from __future__ import annotations

from dataclasses import dataclass, field

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL")


@dataclass
class Site:
    """Settings of the cluster, in seconds."""

    kill_wait: float = 30.0
    user_signal: bool = True
    """PreemptParameters=send_user_signal."""
    grace: float = 0.0
    mode: str = "REQUEUE"
    """PreemptMode."""
    node_timeout: float = 300.0
    requeue_delay: float = 121.0
    """From a requeue to the next start: the credential of the life before must expire."""
    poll: float = 30.0
    """Limits are looked at so often."""
    min_job_age: float = 300.0
    name: str = "lab"
    requeue: bool = True
    """Whether jobs have Requeue=1."""
    refuses_followers: bool = False
    """Whether sbatch is refused to jobs."""


@dataclass(eq=False)
class Node:
    name: str
    up: bool = True
    """As the controller believes."""
    alive: bool = True
    reachable: bool = True
    """Whether messages of the controller's reach it, and those of its processes the controller."""
    job: Job | None = None
    orphans: list = field(default_factory=list)
    """Lives that go on here, of jobs that were taken from it when it was down."""


@dataclass(eq=False)
class Job:
    id: int
    name: str
    nodes_wanted: int
    """At most, if ``least_nodes`` is set."""
    limit: float
    script: object = None
    """What runs; see ``host.Script``. None: a job of another user, of higher priority, that sleeps."""
    seconds: float = 0.0
    nodelist: tuple = ()
    least_nodes: int = 0
    """Fewest nodes with which it starts; 0: ``nodes_wanted``."""
    no_kill: bool = False
    """Whether it goes on without a lost node (``--no-kill``)."""
    array: int = 0
    index: int | None = None
    gpus: int = 0
    lead: float = 0.0
    """Seconds before the limit for the warning signal."""
    state: str = "PENDING"
    completing: bool = False
    reason: str = "None"
    restarts: int = 0
    eligible: float = 0.0
    start: float | None = None
    end: float | None = None
    preempt_time: float | None = None
    held: bool = False
    """As by ``sbatch --hold``."""
    in_grace: bool = False
    """Slurm's bit that is set with a grace, and looked at when the job completes, in whichever life."""
    excluded: str = ""
    comment: str = ""
    after: int = 0
    """The job that must have ended before (--dependency=afterany)."""
    follows: str = ""
    """FLIP_FOLLOWS in its environment."""
    exit_code: str = "0:0"
    nodes: list = field(default_factory=list)
    life: object = None
    timers: list = field(default_factory=list)

    @property
    def key(self):
        if self.index is None:
            return str(self.id)
        return f"{self.array}_{self.index}"
