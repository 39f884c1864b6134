"""Tests of plans (requested runs against existing runs), and of ``create_and_submit``: all of a plan or nothing."""

import errno
import fcntl
import os
import stat
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from flip.common.host import Host
from flip.common.yaml_io import dump_yaml, read_yaml
from flip.config import merge
from flip.config.finish import finish
from flip.config.identity import identity
from flip.config.merge import dump, read_config
from flip.config.resolve import dataset_facts, resolve_auto
from flip.config.schema import Init
from flip.runs import checkpoint_folder
from flip.runs.errors import ConfigError, DataError, PermissionDenied, StorageError
from flip.runs.formats import FormatError
from flip.runs.lifecycle import RunState
from flip.runs.rundir import RunDir, read_json, write_json
from jobs.common.cluster_profile import ClusterProfile
from jobs.local import supervisor
from jobs.planning.run_cost import estimate
from jobs.submission import apply
from jobs.submission import plan as planning
from jobs.submission.plan import ExistingRun, PlanOptions
from jobs.submission.snapshot import Snapshot, digest_of
from jobs.submitted_runs import clusters as cluster
from jobs.workloads.training import TrainingWorkload
from tests.harness.job_records import write_formats
from tests.jobs.outcomes import config, wanted

"""Name of a snapshot without files: the digest of its content."""


class Fake:
    """A cluster that records submitted jobs."""

    def __init__(self, states=None):
        self.known = states or {}
        self.jobs = []

    def states(self, runs):
        return {run.path: self.known.get(run.name, RunState("stopped")) for run in runs}

    def submit(self, jobs):
        for job in jobs:
            # The run directory is complete before submission.
            assert job.run.config.exists()
            assert job.run.identity.exists()
        self.jobs += jobs


@pytest.fixture
def snapshot(tmp_path):
    path = tmp_path / "demo" / ".code" / "new"
    path.mkdir(parents=True)
    return Snapshot("new", path, ())


def older_code(folder):
    """The snapshot of an earlier submission, which has the formats of this version."""
    code = write_formats(folder / ".code" / "older")
    return code.rename(code.with_name(digest_of(code)))


def existing(state, stored_identity=None, **fields):
    return ExistingRun(state, "why", identity(config(**fields), "") if stored_identity is None else stored_identity)


def compare(resolved_runs, existing_runs, folder, names=(), **options):
    return planning.compare(resolved_runs, existing_runs, folder, names, PlanOptions(**options))


def decide(state, retry=False, changed="", **fields):
    (action,) = compare([wanted(**fields)], {"a": existing(state)}, "runs", retry=retry, changed=changed).actions
    return action.kind, action.starts


@pytest.mark.parametrize(
    "state, kind, starts, with_retry",
    [
        ("complete", "complete", False, False),
        ("running", "running", False, False),
        ("queued", "queued", False, False),
        ("waiting", "waiting", False, False),
        ("stopped", "stopped", True, True),
        ("unknown", "unknown", False, False),
        ("failed", "failed", False, True),
        ("cancelled", "cancelled", False, True),
    ],
)
def test_plan_derives_action_from_state_of_existing_run(state, kind, starts, with_retry):
    assert decide(state) == (kind, starts)
    assert decide(state, retry=True) == (kind, with_retry)


def test_plan_starts_runs_without_existing_directory():
    plan = compare([wanted("a"), wanted("b", mask="0")], {}, "runs")
    assert [(action.kind, action.starts) for action in plan.actions] == [("new", True)] * 2
    assert plan.cost.samples == 2 * 12_800 and plan.cost.gpu_hours == 0


def test_plan_refuses_run_with_changed_configuration(tmp_path):
    assert decide("complete", mask="0.75") == ("changed", False)
    assert decide("complete", mask="0.75", retry=True) == ("changed", False)
    plan = compare([wanted(mask="0.75")], {"a": existing("complete")}, tmp_path)
    with pytest.raises(ConfigError, match=r"stages.pretrain.mask: '0.5' -> '0.75'.*--changed keep"):
        plan.refuse_changed()
    with pytest.raises(ConfigError, match="is running.*Cancel it first"):
        decide("running", mask="0.75", changed="restart")
    for stored, message in (
        (None, "cannot be read"),
        ({**wanted().identity, "hash": "old"}, "does not match its hash"),
    ):
        (action,) = compare([wanted()], {"a": ExistingRun("stopped", "", stored)}, tmp_path).actions
        assert action.kind == "changed" and message in action.reason


