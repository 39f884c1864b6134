"""The command that is suggested for a stopped run resumes exactly that run, from any directory."""

import shlex
import sys

import pytest

from flip.runs.rundir import RunDir, read_json, write_json
from jobs.backends.multi import MultiBackend
from jobs.commands import explain
from jobs.commands import submit as command
from jobs.common import cli
from jobs.common.paths import REPOSITORY
from jobs.local import backend
from jobs.reporting import run_details
from jobs.submission import start_runs
from jobs.submission.snapshot import Snapshot
from jobs.submitted_runs import resubmit
from tests.jobs.outcomes import make

SWEEP = """
name: other
set:
  model: {{size: tiny}}
  data: {{manifest: {data}, tokenizer: {data}/tokenizer.json, workers: 0, block: 1}}
  stages: [{{name: pretrain, samples: 48, batch: 16, mask: {mask}}}]
  compute: {{threads: 1}}
runs: {{half: }}
"""


@pytest.fixture
def desk(tmp_path, data, monkeypatch, capsys):
    """``desk(*args)`` submits and returns the names of the started runs; ``desk.write(mask)`` writes the sweep."""
    started = []

    class Cluster(MultiBackend):
        def submit(self, jobs):
            started[:] = [job.run.name for job in jobs]
            super().submit(jobs)

    monkeypatch.setattr(start_runs, "MultiBackend", Cluster)
    monkeypatch.setattr(start_runs, "take", lambda _, into, *rest: Snapshot("c0de", into / "c0de", ()))
    monkeypatch.setattr(backend, "start_supervisor", lambda *_: None)
    monkeypatch.setenv("FLIP_RUNS", str(tmp_path / "runs"))
    (tmp_path / "away").mkdir()
    (tmp_path / "here.yaml").write_text("kind: local\n")

    def submit(*args):
        started.clear()
        assert command.main([*args, "--json"]) == 0, capsys.readouterr().err
        capsys.readouterr()
        return list(started)

    def write(mask):
        (tmp_path / "mine.yaml").write_text(SWEEP.format(data=data, mask=mask))

    submit.write = write
    submit.folder = tmp_path
    write("0.5")
    monkeypatch.chdir(tmp_path)
    return submit


def next_step(run):
    details = run_details.explain(run)
    assert explain.page(details)
    return details["next"]["what"], details["next"]["command"]


def test_suggested_command_restarts_only_given_run_from_any_directory(desk, monkeypatch):
    """The sweep and its file have different names, the profile is a file, and the command line has overrides."""
    args = ["--cluster", "here.yaml", "--seeds", "0", "1", "--changed", "fork"]
    assert desk("--sweep", "mine.yaml", "stages.pretrain.samples=64", *args) == ["half", "half-s1"]
    run = RunDir(desk.folder / "runs" / "other" / "half-s1")
    assert read_json(run.path / "job.json")["cluster"] == "here"
    description, suggested = next_step(run)
    assert description.startswith("nothing automatically: no process supervises it; ")
    assert description.endswith("to start it again, without a checkpoint to resume from")
    monkeypatch.chdir(desk.folder / "away")
    program, folder, name, *args = shlex.split(suggested)
    assert [program, folder, name] == [sys.executable, str(REPOSITORY / "jobs"), "submit"]
    assert desk(*args) == ["half-s1"]


def test_suggested_command_repeats_runs_root(desk, monkeypatch):
    assert desk("mine.yaml", "--root", "else where") == ["half"]
    _, suggested = next_step(RunDir(desk.folder / "else where" / "other" / "half"))
    monkeypatch.chdir(desk.folder / "away")
    assert desk(*shlex.split(suggested)[3:]) == ["half"] and not (desk.folder / "runs").exists()


def test_suggested_command_follows_moved_runs(desk, monkeypatch):
    """The record has the old root, and FLIP_RUNS leads elsewhere."""
    assert desk("mine.yaml", "--root", "before") == ["half"]
    (desk.folder / "before").rename(desk.folder / "after")
    _, suggested = next_step(RunDir(desk.folder / "after" / "other" / "half"))
    monkeypatch.chdir(desk.folder / "away")
    assert desk(*shlex.split(suggested)[3:]) == ["half"]
    assert not (desk.folder / "before").exists() and not (desk.folder / "runs").exists()


def test_command_starts_in_folder_of_submission_if_setting_is_relative(desk, monkeypatch):
    desk("mine.yaml", "data.cache=chunks", "--only", "half")
    run = RunDir(desk.folder / "runs" / "other" / "half")
    monkeypatch.chdir(desk.folder / "away")
    for line in (next_step(run)[1], resubmit.with_seeds(run, (0, 1))):
        assert shlex.split(line)[:4] == ["cd", str(desk.folder), "&&", sys.executable]


