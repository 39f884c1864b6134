"""Tests of canaries and of the jobs that they hold: locally with the real supervisor, on Slurm with stub commands."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from flip.runs import attempts, canary
from flip.runs.errors import ConfigError
from flip.runs.restart_policy import EndFacts
from flip.runs.rundir import RunDir, read_json, write_json
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import Job, JobResources
from jobs.host import held_jobs, slurm_cli
from jobs.host.job_watch import CANARY_SECONDS, FOREVER, CanaryWatch
from jobs.slurm import backend
from jobs.submission import apply
from jobs.submitted_runs import clusters
from tests.harness.job_records import write_formats
from tests.jobs.host.owned import WrittenScheduler, serve

SBATCH = 'cp "$1" "$0.$$"; echo "Submitted batch job 5$(ls $0.* | wc -l)"'


def log(run, n, *steps):
    run.metrics.mkdir(exist_ok=True)
    with open(run.metrics / f"{n}.jsonl", "a") as file:
        file.writelines(json.dumps({"step": step, "samples": 8 * step, "loss": 2.0}) + "\n" for step in steps)


ONE = JobResources()


def job(tmp_path, name, shape=ONE, code="code", **fields):
    run = RunDir(tmp_path / "demo" / name)
    run.path.mkdir(parents=True, exist_ok=True)
    return Job(run, tmp_path / code, shape, **fields)


def state_of(run):
    state = clusters.states([run])[run.path]
    return state.state, state.reason


# -- choice of the canary ----------------------------------------------------------------------------------------------


def test_assign_canaries_picks_first_run_of_each_group_of_shape_and_code(tmp_path):
    large = JobResources(2)
    jobs = [job(tmp_path, "a"), job(tmp_path, "b", large), job(tmp_path, "c"), job(tmp_path, "d", code="old")]
    assigned = apply.assign_canaries([*jobs, job(tmp_path, "e")], tmp_path / "demo", 50)
    assert [(item.run.name, item.canary, item.waits_for) for item in assigned] == [
        ("a", 50, ""), ("b", 0, ""), ("c", 0, "a"), ("d", 0, ""), ("e", 0, "a"),
    ]  # fmt: skip
    assert apply.assign_canaries(jobs, tmp_path / "demo", 0) == jobs


@pytest.mark.parametrize("last, goes_ahead", [(51, False), (50, True)])
def test_assign_canaries_skips_shape_and_code_that_have_passed(tmp_path, last, goes_ahead):
    before = job(tmp_path, "z")
    record = {"shape": JobResources().shape(), "snapshot": str(tmp_path / "code"), "module": "jobs.worker", "after": 0}
    write_json(before.run.path / "job.json", record)
    before.run.start_attempt({})
    log(before.run, 1, 1, 20, last)
    jobs = [job(tmp_path, "a"), job(tmp_path, "b")]
    assert bool(apply.assign_canaries(jobs, tmp_path / "demo", 50)[0].canary) == goes_ahead
    for changes in ({"snapshot": tmp_path / "new"}, {"resources": JobResources(4)}):
        assert apply.assign_canaries([replace(item, **changes) for item in jobs], tmp_path / "demo", 50)[0].canary


# -- local cluster -----------------------------------------------------------------------------------------------------


def submit_with_canary(field, steps, first, *waiting):
    """Submit runs with the first as their canary."""
    jobs = [Job(run, field.snapshot, JobResources(), module="fake_rank") for run in (first, *waiting)]
    field.cluster.profile.parallel = 3
    field.cluster.submit(apply.assign_canaries(jobs, field.sweep, steps))


@pytest.mark.long
def test_local_runs_start_after_canary_has_passed(field):
    first = field.run("a", total=200)
    other = field.run("b")
    submit_with_canary(field, 5, first, other)
    field.until_moving(first, 1)
    assert field.state(other) == "queued" and other.newest_attempt() == 0
    assert clusters.states([other])[other.path].reason == "waits for its canary a"
    log(first, 1, 1, 5)
    field.until_moving(first, 1, step=30)
    assert other.newest_attempt() == 0, "the canary needs another step"
    log(first, 1, 6)
    field.until_state(other, "complete")
    assert field.state(first) == "running"
    clusters.request_cancel([first], "enough")
    field.until(lambda: not field.left())


@pytest.mark.long
def test_local_runs_stay_stopped_after_failed_canary_until_resubmission(field):
    first, *waiting = field.run("a", attempts={"1": {"0": "exit:78"}}), field.run("b"), field.run("c")
    submit_with_canary(field, 5, first, *waiting)
    field.until_state(first, "failed")
    field.until(lambda: not field.left())
    for run in waiting:
        state = clusters.states([run])[run.path]
        assert state.state == "stopped" and state.reason.startswith("its canary a is failed (exit code 78")
    submit_with_canary(field, 5, *waiting)
    field.until(lambda: not field.left())
    assert [field.state(run) for run in (first, *waiting)] == ["failed", "complete", "complete"]


# -- on Slurm ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def submitted(tmp_path, commands):
    """Submit canary a with waiting runs b and c. ``queue(first, waiting)`` sets their ``state|reason`` in squeue, of b
    and c together or each."""
    commands("sbatch", SBATCH)
    commands("srun", "")
    commands("scontrol", "echo 'ClusterName = far'")
    commands("scancel", "")
    write_formats(tmp_path / "code")
    jobs = [job(tmp_path, name) for name in "abc"]
    backend.SlurmBackend(ClusterProfile(name="far", kind="slurm")).submit(
        apply.assign_canaries(jobs, tmp_path / "demo", 50)
    )
    a, b, c = runs = [item.run for item in jobs]

    def queue(first="RUNNING|None", waiting="PENDING|JobHeldUser"):
        names = [(read_json(run.path / "job.json") or {})["name"] for run in runs]
        rows = []
        if first:
            rows = [f"{names[0]}|N/A|57|{first.split('|')[0]}|n1|{first.split('|')[1]}|N/A"]
        if not waiting:
            waiting = ()
        elif isinstance(waiting, str):
            waiting = (waiting, waiting)
        for i, row in enumerate(waiting):
            rows.append(f"{names[1]}|{i}|52_{i}|{row.split('|')[0]}||{row.split('|')[1]}|N/A")
        commands("squeue", "printf '%s\\n' " + " ".join(f"'{text}'" for text in rows))

    commands.queue = queue
    commands.runs = runs
    queue()
    return commands


def watch_of(run, record=None):
    """The watch of a canary by the owner of its job."""
    watch = CanaryWatch(run, print)
    watch.watch(record or canary.canary_of(run.read_job()))
    return watch


def look(watch):
    """Wait until a look at a canary is due, and look; returns whether nothing is left to do."""
    time.sleep(max(0.0, watch.due - time.monotonic()))
    watch.look()
    return watch.due == FOREVER


def calls(submitted, *names):
    return [call for call in submitted.calls() if call.startswith(names)]


def test_slurm_submits_waiting_runs_as_held_array_before_canary(submitted, tmp_path):
    a, b, c = submitted.runs
    texts = [path.read_text() for path in tmp_path.glob("sbatch.[0-9]*")]
    (held,), (first,) = ([t for t in texts if ("\n#SBATCH --hold\n" in t) == with_hold] for with_hold in (True, False))
    assert "\n#SBATCH --array=0-1" in held and "\n#SBATCH --array" not in first
    record, waiting = (read_json(run.path / "job.json") for run in (a, b))
    assert record["canary"] == {"steps": 50, "releases": [waiting["name"]]} and waiting["waits_for"] == "a"
    assert waiting["time"] < record["time"]
    assert state_of(b) == state_of(c) == ("queued", "waits for its canary a")


def test_held_jobs_are_released_once_after_canary_has_passed(submitted, clock):
    a, b, _ = submitted.runs
    a.start_attempt({})
    watch = watch_of(a)
    assert not look(watch)
    log(a, 1, 1)
    assert not look(watch) and calls(submitted, "scontrol release") == []
    log(a, 1, 51)
    assert look(watch) and calls(submitted, "scontrol release") == ["scontrol release 52"]
    assert clock[1:] == [1000 + CANARY_SECONDS, 1000 + 2 * CANARY_SECONDS]
    assert not held_jobs.release(a, canary.canary_record(a))
    assert calls(submitted, "scontrol release") == ["scontrol release 52"]
    submitted.queue(waiting="PENDING|JobHeldAdmin")
    assert state_of(b)[0] == "queued" and "scontrol release 52_0" in state_of(b)[1], "an administrator holds the job"


def test_owner_of_a_canary_releases_the_others_while_ranks_run(submitted, monkeypatch, clock):
    monkeypatch.setenv("SLURM_JOB_ID", "57")
    a, *_ = submitted.runs
    scheduler = WrittenScheduler(75, play=lambda: log(a, 1, 1, 51))
    scheduler.polls = 2
    assert serve(a, scheduler) == 75
    assert calls(submitted, "scontrol release") == ["scontrol release 52"] and scheduler.did[-1][0] == "requeue"


def test_release_returns_jobs_missing_from_squeue_as_unreleased(submitted):
    a, b, _ = submitted.runs
    write_json(a.result, {})
    submitted.queue(waiting="")
    record = canary.canary_record(a)
    assert held_jobs.release(a, record) == record["releases"] and not calls(submitted, "scontrol release")
    submitted.queue()
    assert not held_jobs.release(a, record) and calls(submitted, "scontrol release") == ["scontrol release 52"]


@pytest.mark.parametrize("steps, called", [(51, ["scontrol release 52"]), (20, [])])
def test_release_acts_on_record_that_was_checked(submitted, clock, steps, called):
    """Another user exchanges job.json after the check: it needs fewer steps and names no job."""
    a, *_ = submitted.runs
    a.start_attempt({})
    log(a, 1, 1, steps)
    checked = a.read_job()
    watch = watch_of(a, canary.canary_of(checked))
    write_json(a.path / "job.json", {**checked, "canary": {"steps": 10}})
    assert look(watch) is bool(called) and calls(submitted, "scontrol release") == called


@pytest.mark.parametrize("what", ["end", "begin", "watch"])
def test_owner_stops_waiting_for_held_jobs_missing_from_squeue(submitted, clock, what, monkeypatch):
    """A user has cancelled them. A single answer of squeue may be wrong; two answers without them are enough."""
    a, b, _ = submitted.runs
    submitted.queue(waiting="")
    monkeypatch.setenv("SLURM_JOB_ID", "57")
    if what == "end":
        assert serve(a, WrittenScheduler(play=lambda: write_json(a.result, {}))) == 0 and a.newest_attempt() == 1
    if what == "begin":
        write_json(a.result, {})
        assert serve(a) == 0 and a.newest_attempt() == 0
    if what == "watch":
        write_json(a.result, {})
        watch = watch_of(a)
        while not look(watch):
            assert clock[-1] < 2000
    asked = len(calls(submitted, "squeue"))
    assert slurm_cli.UNKNOWN_JOB_SECONDS <= clock[-1] - 1000 < 3 * slurm_cli.UNKNOWN_JOB_SECONDS and asked > 1
    assert state_of(b) == ("stopped", "its canary a is complete: submit again")


def test_job_start_queries_squeue_again_after_empty_answer(submitted, clock, tmp_path):
    a, *_ = submitted.runs
    write_json(a.result, {})
    queue = (tmp_path / "squeue").read_text().partition("\n")[2].partition("\n")[2]
    submitted("squeue", f"[ $(grep -c squeue {tmp_path}/calls) -lt 3 ] && exit 0\n{queue}")
    assert serve(a) == 0 and calls(submitted, "scontrol release") == ["scontrol release 52"]


@pytest.mark.parametrize("line", ["{", "3", "[]", '{"loss": 1}', '{"step": null}', '{"step": 99}', "\0\0"])
def test_release_ignores_damaged_metrics_lines(submitted, clock, line):
    a, *_ = submitted.runs
    n = attempts.start_attempt(a, {})
    log(a, n, 1)
    with open(a.metrics / f"{n}.jsonl", "ab") as file:
        file.write(line.encode() + b"\n\xff\n")
    assert not canary.passed(a, 50)
    log(a, n, 51)
    assert look(watch_of(a)) and calls(submitted, "scontrol release") == ["scontrol release 52"]


@pytest.mark.parametrize(
    "cause, code, called", [("config", 78, "scancel 52"), ("stopped", 75, ""), ("complete", 0, "")]
)
def test_end_releases_or_cancels_held_jobs_by_cause(submitted, clock, cause, code, called, monkeypatch):
    a, b, _ = submitted.runs

    def play():
        a.write_cause(1, 0, cause, code, f"why {cause}")
        if cause == "complete":
            write_json(a.result, {})

    monkeypatch.setenv("SLURM_JOB_ID", "57")
    assert serve(a, WrittenScheduler(code, play=play)) == code
    assert calls(submitted, "scancel") == ([called] if called else [])
    assert calls(submitted, "scontrol release") == (["scontrol release 52"] if cause == "complete" else [])


@pytest.mark.parametrize("row", ["RUNNING|None", "PENDING|Priority"])
def test_failed_canary_leaves_job_that_was_released_by_hand(submitted, row):
    submitted.queue(waiting=(row, "PENDING|JobHeldUser"))
    held_jobs.cancel(canary.canary_record(submitted.runs[0])["releases"])
    assert calls(submitted, "scancel") == ["scancel 52_1"]
    submitted.queue(waiting=("COMPLETED|None", "PENDING|JobHeldUser"))
    held_jobs.cancel(canary.canary_record(submitted.runs[0])["releases"])
    assert calls(submitted, "scancel")[1:] == ["scancel 52"]


@pytest.mark.parametrize(
    "first, called",
    [("PENDING|Priority", ["scancel 57", "scancel 52"]), ("RUNNING|None", ["scancel --signal=USR2 57"])],
)
def test_cancel_of_canary_that_does_not_run_cancels_held_jobs(submitted, first, called):
    """Its owner, which does so otherwise, never runs."""
    submitted.queue(first=first)
    clusters.request_cancel([submitted.runs[0]], "a mistake")
    assert calls(submitted, "scancel") == called


def test_cancel_of_canary_that_has_passed_cancels_no_other_job(submitted):
    a, *_ = submitted.runs
    log(a, attempts.start_attempt(a, {}), 1, 51)
    submitted.queue(first="PENDING|Priority")
    clusters.request_cancel([a], "a mistake")
    assert calls(submitted, "scancel", "scontrol release") == ["scancel 57", "scontrol release 52"]
    submitted.queue(first="PENDING|Priority", waiting="PENDING|JobHeldAdmin")
    clusters.request_cancel([a], "a mistake")
    assert calls(submitted, "scancel", "scontrol release")[2:] == ["scancel 57"], "an administrator holds them"


@pytest.mark.parametrize("last, done", [(51, "scontrol release 52"), (2, "scancel 52")])
def test_job_start_releases_or_cancels_held_jobs_after_unobserved_end(submitted, clock, last, done, monkeypatch):
    """The canary's node died. The next start sees that the canary has stopped for good."""
    a, b, _ = submitted.runs
    n = attempts.start_attempt(a, {})
    log(a, n, 1, last)
    a.write_cause(n, 0, "data", 65, "a shard is damaged")
    monkeypatch.setenv("SLURM_JOB_ID", "57")
    assert serve(a) == 65
    assert calls(submitted, "scontrol release", "scancel") == [done]