def planned(resolved_runs, existing_runs, names=(), **options):
    """Plan the runs, and return (directory, kind, starts) of each run."""
    plan = compare(resolved_runs, existing_runs, "runs", names, **options)
    return [(action.name, action.kind, action.starts) for action in plan.actions]


def test_plan_continues_fork_with_matching_configuration():
    old, new, newer = (existing("running", mask=mask) for mask in ("0.5", "0.75", "0.9"))
    resolved = wanted(mask="0.75")
    assert planned([resolved], {"a": old}, changed="fork") == [("a-v2", "new", True)]
    assert planned([resolved], {"a": old, "a-v2": new}) == [("a-v2", "running", False)]
    assert planned([resolved], {"a": old, "a-v2": newer}, changed="fork") == [("a-v3", "new", True)]
    # The old values match the original run.
    assert planned([wanted()], {"a": old, "a-v2": new}) == [("a", "running", False)]
    assert planned([resolved, wanted("a-v2")], {"a": old, "a-v2": old}, changed="fork")[0] == ("a-v3", "new", True)
    # a-v2 is a run of the sweep file, not a fork.
    assert planned([resolved], {"a": old, "a-v2": new}, ["a", "a-v2"])[0][:2] == ("a", "changed")
    tenth = {"a": old, "a-v2": old, "a-v10": newer}
    assert planned([resolved], tenth, changed="fork") == [("a-v11", "new", True)]
    stopped = {"a": existing("stopped", mask="0.5"), "a-v2": existing("stopped", mask="0.9")}
    assert planned([resolved], stopped) == [("a-v2", "changed", False)], "the run is stored in its newest fork"
    assert planned([resolved], stopped, changed="restart") == [("a-v2", "changed", True)]
    plan = compare([resolved], {"a": old, "a-v2": newer, "a-v10": new, "b-v2": new}, "runs")
    assert list(plan.dropped) == ["b-v2"] and plan.actions[0].name == "a-v10"


def test_forks_are_grouped_by_run_and_ordered_by_number():
    """All at once: a plan of a thousand runs must not look at all directories for each of them."""
    present = ["a", "a-v10", "a-v2", "a-v2-v3", "a-v", "a-v2x", "b-v2", "c-v2"]
    assert planning.forks(present, {"a", "b", "c-v2"}) == {"a": ["a-v2", "a-v10"], "a-v2": ["a-v2-v3"], "b": ["b-v2"]}


def test_plan_prunes_dropped_runs_on_request_unless_majority(tmp_path):
    existing_runs = {name: existing("complete") for name in "abcd"}
    plan = compare([wanted("a")], existing_runs, tmp_path, ["a", "b"])
    assert list(plan.dropped) == ["c", "d"] and not plan.pruned, "the sweep file contains b, but the request omits it"
    compare([wanted("a")], existing_runs, tmp_path, ["a", "b"], prunes=True).refuse_prune()
    three_runs = {name: existing_runs[name] for name in "abc"}
    with pytest.raises(ConfigError, match="2 of 3 runs"):
        compare([wanted("a")], three_runs, tmp_path, prunes=True).refuse_prune()
    plan = compare([wanted("a")], existing_runs, tmp_path, prunes=True)
    with pytest.raises(ConfigError, match="3 of 4 runs.*more than half.*'b, c, d'.*--allow-prune-majority"):
        plan.refuse_prune()
    plan.refuse_prune(most=True)
    lost = compare([wanted("a")], {**existing_runs, "b": existing("unknown")}, tmp_path, prunes=True)
    with pytest.raises(ConfigError, match="it is unknown whether it runs: why"):
        lost.refuse_prune(most=True)


