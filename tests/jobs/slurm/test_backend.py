"""Tests of the Slurm backend with stand-ins for Slurm commands; tests in tests/slurm use a real Slurm."""

import os
import re
import shlex
import shutil
import stat
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from flip.runs import attempts, lifecycle, wall_limit
from flip.runs.errors import ConfigError, FlipError, PermissionDenied, StorageError
from flip.runs.restart_policy import EndFacts
from flip.runs.rundir import RunDir, read_json, write_json
from jobs.commands import cancel, explain, logs
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import Job, JobResources
from jobs.reporting import run_details
from jobs.slurm import backend, job_states, site
from jobs.submission import dry_run
from jobs.submission import plan as planning
from jobs.submission.snapshot import current_digest
from jobs.submitted_runs import clusters, resubmit
from tests.jobs.outcomes import wanted

ROOT = Path(__file__).resolve().parents[3]
PROFILE = ClusterProfile(name="far", kind="slurm", partition="gpu")
CONFIG = "echo 'ClusterName = far'"
SBATCH = 'cp "$1" "$0.$$"; env | sort > "$0.env"; echo "Submitted batch job 57"'


@pytest.fixture
def sweep(tmp_path, commands):
    """``sweep(name, row)``: a submitted run with this row (state, reason) in squeue; None: not listed."""
    rows = []

    def make(name="a", row=None, site="far", after=0):
        run = RunDir(tmp_path / "runs" / "demo" / name)
        run.path.mkdir(parents=True)
        record = {"kind": "slurm", "name": "demo.77aa", "token": "77aa", "index": len(rows), "site": site}
        write_json(run.path / "job.json", {**record, "after": after})
        rows.append("demo.77aa|{}|57_{}|{}|n1|{}".format(len(rows), len(rows), *row) if row else "")
        commands("squeue", "printf '%s\\n' " + " ".join(f"'{text}'" for text in rows))
        return run

    commands("scontrol", CONFIG)
    return make


def ended(run, cause="stopped", code=75, state="RUNNING", **fields):
    n = attempts.start_attempt(run, {})
    run.write_cause(n, 0, cause, code, f"why {cause}", **fields)
    attempts.end_attempt(run, n, EndFacts(code, state))


def state_of(run):
    state = clusters.states([run])[run.path]
    return state.state, state.attempt, state.reason


def test_states_distinguish_queued_running_and_waiting_runs(sweep):
    assert state_of(sweep("a", ("PENDING", "Priority"))) == ("queued", 0, "in Slurm: Priority")
    run = sweep("b", ("RUNNING", "None"))
    assert state_of(run) == ("running", 0, "starting")
    n = attempts.start_attempt(run, {})
    assert state_of(run) == ("running", 1, "")
    run.record_stop_request(n, "SIGUSR2")
    assert state_of(run) == ("running", 1, "stop requested")
    waiting = sweep("c", ("PENDING", "BeginTime"))
    ended(waiting)
    assert state_of(waiting) == ("waiting", 1, "rank 0: why stopped; in Slurm: BeginTime")
    unseen = sweep("d", ("PENDING", "BeginTime"))
    attempts.start_attempt(unseen, {})
    assert state_of(unseen) == ("waiting", 1, "ended unseen: preempted, or its node failed; in Slurm: BeginTime")
    held = sweep("e", ("PENDING", "job requeued in held state"))
    assert "scontrol release 57_4" in state_of(held)[2]
    assert state_of(sweep("f", ("SUSPENDED", "None"))) == ("running", 0, "in Slurm: SUSPENDED")


