"""Tests that nodes are excluded if two runs fail only there, or if no rank could be started there."""

import os

import pytest

from flip.runs import attempts, bad_nodes
from flip.runs.errors import CAUSES
from flip.runs.restart_policy import EndFacts
from flip.runs.rundir import RunDir, read_json, write_json
from jobs.host import slurm_cli
from jobs.host.job import JobOptions, Owner
from jobs.host.scheduler import SlurmScheduler
from tests.harness.job_records import write_job
from tests.jobs.host.owned import SilentGuard, WrittenStep

NOW = 1_000_000.0


@pytest.fixture
def sweep(tmp_path):
    """``failed(run, node, ...)`` records an attempt of the run that failed on these nodes ``ago`` seconds ago."""

    def failed(name, *nodes, cause="crash", ago=60.0, ended=True, **facts):
        run = RunDir(tmp_path / "sweep" / name)
        run.path.mkdir(parents=True, exist_ok=True)
        n = run.start_attempt({"resumes_from": 0, "after": 0})
        for rank, node in enumerate(nodes):
            run.write_cause(n, rank, cause, CAUSES[cause], "it broke", host=node, **facts)
        if ended:
            write_json(run.attempt(n) / "end.json", {"attempt": n, "cause": cause, "time": NOW - ago})
        return run, n

    return failed


def suspect(run, n):
    return bad_nodes.find_suspect(run, n, NOW)


def test_find_suspect_names_node_on_which_two_runs_failed(sweep):
    sweep("other", "n1", cause="hang")
    assert suspect(*sweep("mine", "n1", ended=False)) == ("n1", "other")


def test_find_suspect_ignores_repeated_failures_of_same_run(sweep):
    sweep("mine", "n1")
    sweep("other", "n2")
    assert suspect(*sweep("mine", "n1", ended=False)) == ("", "")


def test_find_suspect_ignores_runs_that_failed_on_several_nodes(sweep):
    sweep("other", "n2")
    sweep("other", "n1")
    assert suspect(*sweep("mine", "n1", ended=False)) == ("", "")
    sweep("another", "n1")
    sweep("mine", "n3")
    assert suspect(*sweep("mine", "n1", ended=False)) == ("", "")


def test_find_suspect_ignores_attempt_with_several_or_no_named_nodes(sweep):
    sweep("other", "n1")
    assert suspect(*sweep("mine", "n1", "n2", ended=False)) == ("", "")
    assert suspect(*sweep("mine", ended=False)) == ("", "")


@pytest.mark.parametrize("cause, ago", [("crash", 90_000.0), ("storage", 60.0), ("stopped", 60.0)])
def test_find_suspect_ignores_old_failures_and_causes_unrelated_to_nodes(sweep, cause, ago):
    sweep("other", "n1", cause=cause, ago=ago)
    assert suspect(*sweep("mine", "n1", ended=False)) == ("", "")


@pytest.mark.parametrize("which", ["mine", "other"])
def test_find_suspect_ignores_ranks_that_were_killed_for_memory(sweep, which):
    memory = {which: {"out_of_memory": True}}
    sweep("other", "n1", **memory.get("other", {}))
    assert suspect(*sweep("mine", "n1", ended=False, **memory.get("mine", {}))) == ("", "")


def test_find_suspect_skips_other_run_with_damaged_record(sweep):
    run, n = sweep("broken", "n1")
    (run.attempt(n) / "end.json").write_text("{")
    attempt = sweep("mine", "n1", ended=False)
    assert suspect(*attempt) == ("", "")
    sweep("other", "n1")
    assert suspect(*attempt) == ("n1", "other")


def test_find_suspect_skips_closed_run_of_other_user(sweep, monkeypatch):
    """root could read it all the same, so the error is simulated."""
    attempt = sweep("mine", "n1", ended=False)
    closed = attempt[0].path.parent / "closed"
    sweep("other", "n1")
    real_stat = os.stat

    def stat(path, **options):
        if str(path).startswith(str(closed)):
            raise PermissionError(13, "Permission denied", str(path))
        return real_stat(path, **options)

    closed.mkdir()
    monkeypatch.setattr(os, "stat", stat)
    assert suspect(*attempt) == ("n1", "other")


def test_find_suspect_returns_nothing_if_own_records_are_damaged(sweep):
    run, n = sweep("mine", "n2")
    (run.attempt(n) / "end.json").write_text("{")
    sweep("other", "n1")
    assert suspect(*sweep("mine", "n1", ended=False)) == ("", "")


def test_requeue_excludes_suspect_node_and_records_reason(sweep, commands, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "57")
    monkeypatch.setattr(bad_nodes, "RECENT", float("inf"))
    monkeypatch.setattr(slurm_cli.time, "sleep", lambda seconds: None)
    fields = "JobState=RUNNING Restarts=0 Partition=gpu NumNodes=1 ExcNodeList=(null)"
    commands("scontrol", f"case $2 in job) echo '{fields}';; hostnames) echo $3;; esac")
    commands("sinfo", "printf 'n%s|idle\\n' 1 2")
    other, _ = sweep("other", "n1")
    run = RunDir(other.path.parent / "mine")
    run.path.mkdir()
    write_job(run)

    class FailingStep(SlurmScheduler):
        def start_step(self, argv, environ, logs, name="job"):
            run.write_cause(1, 0, "crash", CAUSES["crash"], "it broke", host="n1")
            return WrittenStep(70)

    assert Owner(run, JobOptions(), FailingStep(), SilentGuard).serve() == 70
    assert "scontrol update JobId=57 ExcNodeList=n1" in commands.calls()
    end = read_json(run.attempt(1) / "end.json")
    assert end["exclude"] == ["n1"] and end["reason"].endswith("without n1 from now on, where other failed as well")