def test_plan_refuses_to_trash_run_with_pinned_checkpoint(tmp_path):
    existing_runs = {name: existing("stopped") for name in "abcd"}
    base, child, score = (RunDir(tmp_path / name) for name in ("c", "d", ".evaluate/c-1"))
    for run in (base, child, score):
        run.path.mkdir(parents=True)
    both = compare([wanted("a")], existing_runs, tmp_path, ["a", "b"], prunes=True)
    alone = compare([wanted("a")], existing_runs, tmp_path, ["a", "b", "d"], prunes=True)
    checkpoint_folder.pin(base, child, "pretrain", 64)
    both.refuse_pinned()
    with pytest.raises(ConfigError, match=f"a checkpoint of it is needed by {child.path}.*Wait until"):
        alone.refuse_pinned()
    restart = compare([wanted("c", mask="0.75")], existing_runs, tmp_path, list("abcd"), changed="restart")
    with pytest.raises(ConfigError, match=f"needed by {child.path}"):
        restart.refuse_pinned()
    write_json(child.result, {})
    alone.refuse_pinned()
    checkpoint_folder.pin(base, score, "pretrain", 64)
    with pytest.raises(ConfigError, match="needed by .*evaluate/c-1.*To end an evaluation: .* cancel /.*/c-1"):
        both.refuse_pinned()
    score.attempt(score.start_attempt({})).joinpath("end.json").write_text('{"action": "stop", "reason": "data"}')
    both.refuse_pinned()
    next(base.pins.iterdir()).write_text("{")
    with pytest.raises(ConfigError, match="not JSON.*Delete that file"):
        both.refuse_pinned()


def test_plan_names_changed_keys_and_marks_changed_defaults():
    stored = identity(config(), "")
    resolved = wanted(mask="0.75")
    resolved.config.optim.eps = 1e-6
    resolved = replace(resolved, identity=identity(resolved.config, ""), given=frozenset({"stages.pretrain.mask"}))
    (action,) = compare([resolved], {"a": existing("complete", stored)}, "runs").actions
    assert "optim.eps: 1e-08 -> 1e-06, which the sweep does not set: a default moved; " in action.reason
    moved, _, changed = action.reason.partition("; ")
    assert moved.endswith("(optim.eps: 1e-08 -> 1e-06, which the sweep does not set: a default moved")
    assert changed == "stages.pretrain.mask: '0.5' -> '0.75')"
    stored["config"]["optim"]["beta1"] = 0.5
    (action,) = compare([resolved], {"a": existing("complete", stored)}, "runs").actions
    assert "optim.beta1: 0.5 -> 0.9" in action.reason and "does not match its hash: it was edited" in action.reason


@pytest.mark.long
def test_prune_stops_running_run_and_spares_others(field):
    a = field.run("a", step=0.1, total=10_000)
    b = field.run("b", step=0.1, total=10_000)
    field.submit(a, b, parallel=2)
    for run in (a, b):
        field.until_moving(run, 1)
    existing_runs = {"a": ExistingRun("complete"), "b": ExistingRun("running")}
    apply.prune(planning.Plan(field.sweep, [], {"b": existing_runs["b"]}, True), "no longer there")
    (moved,) = (field.sweep.parent / ".trash").glob("*/sweep/b")
    assert not b.path.exists() and read_json(moved / "cancel.json")["why"] == "no longer there"
    assert read_json(moved / "attempts" / "1" / "end.json")["action"] == "stop", "the run ends before it is moved"
    assert field.state(a) == "running" and not [pid for pid in field.left() if str(b.path) in command_of(pid)]
    cluster.request_cancel([a], "the end")
    field.until_state(a, "cancelled")


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_prune_leaves_running_run_in_place_after_timeout(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / "demo" / name).mkdir(parents=True)
    monkeypatch.setattr(apply, "PRUNE_SECONDS", 0.0)
    killed = []
    monkeypatch.setattr(cluster, "cancel", lambda runs, again: killed.append(list(again)))
    plan = planning.Plan(tmp_path / "demo", [], {"a": ExistingRun("running"), "b": ExistingRun("complete")}, True)
    assert apply.prune(plan, "why") == ["a"]
    assert apply.prune(replace(plan, dropped={"a": ExistingRun("running")}), "why") == ["a"]
    assert killed == [[], []], "a run that is still saving is signalled again, not killed"
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["a"]


def test_apply_writes_complete_run_directories_before_submission(tmp_path, snapshot, monkeypatch):
    cluster = Fake()
    folder = tmp_path / "demo"
    plan = compare([wanted("a"), wanted("b", mask="0")], {}, folder)
    runs = [job.run for job in apply.create_and_submit(plan, snapshot, cluster, {"name": "demo"})]
    assert [run.name for run in runs] == ["a", "b"] and [job.snapshot for job in cluster.jobs] == [snapshot.path] * 2
    assert read_config(runs[1].config) == config("0")
    stored = read_json(runs[0].identity)
    assert stored["hash"] == plan.actions[0].wanted.identity["hash"] and stored["code"] == "new"
    assert "omegaconf" in stored["environment"]["packages"]
    monkeypatch.setattr(planning, "states", Fake({"a": RunState("running", 1)}).states)
    scanned = planning.scan_runs(folder, ["a"])
    assert scanned["a"].state == "running" and scanned["a"].identity == stored and list(scanned) == ["a", "b"]


