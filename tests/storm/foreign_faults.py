"""Faults of the foreign site: what its administrators and users do, and kills of Slurm's own processes on a node.

They are written like those of `tests.storm.faults`. A fault after which a person must act does what `status` or
`explain` says, and records it.
"""

import time

from flip.runs.errors import FlipError
from jobs.reporting import run_details
from tests.storm.faults import FOREIGN, _kill, kind
from tools.sandbox import processes

HANGS = (6, 14)
"""Seconds for which slurmctld does not answer; commands wait for ten."""
SITE = (FOREIGN,)


# -- the scheduler and its administrators ----------------------------------------------------------------------------


@kind(22, sites=SITE)
def prolog_failed(run):
    """The prolog of the next start fails on a node, which Slurm drains; the administrator resumes the node."""
    flag = run.scene.fail_prolog(run.job_number())
    killed = _kill(run)
    run.wait(lambda: not flag.exists(), "a failed prolog")
    run.wait(run.scene.resume_drained, "a drained node")
    return f"{killed}, then the prolog of the next start fails on a node, which is drained and resumed"


@kind(22, sites=SITE)
def node_down(run):
    row = run.rng.choice(run.ranks())
    run.slurm("scontrol", "update", f"NodeName={row['node']}", "State=DOWN", "Reason=storm")
    run.wait_queued()
    try:
        run.slurm("scontrol", "update", f"NodeName={row['node']}", "State=RESUME")
    except FlipError as error:  # its slurmd has registered meanwhile, which brings it back (ReturnToService)
        if "Invalid node state" not in str(error):
            raise
    run.wait_end()
    return f"the node of rank {row['rank']} is set down, and resumed when the job is queued"


@kind(25, sites=SITE)
def controller_hung(run):
    """No command is answered meanwhile, as during an outage of squeue."""
    seconds = run.rng.choice(HANGS)
    with run.hands():
        run.scene.stop_answers(True)
        try:
            killed = _kill(run)
            time.sleep(seconds)
        finally:
            run.scene.stop_answers(False)
    run.wait_end()
    return f"slurmctld does not answer for {seconds} s; meanwhile {killed}"


@kind(14, sites=SITE)
def requeued(run):
    run.slurm("scontrol", "requeue", run.job().id)
    run.wait_end()
    return "scontrol requeue"


@kind(16, sites=SITE, shows=("queued",))
def held(run):
    """A person holds the job, and later releases it as `explain` says."""
    run.slurm("scontrol", "requeuehold", run.job().id)
    state = run.wait_shown(lambda state: state.needs, "a held job")
    command = run_details.explain(run.run)["next"]["what"].split("`")[1]
    run.slurm(*command.split())
    run.intervene(f"`{command}`; status: {state.state}, {state.reason}")
    run.wait_end()
    return "scontrol requeuehold"


@kind(24, sites=SITE, shows=("cancelled", "stopped", "queued"))
def scancelled(run):
    """A person cancels the job, and later submits the run again.

    If KillWait (5 s here) ends before the owner has recorded the end, `status` shows what Slurm says of the job.
    """
    number = run.job_number()
    run.cancelled.add(run.attempt)
    run.slurm("scancel", run.job().id)  # the number of an array's last task is that of the array: it would end all
    state = run.wait_shown(_is_cancelled, "a cancelled run")
    run.wait(lambda: not run.owners(number), "the end of the job")
    run.scene.resubmit(run.run.name, "--retry")
    run.intervene(f"submitted again with --retry; status: {state.state}, {state.reason}")
    return "scancel"


def _is_cancelled(state):
    return state.state == "cancelled" or (state.state == "stopped" and "cancelled in Slurm" in state.reason)


@kind(14, sites=SITE)
def step_cancelled(run):
    run.wait(lambda: run.scene.rank_step(run.job().id), "the step of all ranks")
    run.slurm("scancel", f"{run.job().id}.{run.scene.rank_step(run.job().id)}")
    run.wait_end()
    return "scancel of the step of all ranks"


# -- processes of a node ---------------------------------------------------------------------------------------------


@kind(6, sites=SITE)
def batch_stepd_killed(run):
    """Kill Slurm's parent of the owner. The run goes on until slurmctld misses the step, when it next asks the
    node for its steps."""
    number = run.job_number()
    with run.hands():
        (stepd,) = run.scene.stepds(number)["batch"]
        processes.kill([stepd])
    return "SIGKILL to the slurmstepd of the batch script"


@kind(6, sites=SITE)
def stepd_killed(run):
    """Kill Slurm's parent of ranks on one node. They go on; when they have ended, the owner ends srun, which would
    wait for ever. If an earlier fault has killed it in the same attempt, a rank is killed."""
    number = run.job_number()
    with run.hands():
        steps = run.scene.stepds(number)
        of_ranks = [process for step in steps if step.isdigit() for process in steps[step]]
        if not of_ranks:
            return f"no slurmstepd of ranks is left: {_kill(run)}"
        processes.kill([run.rng.choice(of_ranks)])
    return "SIGKILL to the slurmstepd of ranks on a node"


@kind(16, sites=SITE)
def interpreter_missing(run):
    """The Python of the batch script is missing at the next start."""
    flag = run.scene.hide_interpreter(run.run.name)
    killed = _kill(run)
    run.wait(lambda: not flag.exists(), "a failed start")
    return f"{killed}, then the next start does not find its Python"
