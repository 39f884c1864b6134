"""What is wanted against what exists; and the one commit that leaves everything or nothing."""

import stat

import pytest

from flip.config.identity import identity
from flip.config.load import read
from flip.config.resolve import Host, facts, resolve
from flip.exitcodes import ConfigError, StorageError
from flip.rundir import read_json, write_json
from jobs import plan as planning
from jobs.cluster import JobState
from jobs.cost import estimate
from jobs.plan import Found, Wanted
from jobs.profile import Profile
from jobs.snapshot import Snapshot
from tests.jobs.outcomes import config


class Fake:
    """A cluster that remembers what it was given."""

    def __init__(self, states=None):
        self.known, self.jobs = states or {}, []

    def states(self, runs):
        return {run.path: self.known.get(run.name, JobState("stopped")) for run in runs}

    def submit(self, jobs):
        for job in jobs:
            assert job.run.config.exists() and job.run.identity.exists(), "complete before it is handed over"
        self.jobs += jobs


@pytest.fixture
def snapshot(tmp_path):
    path = tmp_path / "demo" / ".code" / "new"
    path.mkdir(parents=True)
    return Snapshot("new", path, 1, 1, ())


def wanted(name="a", **fields):
    made = config(**fields)
    return Wanted(name, made, identity(made, ""), estimate(made, Profile()))


def found(state, want=None, **fields):
    return Found(state, "why", identity(config(**fields), "") if want is None else want)


def decide(state, retry=False, restart=False, **fields):
    (action,) = planning.plan([wanted(**fields)], {"a": found(state)}, "runs", retry, restart).actions
    return action.kind, action.starts


@pytest.mark.parametrize(
    "state, kind, starts, with_retry",
    [
        ("complete", "complete", False, False),
        ("running", "running", False, False),
        ("queued", "running", False, False),
        ("waiting", "waiting", False, False),
        ("stopped", "stopped", True, True),
        ("unknown", "unknown", False, False),
        ("failed", "failed", False, True),
        ("cancelled", "cancelled", False, True),
    ],
)
def test_what_exists_decides(state, kind, starts, with_retry):
    assert decide(state) == (kind, starts)
    assert decide(state, retry=True) == (kind, with_retry)


def test_nothing_there_starts():
    plan = planning.plan([wanted("a"), wanted("b", mask="0")], {}, "runs")
    assert [(action.kind, action.starts) for action in plan.actions] == [("new", True)] * 2
    assert plan.cost.samples == 2 * 12_800 and plan.cost.gpu_hours is None


def test_another_configuration_is_refused(tmp_path):
    assert decide("complete", mask="0.75") == ("changed", False)
    assert decide("complete", mask="0.75", retry=True) == ("changed", False)
    plan = planning.plan([wanted(mask="0.75")], {"a": found("complete")}, tmp_path)
    with pytest.raises(ConfigError, match=r"stages.pretrain.mask: '0.5' -> '0.75'.*--restart changed"):
        plan.refuse_changed()
    with pytest.raises(ConfigError, match="is running.*Cancel it first"):
        decide("running", mask="0.75", restart=True)
    for stored, words in ((None, "cannot be read"), ({**wanted().identity, "hash": "old"}, "no field differs")):
        (action,) = planning.plan([wanted()], {"a": Found("stopped", "", stored)}, tmp_path).actions
        assert action.kind == "changed" and words in action.reason


def test_apply_makes_whole_directories(tmp_path, snapshot, monkeypatch):
    cluster, folder = Fake(), tmp_path / "demo"
    plan = planning.plan([wanted("a"), wanted("b", mask="0")], {}, folder)
    runs = planning.apply(plan, snapshot, cluster, {"name": "demo"})
    assert [run.name for run in runs] == ["a", "b"] and [job.snapshot for job in cluster.jobs] == [snapshot.path] * 2
    assert read(runs[1].config) == config("0")
    stored = read_json(runs[0].identity)
    assert stored["hash"] == plan.actions[0].wanted.identity["hash"] and stored["code"] == "new"
    assert "omegaconf" in stored["environment"]["packages"]
    monkeypatch.setattr(planning, "states", Fake({"a": JobState("running", 1)}).states)
    again, others = planning.observe(folder, ["a"])
    assert again["a"].state == "running" and again["a"].identity == stored and others == ["b"]