def test_apply_needs_source_of_run_only_until_its_first_checkpoint(tmp_path, snapshot):
    """A source that is gone stops nothing that has checkpoints, and a restart before anything is moved."""
    run_config = config(samples=25_600)
    run_config.init = Init(run=str(tmp_path / "gone"), stage="pretrain", samples=6400, commit="0" * 16)
    resolved = replace(wanted("a"), config=run_config, identity=identity(run_config, ""))
    cluster = Fake()
    folder = tmp_path / "demo"
    run = RunDir(folder / "a")
    run.path.mkdir(parents=True)
    write_json(run.identity, resolved.identity)
    run.config.write_text(dump(run_config))
    present = {"a": ExistingRun("stopped", "", resolved.identity)}
    other = {"a": ExistingRun("stopped", "", wanted("a").identity)}
    restart = compare([resolved], other, folder, changed="restart")
    for plan in (compare([resolved], present, folder), restart):
        with pytest.raises(DataError, match="no longer exists"):
            apply.create_and_submit(plan, snapshot, cluster, {"name": "demo"})
    assert run.path.exists() and not cluster.jobs
    place = checkpoint_folder.folder(run, "pretrain", 12_800, 1)
    place.mkdir(parents=True)
    checkpoint_folder.complete_checkpoint(place, {"stage": "pretrain", "samples": 12_800, "attempt": 1})
    apply.create_and_submit(compare([resolved], present, folder), snapshot, cluster, {"name": "demo"})
    assert [job.run.name for job in cluster.jobs] == ["a"]


def test_apply_leaves_no_partial_directories_after_write_error(tmp_path, snapshot, monkeypatch):
    folder = tmp_path / "demo"
    written = apply.write_json

    def full(path, value):
        if "-b." in str(path):
            raise OSError(28, "No space left on device", str(path))
        written(path, value)

    monkeypatch.setattr(apply, "write_json", full)
    cluster = Fake()
    with pytest.raises(StorageError, match="No space left"):
        apply.create_and_submit(compare([wanted("a"), wanted("b")], {}, folder), snapshot, cluster, {})
    assert sorted(path.name for path in folder.iterdir()) == [".code"] and not cluster.jobs


def test_apply_moves_changed_run_to_trash_on_restart(tmp_path, snapshot):
    cluster = Fake()
    folder = tmp_path / "demo"
    apply.create_and_submit(compare([wanted()], {}, folder), snapshot, cluster, {})
    (folder / "a" / "treasure").write_text("weights")
    existing_runs = planning.scan_runs(folder, ["a"])
    apply.create_and_submit(
        compare([wanted(mask="0.75")], existing_runs, folder, changed="restart"), snapshot, cluster, {}
    )
    assert read_config(folder / "a" / "config.yaml").stages[0].mask == "0.75"
    (trashed,) = (tmp_path / ".trash").glob("*/demo/a/treasure")
    assert trashed.read_text() == "weights"


@pytest.mark.parametrize(
    "state, starts", [("stopped", True), ("failed", True), ("cancelled", True), ("complete", False)]
)
def test_plan_adopts_other_data_only_on_request(state, starts):
    resolved = wanted(data="other")
    existing_runs = {"a": existing(state)}
    plan = compare([resolved], existing_runs, Path("runs"))
    with pytest.raises(ConfigError, match=r"data.manifest: .*or data \(it continues with the new data\)"):
        plan.refuse_changed()
    (action,) = compare([resolved], existing_runs, "runs", changed="data").actions
    assert (action.starts, action.adopts, action.moves) == (starts, starts, False)


def test_plan_refuses_to_adopt_other_changes_or_data_of_running_run():
    (action,) = compare([wanted(data="other", mask="0.75")], {"a": existing("stopped")}, "runs", changed="data").actions
    assert (action.kind, action.starts) == ("changed", False)
    with pytest.raises(ConfigError, match="Cancel it first"):
        compare([wanted(data="other")], {"a": existing("running")}, "runs", changed="data")


