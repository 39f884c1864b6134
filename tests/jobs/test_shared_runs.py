"""Commands of users other than the submitter: they show the same states; an unreadable run hides no other run."""

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest

from flip.files.ownership import user_name
from flip.runs import attempts
from flip.runs.checks import UNKNOWN
from flip.runs.errors import ConfigError, FlipError
from flip.runs.restart_policy import EndFacts
from flip.runs.rundir import read_json, write_json
from jobs.commands import explain, report, status
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import Job
from jobs.planning import storage_checks
from jobs.slurm import backend
from jobs.submission import apply
from jobs.submission import plan as planning
from jobs.submitted_runs import clusters, select
from tests.harness.common import no_access
from tests.jobs.outcomes import make, wanted

SUBMITTED = "its job is not in Slurm's queue any more: submit again"


@pytest.fixture
def tmp_path():
    """A temporary folder that other users may enter, unlike pytest's folder."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in folder.rglob("*"):
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


@contextlib.contextmanager
def another(*private: Path):
    """Act as another user, who cannot enter the ``private`` folders."""
    modes = [path.stat().st_mode for path in private]
    assert all(mode & 0o077 == 0 for mode in modes), "the folders are private before their modes change"
    with no_access(*private):
        yield


@pytest.fixture
def sweep(tmp_path, commands):
    """The canary a runs, b and c wait. ``sweep.queue`` sets the rows of squeue for a, and for the waiting b and c."""
    commands("sbatch", 'echo "Submitted batch job 5$$"')
    commands("srun", "")
    commands("scontrol", "echo 'ClusterName = far'")
    runs = [make(tmp_path / "runs" / "demo", name, steps=0, complete=False) for name in "abc"]
    jobs = apply.assign_canaries([Job(run, tmp_path / "code") for run in runs], tmp_path / "runs" / "demo", 50)
    backend.SlurmBackend(ClusterProfile(name="far", kind="slurm")).submit(jobs)
    canary, array = (read_json(run.path / "job.json")["name"] for run in runs[:2])

    def queue(first="RUNNING|None", waiting="PENDING|JobHeldUser"):
        rows = [(canary, "N/A", "57", first), (array, 0, "58_0", waiting), (array, 1, "58_1", waiting)]
        lines = ["{}|{}|{}|{}|n1|{}|N/A".format(*row[:3], *row[3].split("|")) for row in rows if row[3]]
        commands("squeue", "printf '%s\\n' " + " ".join(f"'{line}'" for line in lines))
        (tmp_path / "calls").chmod(0o666)  # the stub commands record the calls of all users in this file

    commands.queue = queue
    commands.runs = runs
    commands.root = tmp_path / "runs"
    commands.tokens = list((tmp_path / "runs" / "demo" / ".slurm").iterdir())
    queue()
    return commands


def states_for_other_user(sweep):
    with another(*sweep.tokens):
        states = clusters.states(sweep.runs)
    return [(states[run.path].state, states[run.path].reason) for run in sweep.runs]


WAITS = ("queued", "waits for its canary a")


@pytest.mark.parametrize(
    "first, others, expected",
    [
        ("RUNNING|None", "PENDING|JobHeldUser", [("running", "starting"), WAITS, WAITS]),
        ("RUNNING|None", "PENDING|Priority", [("running", "starting")] + 2 * [("queued", "in Slurm: Priority")]),
        ("", "RUNNING|None", [("stopped", SUBMITTED)] + 2 * [("running", "starting")]),
        ("FAILED|None", "", [("stopped", "its job ended (FAILED): submit again")] + 2 * [("stopped", SUBMITTED)]),
    ],
)
def test_job_states_are_visible_to_other_users_from_squeue(sweep, first, others, expected):
    sweep.queue(first, others)
    assert states_for_other_user(sweep) == expected


def test_job_states_of_other_users_are_unknown_if_slurm_hides_jobs(sweep, monkeypatch):
    """squeue lists no jobs of others, so they may run."""
    run, own, complete = sweep.runs
    sweep.queue("", "")
    sweep("scancel", "")
    write_json(complete.result, {})
    uid = read_json(run.path / "job.json")["uid"]
    write_json(own.path / "job.json", {**read_json(own.path / "job.json"), "uid": uid + 1})
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)

    def read_states(settings):
        sweep("scontrol", f"printf '%s\\n' 'ClusterName = far' {settings}")
        states = clusters.states([run, own, complete])
        return states[run.path].reason, *(state.state for state in states.values())

    visible = (SUBMITTED, "stopped", "stopped", "complete")
    reason = f"this Slurm hides the jobs of {user_name(uid)} from other users (PrivateData)"
    hidden = (reason, "unknown", "stopped", "complete")
    assert read_states("") == read_states("'PrivateData = accounts,users'") == visible
    assert read_states("'PrivateData             = accounts,jobs'") == hidden
    with pytest.raises(FlipError, match=re.escape(f"not signalled (found: 'a: {reason}'")):
        clusters.cancel([run])
    write_json(run.identity, dict(wanted("a").identity))
    plan = planning.compare([wanted("a")], planning.scan_runs(run.path.parent, ["a"]), run.path.parent)
    assert [action.kind for action in plan.actions] == ["unknown"] and not plan.starting
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert read_states("'PrivateData = jobs'") == visible, "root sees all"


def test_job_states_show_failed_canary_to_other_users(sweep):
    n = attempts.start_attempt(sweep.runs[0], {})
    sweep.runs[0].write_cause(n, 0, "config", 78, "a key is unknown")
    attempts.end_attempt(sweep.runs[0], n, EndFacts(78, "RUNNING"))
    sweep.queue(first="")
    stuck = ("stopped", "its canary a is failed (rank 0: a key is unknown): submit again")
    assert states_for_other_user(sweep) == [("failed", "rank 0: a key is unknown"), stuck, stuck]


def test_job_states_name_release_command_for_hold_after_canary(sweep):
    write_json(sweep.runs[0].result, {})
    held = ("queued", "in Slurm: JobHeldUser (release it with `scontrol release {}`)")
    assert states_for_other_user(sweep)[1:] == [(held[0], held[1].format(id_)) for id_ in ("58_0", "58_1")]


def outputs(sweep, capsys, command, *argv):
    """The output of a command as this user, which imports all modules, and then as another user."""
    texts = []
    for context in (contextlib.nullcontext, lambda: another(*sweep.tokens)):
        with context():
            assert command.main([*argv, "--root", str(sweep.root)]) == 0
        texts.append(capsys.readouterr().out)
    return texts


def test_read_only_commands_give_same_output_to_other_users(sweep, capsys):
    own, other = outputs(sweep, capsys, status, "demo", "--json")
    assert own == other and [row["state"] for row in json.loads(other)] == ["running", "queued", "queued"]
    for command, argv in ((explain, ["demo/b"]), (report, ["demo", "--json"]), (status, ["demo", "--goodput"])):
        own, other = outputs(sweep, capsys, command, *argv)
        assert own == other


def test_commands_list_unreadable_run_and_all_other_runs(sweep, capsys):
    hidden = sweep.runs[1].path
    hidden.chmod(0o700)
    sweep.tokens.append(hidden)
    _, shown = outputs(sweep, capsys, status, "demo", "--json")
    rows = {row["run"]: row for row in json.loads(shown)}
    assert [rows[name]["state"] for name in "abc"] == ["running", "unknown", "queued"]
    assert f"{hidden}" in rows["b"]["reason"] and "Permission denied" in rows["b"]["reason"]
    assert rows["b"].keys() == rows["a"].keys() and rows["b"]["samples"] is None
    for argv in (["demo"], ["demo", "--goodput"]):
        outputs(sweep, capsys, status, *argv)
    assert "cannot be read" in outputs(sweep, capsys, explain, "demo/b")[1]
    assert {row["run"]: row["state"] for row in json.loads(outputs(sweep, capsys, report, "demo", "--json")[1])} == {
        "a": "running", "b": "unknown", "c": "queued",
    }  # fmt: skip


def test_runs_root_that_cannot_be_entered_hides_no_run_of_others(sweep, tmp_path):
    closed = tmp_path / "alice"
    (closed / "runs" / "demo" / "x").mkdir(parents=True)
    (closed / "runs" / "demo" / "x" / "config.yaml").write_text("schema: 1\n")
    closed.chmod(0o700)
    roots = [tmp_path / "runs", closed / "runs"]
    with another(closed):
        for words in ([], ["demo"], ["d*"], ["demo/*"]):
            assert [run.name for run in select.select_many(words, roots)] == ["a", "b", "c"], words
        for words in (["typo"], ["demo/x"], ["x*"]):
            with pytest.raises(ConfigError, match="There are: demo"):
                select.select_many(words, roots)
        profile = ClusterProfile(name="far", kind="slurm", runs_root=str(closed / "runs"))
        assert storage_checks.check_folder(profile, closed / "runs" / "new", dry=True).state == UNKNOWN


def test_stale_mount_hides_no_run_of_other_roots_and_is_reported_once(sweep, tmp_path, monkeypatch, capsys):
    stale = tmp_path / "stale"
    iterdir = Path.iterdir

    def broken(path):
        if path == stale:
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", broken)
    for _ in range(2):
        assert [run.name for run in select.select(None, [tmp_path / "runs", stale])] == ["a", "b", "c"]
    assert capsys.readouterr().err.count("Stale file handle") == 1