def test_command_for_more_seeds_submits_whole_sweep(desk, monkeypatch):
    assert desk("mine.yaml", "stages.pretrain.samples=64") == ["half"]
    run = RunDir(desk.folder / "runs" / "other" / "half")
    suggested = resubmit.with_seeds(run, (0, 1))
    monkeypatch.chdir(desk.folder / "away")
    assert desk(*shlex.split(suggested)[3:]) == ["half", "half-s1"]
    write_json(run.path / "job.json", {**read_json(run.path / "job.json"), "command": ["rm", "-rf"]})
    assert resubmit.with_seeds(run, (0, 1)) is None


def test_command_for_more_seeds_names_runs_unless_it_is_for_all_of_the_sweep(desk, monkeypatch):
    """After `submit --only half` the hint of the report started runs that nobody had asked for."""
    text = (desk.folder / "mine.yaml").read_text()
    (desk.folder / "mine.yaml").write_text(text.replace("half: }", "half: , whole: {data.block: 2}}"))
    assert desk("mine.yaml", "--only", "half-s1", "--seeds", "1") == ["half-s1"]
    run = RunDir(desk.folder / "runs" / "other" / "half-s1")
    assert resubmit.design_of(run, 1) == "half"
    monkeypatch.chdir(desk.folder / "away")
    some = resubmit.with_seeds(run, (0, 1), ["half"])
    assert desk(*shlex.split(some)[3:]) == ["half", "half-s1"]
    assert "--only" not in resubmit.with_seeds(run, (0, 1), ["whole", "half"])
    (desk.folder / "mine.yaml").unlink()
    assert resubmit.with_seeds(run, (0, 1), ["half", "whole"]).endswith("--only half half-s1 whole whole-s1")


def test_suggested_command_resumes_fork_and_original_run(desk, monkeypatch):
    assert desk("--sweep", "mine.yaml") == ["half"]
    desk.write("0.25")
    assert desk("--sweep", "mine.yaml", "--changed", "fork") == ["half-v2"]
    sweep = desk.folder / "runs" / "other"
    monkeypatch.chdir(desk.folder / "away")
    description, suggested = next_step(RunDir(sweep / "half-v2"))
    assert desk(*shlex.split(suggested)[3:]) == ["half-v2"] and "old values" not in description
    description, suggested = next_step(RunDir(sweep / "half"))
    assert description.endswith("after restoring its old values in the sweep file, which now means half-v2")
    desk.write("0.5")
    assert desk(*shlex.split(suggested)[3:]) == ["half"], "the restored sweep file resumes the original run"


def test_suggested_command_repeats_changed_keep(desk):
    desk("--sweep", "mine.yaml")
    desk.write("0.25")
    assert desk("--sweep", "mine.yaml", "--changed", "keep") == ["half"]
    _, suggested = next_step(RunDir(desk.folder / "runs" / "other" / "half"))
    assert desk(*shlex.split(suggested)[3:]) == ["half"]


@pytest.mark.parametrize("command", [[], ["rm", "-rf", "/"]])
def test_advice_names_sweep_and_run_if_job_record_has_no_usable_command(tmp_path, command):
    run = make(tmp_path / "quickstart", "c", steps=0, complete=False)
    write_json(run.path / "job.json", {"after": 0, "order": 0, "cluster": "here", "command": command})
    expected = (
        "submit the sweep file of quickstart again, with --cluster and the file of the profile here, with --only c"
    )
    assert resubmit.command(run) == (expected, None)
    assert resubmit.command(run, retry=True) == (f"{expected} --retry", None)


def test_next_step_of_evaluation_is_new_request_or_report(tmp_path):
    run = make(tmp_path / "demo" / ".evaluate", "a-1126-0000", steps=0, complete=False)
    write_json(run.path / "job.json", {"after": 0, "order": 0})
    assert next_step(run) == (
        "nothing automatically: no process supervises it; request it again: `flip evaluate` does not resume an"
        " existing job",
        None,
    )  # fmt: skip
    write_json(run.result, {"run": run.name})
    assert next_step(run)[1] == cli.command("report", tmp_path / "demo")
    moved = (tmp_path / "demo").rename(tmp_path / "elsewhere")
    assert next_step(RunDir(moved / ".evaluate" / run.name))[1] == cli.command("report", moved)