def test_apply_records_adopted_data_in_identity_and_config(tmp_path, snapshot):
    folder = tmp_path / "demo"
    cluster = Fake()
    apply.create_and_submit(compare([wanted()], {}, folder), snapshot, cluster, {})
    checkpoint = folder / "a" / "checkpoints" / "pretrain" / "96-1"
    checkpoint.mkdir(parents=True)
    write_json(checkpoint / "commit.json", {"samples": 96, "stage": "pretrain", "attempt": 1, "files": {}})
    resolved = wanted(data="other")
    old = wanted().identity["hash"]
    existing_runs = planning.scan_runs(folder, ["a"])
    apply.create_and_submit(compare([resolved], existing_runs, folder, changed="data"), snapshot, cluster, {})
    stored = read_json(folder / "a" / "identity.json")
    assert stored["hash"] == resolved.identity["hash"] != old
    assert read_config(folder / "a" / "config.yaml") == resolved.config
    (before,) = stored["before"]
    assert (before["samples"], before["hash"]) == (96, old)
    assert [change["key"] for change in before["changes"]] == ["data.manifest"]
    assert [(a.kind, a.starts) for a in compare([resolved], planning.scan_runs(folder, ["a"]), folder).actions] == [
        ("stopped", True)
    ]


def test_apply_keeps_code_of_stopped_run_and_renews_it_on_retry(tmp_path, snapshot):
    folder = tmp_path / "demo"
    resolved = wanted()
    apply.create_and_submit(compare([resolved], {}, folder), snapshot, Fake(), {})
    old = older_code(folder)
    for state, code in (("never started", snapshot.path), ("stopped", old), ("failed", snapshot.path)):
        if state == "never started":
            state = "stopped"  # its canary failed because of the old code
        else:
            RunDir(folder / "a").start_attempt({})
        write_json(folder / "a" / "identity.json", {**resolved.identity, "code": old.name})
        cluster = Fake()
        existing_runs = {"a": ExistingRun(state, "", resolved.identity)}
        apply.create_and_submit(compare([resolved], existing_runs, folder, retry=True), snapshot, cluster, {})
        assert (cluster.jobs[0].snapshot, cluster.jobs[0].host_snapshot) == (code, snapshot.path)
        assert read_json(folder / "a" / "identity.json")["code"] == code.name


def test_run_whose_code_has_another_version_is_refused_before_it_is_queued(tmp_path, snapshot):
    folder = tmp_path / "demo"
    resolved = wanted()
    apply.create_and_submit(compare([resolved], {}, folder), snapshot, Fake(), {})
    RunDir(folder / "a").start_attempt({})
    code = folder / ".code" / "older"
    code.mkdir()
    code = code.rename(code.with_name(digest_of(code)))
    write_json(folder / "a" / "identity.json", {**resolved.identity, "code": code.name})
    cluster = Fake()
    with pytest.raises(FormatError, match="other messages of node agents") as error:
        existing_runs = {"a": ExistingRun("stopped", "", resolved.identity)}
        apply.create_and_submit(compare([resolved], existing_runs, folder), snapshot, cluster, {})
    assert error.value.code == 78 and not cluster.jobs
    assert f"mv {code} {code}.other" in error.value.remedy
    code.rename(f"{code}.other")
    apply.create_and_submit(compare([resolved], existing_runs, folder), snapshot, cluster, {})
    assert cluster.jobs[0].snapshot == snapshot.path


def test_run_that_keeps_older_code_gets_no_unknown_settings(tmp_path, snapshot):
    folder = tmp_path / "demo"
    resolved = wanted()
    apply.create_and_submit(compare([resolved], {}, folder), snapshot, Fake(), {})
    RunDir(folder / "a").start_attempt({})
    old = older_code(folder)
    path = folder / "a" / "config.yaml"
    stored = merge.to_dict(read_config(path))
    del stored["compute"]["loss_tf32"], stored["stages"][0]["schedule"]  # of later versions
    resolved.config.checkpoint.minutes = 77
    for code in (old.name, snapshot.path.name):
        path.write_text(dump_yaml(stored))
        write_json(folder / "a" / "identity.json", {**resolved.identity, "code": code})
        existing_runs = {"a": ExistingRun("stopped", "", resolved.identity)}
        apply.create_and_submit(compare([resolved], existing_runs, folder), snapshot, Fake(), {})
        older = code != snapshot.path.name
        written = read_yaml(path)
        assert ("loss_tf32" not in written["compute"]) is older and ("schedule" not in written["stages"][0]) is older
        assert written["checkpoint"]["minutes"] == 77


