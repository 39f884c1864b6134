"""Tests of the local backend with real processes and signals: runs end correctly and leave no processes."""

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from flip.runs import attempts, checkpoint_folder
from flip.runs.errors import FlipError
from flip.runs.origin import is_copy
from flip.runs.restart_policy import EndFacts
from flip.runs.rundir import RunDir, read_json, write_json
from jobs.common.job import Job
from jobs.host import processes
from jobs.host.agents.coordinator import TIMING
from jobs.host.rank_entry import MALLOC
from jobs.local import adopted, agents, backend, supervisor
from jobs.submitted_runs import clusters

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[3]


def ends(run):
    return [(row["action"], row["cause"]) for row in reversed(list(attempts.ends(run)))]


def log(run):
    path = run.logs / "latest" / "node0.out"
    if path.exists():
        return path.read_text()
    return ""


def start_attempt(field, run):
    """Start the first attempt of a run without a supervisor."""
    world = field.worlds[run.name]
    n = run.start_attempt({"host": socket.gethostname(), "world": world, "first_commit": False})
    job = {"python": sys.executable, "module": "fake_rank", "snapshot": str(field.snapshot), "env": {}}
    return agents.start(run, n, {**job, "world": world}, grace=0.5)


def test_runs_complete_in_order_and_leave_no_processes(field):
    first = field.run("b", world=2)
    second = field.run("a")
    field.submit(first, second)
    assert field.state(second) == "queued"
    field.until(lambda: not field.left())
    assert [field.state(run) for run in (first, second)] == ["complete", "complete"]
    assert ends(first) == [("done", "complete")]
    assert attempts.last_end(first)["time"] < read_json(second.attempt(1) / "start.json")["time"]
    assert "rank 0 starts at 0" in log(first)  # rank 1 may start later, after a save
    assert log(first).count("starts at") == log(first).count(f"malloc {MALLOC}") == 2
    field.submit(first, second)  # complete runs start nothing
    field.until(lambda: not field.left())
    assert first.newest_attempt() == second.newest_attempt() == 1


def test_ranks_get_open_file_limit_raised_to_hard_limit(field):
    run = field.run(total=10_000)
    kind = resource.RLIMIT_NOFILE
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (min(256, hard), hard))
    try:
        field.submit(run)
    finally:
        resource.setrlimit(kind, (soft, hard))
    field.until_moving(run, 1)
    assert resource.prlimit(field.pids(run)[0], kind) == (hard, hard)


def test_parallel_setting_limits_concurrent_runs(field):
    runs = [field.run("a", total=100), field.run("b", total=100), field.run("c", total=1)]
    field.submit(*runs, parallel=2)
    field.until_moving(runs[0], 1)
    field.until_moving(runs[1], 1)
    assert [field.state(run) for run in runs] == ["running", "running", "queued"]
    field.until(lambda: not field.left())
    assert [field.state(run) for run in runs] == ["complete"] * 3