@pytest.mark.parametrize("row", ["PENDING|JobHeldUser", "CANCELLED|None", ""])
def test_waiting_runs_report_failed_canary_and_can_be_resubmitted(submitted, row):
    a, b, c = submitted.runs
    n = attempts.start_attempt(a, {})
    a.write_cause(n, 0, "config", 78, "a key is unknown")
    attempts.end_attempt(a, n, EndFacts(78, "RUNNING"))
    submitted.queue(first="FAILED|NonZeroExitCode", waiting=row)
    expected = "its canary a is failed (rank 0: a key is unknown): submit again"
    assert state_of(b) == state_of(c) == ("stopped", expected) and state_of(a)[0] == "failed"
    states = clusters.states([c, b, a])
    assert [states[run.path].state for run in (a, b, c)] == ["failed", "stopped", "stopped"]
    jobs = [Job(run, Path("/code")) for run in (b, c)]
    backend.SlurmBackend(ClusterProfile(name="far", kind="slurm")).submit(
        apply.assign_canaries(jobs, a.path.parent, 50)
    )
    # Held jobs of the old submission are cancelled.
    assert calls(submitted, "scancel") == (["scancel 52_0 52_1"] if "Held" in row else [])
    assert read_json(b.path / "job.json")["canary"] and read_json(c.path / "job.json")["waits_for"] == "b"


