"""Events of a cluster that affect a run: one short scenario per event. ``recording.py`` plays them on a real Slurm."""

from dataclasses import dataclass, field
from typing import Any

SHORT = 10
LONG = 10**5
"""Steps of a run that finishes, and of one that something else must end."""
GRACE = 6
KILL_WAIT = 5
WAITING_MINUTE = 1 / 60
"""The shortest limit, in hours. Slurm looks at limits every half minute, and was seen to miss the warning of so short a
one: then TERM comes, and the owner requeues. So these are for a quiet machine."""

AGAIN = {"steps": LONG, "save": 1.0, "attempts": {"2": {"steps": SHORT}}}
"""Obeys, and finishes in its second attempt."""
DEAF = {**AGAIN, "ignore": ["TERM", "USR2", "USR1"]}
HERE = {"user_signal": True, "kill_wait": KILL_WAIT}
MUTE = {**HERE, "user_signal": False}
"""Preemption does not send the warning signal."""
WATCHFUL = {**HERE, "node_timeout": 5}
AGENTS = {**HERE, "kill_wait": 15}
"""With node agents the owner ends after the ranks and the agents: a busy machine needs more time."""
OTHER = {**HERE, "accounting": True, "select": "linear"}
"""Another kind of site: accounting, and whole nodes only."""
JOB_SUBMIT = """
function slurm_job_submit(job, partitions, uid)
    if job.time_limit == slurm.NO_VAL then
        slurm.log_user("Site policy: jobs must have a time limit (--time).")
        return slurm.ERROR
    end
    if job.name ~= nil and string.find(job.name, "^requeue_disabled") then
        job.requeue = 0
        if string.find(job.name, "^requeue_disabled_refused") and job.dependency ~= nil then
            slurm.log_user("Site policy: jobs may not submit jobs.")
            return slurm.ERROR
        end
    end
    return slurm.SUCCESS
end
function slurm_job_modify(job, record, partitions, uid)
    return slurm.SUCCESS
end
return slurm.SUCCESS
"""
"""A site's own rules: no job without a time limit; jobs whose name begins with requeue_disabled are never requeued,
whatever they ask for, and those of requeue_disabled_refused have no successor. The name of a scenario's jobs begins
with that of the scenario."""
FOREIGN = {
    **HERE,
    "accounting": True,
    "preempt": "qos",
    "requeue": False,
    "job_submit": JOB_SUBMIT,
    "max_submit": 40,
}
"""A site of another form: accounting, preemption by QOS, JobRequeue=0, job_submit.lua, a limit on submitted jobs. Use
it with grace 0."""


@dataclass(frozen=True)
class Scenario:
    """``act`` submits a run and causes ``event``."""

    event: str
    act: Any
    options: dict = field(default_factory=lambda: HERE)
    grace: int = 0
    mode: str = "REQUEUE"
    """PreemptMode of the partition."""
    ends: tuple = (2, "complete")
    """Attempts and state at the end, as they must be: a recording of something else is refused."""
    torn: bool = False
    """Whether the owner lives to the end of the first attempt is a matter of a second."""
    ci: bool = False
    """Whether ``make test`` plays it on a real Slurm; ``make test-all`` plays them all, the simulated Slurm too."""


SCENARIOS: dict[str, Scenario] = {}


def scenario(event, **fields):
    def add(act):
        SCENARIOS[act.__name__] = Scenario(event, act, **fields)
        return act

    return add


@scenario("nothing; it asks for two GPUs of each node", ends=(1, "complete"))
def finishes(scene):
    scene.submit({"steps": SHORT}, gpus=2)


def preempted(scene, play=AGAIN):
    scene.submit(play)
    scene.ready()
    scene.preempt()
    scene.until(lambda: scene.rows[0]["state"] not in ("RUNNING",), "a reaction")


scenario("a job of higher priority; no grace, warning signal on", ci=True)(preempted)


@scenario("a job of higher priority; no grace, warning signal off", options=MUTE)
def preempted_mute(scene):
    preempted(scene)


@scenario("a job of higher priority; grace, warning signal on", grace=GRACE)
def preempted_grace(scene):
    preempted(scene)


@scenario("a job of higher priority; grace, warning signal off", options=MUTE, grace=GRACE)
def preempted_grace_mute(scene):
    preempted(scene)


@scenario("a job of higher priority; grace; the ranks do not obey the warning, but the TERM after it", grace=GRACE)
def preempted_grace_late(scene):
    preempted(scene, {**AGAIN, "ignore": ["USR2"]})


# torn: ranks and owner are killed simultaneously, but on a busy machine the owner may still act
@scenario("a job of higher priority; no grace; the ranks obey nothing and are killed", torn=True)
def preempted_deaf(scene):
    preempted(scene, DEAF)


@scenario("a job of higher priority, where preemption cancels; no grace, warning signal on", mode="CANCEL")
def preempted_for_good(scene):
    preempted(scene)


@scenario(
    "a job of higher priority, where preemption cancels; no grace; the ranks obey nothing and are killed", mode="CANCEL"
)
def preempted_for_good_deaf(scene):
    preempted(scene, DEAF)