def test_an_error_leaves_nothing_half_written(tmp_path, snapshot, monkeypatch):
    folder, written = tmp_path / "demo", planning.write_json

    def full(path, value):
        if "-b." in str(path):
            raise OSError(28, "No space left on device", str(path))
        written(path, value)

    monkeypatch.setattr(planning, "write_json", full)
    cluster = Fake()
    with pytest.raises(StorageError, match="No space left"):
        planning.apply(planning.plan([wanted("a"), wanted("b")], {}, folder), snapshot, cluster, {})
    assert sorted(path.name for path in folder.iterdir()) == [".code"] and not cluster.jobs


def test_changed_goes_to_the_trash_and_is_not_deleted(tmp_path, snapshot):
    cluster, folder = Fake(), tmp_path / "demo"
    planning.apply(planning.plan([wanted()], {}, folder), snapshot, cluster, {})
    (folder / "a" / "treasure").write_text("weights")
    seen, _ = planning.observe(folder, ["a"])
    planning.apply(planning.plan([wanted(mask="0.75")], seen, folder, restart=True), snapshot, cluster, {})
    assert read(folder / "a" / "config.yaml").stages[0].mask == "0.75"
    (kept,) = (tmp_path / ".trash").glob("*/demo/a/treasure")
    assert kept.read_text() == "weights"


def test_a_stopped_run_keeps_its_code_and_a_retried_one_gets_todays(tmp_path, snapshot):
    folder, want = tmp_path / "demo", wanted()
    planning.apply(planning.plan([want], {}, folder), snapshot, Fake(), {})
    old = folder / ".code" / "old"
    old.mkdir()
    for state, code in (("stopped", old), ("failed", snapshot.path)):
        write_json(folder / "a" / "identity.json", {**want.identity, "code": "old"})
        cluster = Fake()
        seen = {"a": Found(state, "", want.identity)}
        planning.apply(planning.plan([want], seen, folder, retry=True), snapshot, cluster, {})
        assert cluster.jobs[0].snapshot == code
        assert read_json(folder / "a" / "identity.json")["code"] == code.name


def test_a_run_that_goes_on_takes_what_is_new_outside_its_identity(tmp_path, snapshot):
    folder = tmp_path / "demo"
    planning.apply(planning.plan([wanted()], {}, folder), snapshot, Fake(), {})
    want = wanted()
    want.config.checkpoint.minutes, want.config.data.workers = 77, 3
    seen, _ = planning.observe(folder, ["a"])

    class Looks(Fake):
        def submit(self, jobs):
            (job,) = jobs
            stored = read(job.run.config)
            assert (stored.checkpoint.minutes, stored.data.workers) == (77, 3), "before the cluster gets it"

    assert planning.apply(planning.plan([want], seen, folder), snapshot, Looks(), {})


def test_another_machine_makes_no_other_run(tmp_path, snapshot):
    folder, asked = tmp_path / "demo", config()
    asked.data.lanes, asked.data.buffer, asked.compute.threads = 0, 0, 0
    asked.compute.precision = asked.compute.attention = "auto"
    big, small = Host(64, 10**11, bf16=True), Host(2, 10**8)
    data = facts(asked)
    first = planning.settle(asked, big, data, folder / "a")
    want = Wanted("a", first, identity(first, ""), estimate(first, Profile()))
    planning.apply(planning.plan([want], {}, folder), snapshot, Fake(), {})
    again = planning.settle(asked, small, data, folder / "a")
    assert identity(again, "")["hash"] == want.identity["hash"] != identity(resolve(asked, small, data), "")["hash"]
    assert again.data.buffer == small.memory // 4, "memory is that of the machine it goes on at"
    asked.stages[0].batch = 96
    assert planning.settle(asked, small, data, folder / "a") == resolve(asked, small, data), "another run: all is new"
    (folder / "a" / "config.yaml").write_text("{")
    assert planning.settle(asked, small, data, folder / "a") == resolve(asked, small, data)


def test_one_submit_at_a_time(tmp_path):
    with planning.lock(tmp_path / "demo"):
        with pytest.raises(ConfigError, match="another submit"), planning.lock(tmp_path / "demo"):
            pass
        assert stat.S_ISREG((tmp_path / "demo" / ".lock").stat().st_mode)
    with planning.lock(tmp_path / "demo"):
        pass