def test_states_show_failed_starts_from_comment_of_job(sweep):
    """The node may have no folder to write a log to."""
    run = sweep("a", ("PENDING", "BeginTime|N/A|away:3:2:0:127:n7"))
    failed = "3 starts in a row failed, the last one on n7: the batch script's Python is missing there"
    assert state_of(run) == ("queued", 0, f"{failed}; in Slurm: BeginTime")
    folder = run.path.parent / ".slurm" / "77aa"
    folder.mkdir(parents=True)
    (folder / "57_0.err").write_text("/opt/python: No such file or directory\n")
    (folder / "57_1.err").write_text("of another run\n")
    assert f"{failed} (log: {folder}/57_0.err); in" in state_of(run)[2]
    assert logs.files(run, None, err=True) == [folder / "57_0.err"]
    details = run_details.explain(run)
    assert details["start"]["lines"] == ["/opt/python: No such file or directory"]
    assert f"{folder}/57_0.err" in explain.page(details) and "No such file" in explain.page(details)
    attempts.start_attempt(run, {"job": "57_0", "restarts": "3"})  # a start that has succeeded since
    assert state_of(run)[2].startswith("ended unseen") and "starts in a row" not in state_of(run)[2]
    os.utime(folder / "57_0.err", (1, 1))
    assert logs.files(run, None, err=True) == [] and run_details.explain(run)["start"] is None


@pytest.mark.parametrize(
    "reason, step",
    [
        ("job requeued in held state", "release it with `scontrol release 57_0`"),
        ("launch failed requeued held", "release it with `scontrol release 57_0`"),  # after a failed prolog
        ("JobHeldUser", "release it with `scontrol release 57_0`"),
        ("JobHeldAdmin", "an administrator must release it: `scontrol release 57_0`"),
        ("BadConstraints", "`scontrol update JobId=57_0 ExcNodeList=` excludes none"),
        ("PartitionTimeLimit", "`scontrol update JobId=57_0 TimeLimit=MINUTES`"),
        ("BeginTime", ""),
        ("Resources", ""),
    ],
)
def test_next_step_of_waiting_job_follows_reason_of_slurm(sweep, reason, step):
    run = sweep("a", ("PENDING", reason))
    ended(run)
    (shown,) = state_of(run)[2:]
    what = run_details.explain(run)["next"]["what"]
    if not step:
        assert what == "it restarts automatically" and shown.endswith(f"in Slurm: {reason}")
    else:
        assert what.startswith("nothing until a person acts: ") and step in what and step in shown


def test_state_names_batch_script_that_was_killed_before_it_could_act(sweep):
    run = sweep("a", ("FAILED", "RaisedSignal:9(Killed)"))
    (run.path.parent / ".slurm" / "77aa").mkdir(parents=True)
    (run.path.parent / ".slurm" / "77aa" / "runs").touch()
    assert "its job ended (FAILED); its batch script was killed before it could act: submit again" in state_of(run)[2]
    (run.path.parent / ".slurm" / "77aa" / "57_0.err").write_text("boom\n")
    assert "its batch script failed (log: " in state_of(run)[2]


def test_states_name_too_short_wall_limit_of_running_run(sweep):
    run = sweep("a", ("RUNNING", "None"))
    n = attempts.start_attempt(run, {})
    write_json(run.attempt(n) / "start.json", {"time": 1000.0})
    write_json(run.attempt(n) / "ready.json", {"time": 1070.0})
    wall_limit.record_limit(run, n, 60)
    assert state_of(run) == (
        "running",
        1,
        "no attempt can make progress within the wall limit of 60 s: a start takes 70 s",
    )


def test_states_ignore_attempts_before_current_submission(sweep):
    run = sweep("a", ("PENDING", "Priority"), after=1)
    ended(run)
    assert state_of(run) == ("queued", 1, "in Slurm: Priority")