@scenario(
    "a job of higher priority, where preemption cancels; grace, warning signal on",
    mode="CANCEL",
    grace=GRACE,
)
def preempted_for_good_grace(scene):
    preempted(scene)


@scenario(
    "preempted with grace; then scancel; the ranks of the second attempt obey nothing and are killed",
    grace=GRACE,
    ends=(2, "stopped"),
)
def scancelled_after_grace(scene):
    preempted(scene, {**AGAIN, "attempts": {"2": DEAF}})
    scene.ready(2)
    scene.call("scancel", scene.id())


@scenario(
    "a job of higher priority; the run finishes within the grace, and Slurm starts it once more",
    grace=GRACE,
    ends=(1, "complete"),
)
def finished_in_grace(scene):
    scene.submit({**DEAF, "steps": 60})
    scene.ready()
    scene.preempt()


@scenario("SIGKILL to rank 1; the other is ended by srun's --wait", ci=True)
def rank_killed(scene):
    scene.submit(AGAIN, peer_seconds=2)
    scene.ready()
    scene.kill(rank=1)


@scenario("the ranks end with 1 at each start", ends=(3, "failed"))
def crashes(scene):
    scene.submit({"exit": 1})


def lose(scene, rank):
    scene.submit(AGAIN)
    scene.ready()
    node = scene.facts(rank)["node"]
    scene.here.lose(node)
    scene.ready(2)
    scene.over()
    scene.here.bring_back(node)


@scenario(
    "the second node dies; the first, with the batch script and rank 0, notices nothing",
    options=WATCHFUL,
    torn=True,
)
def node_lost(scene):
    lose(scene, rank=1)


@scenario("the first node dies with the batch script; rank 1 notices nothing", options=WATCHFUL)
def batch_host_lost(scene):
    lose(scene, rank=0)


@scenario("scancel --signal=USR2")
def warned(scene):
    scene.submit(AGAIN)
    scene.ready()
    scene.call("scancel", "--signal=USR2", scene.id())


@scenario("scancel --batch --signal=USR1: only the batch shell gets it")
def warned_batch(scene):
    scene.submit(AGAIN)
    scene.ready()
    scene.call("scancel", "--batch", "--signal=USR1", scene.id())


@scenario("scancel --full --signal=USR1: the batch shell, srun and the ranks get it")
def warned_full(scene):
    scene.submit(AGAIN)
    scene.ready()
    scene.call("scancel", "--full", "--signal=USR1", scene.id())


def shell_killed(scene, play=AGAIN):
    scene.submit(play)
    scene.ready()
    scene.kill_shell()


scenario("SIGKILL to the batch shell; the watcher beside the ranks requeues the job")(shell_killed)


@scenario("SIGKILL to the batch shell; accounting, QOS, JobRequeue=0", options=FOREIGN)
def foreign_shell_killed(scene):
    shell_killed(scene)


@scenario("scancel --batch --signal=USR1; accounting, QOS, JobRequeue=0", options=FOREIGN)
def foreign_warned_batch(scene):
    warned_batch(scene)


def limit(scene, ignore, save=1.0):
    scene.patience = 300.0
    scene.submit({**AGAIN, "ignore": ignore, "save": save}, hours=WAITING_MINUTE, signal_seconds=30)


@scenario("the time limit; the ranks obey the warning")
def limit_obeyed(scene):
    limit(scene, [])


@scenario("the time limit; the ranks do not obey the warning, but the TERM after it")
def limit_late(scene):
    limit(scene, ["USR2"], save=3.0)  # the owner asks every second, so it acts before their end


@scenario("the time limit; the ranks obey nothing and are killed")
def limit_deaf(scene):
    limit(scene, ["USR2", "TERM", "USR1"])


def lowered(scene, play):
    """Lower the limit of a running job to one minute, which is less than the lead time of the warning."""
    scene.patience = 400.0
    scene.submit(play, signal_seconds=60)
    scene.ready()
    scene.call("scontrol", "update", f"JobId={scene.id()}", "TimeLimit=1")


@scenario(
    "the time limit is lowered to a minute, which leaves no time to train; the third attempt is quick",
    options=FOREIGN,
    ends=(3, "complete"),
)
def limit_lowered(scene):
    lowered(scene, {"steps": LONG, "save": 1.0, "attempts": {"3": {"steps": SHORT}}})


@scenario("the time limit is lowered to a minute; the ranks obey nothing and are killed", options=FOREIGN)
def limit_lowered_deaf(scene):
    lowered(scene, DEAF)


def scancelled(scene, play=AGAIN):
    scene.submit(play)
    scene.ready()
    scene.call("scancel", scene.id())


scenario("scancel while it runs", ends=(1, "cancelled"))(scancelled)


@scenario("scancel while it runs; the ranks obey nothing and are killed", ends=(1, "stopped"), torn=True)
def scancelled_deaf(scene):
    scancelled(scene, DEAF)


@scenario("scancel while it runs, where squeue --json does not work", ends=(1, "cancelled"))
def scancelled_without_json(scene):
    scene.submit(AGAIN)
    (scene.runs[0].path / "no-json").touch()
    scene.ready()
    scene.call("scancel", scene.id())


