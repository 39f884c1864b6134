"""Tests on a real Slurm that a run with node agents goes on in its job after a fault, and otherwise ends as without.

Ranks are scripted (tests/slurm/scripted.py), two nodes with one rank each.
"""

import os
import signal
import time

import pytest

from flip.common.shutdown import ORPHAN_GRACE_SECONDS
from flip.runs.rundir import read_json
from jobs.common.job import JobResources
from jobs.host import processes
from jobs.slurm.backend import SlurmBackend
from tests.harness.common import wait_until
from tests.harness.leftovers import Leftovers
from tests.harness.slurm_scene import SlurmScene, profile, slurm
from tests.harness.training_run import TrainingRun, configuration
from tests.jobs.host.agents.task import processes_of
from tests.slurm.agent_cases import CASES, IN_CI, ONE_NODE, SPARE, lost_first_node, lost_node, lost_node_is_back
from tests.slurm.scenarios import AGAIN, GRACE, HERE, LONG, SHORT, WAITING_MINUTE
from tests.slurm_site import require
from tests.synthetic import make_dataset, make_tokenizer
from tests.verdicts import check_equal, check_ids

pytestmark = pytest.mark.slurm
UNREACHABLE = """sed -i 's/"port": [0-9]*/"port": 9/' "$FLIP_RUN/attempts/$FLIP_ATTEMPT/coordinator.json" || :"""
"""A setup line that lets agents search for the owner where nobody listens."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    require(False)
    folder = tmp_path_factory.mktemp("s")
    with slurm(folder, **HERE, node_timeout=8) as (cluster, squeue):
        cluster.set_grace(0)
        yield cluster, squeue, folder


@pytest.fixture
def scene(site, request, tmp_path_factory):
    cluster, squeue, folder = site
    name = request.node.name.replace("[", "-").strip("]")
    scene = SlurmScene(cluster, squeue, folder, name)
    scene.left = Leftovers(tmp_path_factory.mktemp("t"))
    scene.env = {"TMPDIR": str(scene.left.temporary)}
    yield scene
    scene.close()


def submit(scene, play=AGAIN, **fields):
    scene.submit(play, agents=True, **fields)
    scene.ready()


def end(scene):
    """Wait for the end of the job; returns (causes of the attempts, restarts of the job, state of the run)."""
    scene.over()
    (run,) = scene.runs
    # An agent whose task was killed gives its ranks this time to save.
    wait_until(lambda: not processes_of(run), "the end of its processes", ORPHAN_GRACE_SECONDS + 20)
    assert scene.left.find() == []
    record = scene.record()
    ends = [read_json(run.attempt(n) / "end.json") or {} for n in run.attempt_numbers()]
    return [row.get("cause") for row in ends], int(record["job"]["Restarts"]), record["end"]["state"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == IN_CI else pytest.mark.slow) for name in CASES]
)
def test_case_of_agents_ends_as_on_the_simulated_slurm(scene, name):
    case = CASES[name]
    scene.patience = 300.0
    submit(scene, case.play, hours=case.hours, shape=case.shape, **case.options)
    before = scene.nodes()
    try:
        case.act(scene)
        causes, restarts, state = end(scene)
        assert (restarts, state) == (case.restarts, case.state)
        assert causes[0] in (case.causes[0], *case.also) and tuple(causes[1:]) == case.causes[1:]
        (run,) = scene.runs
        starts = [read_json(run.attempt(n) / "start.json") for n in run.attempt_numbers()]
        if case.worlds:
            assert tuple(start["world"] for start in starts) == case.worlds
        if not case.restarts:
            assert {start["job"] for start in starts} == {starts[0]["job"]}
        if case.shape == SPARE and not case.restarts:
            assert (scene.facts(0, 2)["node"] == before[0]) and scene.facts(1, 2)["node"] not in before
        if name == IN_CI:
            assert [scene.facts(rank, 3)["node"] for rank in (0, 1)] == before, "the ranks keep their nodes"
        if case.act is lost_node_is_back:
            assert scene.record()["job"]["ExitCode"] == "0:0"
            errors = (run.logs / "2" / "job.err").read_text()
            assert "srun was killed: all node agents have left" in errors
    finally:
        if case.act in (lost_node, lost_first_node):
            for node in before:
                scene.here.bring_back(node)


@pytest.mark.slow
def test_stopped_rank_counts_as_hung_and_run_goes_on(scene):
    submit(scene)
    os.kill(scene.facts(0)["pid"], signal.SIGSTOP)
    assert end(scene) == (["hang", "complete"], 0, "complete")


@pytest.mark.slow
def test_suspended_run_goes_on(scene):
    """Slurm stops and continues all processes of the job, one after another."""
    submit(scene, {"steps": 20 * SHORT})
    scene.call("scontrol", "suspend", scene.id())
    time.sleep(6.0)
    scene.call("scontrol", "resume", scene.id())
    assert end(scene) == (["complete"], 0, "complete")


@pytest.mark.slow
def test_stopped_agent_is_replaced(scene):
    submit(scene)
    os.kill(scene.agent(1), signal.SIGSTOP)
    assert end(scene) == (["node", "complete"], 0, "complete")


@pytest.mark.slow
def test_crash_loop_restarts_once_here_then_by_requeue_and_stops(scene):
    scene.submit({"exit": 1}, agents=True)
    assert end(scene) == (["crash", "crash", "crash"], 1, "failed")


@pytest.mark.slow
@pytest.mark.parametrize("grace", [0, GRACE])
def test_preempted_run_saves_and_is_requeued(scene, grace):
    scene.here.set_grace(grace)
    try:
        submit(scene)
        scene.preempt()
        causes, restarts, state = end(scene)  # after a grace period, Slurm starts the complete run once more
        assert (causes, state) == (["stopped", "complete"], "complete") and 1 <= restarts <= 2
    finally:
        scene.here.set_grace(0)


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [[], ["USR2", "TERM", "USR1"]])
def test_run_at_its_time_limit_is_requeued(scene, ignored):
    """Ranks that obey the warning save; others are killed with the owner, which has requeued the job."""
    scene.patience = 300.0
    scene.submit({**AGAIN, "ignore": ignored}, agents=True, hours=WAITING_MINUTE, signal_seconds=30)
    causes, restarts, state = end(scene)
    assert (restarts, state) == (1, "complete") and causes in (["stopped", "complete"], ["timeout", "complete"])


@pytest.mark.slow
def test_run_goes_on_without_a_break_after_kill_of_guard(scene):
    submit(scene, {"steps": 20 * SHORT})
    owner, guard = scene.owner_and_guard()
    os.kill(guard, signal.SIGKILL)
    scene.until(lambda: guard not in scene.owner_and_guard() and len(scene.owner_and_guard()) == 2, "another guard")
    assert scene.owner_and_guard()[0] == owner
    assert end(scene) == (["complete"], 0, "complete")


@pytest.mark.slow
def test_job_whose_batch_step_was_killed_without_srun_is_requeued_by_a_task(scene):
    submit(scene, shape=ONE_NODE)
    scene.kill_batch_step(spared="srun")
    assert end(scene) == (["stopped", "complete"], 1, "complete")


@pytest.mark.slow
def test_code_of_ranks_counts_although_a_task_was_killed_before(scene):
    """srun ends with the highest code of its tasks: 137."""
    submit(scene, {"steps": LONG, "save": 1.0, "attempts": {"2": {"exit": 65}}}, shape={"spares": 1})
    task = int(processes.read_stat(scene.agent(1))[1][1])
    os.kill(task, signal.SIGKILL)
    assert end(scene) == (["node", "data"], 0, "failed")
    assert read_json(scene.runs[0].attempt(2) / "end.json")["code"] == 65
    assert scene.record()["job"]["ExitCode"] == "65:0"


@pytest.mark.slow
@pytest.mark.parametrize("is_back", [False, True])
def test_spare_node_replaces_silent_one_when_slurm_has_noticed(scene, is_back):
    """No connection ends: all processes of the node are stopped. One that is back is not used, and Slurm kills its
    task, which is no failure of the job."""
    submit(scene, {"steps": LONG, "save": 1.0, "attempts": {"2": {"steps": 10 * SHORT}}}, shape={"spares": 1})
    first, lost = (scene.facts(rank)["node"] for rank in (0, 1))
    scene.here.silence(lost)
    try:
        scene.ready(2)
        errors = (scene.runs[0].logs / "1" / "job.err").read_text()
        assert f"lost {lost}: silent, and the scheduler has taken its node away" in errors
    finally:
        if is_back:
            scene.here.end_silence(lost)
        else:
            scene.here.lose(lost)
    assert end(scene) == (["node", "complete"], 0, "complete")
    assert scene.record()["job"]["ExitCode"] == "0:0" and scene.facts(0, 2)["node"] == first
    scene.here.bring_back(lost)


@pytest.mark.slow
def test_agents_that_cannot_reach_the_owner_leave_ranks_to_srun(scene):
    """They search for 60 s."""
    scene.patience = 240.0
    scene.submit({"steps": SHORT}, agents=True, cpus=1, setup=[UNREACHABLE])
    causes, restarts, state = end(scene)
    assert (restarts, state) == (0, "complete") and causes[-1] == "complete"


@pytest.mark.slow
def test_node_lost_by_ranks_of_srun_in_elastic_job_is_no_crash(scene):
    """No agent reaches the owner. The job keeps running without the lost node."""
    scene.patience = 300.0
    scene.submit(AGAIN, agents=True, shape={"spares": 1}, peer_seconds=2, setup=[UNREACHABLE])
    scene.ready()
    lost = scene.facts(1)["node"]
    scene.here.lose(lost)
    scene.ready(2)
    causes, restarts, state = end(scene)
    scene.here.bring_back(lost)
    assert (causes, restarts, state) == (["node", "complete"], 1, "complete")


class SlurmTrainingRun(TrainingRun):
    """A training of two ranks on two nodes of a real Slurm, with node agents."""

    def __init__(self, folder, name, config, temporary):
        super().__init__(folder, name, config)
        self.left = Leftovers(temporary)
        self.env["TMPDIR"] = str(temporary)

    def open(self):
        (self.run.path / "calls").mkdir()  # of the site's scontrol
        return SlurmBackend(profile(agents=True))

    def shape(self):
        resources = self.config.resources
        fields = {"hours": 0.5}
        if resources.least_nodes:  # the wall limit is near enough to go on with fewer nodes
            fields = {"hours": 0.25, "least_nodes": resources.least_nodes, "usable": (1, 2)}
        return JobResources(nodes=2, processes=1, cpus=1, **fields)

    def ranks(self):
        """Rows {pid} of the ranks: children of agents."""
        pids = [pid for pid in processes_of(self.run) if is_agent(pid)]
        return [{"pid": pid, "rank": 0} for pid in pids if is_agent(int(processes.read_stat(pid)[1][1]))]


def is_agent(pid):
    """Whether a process is an agent, or a rank that it has forked."""
    return any(word.endswith("node_agent") for word in processes.arguments(pid))


@pytest.mark.slow
def test_training_has_same_bits_after_faults_in_its_job(site, tmp_path, tmp_path_factory):
    data = make_dataset(tmp_path / "data", samples=200, shards=3, chunk=4, classes=8)
    make_tokenizer(data / "tokenizer.json")
    config = configuration(data, 2)
    calm, stormy = (
        SlurmTrainingRun(tmp_path, name, config, tmp_path_factory.mktemp("t")) for name in ("calm", "stormy")
    )
    calm.submit()
    calm.wait_over()
    stormy.submit()
    for n, step, fault in ((1, 7, "killed rank"), (2, 12, "killed agent"), (3, 20, "stopped rank")):
        stormy.wait_step(step, n)
        pid = stormy.ranks()[0]["pid"]
        stormy.left.note(row["pid"] for row in stormy.ranks())
        if fault == "killed agent":
            pid = int(processes.read_stat(pid)[1][1])
        os.kill(pid, signal.SIGSTOP if fault == "stopped rank" else signal.SIGKILL)
        start = time.monotonic()
        stormy.wait_step(1, n + 1)
        print(f"{time.monotonic() - start:.1f} s from a {fault} to the next step")
        assert stormy.left.find(n + 1) == [], fault
    stormy.wait_over()
    causes = [read_json(stormy.run.attempt(n) / "end.json")["cause"] for n in stormy.run.attempt_numbers()]
    assert causes == ["crash", "node", "hang", "complete"]
    jobs = [read_json(stormy.run.attempt(n) / "start.json") for n in stormy.run.attempt_numbers()]
    assert len({row["job"] for row in jobs}) == 1 and not any("restarts" in row for row in jobs), "no requeue"
    for run in (calm.run, stormy.run):
        wait_until(lambda run=run: not processes_of(run), "the end of its processes", 60.0)
    assert (calm.left.find(), stormy.left.find()) == ([], [])
    check_equal(calm, stormy)


@pytest.mark.slow
def test_training_keeps_its_order_with_fewer_nodes_of_its_range_and_back(site, tmp_path, tmp_path_factory):
    """It goes on in its job on one node, with twice the samples per rank, and on two nodes after a requeue."""
    cluster, _, _ = site
    data = make_dataset(tmp_path / "data", samples=200, shards=3, chunk=4, classes=8)
    make_tokenizer(data / "tokenizer.json")
    config = configuration(data, 1)
    config.resources.nodes, config.resources.least_nodes = 2, 1
    arena = SlurmTrainingRun(tmp_path, "ranged", config, tmp_path_factory.mktemp("t"))
    arena.submit()
    arena.wait_step(7)
    environs = [processes.own_environments()[row["pid"]] for row in arena.ranks()]
    (lost,) = [environ["SLURMD_NODENAME"] for environ in environs if environ["SLURM_NODEID"] == "1"]
    cluster.lose(lost)
    arena.wait_step(16, 2)
    cluster.bring_back(lost)
    job = read_json(arena.run.attempt(2) / "start.json")["job"]
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    arena.wait_over()
    causes = [read_json(arena.run.attempt(n) / "end.json")["cause"] for n in arena.run.attempt_numbers()]
    starts = [read_json(arena.run.attempt(n) / "start.json") for n in arena.run.attempt_numbers()]
    assert (causes, [start["world"] for start in starts]) == (["node", "stopped", "complete"], ["2", "1", "2"])
    assert [start["job"] for start in starts] == [job] * 3 and "restarts" in starts[2]
    check_ids(arena)