def test_states_distinguish_ends_of_runs(sweep):
    failed = sweep("a")
    ended(failed, "config", 78)
    assert state_of(failed) == ("failed", 1, "rank 0: why config")
    complete = sweep("b", ("PENDING", "BeginTime"))  # Slurm is about to restart this job
    write_json(complete.result, {})
    assert state_of(complete) == ("complete", 0, "")
    by_hand = sweep("c", ("CANCELLED", "None"))
    # No file records it, so it must not depend on how long Slurm lists the job.
    assert state_of(by_hand) == ("stopped", 0, "its job was cancelled in Slurm: submit again")
    cancelling = sweep("d", ("RUNNING", "None"))
    write_json(cancelling.cancel, {"who": "ann", "why": "a mistake"})
    assert state_of(cancelling) == ("running", 0, "cancelled by ann: a mistake: it saves and stops")
    late = sweep("l", ("PENDING", "BeginTime"))
    late.record_time_limit(attempts.start_attempt(late, {}))
    assert state_of(late)[2].startswith("its wall limit came before it had saved; in Slurm")
    unlisted = sweep("e")
    ended(unlisted)
    assert state_of(unlisted) == (
        "stopped",
        1,
        "rank 0: why stopped; its job is not in Slurm's queue any more: submit again",
    )
    record = read_json(unlisted.path / "job.json")
    write_json(unlisted.path / "job.json", {**record, "command": ["jobs/submit.py", "--sweep", "x"]})
    # The reason ends with the command to resubmit.
    assert state_of(unlisted)[2].endswith(f": submit again: {resubmit.command(unlisted)[1]}")
    assert state_of(sweep("f", ("FAILED", "NonZeroExitCode")))[0] == "stopped"


@pytest.mark.parametrize("requeue", [0, 1])
def test_submit_warns_if_site_disables_requeue(sweep, commands, capsys, requeue):
    run = sweep("a")
    commands("sbatch", SBATCH)
    commands("scontrol", f"[ $2 = job ] && echo 'JobId=57\n   Requeue={requeue} Restarts=0'; {CONFIG}")
    backend.SlurmBackend(PROFILE).submit([Job(run, ROOT, JobResources(1, 1, 0, 1, 1.0))])
    stderr = capsys.readouterr().err
    assert ("warning: job 57: requeue is disabled here (Requeue=0)" in stderr) == (not requeue)
    token = read_json(run.path / "job.json")["token"]
    assert read_json(run.path.parent / ".slurm" / token / "submitted.json")["requeue"] is bool(requeue)


def test_check_ready_notes_no_requeue_option_of_profile(sweep, commands, monkeypatch):
    for name in site.COMMANDS:
        commands(name, CONFIG)
    assert "each start is a new job" not in site.check_ready(replace(PROFILE, partition=""))
    assert "each start is a new job" in site.check_ready(replace(PROFILE, partition="", options={"no-requeue": ""}))


def test_submit_reports_runs_accepted_before_refusal(tmp_path, commands):
    commands("scontrol", CONFIG)
    commands("sbatch", "grep -q -- --nodes=2 $1 && { echo 'sbatch: error: QOSMaxSubmit' >&2; exit 1; }\n" + SBATCH)
    small = JobResources(1, 2, 0, 1, 1.0)
    large = JobResources(2, 8, 8, 4, 24.0)
    with pytest.raises(ConfigError, match="; 2 of 3 runs were submitted before and stay"):
        backend.SlurmBackend(PROFILE).submit(jobs(tmp_path, small, large, small))


def test_submit_reports_sbatch_error_and_leaves_run_stopped(sweep, commands):
    """The messages are those of Slurm 24.11. In the last, a hint follows the error."""
    messages = {
        "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified": "",
        "sbatch: error: Site policy: give an account.": "sbatch: error: Batch job submission failed: Unspecified error",
        "sbatch: unrecognized option '--nonsense=3'": 'Try "sbatch --help" for more information',
    }
    for i, (error, hint) in enumerate(messages.items()):
        run = sweep(f"a{i}")
        commands("sbatch", f"printf '%s\\n' {shlex.quote(error)} {shlex.quote(hint)} >&2; exit 1")
        with pytest.raises(ConfigError, match=re.escape(error)) as caught:
            backend.SlurmBackend(PROFILE).submit([Job(run, ROOT, JobResources(1, 1, 0, 1, 1.0))])
        assert "partition, account, qos or options of the profile" in str(caught.value)
        assert state_of(run) == ("stopped", 0, "Slurm did not confirm that it accepted its job: submit again")


def test_submit_distinguishes_silent_controller_from_refusal(sweep, commands):
    """Then nothing is wrong with the profile, and the job may have been accepted."""
    error = "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)"
    commands("sbatch", f"echo '{error}' >&2; exit 1")
    with pytest.raises(StorageError, match="Slurm does not answer.*Submit again when the controller answers"):
        backend.SlurmBackend(PROFILE).submit([Job(sweep("a"), ROOT, JobResources(1, 1, 0, 1, 1.0))])