@scenario("scancel while it waits", ends=(0, "stopped"))
def scancelled_pending(scene):
    scene.submit(AGAIN, options={"begin": "now+3600"})
    scene.until(lambda: 0 in scene.rows, "a row in the queue")
    scene.call("scancel", scene.id())


@scenario("cancel.json and SlurmCluster.cancel while it runs", ends=(1, "cancelled"))
def cancelled(scene):
    scene.submit(AGAIN)
    scene.ready()
    scene.cancel()


@scenario("scontrol requeue by another user")
def requeued(scene):
    scene.submit(AGAIN)
    scene.ready()
    scene.call("scontrol", "requeue", scene.id())


def element(scene, target, act):
    """Submit two array elements with two nodes each. The job id of the second is the array id."""
    plays = [{"steps": LONG, "save": 1.0}, {"steps": LONG, "save": 1.0}]
    plays[target] = AGAIN
    plays[1 - target] = {"steps": 400}  # runs longer than the event of the other element
    scene.submit(*plays, cpus=16, peer_seconds=1)
    scene.ready()
    act(target)


@scenario("element 0 of an array is preempted")
def first_element_preempted(scene):
    element(scene, 0, scene.preempt)


@scenario("element 1, which has the array's own id, is preempted")
def last_element_preempted(scene):
    element(scene, 1, scene.preempt)


@scenario("SIGKILL to a rank of element 0 of an array")
def first_element_killed(scene):
    element(scene, 0, lambda target: scene.kill(rank=1, index=target))


@scenario("SIGKILL to a rank of element 1, which has the array's own id")
def last_element_killed(scene):
    element(scene, 1, lambda target: scene.kill(rank=1, index=target))


@scenario("a job of higher priority; accounting, whole nodes", options=OTHER)
def other_preempted(scene):
    preempted(scene)


@scenario("a job of higher priority; grace; accounting, whole nodes", options=OTHER, grace=GRACE)
def other_preempted_grace(scene):
    preempted(scene)


@scenario("SIGKILL to rank 1; accounting, whole nodes", options=OTHER)
def other_rank_killed(scene):
    rank_killed(scene)


@scenario("scancel while it runs; accounting, whole nodes", options=OTHER, ends=(1, "cancelled"))
def other_scancelled(scene):
    scancelled(scene)


@scenario("cancel.json and SlurmCluster.cancel; accounting, whole nodes", options=OTHER, ends=(1, "cancelled"))
def other_cancelled(scene):
    cancelled(scene)


@scenario("the warning signal, where the job has Requeue=0: a successor goes on", options=FOREIGN)
def requeue_disabled(scene):
    warned(scene)


@scenario("a job of higher QOS, where the job has Requeue=0: Slurm ends it, a successor goes on", options=FOREIGN)
def requeue_disabled_preempted(scene):
    preempted(scene)


@scenario(
    "the warning signal, where the job has Requeue=0 and sbatch is refused to jobs",
    options=FOREIGN,
    ends=(1, "stopped"),
)
def requeue_disabled_refused(scene):
    warned(scene)


@scenario("SIGKILL to the batch shell, where the job has Requeue=0: a successor goes on", options=FOREIGN)
def requeue_disabled_shell_killed(scene):
    shell_killed(scene)


def with_agents(scene, play=AGAIN, **fields):
    scene.submit(play, agents=True, peer_seconds=2, **fields)
    scene.ready()


@scenario("SIGKILL to rank 1 of a run with node agents: it goes on in its job")
def agents_rank_killed(scene):
    with_agents(scene)
    scene.kill(rank=1)


@scenario(
    "the ranks end with 1 at each start; node agents: first in the job, then by a requeue, then never",
    ends=(3, "failed"),
)
def agents_crash(scene):
    scene.submit({"exit": 1}, agents=True, peer_seconds=2)


@scenario("a job of higher priority; node agents")
def agents_preempted(scene):
    with_agents(scene)
    scene.preempt()
    scene.until(lambda: scene.rows[0]["state"] not in ("RUNNING",), "a reaction")


@scenario("a job of higher priority after a restart in the job; node agents", options=AGENTS, ends=(3, "complete"))
def agents_restarted_preempted(scene):
    with_agents(scene, {"steps": LONG, "save": 1.0, "attempts": {"3": {"steps": SHORT}}})
    scene.kill(rank=0)
    scene.ready(2)
    scene.preempt()


@scenario("scancel while it runs; node agents", options=AGENTS, ends=(1, "cancelled"))
def agents_scancelled(scene):
    with_agents(scene)
    scene.call("scancel", scene.id())


@scenario("scancel --batch --signal=USR1; node agents")
def agents_warned_batch(scene):
    with_agents(scene)
    scene.call("scancel", "--batch", "--signal=USR1", scene.id())


@scenario("SIGKILL to the batch shell; node agents", options=AGENTS)
def agents_shell_killed(scene):
    with_agents(scene, {**AGAIN, "save": 4.0})  # the job ends after the guard has requeued it
    scene.kill_shell()