@pytest.mark.parametrize(
    "reason, before, cause, action",
    [
        ("Address already in use", 0, "port", "requeue"),
        ("it broke", 2, "crash", "stop"),
        ("it broke", 1, "crash", "requeue"),
    ],
)
def test_end_attempt_excludes_suspect_only_for_retried_crash(sweep, reason, before, cause, action):
    for _ in range(before):
        attempts.end_attempt(*sweep("mine", "n1", ended=False), EndFacts(70, "RUNNING"))
    run, n = sweep("mine", ended=False)
    run.write_cause(n, 0, "crash", CAUSES["crash"], reason, host="n1")
    decision = attempts.end_attempt(run, n, EndFacts(70, "RUNNING"), suspect=("n1", "other"))
    assert (decision.cause, decision.action) == (cause, action)
    excluded = cause == "crash" and action == "requeue"
    assert decision.exclude == (("n1",) if excluded else ()) and ("without n1" in decision.reason) == excluded


# -- nodes that could not start a rank, according to the output of srun

LOST = "srun: error: n2: task 1: Exited with exit code 2\n"


def unstartable(tmp_path, text, among=4):
    run = RunDir(tmp_path / "run")
    (run.logs / "1").mkdir(parents=True, exist_ok=True)
    (run.logs / "1" / "job.err").write_text(text)
    return bad_nodes.unstartable_nodes(run, 1, among)


def test_unstartable_nodes_is_empty_if_all_ranks_have_started(tmp_path):
    """The code has another reason then: such a node was once excluded for a day, after 110 steps, for a full disk."""
    assert unstartable(tmp_path, LOST) == ["n2"]
    run = RunDir(tmp_path / "run")
    run.start_attempt({})
    run.record_ready(1, 0)
    assert unstartable(tmp_path, LOST) == []


@pytest.mark.parametrize("code", bad_nodes.UNSTARTED_CODES)
def test_unstartable_nodes_lists_node_that_started_no_rank(tmp_path, code):
    text = f"x\nsrun: error: n-2.site: tasks 4-5,7: Exited with exit code {code}\nsrun: error: n1: task 0: Killed\n"
    assert unstartable(tmp_path, text) == ["n-2.site"]


@pytest.mark.parametrize("code", [1, 12, 65, 69, 70, 75, 78, 137, 143])
def test_unstartable_nodes_ignores_exit_codes_of_started_ranks(tmp_path, code):
    assert unstartable(tmp_path, f"srun: error: n2: task 1: Exited with exit code {code}\n") == []


def test_unstartable_nodes_is_empty_if_more_than_half_fail(tmp_path):
    three = LOST + LOST.replace("n2", "n3") + LOST.replace("n2", "n4")
    assert unstartable(tmp_path, three, 6) == ["n2", "n3", "n4"] and unstartable(tmp_path, three, 5) == []
    assert unstartable(tmp_path, LOST, 2) == ["n2"] and unstartable(tmp_path, LOST, 1) == []


def test_unstartable_nodes_accepts_missing_log_and_reads_only_its_tail(tmp_path):
    assert bad_nodes.unstartable_nodes(RunDir(tmp_path / "nothing"), 1, 4) == []
    assert unstartable(tmp_path, LOST + "x" * bad_nodes.TAIL_BYTES) == []
    assert unstartable(tmp_path, "x" * bad_nodes.TAIL_BYTES + "\n" + LOST) == ["n2"]


def test_out_of_memory_nodes_reads_lines_of_srun(tmp_path):
    run = RunDir(tmp_path / "run")
    assert bad_nodes.out_of_memory_nodes(run, 1) == []
    (run.logs / "1").mkdir(parents=True)
    lines = [
        "slurmstepd-n1: error: Detected 1 oom_kill event in StepId=1.0. Some of the step tasks have been OOM Killed."
    ]
    lines += ["srun: error: n1: task 0: Out Of Memory", "srun: error: n-3.site: tasks 4-5: Out Of Memory"]
    lines += ["srun: error: n2: task 1: Killed", "rank 1: srun: error: n9: task 1: Out Of Memory"]
    (run.logs / "1" / "job.err").write_text("\n".join(lines) + "\n")
    assert bad_nodes.out_of_memory_nodes(run, 1) == ["n-3.site", "n1"]
    run.attempt(1).mkdir(parents=True)
    run.write_cause(1, 4, "crash", 70, "out of memory", host="n4", out_of_memory=True)
    run.write_cause(1, 5, "crash", 70, "a fault", host="n5")
    assert bad_nodes.out_of_memory_nodes(run, 1) == ["n-3.site", "n1", "n4"]