def test_states_are_unknown_if_squeue_fails_unless_files_decide(sweep, commands):
    running, complete, failed, over, saving = runs = [sweep(name) for name in "abcde"]
    for run in (running, saving):
        attempts.start_attempt(run, {})
    write_json(complete.result, {})
    ended(failed, "data", 65)
    for run in (over, saving):
        write_json(run.cancel, {"who": "ann"})
    commands("squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    states = clusters.states(runs)
    assert [states[run.path].state for run in runs] == ["unknown", "complete", "failed", "cancelled", "unknown"]
    assert states[running.path].reason == "Slurm does not answer: squeue: Unable to contact slurm controller"


def test_states_of_runs_on_other_cluster_are_unknown(sweep):
    state = state_of(sweep("a", site="near"))
    assert state == ("unknown", 0, "it was submitted to the Slurm cluster near; this is far")


def test_states_of_other_runs_survive_damaged_job_record(sweep):
    bad = sweep("a", ("RUNNING", "None"))
    good = sweep("b", ("RUNNING", "None"))
    (bad.path / "job.json").write_text("{")
    states = lifecycle.states([bad, good], job_states.seen([bad, good]))
    assert (states[bad.path].state, states[good.path].state) == ("unknown", "running")
    assert "job.json" in states[bad.path].reason


def test_states_call_squeue_once_for_many_runs(sweep, commands):
    runs = [sweep(f"r{i}", ("RUNNING", "None")) for i in range(200)]
    assert {state.state for state in clusters.states(runs).values()} == {"running"}
    assert [call.split()[0] for call in commands.calls()] == ["squeue"]


# -- submit and cancel -------------------------------------------------------------------------------------------------


def jobs(tmp_path, *shapes):
    created = []
    for i, shape in enumerate(shapes):
        run = RunDir(tmp_path / "runs" / "demo" / f"run{i}")
        run.path.mkdir(parents=True)
        created.append(Job(run, tmp_path / "code", shape))
    return created


def test_submit_writes_job_records_before_sbatch_per_shape(tmp_path, commands, monkeypatch):
    """job.json and the list of runs exist before sbatch runs, so that each job can be traced to its run."""
    small = JobResources(1, 2, 0, 1, 1.0)
    large = JobResources(2, 8, 8, 4, 24.0)
    list_command = f'ls {tmp_path}/runs/demo/*/job.json {tmp_path}/runs/demo/.slurm/*/runs >> "$0.seen"'
    commands("sbatch", f"{list_command}; {SBATCH}")
    commands("scontrol", CONFIG)
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.setenv("PROXY", "y")
    submitted = jobs(tmp_path, small, large, small)
    backend.SlurmBackend(ClusterProfile(name="far", kind="slurm", env=["PROXY"])).submit(submitted)
    listed = (tmp_path / "sbatch.seen").read_text().split()
    # Two job records and a list at the first sbatch, three records and two lists at the second.
    assert len(listed) == 3 + 5
    records = [read_json(job.run.path / "job.json") for job in submitted]
    assert [record["index"] for record in records] == [0, 0, 1] and records[0]["token"] == records[2]["token"]
    folder = tmp_path / "runs" / "demo" / ".slurm" / records[0]["token"]
    assert (folder / "runs").read_text().split() == [str(submitted[0].run.path), str(submitted[2].run.path)]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert records[0]["name"] == f"demo.{folder.name}" and records[0]["site"] == "far"
    assert records[0]["uid"] == os.geteuid()
    texts = [path.read_text() for path in sorted(tmp_path.glob("sbatch.[0-9]*"))]
    assert sum("--array=0-1%2" in text for text in texts) == 1 and len(texts) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["batch_script.sh", "runs", "submitted.json"]
    environment = (tmp_path / "sbatch.env").read_text()
    assert "PROXY=y" in environment and "SECRET" not in environment and os.environ["SECRET"] == "x"


def test_dry_run_shows_script_passed_to_sbatch(tmp_path, commands):
    commands("sbatch", SBATCH)
    commands("scontrol", CONFIG)
    submitted = jobs(tmp_path, JobResources(2, 8, 8, 4, 24.0), JobResources(2, 8, 8, 4, 24.0))
    shown_script = dry_run._script_of(PROFILE, submitted)
    backend.SlurmBackend(PROFILE).submit(submitted)
    (text,) = (path.read_text() for path in tmp_path.glob("sbatch.[0-9]*"))
    token = read_json(submitted[0].run.path / "job.json")["token"]
    assert text.replace(token, dry_run.TOKEN) == shown_script
    assert token not in shown_script
    assert "--array=0-1" in shown_script


TO_START = "sbatch: Job 9 to start at 2026-11-25T14:00:00 using 16 processors on nodes n[1-2] in partition gpu"


def test_dry_run_calls_sbatch_test_only_once_per_shape(tmp_path, commands, monkeypatch):
    commands("sbatch", f'cat > "$0.script"; env > "$0.env"; echo "{TO_START}" >&2')
    monkeypatch.setenv("SECRET", "x")
    resolved_runs = [wanted(name) for name in "abc"]
    for resolved, nodes in zip(resolved_runs, (1, 2, 1), strict=True):
        resolved.config.resources.nodes = nodes
    plan = planning.compare(resolved_runs, {}, tmp_path / "demo")
    planned = dry_run.planned_jobs(plan, replace(PROFILE, array_size=1), canary=0)
    assert [list(batch.runs) for batch in planned] == [["a"], ["c"], ["b"]]
    assert {batch.start for batch in planned} == {"would start at 2026-11-25T14:00:00 on n[1-2], as things are now"}
    assert commands.calls() == ["sbatch --test-only"] * 2
    assert (tmp_path / "sbatch.script").read_text() == planned[2].script
    assert "SECRET" not in (tmp_path / "sbatch.env").read_text() and not (tmp_path / "demo").exists()


def test_dry_run_shows_the_canary_and_followers_of_the_submission(tmp_path, commands):
    """With code that has passed, there is no canary: it is found by its digest, although the scripts show CODE."""
    commands("sbatch", f'echo "{TO_START}" >&2')
    resolved_runs = [wanted(name) for name in "abc"]
    for resolved in resolved_runs:
        resolved.config.monitor.wandb = "project"
    plan = planning.compare(resolved_runs, {}, tmp_path / "demo")
    held, first = dry_run.planned_jobs(plan, PROFILE)
    assert (list(held.runs), held.start) == (["b", "c"], "held until a has passed 50 steps")
    assert list(first.runs) == ["a"] and first.start.startswith("would start at")
    heads = [batch.script.partition("\n# command\n")[0].splitlines() for batch in (held, first)]
    assert ["#SBATCH --hold" in head for head in heads] == [True, False]
    assert "wandb" in first.script and dry_run.CODE in first.script and commands.calls() == ["sbatch --test-only"]
    run = RunDir(tmp_path / "demo" / "z")
    run.path.mkdir(parents=True)
    write_json(run.result, {})
    code = run.path.parent / ".code" / current_digest(ROOT)
    write_json(run.path / "job.json", Job(run, code, held.shape).record(kind="slurm"))
    (all_at_once,) = dry_run.planned_jobs(plan, PROFILE)
    assert list(all_at_once.runs) == ["a", "b", "c"]


def test_dry_run_shows_error_of_sbatch(tmp_path, commands):
    commands("sbatch", "echo 'allocation failure: Invalid account' >&2; exit 1")
    plan = planning.compare([wanted("a")], {}, tmp_path / "demo")
    (batch,) = dry_run.planned_jobs(plan, PROFILE)
    assert batch.start == "Slurm says: allocation failure: Invalid account"


def test_group_into_arrays_splits_at_array_size_limit(tmp_path):
    groups = list(backend.group_into_arrays(jobs(tmp_path, *[JobResources()] * 7), 3))
    assert [len(group) for group in groups] == [3, 3, 1]


def test_submit_reports_sbatch_error_in_single_paragraph(tmp_path, commands):
    commands("scontrol", CONFIG)
    commands("sbatch", "echo 'sbatch: error: Batch job submission failed: Invalid account' >&2; exit 1")
    with pytest.raises(ConfigError, match="Invalid account.*doctor"):
        backend.SlurmBackend(PROFILE).submit(jobs(tmp_path, JobResources()))


def test_cancel_signals_ranks_first_and_ends_job_on_second_call(sweep, commands):
    running = sweep("a", ("RUNNING", "None"))
    pending = sweep("b", ("PENDING", "Priority"))
    over = sweep("c", ("COMPLETED", "None"))
    ending = sweep("d", ("COMPLETING", "None"))
    n = attempts.start_attempt(running, {})
    commands("scancel", "")
    running.record_stop_request(n, "SIGUSR2")  # preemption with a grace time: cancel must let the run save
    starting = sweep("e", ("CONFIGURING", "None"))
    clusters.cancel([running, pending, over, ending, starting])
    ends = ["scancel --signal=USR2 57_0", "scancel 57_1", "scancel 57_3"]
    assert [c for c in commands.calls() if "scancel" in c] == ends, "one that ends may have been requeued"
    clusters.cancel([running], [running.path])
    assert commands.calls()[-1] == "scancel 57_0"


def test_job_of_copied_run_belongs_to_the_original(sweep, commands):
    run = sweep("a", ("RUNNING", "None"))
    record = read_json(run.path / "job.json")
    write_json(run.path / "job.json", {**record, "folder": str(run.path)})
    copy = RunDir(run.path.parent / "a-copy")
    shutil.copytree(run.path, copy.path)
    commands("scancel", "")
    assert state_of(run)[0] == "running" and state_of(copy)[0] == "stopped"
    clusters.request_cancel([copy], "not needed")
    assert not [call for call in commands.calls() if call.startswith("scancel")]


@pytest.mark.parametrize("reason", ["job requeued in held state", "JobHeldUser", "JobHeldAdmin"])
def test_second_cancel_ends_job_that_slurm_has_held_since(sweep, commands, capsys, reason):
    """Its state is cancelled, which is final, but if it is released it starts."""
    run = sweep("a", ("PENDING", reason))
    run.config.write_text("schema: 1\n")
    complete = sweep("b", ("PENDING", reason))
    complete.config.write_text("schema: 1\n")
    write_json(complete.result, {})
    commands("scancel", "")
    write_json(run.cancel, {"who": "ann"})
    assert state_of(run)[0] == "cancelled"
    assert cancel.main(["demo", "--yes", "--root", str(run.path.parent.parent)]) == 0
    assert capsys.readouterr().out == "cancelled: a\n"
    assert [call for call in commands.calls() if "scancel" in call] == ["scancel 57_0"]


def test_second_cancel_request_ends_job_without_save(sweep, commands):
    run = sweep("a", ("RUNNING", "None"))
    commands("scancel", "")
    for call in ("scancel --signal=USR2 57_0", "scancel 57_0"):
        clusters.request_cancel([run], "no longer wanted")
        assert commands.calls()[-1] == call
    assert read_json(run.cancel)["why"] == "no longer wanted"


def test_cancel_command_continues_after_unwritable_cancel_file(sweep, commands, capsys, monkeypatch):
    """The job of such a run is ended at once: without cancel.json, a run that saves and stops would start again."""
    runs = [sweep(name, ("RUNNING", "None")) for name in "abc"]
    for run in runs:
        run.config.write_text("schema: 1\n")
    commands("scancel", "")
    create = clusters.create_json

    def full(path, value):
        if path.parent.name == "b":
            raise OSError(28, "No space left on device", str(path))
        return create(path, value)

    monkeypatch.setattr(clusters, "create_json", full)
    root = str(runs[0].path.parents[1])
    assert cancel.main(["demo", "--yes", "--root", root]) == 69
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    assert "b: No space left on device" in stderr
    assert "The others are cancelled." in stderr
    ends = [call for call in commands.calls() if "scancel" in call]
    assert ends == ["scancel --signal=USR2 57_0", "scancel 57_1", "scancel --signal=USR2 57_2"]
    assert [run.cancel.exists() for run in runs] == [True, False, True]
    commands("scancel", "echo 'Access denied' >&2; exit 1")
    monkeypatch.setattr(clusters, "create_json", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(PermissionDenied, match="a: Permission denied; .*not ended: not signalled .*Access denied"):
        clusters.request_cancel(runs, "")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_cancel_of_run_of_other_user_claims_no_kill(sweep, commands, monkeypatch):
    """scancel is refused, too: nothing was ended."""
    run = sweep("a", ("RUNNING", "None"))
    os.chown(run.path, 12345, -1)
    commands("scancel", "echo 'scancel: error: Kill job error on job id 57_0: Access/permission denied' >&2; exit 210")
    monkeypatch.setattr(clusters, "create_json", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(PermissionDenied) as error:
        clusters.request_cancel([run], "")
    assert "were killed" not in str(error.value) and "Access/permission denied" in str(error.value)
    assert str(error.value).endswith("Ask uid 12345, who started them.")


def test_submit_shows_messages_of_site_and_limit_that_it_has_cut(tmp_path, commands, capsys):
    commands("sbatch", "echo 'sbatch: Site policy: at most a minute' >&2; echo 'Submitted batch job 57'")
    commands("scontrol", f"[ $2 = job ] && echo 'JobId=57 Requeue=1 TimeLimit=00:01:00' || {CONFIG}")
    run = RunDir(tmp_path / "demo" / "a")
    run.path.mkdir(parents=True)
    backend.SlurmBackend(PROFILE).submit([Job(run, tmp_path, JobResources(hours=0.5))])
    assert capsys.readouterr().err.splitlines() == [
        "sbatch: Site policy: at most a minute",
        "warning: job 57: the site has cut its wall limit to 60 s; asked for 30 min",
    ]
    (submitted,) = map(read_json, run.path.parent.glob(".slurm/*/submitted.json"))
    assert submitted["limit"] == 60 and wall_limit.why_lowered(run, 60) == "", "it was not lowered since"


def test_status_warns_of_limit_that_was_lowered(sweep):
    run = sweep("a", ("RUNNING", "None"))
    write_json(run.path / "job.json", {**read_json(run.path / "job.json"), "shape": {"hours": 0.5}})
    n = attempts.start_attempt(run, {})
    wall_limit.record_limit(run, n, 1800)
    assert state_of(run)[2] == ""
    wall_limit.record_limit(run, n, 60)
    assert state_of(run)[2] == "its wall limit was lowered from 30 min to 60 s"


def test_cancel_signals_remaining_runs_after_failure(sweep, commands):
    remote = sweep("a", site="near")
    first = sweep("b", ("RUNNING", "None"))
    second = sweep("c", ("RUNNING", "None"))
    commands("scancel", "case $* in *57_1) echo 'Access denied' >&2; exit 1;; esac")
    with pytest.raises(FlipError, match="a: it was submitted to the Slurm cluster near.*b: .*Access denied"):
        clusters.cancel([remote, first, second])
    assert commands.calls()[-1] == "scancel --signal=USR2 57_2"
    attempts.start_attempt(remote, {})
    write_json(remote.cancel, {"who": "ann"})
    assert state_of(remote)[0] == "unknown", "the state on the other cluster is unknown"


def test_cancel_raises_error_if_scancel_fails(sweep, commands):
    commands("scancel", "echo 'Access denied' >&2; exit 1")
    with pytest.raises(FlipError, match="Access denied"):
        clusters.cancel([sweep("a", ("RUNNING", "None"))])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_cancel_limits_scancel_to_owner_of_job_record(sweep, commands):
    """A record of another user may name a job of the current user."""
    run = sweep("a", ("RUNNING", "None"))
    os.chown(run.path / "job.json", 12345, -1)
    commands("scancel", "")
    backend.SlurmBackend(PROFILE).cancel([run])
    assert commands.calls()[-1] == "scancel --signal=USR2 --user=12345 57_0"