def test_concurrent_runs_get_disjoint_gpus(field, monkeypatch):
    """start.json records the GPUs, so that a later supervisor knows which are in use."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-a,6")
    first = field.run("a", total=10_000)
    second = field.run("b", world=2, total=40)
    third = field.run("c", total=1)
    field.submit(first, second, third, parallel=3, gpus=1)
    field.until_moving(second, 1)
    field.until(lambda: "GPUs" in log(first))
    assert field.state(third) == "queued"
    field.until_state(third, "complete")
    assert "GPUs 4, expandable_segments:True" in log(first)
    assert log(second).count("GPUs GPU-a,6,") == 2 and log(third).count("GPUs GPU-a,") == 1
    assert "malloc None" in log(first), "the settings for CPUs were not measured beside GPUs"
    assert read_json(first.attempt(1) / "start.json")["gpus"] == ["4"]
    assert list(adopted.adopt(first, 1, 60.0).gpus) == ["4"]
    field.cluster.cancel([first])
    first.cancel.touch()
    field.until(lambda: not field.left())


def test_run_fails_after_three_crashes_and_restarts_after_resubmission(field):
    run = field.run(attempts={str(n): {"0": "crash"} for n in (1, 2, 3, 4)})
    field.submit(run)
    field.until_state(run, "failed")
    assert ends(run) == [("requeue", "crash"), ("requeue", "crash"), ("stop", "crash")]
    assert "3 failed attempts" in clusters.states([run])[run.path].reason
    field.until(lambda: not field.left())
    field.submit(run)
    field.until_state(run, "complete")
    assert ends(run)[3:] == [("requeue", "crash"), ("done", "complete")]


def test_configuration_error_fails_run_without_retry(field):
    run = field.run(attempts={"1": {"0": "exit:78"}})
    field.submit(run)
    field.until_state(run, "failed")
    assert ends(run) == [("stop", "config")]


def test_killed_rank_ends_peers_and_run_resumes_from_checkpoint(field):
    run = field.run(world=2, total=60)
    field.submit(run)
    field.until_moving(run, 1, step=4)
    peer, victim = field.pids(run)
    os.kill(victim, signal.SIGKILL)
    field.until_state(run, "complete")
    assert ends(run) == [("requeue", "crash"), ("done", "complete")]
    assert peer not in field.left()
    assert read_json(run.attempt(2) / "start.json")["resumes_from"] >= 4
    assert attempts.last_end(run)["commits"] == 60


def parent(pid):
    return int(processes.read_stat(pid)[1][1])


def test_first_failure_restarts_from_same_agent_and_second_from_new_one(field):
    run = field.run(world=2, total=30, every=1000)
    field.submit(run)
    parents = []
    for n in (1, 2, 3):
        field.until_moving(run, n, step=3)
        field.until(lambda: len(field.pids(run)) == 2)
        pids = field.pids(run)
        assert len({parent(pid) for pid in pids}) == 1
        parents.append(parent(pids[0]))
        if n < 3:
            os.kill(pids[n % 2], signal.SIGKILL)
    field.until_state(run, "complete")
    assert ends(run) == [("requeue", "crash"), ("requeue", "crash"), ("done", "complete")]
    assert parents[0] == parents[1] != parents[2]
    starts = [read_json(run.attempt(n) / "start.json") for n in (1, 2, 3)]
    assert [start["warm"] for start in starts] == [False, True, False]
    end = read_json(run.attempt(1) / "end.json")
    assert starts[0]["time"] < end["noticed"] < end["time"]  # the peer of the killed rank ends in between
    field.until(lambda: not field.left())


def test_agent_that_waits_for_next_attempt_ends_with_its_supervisor(field):
    run = field.run(total=10_000, attempts={"1": {"0": "exit:69"}}, at=2)  # storage: again after 30 s
    field.submit(run)
    field.until(lambda: ends(run) == [("requeue", "storage")])
    assert len(field.left()) == 2  # the supervisor, and the agent without ranks
    os.kill(field.supervisor(), signal.SIGTERM)
    field.until(lambda: not field.left())


def test_stopped_rank_is_noticed_and_run_continues(field):
    run = field.run(world=2, total=40)
    field.submit(run)
    field.until_moving(run, 1, step=4)
    os.kill(field.pids(run)[0], signal.SIGSTOP)
    field.until_state(run, "complete")
    assert ends(run) == [("requeue", "hang"), ("done", "complete")]
    assert "SIGSTOP" in run.causes(1)[0]["reason"]
    field.until(lambda: not field.left())


def test_ranks_of_killed_agent_save_and_run_continues(field):
    run = field.run(world=2, total=60, every=1000)
    field.submit(run)
    field.until_moving(run, 1, step=4)
    (agent,) = {parent(pid) for pid in field.pids(run)}
    os.kill(agent, signal.SIGKILL)
    field.until_state(run, "complete")
    assert ends(run) == [("requeue", "stopped"), ("done", "complete")]
    assert read_json(run.attempt(2) / "start.json")["resumes_from"] >= 4
    end = read_json(run.attempt(1) / "end.json")
    assert end["code"] is None and end["observed"] and end["noticed"] < end["time"]  # its ranks save in between
    field.until(lambda: not field.left())


def test_hung_peer_is_killed_and_root_cause_is_recorded(field):
    run = field.run(world=2, attempts={"1": {"0": "hang", "1": "diverge"}})
    field.submit(run)
    field.until_state(run, "failed")
    assert ends(run) == [("stop", "diverged")]
    field.until(lambda: not field.left())


def test_run_restarts_after_stop_signals(field):
    run = field.run(total=20, every=1000)
    field.submit(run)
    for number, sent in enumerate((signal.SIGTERM, signal.SIGUSR2), 1):
        field.until_moving(run, number)
        os.kill(field.pids(run)[0], sent)
        field.until(lambda number=number: run.newest_attempt() > number)
    field.until_state(run, "complete")
    assert ends(run) == [("requeue", "stopped"), ("requeue", "stopped"), ("done", "complete")]
    assert [read_json(run.attempt(n) / "start.json")["first_commit"] for n in (1, 2, 3)] == [False] * 3


def test_attempt_saves_first_step_if_previous_was_interrupted_without_checkpoint(field):
    run = field.run(every=1000, total=5, at=2, attempts={"1": {"0": "exit:75"}, "2": {"0": "kill"}})
    field.submit(run)
    field.until_state(run, "complete")
    assert [read_json(run.attempt(n) / "start.json")["first_commit"] for n in (1, 2, 3)] == [False, True, False]
    assert read_json(run.attempt(3) / "start.json")["resumes_from"] == 1
    assert ends(run) == [("requeue", "stopped"), ("requeue", "crash"), ("done", "complete")]


def test_rank_that_ignores_cancel_is_killed(field):
    field.cluster.profile.signal_seconds = 1
    run = field.run(attempts={"1": {"0": "hang"}})
    field.submit(run)
    field.until(lambda: "starts at" in log(run))
    run.cancel.write_text("{}")
    field.cluster.cancel([run])
    field.until(lambda: not field.left())
    assert field.state(run) == "cancelled"


def test_new_supervisor_adopts_ranks_of_killed_supervisor(field):
    run = field.run(world=2, total=60)
    field.submit(run)
    field.until_moving(run, 1, step=3)
    os.kill(field.supervisor(), signal.SIGKILL)
    field.submit(run)  # at once, while the ranks are still stopping
    field.until_state(run, "complete")
    assert ends(run) == [("requeue", "stopped"), ("done", "complete")]
    assert "adopting attempt 1" in field.journal()
    field.until(lambda: not field.left())


def test_copy_of_running_run_is_left_alone(field):
    """Its records name the processes of the original, which a supervisor must not adopt."""
    run = field.run("a", total=60)
    field.submit(run)
    field.until_moving(run, 1, step=2)
    copy = RunDir(field.sweep / "a-copy")
    shutil.copytree(run.path, copy.path, ignore=shutil.ignore_patterns("*.tmp.*"))  # these vanish during the copy
    assert field.state(copy) == "stopped" and backend.live_ranks(copy) == []
    field.until_state(run, "complete")
    field.until(lambda: not field.left())
    assert ends(run) == [("done", "complete")] and copy.newest_attempt() == 1 and "a-copy" not in field.journal()
    copied = {**read_json(copy.path / "job.json"), "folder": str(copy.path.parent / "gone")}
    assert not is_copy(copy, copied), "it was renamed"


def test_copy_of_running_sweep_whose_job_record_is_partial_is_left_alone(field, tmp_path):
    """Without ``folder`` it does not show that it is a copy: no start obeys it."""
    run = field.run("a", total=60)
    field.submit(run)
    field.until_moving(run, 1, step=2)
    copy = RunDir(tmp_path / "copied" / field.sweep.name / "a")
    shutil.copytree(run.path, copy.path, ignore=shutil.ignore_patterns("*.tmp.*"))
    job = read_json(copy.path / "job.json")
    del job["folder"]
    write_json(copy.path / "job.json", job)
    assert clusters.states([copy])[copy.path].state == "stopped" and backend.live_ranks(copy) == []
    done = subprocess.run(
        [sys.executable, "-m", "jobs.local.supervisor", copy.path.parent], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    field.until(lambda: not supervisor.is_served(copy.path.parent))
    assert copy.newest_attempt() == 1 and not (copy.attempt(1) / "end.json").exists()
    field.until_state(run, "complete")
    assert ends(run) == [("done", "complete")]


def test_ranks_stop_by_themselves_if_supervisor_is_killed(field):
    run = field.run(world=2, total=10_000)
    field.submit(run)
    field.until_moving(run, 1, step=2)
    os.kill(field.supervisor(), signal.SIGKILL)
    field.until(lambda: not field.left())
    assert {record["cause"] for record in run.causes(1)} == {"stopped"}
    assert field.state(run) == "stopped"


def test_adopted_rank_that_ignores_stop_is_killed(field):
    run = field.run(attempts={"1": {"0": "hang"}}, total=4)
    field.submit(run)
    field.until(lambda: "starts at" in log(run))
    os.kill(field.supervisor(), signal.SIGKILL)
    field.until(lambda: not supervisor.is_served(field.sweep))
    attempt = adopted.adopt(run, 1, patience=0.0)
    field.until(attempt.poll)
    assert not field.pids(run)
    assert supervisor.attempts.end_attempt(run, 1, EndFacts(attempt.code, "RUNNING")).cause == "node"
    assert not attempt.observed


def test_cancel_saves_running_run_and_lasts_until_resubmission(field):
    run = field.run("a", total=10_000, every=10_000)
    queued = field.run("b")
    field.submit(run, queued)
    field.until_moving(run, 1, step=2)
    command = [sys.executable, "jobs", "cancel", str(field.sweep), "--yes", "--why", "a test"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "cancelled: a, b\n"
    field.until(lambda: not field.left())
    assert ends(run) == [("stop", "cancelled")] and "a test" in attempts.last_end(run)["reason"]
    assert [field.state(r) for r in (run, queued)] == ["cancelled", "cancelled"]
    assert checkpoint_folder.checkpoints(run)
    field.submit(queued, uncancels=True)
    field.until_state(queued, "complete")
    assert field.state(run) == "cancelled"


def test_terminated_supervisor_lets_runs_save_and_resubmission_resumes(field):
    run = field.run(total=60)
    field.submit(run)
    field.until_moving(run, 1, step=2)
    os.kill(field.supervisor(), signal.SIGTERM)
    field.until(lambda: not field.left())
    assert ends(run) == [("nothing", "stopped")] and field.state(run) == "stopped"
    field.submit(run)
    field.until_state(run, "complete")
    assert read_json(run.attempt(2) / "start.json")["resumes_from"] >= 2


def test_submit_reports_why_supervisor_does_not_start(field):
    (field.sweep / ".supervisor" / "lock").mkdir(parents=True)
    with pytest.raises(FlipError, match="the supervisor did not start .*Is a directory"):
        field.submit(field.run())


def test_second_supervisor_of_same_sweep_exits(field):
    run = field.run(total=10_000)
    field.submit(run)
    field.until_moving(run, 1)
    first = field.supervisor()
    command = [sys.executable, "-m", "jobs.local.supervisor", str(field.sweep)]
    assert subprocess.run(command, cwd=field.snapshot, check=False).returncode == 0
    assert field.supervisor() == first and len(field.left()) == 3  # with an agent and its rank
    os.kill(first, signal.SIGTERM)
    field.until(lambda: not field.left())


def test_supervisor_runs_from_hooks_code_instead_of_older_snapshot(field):
    """The run continues with its own code, but not with the supervisor in it."""
    (field.snapshot / "jobs").unlink()
    shutil.copytree(ROOT / "jobs", field.snapshot / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    (field.snapshot / "jobs" / "local" / "supervisor.py").write_text("raise SystemExit('another supervisor')\n")
    run = field.run()
    field.submit(run, host_snapshot=ROOT)
    field.until_state(run, "complete")
    job = read_json(run.path / "job.json")
    assert (job["snapshot"], job["hooks"]) == (str(field.snapshot), str(ROOT))


def test_missing_python_interpreter_fails_run_and_is_named(field):
    run = field.run()
    field.cluster.profile.python = "/nowhere/python"
    field.submit(run)
    field.until_state(run, "failed")
    assert "/nowhere/python" in clusters.states([run])[run.path].reason


def test_supervisor_records_missing_end_of_complete_run(field):
    done = field.run("a")
    other = field.run("b")
    field.submit(done)
    field.until_state(done, "complete")
    field.until(lambda: not field.left())
    (done.attempt(1) / "end.json").unlink()  # as if supervisor and ranks ended at the same moment
    field.submit(other)
    field.until(lambda: ends(done) == [("done", "complete")])
    field.until_state(other, "complete")


def test_rank_killed_by_leaving_supervisor_counts_as_stopped(field):
    field.cluster.profile.signal_seconds = 1
    run = field.run(attempts={"3": {"0": "hang"}, "1": {"0": "crash"}, "2": {"0": "crash"}})
    field.submit(run)
    field.until(lambda: run.newest_attempt() == 3 and "starts at" in log(run))
    os.kill(field.supervisor(), signal.SIGTERM)
    field.until(lambda: not field.left())
    assert ends(run)[2:] == [("nothing", "stopped")]
    assert "asked to save and stop" in attempts.last_end(run)["reason"]


def test_submission_during_supervisor_shutdown_is_served(field):
    field.cluster.profile.signal_seconds = 2
    run = field.run(attempts={"1": {"0": "hang"}})
    field.submit(run)
    field.until(lambda: "starts at" in log(run))
    os.kill(field.supervisor(), signal.SIGTERM)
    field.until(lambda: "stop requested" in field.journal())
    field.submit(run)
    assert supervisor.is_served(field.sweep) and run.newest_attempt() == 1
    field.until_state(run, "complete")
    assert ends(run) == [("nothing", "stopped"), ("done", "complete")]
    field.until(lambda: not field.left())


def wait_for_end(field, attempt):
    """Wait for the end of an attempt that ``start_attempt`` has started, and of its agent."""
    field.until(attempt.poll)
    attempt.close()
    attempt.agent.leave()
    attempt.agent.process.wait(20)
    assert not field.left()


def test_terminate_repeats_lost_signal(field):
    run = field.run(total=10_000, attempts={"1": {"0": "lose"}})
    attempt = start_attempt(field, run)
    attempt.agent.coordinator.timing = TIMING._replace(repeat=0.1)
    field.until(lambda: attempt.poll() or (read_json(run.status) or {}).get("step", 0) >= 1)
    field.until(lambda: attempt.terminate(30.0) or attempt.poll())
    wait_for_end(field, attempt)
    assert attempt.code == 75


def test_rank_that_hangs_after_peer_exits_successfully_is_killed(field):
    attempt = start_attempt(field, field.run(world=2, attempts={"1": {"1": "hang"}}))
    attempt.agent.coordinator.timing = TIMING._replace(stragglers=0.5)
    wait_for_end(field, attempt)
    assert attempt.code == 71, "as a hang, not as a rank that the kernel has killed for memory"
    cause = next(record for record in attempt.run.causes(1) if record["rank"] == 1)
    assert cause["cause"] == "hang" and "after its peers had ended well" in cause["reason"]


@pytest.mark.parametrize("recorded", [0, 1])
def test_adopted_attempt_waits_for_unrecorded_ranks_until_deadline(field, recorded):
    run = field.run(world=2, total=10_000)
    attempt = start_attempt(field, run)
    pids = run.attempt(1) / "pids.json"
    field.until(lambda: attempt.poll() or len(read_json(pids) or ()) == 2)
    field.until(lambda: attempt.poll() or (read_json(run.status) or {}).get("step", 0) >= 1)
    write_json(pids, read_json(pids)[:recorded])
    left = adopted.adopt(run, 1, patience=float("inf"))
    attempt.agent.leave()  # the ranks stop
    field.until(lambda: not field.left() or attempt.agent.code)
    assert not left.poll()
    left.shorten_deadline(0.0)
    assert left.poll()
    attempt.close()


def test_failed_start_leaks_no_file_descriptors(field):
    run = field.run()
    run.logs.write_text("no folder")
    before = os.listdir("/proc/self/fd")
    with pytest.raises(FileExistsError):
        start_attempt(field, run)
    assert os.listdir("/proc/self/fd") == before


def test_refused_process_start_is_retried_as_storage_failure(field):
    run = field.run()
    field.cluster.submit([Job(run, field.snapshot, env={"BIG": "x" * 200_000}, module="fake_rank")])
    field.until_state(run, "waiting")
    assert ends(run) == [("requeue", "storage")] and "too long" in attempts.last_end(run)["reason"]
    run.cancel.write_text("{}")
    field.until(lambda: not field.left())


def test_damaged_records_of_a_run_do_not_affect_other_runs(field):
    crash = {str(n): {"0": "crash"} for n in (1, 2)}
    bad = field.run("a", every=1000, total=60, at=20, attempts=crash)
    worse = field.run("b")
    good = field.run("c")
    field.submit(bad, worse, good)
    field.until_moving(bad, 2)
    (bad.attempt(1) / "end.json").write_text("{")
    write_json(worse.path / "job.json", {})
    field.until_state(good, "complete")
    field.until(lambda: not field.left())
    assert bad.newest_attempt() == 2 and worse.newest_attempt() == 0
    assert (field.state(bad), field.state(good)) == ("failed", "complete")
    assert "damaged" in clusters.states([bad])[bad.path].reason


def test_run_with_moved_folder_ends_without_supervisor_error(field):
    run = field.run(total=10_000)
    field.submit(run)
    field.until_moving(run, 1)
    run.path.rename(field.sweep.parent / "elsewhere")
    field.until(lambda: not field.left())
    assert "1 ranks" in field.journal() and "Traceback" not in field.journal()


def test_run_whose_files_were_partly_deleted_does_not_keep_supervisor(field):
    run = field.run(total=10_000)
    field.submit(run)
    field.until_moving(run, 1)
    (pid,) = field.pids(run)
    (run.path / "job.json").unlink()
    shutil.rmtree(run.attempts)
    os.kill(pid, signal.SIGKILL)
    field.until(lambda: not field.left())


def test_unreadable_files_of_a_run_do_not_stop_other_runs(field):
    bad = field.run("a")
    good = field.run("b", total=40)
    field.submit(good)
    field.until_moving(good, 1)
    bad.attempts.write_text("no folder")
    write_json(bad.path / "job.json", {**read_json(good.path / "job.json"), "folder": str(bad.path)})
    field.until_state(good, "complete")
    field.until(lambda: "a: [Errno 20]" in field.journal())
    assert supervisor.is_served(field.sweep)  # it waits to retry
    os.kill(field.supervisor(), signal.SIGTERM)
    field.until(lambda: not field.left())


@pytest.mark.parametrize("place", ["", "job.json"])
def test_supervisor_refuses_run_writable_by_other_users(field, place):
    """job.json names the code to execute. Code chosen by another user must not run with this user's rights."""
    trusted = field.run("a", total=40)
    untrusted = field.run("b")
    field.submit(trusted, untrusted)
    (untrusted.path / place).chmod(0o777)
    field.until(lambda: not field.left())
    assert field.state(trusted) == "complete" and untrusted.newest_attempt() == 0
    assert "every user may write to it" in field.journal()