@pytest.mark.parametrize("code", ["../../elsewhere", "FOLDER/elsewhere", ".", "", "zz" * 8, 7, None])
def test_apply_ignores_recorded_code_outside_sweep_folder(tmp_path, snapshot, code):
    """Other users may have written identity.json, so a path in it is not trusted."""
    folder = tmp_path / "demo"
    resolved = wanted()
    apply.create_and_submit(compare([resolved], {}, folder), snapshot, Fake(), {})
    RunDir(folder / "a").start_attempt({})
    (tmp_path / "elsewhere").mkdir()
    if isinstance(code, str):
        code = code.replace("FOLDER", str(tmp_path))
    write_json(folder / "a" / "identity.json", {**resolved.identity, "code": code})
    cluster = Fake()
    existing_runs = {"a": ExistingRun("stopped", "", resolved.identity)}
    apply.create_and_submit(compare([resolved], existing_runs, folder), snapshot, cluster, {})
    assert cluster.jobs[0].snapshot == snapshot.path


def test_lock_refuses_sweep_folder_writable_by_other_users(tmp_path, monkeypatch):
    folder = tmp_path / "demo"
    before = os.umask(0)
    try:
        with apply.lock(folder):
            assert folder.stat().st_mode & 0o022 == 0, "the folder is not writable by others under an open umask"
    finally:
        os.umask(before)
    folder.mkdir()  # an unused folder is deleted with the lock
    folder.chmod(0o777)
    with pytest.raises(PermissionDenied, match="every user may write to it.*chmod -R go-w"), apply.lock(folder):
        pass


def test_apply_updates_settings_outside_identity_of_continued_run(tmp_path, snapshot):
    folder = tmp_path / "demo"
    apply.create_and_submit(compare([wanted()], {}, folder), snapshot, Fake(), {})
    resolved = wanted()
    resolved.config.checkpoint.minutes = 77
    resolved.config.data.workers = 3
    existing_runs = planning.scan_runs(folder, ["a"])

    class Looks(Fake):
        def submit(self, jobs):
            (job,) = jobs
            stored = read_config(job.run.config)
            # The stored configuration is updated before submission.
            assert (stored.checkpoint.minutes, stored.data.workers) == (77, 3)

    assert apply.create_and_submit(compare([resolved], existing_runs, folder), snapshot, Looks(), {})


def test_finish_keeps_identity_of_existing_run_on_other_machine(tmp_path, snapshot):
    folder = tmp_path / "demo"
    requested = config()
    requested.data.lanes = 0
    requested.data.buffer = 0
    requested.compute.threads = 0
    requested.compute.precision = requested.compute.attention = "auto"
    big = Host(64, 10**11, bf16=True)
    small = Host(2, 10**8)
    data = dataset_facts(requested)
    first = finish(requested, big, data, [folder / "a"]).config
    resolved = TrainingWorkload("a", first, identity(first, ""), estimate(first, ClusterProfile()))
    apply.create_and_submit(compare([resolved], {}, folder), snapshot, Fake(), {})
    again = finish(requested, small, data, [folder / "a"]).config
    assert identity(again, "")["hash"] == resolved.identity["hash"]
    assert identity(resolve_auto(requested, small, data), "")["hash"] != resolved.identity["hash"]
    assert again.data.buffer == small.memory // 4, "the buffer depends on the memory of the present machine"
    requested.stages[0].batch = 96
    # A different run keeps no stored values.
    assert finish(requested, small, data, [folder / "a"]).config == resolve_auto(requested, small, data)
    (folder / "a" / "config.yaml").write_text("{")
    assert finish(requested, small, data, [folder / "a"]).config == resolve_auto(requested, small, data)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_lock_reports_file_system_without_locks(tmp_path, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(number, os.strerror(number))))
    pattern = "demo: this file system has no locks .*-o flock, or choose another runs root with FLIP_RUNS"
    with pytest.raises(ConfigError, match=pattern), apply.lock(tmp_path / "demo"):
        pass
    with pytest.raises(ConfigError, match=pattern):
        supervisor.take_lock(tmp_path / "demo")
    assert not supervisor.is_served(tmp_path / "demo")
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    with pytest.raises(StorageError, match="Input/output error"), apply.lock(tmp_path / "demo"):
        pass


def test_lock_refuses_concurrent_submit(tmp_path):
    with apply.lock(tmp_path / "demo"):
        with pytest.raises(ConfigError, match="another command is at work"), apply.lock(tmp_path / "demo"):
            pass
        assert stat.S_ISREG((tmp_path / "demo" / ".lock").stat().st_mode)
    with apply.lock(tmp_path / "demo"):
        pass
