"""Tests that submit carries out plans: pruned, restarted, forked and cancelled runs, and errors of the runs folder."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from flip.config.identity import identity
from flip.config.merge import read_config
from flip.runs import checkpoint_folder
from flip.runs.errors import ConfigError
from flip.runs.rundir import RunDir, create_json, read_json, write_json
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import Job
from jobs.local import backend as local
from jobs.slurm import backend as slurm
from jobs.submission import apply as submission
from jobs.submission import plan as planning
from jobs.submission.plan import PlanOptions
from jobs.submission.snapshot import Snapshot
from jobs.submitted_runs import clusters
from tests.jobs.outcomes import wanted


def test_prune_moves_dropped_runs_to_trash_with_consent(desk, typed):
    extended = desk.text + "  other: {seed: 1}\n  last: {seed: 2}\n"
    assert typed(sweep=extended)[0] == 0 and typed.started == ["half", "whole", "other", "last"]
    code, out, _ = typed()
    assert code == 0 and "left alone: last (stopped), other (stopped); --prune moves them to the trash" in out
    code, out, err = typed("--prune")
    assert code == 78 and "moves 2 runs to the trash: last, other" in err and "--yes" in err and not typed.started
    document = json.loads(typed("--prune", "--dry-run", "--json")[1])
    assert [(row["name"], row["prunes"]) for row in document["dropped"]] == [("last", True), ("other", True)]
    assert "moves 2 runs to the trash" in document["question"] and len(typed.there()) == 4
    single_run = desk.text[: desk.text.index("  whole")]
    code, _, err = typed("--prune", "--yes", sweep=single_run)
    assert code == 78 and "3 of 4 runs" in err and len(typed.there()) == 4
    code, out, _ = typed("--prune", "--yes")
    assert code == 0 and out.count("moved to the trash: ") == 2
    assert typed.there() == ["half", "whole"] and typed.trashed() == ["last", "other"]
    assert typed("--prune-most", "--yes", sweep=desk.text.replace("half", "mid"))[0] == 0
    assert typed.there() == ["mid", "whole"] and typed.started == ["mid", "whole"]


def test_json_option_prints_outcome_as_single_document(desk, typed, tmp_path):
    """With --json, standard output is a single document, even if the plan is refused. Hints go to standard error."""
    code, out, err = typed("--json", sweep=desk.text + "  other: {seed: 1}\n")
    assert code == 0 and json.loads(out)["outcome"]["started"] == typed.started == ["half", "whole", "other"]
    assert "next:" in err
    code, out, err = typed("--json", "--prune", "--yes")
    outcome = json.loads(out)["outcome"]
    assert list(outcome["trashed"]) == ["other"] and Path(outcome["trashed"]["other"], "config.yaml").exists()
    assert "restore it with" in err and "next:" not in typed("--json", "--quiet")[2]
    code, out, err = typed("--json", "stages.pretrain.samples=64")
    assert code == 78 and json.loads(out)["outcome"]["started"] == [] and "changed" in err
    code, out, err = typed("--json", "--changed", "restart", "stages.pretrain.samples=64")
    assert code == 78 and json.loads(out)["question"] and "cannot be shown with --json" in err
    assert "next:" not in typed("--quiet")[1] and "half" in typed("--quiet")[1]


def test_root_option_places_runs_in_other_folder(desk, typed, tmp_path):
    assert typed("--root", str(tmp_path / "elsewhere"))[0] == 0 and not typed.there()
    record = read_json(tmp_path / "elsewhere" / "demo" / "half" / "identity.json")
    assert record["hash"] and not desk.runs.exists()


def test_prune_asks_on_terminal_and_respects_refusal(desk, typed, monkeypatch):
    typed(sweep=desk.text + "  other: {seed: 1}\n")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    prompt = Mock(return_value="n")
    monkeypatch.setattr("builtins.input", prompt)
    code, _, err = typed("--prune")
    assert code == 78 and "nothing was done" in err and len(typed.there()) == 3 and not typed.started
    assert prompt.call_args.args == ("This moves 1 run to the trash: other. Go on? [y/N] ",)
    prompt.return_value = "y"
    assert typed("--prune")[0] == 0 and typed.trashed() == ["other"]


def test_restart_asks_for_consent_and_prints_restore_command(desk, typed):
    typed()
    write_json(desk.runs / "demo" / "half" / "result.json", {"run": "half"})
    args = ["--changed", "restart"]
    changed = desk.text.replace("mask: 0.5", "mask: 0.25")
    code, _, err = typed(*args, sweep=changed)
    question = "This moves 1 run to the trash and starts it from zero: half (complete)."
    assert code == 78 and question in err and not typed.trashed() and not typed.started
    assert json.loads(typed(*args, "--dry-run", "--json", sweep=changed)[1])["question"] == question
    code, out, err = typed(*args, "--yes", sweep=changed)
    assert code == 0 and typed.trashed() == ["half"], err
    (line,) = [line for line in out.splitlines() if line.startswith("moved to the trash: half")]
    subprocess.run(line.partition("restore it with: ")[2], shell=True, check=True)
    assert (desk.runs / "demo" / "half-old" / "result.json").exists() and (desk.runs / "demo" / "half").exists()


def test_prune_respects_only_option_and_prints_restore_command(desk, typed):
    typed(sweep=desk.text + "  other: {seed: 1}\n  last: {seed: 2}\n")
    assert "no longer in the sweep" not in typed("--only", "half")[1]
    assert typed("--only", "half", "--prune", "--yes")[0] == 0 and not typed.trashed()
    code, out, _ = typed("--only", "oth*", "--prune", "--yes")
    assert code == 0 and typed.trashed() == ["other"] and typed.there() == ["half", "last", "whole"]
    assert not typed.started
    (line,) = [line for line in out.splitlines() if line.startswith("moved to the trash: other")]
    subprocess.run(line.partition("restore it with: ")[2], shell=True, check=True)
    assert typed.there() == ["half", "last", "other", "whole"]
    code, _, err = typed("--only", "nothing", "--prune")
    assert code == 78 and "no run of the sweep matches" in err


def test_changed_option_keeps_forks_or_restarts_runs(desk, typed):
    typed()
    changed = desk.text.replace("mask: 0.5", "mask: 0.25")
    code, out, err = typed(sweep=changed)
    assert code == 78 and "stages.pretrain.mask: '0.5' -> '0.25')" in err and "--changed keep" in err
    code, out, _ = typed("--changed", "keep", sweep=changed)
    assert code == 0 and "kept as it is (stages.pretrain.mask: '0.5' -> '0.25')" in out
    assert read_config(desk.runs / "demo" / "half" / "config.yaml").stages[0].mask == "0.5" and "half" in typed.started
    code, out, _ = typed("--changed", "fork", sweep=changed + "paper: {half: {small: 50.0}}\n")
    assert code == 0 and "half-v2" in typed.started and typed.there() == ["half", "half-v2", "whole"]
    assert read_config(desk.runs / "demo" / "half-v2" / "config.yaml").stages[0].mask == "0.25"
    sweep_record = read_json(desk.runs / "demo" / "sweep.json")
    assert sweep_record["runs"] == ["half", "half-v2", "whole"] and sweep_record["paper"]["half-v2"] == {"small": 50.0}
    assert typed(sweep=changed)[0] == 0 and typed.started == ["half-v2", "whole"], "later submits continue the fork"
    assert typed("--changed", "keep", sweep=changed)[0] == 0 and typed.started == ["half-v2", "whole"]
    changed_again = changed.replace("0.25", "0.75")
    code, out, _ = typed("--changed", "keep", sweep=changed_again)
    assert code == 0 and "kept as it is (stages.pretrain.mask: '0.25' -> '0.75')" in out
    assert typed.started == ["half-v2", "whole"], "the run is stored in its fork"
    assert typed("--prune", sweep=changed)[0] == 0 and not typed.trashed(), "a fork does not count as a dropped run"
    (desk.runs / "demo" / "whole" / "identity.json").write_text('{"hash": "x", "schema": 2}')
    code, _, err = typed("--changed", "keep", sweep=changed)
    assert code == 78 and "run whole" in err and "cannot be kept: its identity.json is damaged" in err
    assert typed("--changed", "restart", "--yes", sweep=changed_again)[0] == 0
    assert typed.trashed() == ["half-v2", "whole"]
    masks = [read_config(desk.runs / "demo" / name / "config.yaml").stages[0].mask for name in ("half", "half-v2")]
    assert masks == ["0.5", "0.75"]


def test_corrected_class_names_continue_the_run(desk, typed, tmp_path):
    assert typed()[0] == 0
    run = RunDir(desk.runs / "demo" / "half")
    config = read_config(run.config)
    stored = read_json(run.identity)
    before = run.identity.read_bytes()
    assert typed("--only", "half")[0] == 0 and typed.started == ["half"]
    assert read_json(run.identity) == json.loads(before), "an unchanged sweep changes nothing"
    (tmp_path / "names.json").write_text(json.dumps({"names": list("abcdefghij"), "templates": ["the {}"]}))
    corrected = f"evaluate.sets.small.classes={tmp_path}/names.json"
    code, out, err = typed("--only", "half", corrected)
    assert code == 0 and typed.started == ["half"] and "changed" not in out, err
    config = read_config(run.config)
    after = read_json(run.identity)
    assert config.evaluate.sets[0].classes == f"{tmp_path}/names.json"
    assert after == {**stored, **identity(config, stored["code"])} != stored


def test_complete_run_with_other_class_names_is_named_and_left_alone(desk, typed, tmp_path):
    assert typed()[0] == 0
    run = RunDir(desk.runs / "demo" / "half")
    create_json(run.result, {})
    before = run.identity.read_bytes()
    (tmp_path / "names.json").write_text(json.dumps({"names": list("abcdefghij"), "templates": ["the {}"]}))
    code, out, _ = typed("--only", "half", f"evaluate.sets.small.classes={tmp_path}/names.json")
    assert code == 0
    assert not typed.started
    assert "class names of small have changed: its scores have the earlier" in out
    assert run.identity.read_bytes() == before
    assert "class names" not in typed("--only", "half")[1]


def save(run, samples):
    """Save a checkpoint at S = ``samples`` of a run as its first attempt."""
    run.start_attempt({})
    path = checkpoint_folder.folder(run, "pretrain", samples, 1)
    path.mkdir(parents=True)
    (path / "model.safetensors").write_text("weights")
    checkpoint_folder.complete_checkpoint(path, {"stage": "pretrain", "samples": samples, "attempt": 1})


def test_only_keeps_published_numbers_of_other_forks(desk, typed):
    typed()
    changed = desk.text.replace("mask: 0.5", "mask: 0.25") + "paper: {half: {small: 50.0}}\n"
    typed("--changed", "fork", sweep=changed)

    def numbers(*argv, sweep):
        assert typed(*argv, sweep=sweep)[0] == 0
        return read_json(desk.runs / "demo" / "sweep.json")["paper"]

    assert numbers("--only", "whole", sweep=changed) == {"half": {"small": 50.0}, "half-v2": {"small": 50.0}}
    newer = changed.replace("50.0", "60.0")
    assert numbers(sweep=newer) == {"half": {"small": 60.0}, "half-v2": {"small": 60.0}}
    none = changed.replace("paper: {half: {small: 50.0}}", "")
    assert numbers(sweep=none) == {}


def test_submit_refuses_sweep_locked_by_other_submit(desk):
    with submission.lock(desk.runs / "demo"):
        done = desk.submit()
    assert done.returncode == 78 and "another command is at work" in done.stderr


def test_lock_deletes_new_folder_in_which_nothing_was_written(tmp_path):
    with submission.lock(tmp_path / "unused"):
        pass
    with submission.lock(tmp_path / "used"):
        (tmp_path / "used" / "sweep.json").touch()
    (tmp_path / "older").mkdir()
    with submission.lock(tmp_path / "older"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"used", "older"}


def test_lock_of_folder_that_other_submit_deletes_is_refused(tmp_path, monkeypatch):
    """The other one ends between the opening of the file and its lock."""
    other = contextlib.ExitStack()
    other.enter_context(submission.lock(tmp_path / "demo"))
    lock_file = submission.locked

    def end_other(*arguments):
        other.close()
        return lock_file(*arguments)

    monkeypatch.setattr(submission, "locked", end_other)
    with pytest.raises(ConfigError, match="another command is at work"), submission.lock(tmp_path / "demo"):
        pytest.fail("the locked file has no name")


def test_submit_refuses_file_in_place_of_runs_folder(desk):
    desk.runs.write_text("")
    done = desk.submit()
    assert done.returncode == 78 and "a file is where a folder must be" in done.stderr


def test_submit_reports_runs_cancelled_meanwhile(typed, monkeypatch):
    def cancelled(jobs):
        create_json(jobs[0].run.cancel, {"who": "ann"})

    monkeypatch.setattr(typed, "submit", cancelled)
    code, out, _ = typed()
    assert code == 0 and "cancelled meanwhile, so not started: half\n" in out


# -- runs that are cancelled during submission

WHO = {"who": "ann", "why": "not needed"}


@pytest.fixture(params=["local", "slurm"])
def cluster(request, commands, monkeypatch):
    """A backend that accepts jobs and starts none."""
    monkeypatch.setattr(local, "start_supervisor", lambda *_: None)
    commands("sbatch", 'echo "Submitted batch job 57"')
    commands("srun", "")
    commands("scontrol", "echo 'ClusterName = far'")
    commands("squeue", "")
    kind = {"local": local.LocalBackend, "slurm": slurm.SlurmBackend}[request.param]
    return kind(ClusterProfile(name="here", kind=request.param))


@pytest.fixture
def sweep(tmp_path):
    """``sweep(*names, **options)`` plans these runs; ``options`` are options of the plan."""
    place = tmp_path / "demo"
    (place / ".code" / "new").mkdir(parents=True)

    def plan(*names, **options):
        resolved_runs = [wanted(name) for name in names]
        return planning.compare(resolved_runs, planning.scan_runs(place, names), place, (), PlanOptions(**options))

    plan.place = place
    plan.snapshot = Snapshot("new", place / ".code" / "new", ())
    return plan


def apply(sweep, plan, cluster):
    """Apply the plan, and return the names of the submitted jobs."""
    return [job.run.name for job in submission.create_and_submit(plan, sweep.snapshot, cluster, {})]


def test_apply_skips_run_cancelled_after_planning(sweep, cluster):
    apply(sweep, sweep("a", "b"), cluster)
    before = read_json(sweep.place / "a" / "job.json")
    plan = sweep("a", "b")
    assert [action.kind for action in plan.starting] == ["stopped"] * 2
    create_json(sweep.place / "a" / "cancel.json", WHO)
    assert apply(sweep, plan, cluster) == ["b"] and submission.cancelled_meanwhile(plan) == ["a"]
    assert read_json(sweep.place / "a" / "cancel.json") == WHO and read_json(sweep.place / "a" / "job.json") == before


def test_folders_of_existing_run_are_closed_before_its_job_record_is_written(sweep, cluster, monkeypatch):
    """The job may wait in the queue for days before its start closes them."""
    apply(sweep, sweep("a"), cluster)
    run = RunDir(sweep.place / "a")
    run.attempts.mkdir()
    for folder in (run.path, run.attempts):
        folder.chmod(0o2775)
    run.config.chmod(0o664)
    submit = cluster.submit

    def observed(jobs):
        for place in (run.path, run.attempts, run.config):
            assert place.stat().st_mode & 0o022 == 0, place
        submit(jobs)

    monkeypatch.setattr(cluster, "submit", observed)
    assert apply(sweep, sweep("a"), cluster) == ["a"]


def test_apply_starts_cancelled_run_only_with_retry(sweep, cluster):
    apply(sweep, sweep("a"), cluster)
    create_json(sweep.place / "a" / "cancel.json", WHO)
    assert apply(sweep, sweep("a"), cluster) == []
    plan = sweep("a", retry=True)
    assert apply(sweep, plan, cluster) == ["a"]
    assert submission.cancelled_meanwhile(plan) == [] and not (sweep.place / "a" / "cancel.json").exists()


def test_new_run_cancelled_before_submission_stays_cancelled(sweep, cluster, monkeypatch):
    plan = sweep("a", "b")
    submit = cluster.submit

    def slowly(jobs):
        create_json(jobs[0].run.cancel, WHO)
        submit(jobs)

    monkeypatch.setattr(cluster, "submit", slowly)
    assert apply(sweep, plan, cluster) == ["a", "b"]
    assert submission.cancelled_meanwhile(plan) == ["a"] and read_json(sweep.place / "a" / "cancel.json") == WHO
    assert clusters.states([RunDir(sweep.place / "a")])[sweep.place / "a"].state == "cancelled"


def test_apply_restarts_cancelled_run_after_configuration_change(sweep, cluster):
    apply(sweep, sweep("a"), cluster)
    create_json(sweep.place / "a" / "cancel.json", WHO)
    resolved = wanted("a", mask="0.75")
    plan = planning.compare(
        [resolved], planning.scan_runs(sweep.place, ["a"]), sweep.place, (), PlanOptions(changed="restart")
    )
    assert apply(sweep, plan, cluster) == ["a"] and submission.cancelled_meanwhile(plan) == []


def test_backend_removes_cancel_file_after_writing_job_record(tmp_path, cluster, monkeypatch):
    """A supervisor that reads the folder in between must not start the job of the old job.json."""
    run = RunDir(tmp_path / "demo" / "a")
    existed = []
    run.path.mkdir(parents=True)
    create_json(run.cancel, WHO)
    if isinstance(cluster, local.LocalBackend):
        module = local
    else:
        module = slurm
    write = module.write_json

    def written(path, value):
        existed.extend([run.cancel.exists()] if path.name == "job.json" else [])
        write(path, value)

    monkeypatch.setattr(module, "write_json", written)
    cluster.submit([Job(run, tmp_path, uncancels=True)])
    assert existed == [True] and not run.cancel.exists()