def test_waiting_run_is_stopped_if_canary_is_resubmitted_alone(submitted):
    a, b, _ = submitted.runs
    backend.SlurmBackend(ClusterProfile(name="far", kind="slurm")).submit([Job(a, Path("/code"), canary=50)])
    submitted.queue()
    assert state_of(b) == ("stopped", "its canary a is running (starting): submit again")


def test_waiting_run_reports_slurm_state_if_released_by_hand(submitted):
    _, b, _ = submitted.runs
    submitted.queue(waiting="PENDING|Priority")
    assert state_of(b) == ("queued", "in Slurm: Priority")
    submitted.queue(waiting="RUNNING|None")
    assert state_of(b) == ("running", "starting")


def test_submit_cancels_held_jobs_if_sbatch_refuses_canary(tmp_path, submitted):
    jobs = apply.assign_canaries([job(tmp_path, name, JobResources(3)) for name in "xy"], tmp_path / "demo", 50)
    refuse = "if grep -qx '#SBATCH --hold' $1; then echo 'Submitted batch job 60'; else echo too many >&2; exit 1; fi"
    submitted("sbatch", refuse)
    listed = f'name=$(sed -n \'s/.*"name": "\\(.*\\)",/\\1/p\' {tmp_path}/demo/y/job.json); '
    submitted("squeue", listed + 'echo "$name|N/A|60|PENDING||JobHeldUser|N/A"')
    with pytest.raises(ConfigError, match="too many"):
        backend.SlurmBackend(ClusterProfile(name="far", kind="slurm")).submit(jobs)
    assert calls(submitted, "scancel") == ["scancel 60"]


