"""A run that somebody cancels while it is being submitted: the later word is the one that counts."""

import pytest

from flip.runs.rundir import RunDir, create_json, read_json
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import Job
from jobs.local import backend as local
from jobs.planning import plan as planning
from jobs.slurm import backend as slurm
from jobs.submission import apply as folder
from jobs.submission.snapshot import Snapshot
from tests.jobs.outcomes import wanted

WHO = {"who": "ann", "why": "not needed"}


@pytest.fixture(params=["local", "slurm"])
def cluster(request, commands, monkeypatch):
    """Takes what it gets and starts nothing."""
    monkeypatch.setattr(local, "start_supervisor", lambda *_: None)
    commands("sbatch", 'echo "Submitted batch job 57"')
    commands("srun", "")
    commands("scontrol", "echo 'ClusterName = far'")
    commands("squeue", "")
    kind = {"local": local.LocalBackend, "slurm": slurm.SlurmBackend}[request.param]
    return kind(ClusterProfile(name="here", kind=request.param))


@pytest.fixture
def sweep(tmp_path):
    """``sweep(*names, **words)``: the plan for these runs of the sweep."""
    place = tmp_path / "demo"
    (place / ".code" / "new").mkdir(parents=True)

    def plan(*names, **words):
        wants = [wanted(name) for name in names]
        return planning.plan(wants, planning.scan_runs(place, names), place, **words)

    plan.place, plan.snapshot = place, Snapshot("new", place / ".code" / "new", 1, 1, ())
    return plan


def apply(sweep, plan, cluster):
    """Names of the jobs that are handed over."""
    return [job.run.name for job in folder.apply(plan, sweep.snapshot, cluster, {})]


def test_one_that_was_cancelled_since_it_was_planned_is_left_alone(sweep, cluster):
    apply(sweep, sweep("a", "b"), cluster)
    before = read_json(sweep.place / "a" / "job.json")
    plan = sweep("a", "b")
    assert [action.kind for action in plan.starting] == ["stopped"] * 2
    create_json(sweep.place / "a" / "cancel.json", WHO)
    assert apply(sweep, plan, cluster) == ["b"] and folder.cancelled_meanwhile(plan) == ["a"]
    assert read_json(sweep.place / "a" / "cancel.json") == WHO and read_json(sweep.place / "a" / "job.json") == before


def test_one_that_was_cancelled_before_starts_with_retry(sweep, cluster):
    apply(sweep, sweep("a"), cluster)
    create_json(sweep.place / "a" / "cancel.json", WHO)
    assert apply(sweep, sweep("a"), cluster) == []
    plan = sweep("a", retry=True)
    assert apply(sweep, plan, cluster) == ["a"]
    assert folder.cancelled_meanwhile(plan) == [] and not (sweep.place / "a" / "cancel.json").exists()


def test_a_new_one_that_is_cancelled_before_it_is_handed_over_stays_cancelled(sweep, cluster, monkeypatch):
    plan, submit = sweep("a", "b"), cluster.submit

    def slowly(jobs):
        create_json(jobs[0].run.cancel, WHO)
        submit(jobs)

    monkeypatch.setattr(cluster, "submit", slowly)
    assert apply(sweep, plan, cluster) == ["a", "b"]
    assert folder.cancelled_meanwhile(plan) == ["a"] and read_json(sweep.place / "a" / "cancel.json") == WHO
    assert cluster.states([RunDir(sweep.place / "a")])[sweep.place / "a"].state == "cancelled"


def test_one_that_is_begun_again_has_a_new_directory_and_no_cancel(sweep, cluster):
    apply(sweep, sweep("a"), cluster)
    create_json(sweep.place / "a" / "cancel.json", WHO)
    want = wanted("a", mask="0.75")
    plan = planning.plan([want], planning.scan_runs(sweep.place, ["a"]), sweep.place, changed="restart")
    assert apply(sweep, plan, cluster) == ["a"] and folder.cancelled_meanwhile(plan) == []


def test_it_is_the_new_order_that_is_no_longer_cancelled(tmp_path, cluster, monkeypatch):
    """A supervisor that looks in between must not start what the old job.json says."""
    run, seen = RunDir(tmp_path / "demo" / "a"), []
    run.path.mkdir(parents=True)
    create_json(run.cancel, WHO)
    module = local if isinstance(cluster, local.LocalBackend) else slurm
    write = module.write_json

    def written(path, value):
        seen.extend([run.cancel.exists()] if path.name == "job.json" else [])
        write(path, value)

    monkeypatch.setattr(module, "write_json", written)
    cluster.submit([Job(run, tmp_path, uncancels=True)])
    assert seen == [True] and not run.cancel.exists()