def test_submit_cancels_only_held_jobs_of_resubmitted_runs(submitted):
    """b and c wait in one array."""
    _, b, _ = submitted.runs
    again = Job(b, Path("/"), JobResources(1))
    backend.SlurmBackend(ClusterProfile(name="far", kind="slurm")).submit([again])
    assert calls(submitted, "scancel") == ["scancel 52_0"]


def test_submit_keeps_held_jobs_if_sbatch_refuses_job_after_canary(tmp_path, submitted):
    """They wait for a canary that runs; if they were cancelled, they would be reported as cancelled."""
    jobs = [*[job(tmp_path, name, JobResources(3)) for name in "xy"], job(tmp_path, "z", JobResources(4))]
    submitted("sbatch", "grep -q -- --nodes=4 $1 && { echo 'error: too many' >&2; exit 1; }\n" + SBATCH)
    listed = f'name=$(sed -n \'s/.*"name": "\\(.*\\)",/\\1/p\' {tmp_path}/demo/y/job.json); '
    submitted("squeue", listed + 'echo "$name|N/A|60|PENDING||JobHeldUser|N/A"')
    with pytest.raises(ConfigError, match="too many"):
        backend.SlurmBackend(ClusterProfile(name="far", kind="slurm")).submit(
            apply.assign_canaries(jobs, tmp_path / "demo", 50)
        )
    assert read_json(tmp_path / "demo" / "x" / "job.json")["canary"]["releases"] and not calls(submitted, "scancel")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("during", ["held", "canary"])
def test_submit_cancels_held_jobs_if_interrupted(tmp_path, submitted, monkeypatch, error, during):
    """Slurm has accepted the job when Ctrl-C or a full disk interrupts the submission."""
    jobs = apply.assign_canaries([job(tmp_path, name, JobResources(3)) for name in "xy"], tmp_path / "demo", 50)
    submitted("sbatch", "echo 'Submitted batch job 60'")
    listed = f'name=$(sed -n \'s/.*"name": "\\(.*\\)",/\\1/p\' {tmp_path}/demo/y/job.json); '
    submitted("squeue", listed + 'echo "$name|N/A|60|PENDING||JobHeldUser|N/A"')
    real_sbatch = backend.SlurmBackend._sbatch

    def sbatch(self, jobs, *args):
        number = real_sbatch(self, jobs, *args)
        if bool(jobs[0].waits_for) == (during == "held"):
            raise error
        return number

    monkeypatch.setattr(backend.SlurmBackend, "_sbatch", sbatch)
    with pytest.raises(type(error)):
        backend.SlurmBackend(ClusterProfile(name="far", kind="slurm")).submit(jobs)
    assert calls(submitted, "scancel") == ["scancel 60"]
