"""Tests of the owner of a job (jobs/host/job.py) on a real Slurm: it and its guard are killed, it hangs, the disk is
full, and nodes are lost."""

import os
import signal
import subprocess
import time

import pytest

from flip.runs.errors import FlipError
from flip.runs.rundir import RunDir, read_json, write_json
from jobs.common.job import Job, JobResources
from jobs.host import slurm_cli
from jobs.slurm.backend import SlurmBackend
from jobs.submitted_runs.clusters import states
from tests.harness.common import ROOT, wait_until
from tests.harness.slurm_scene import command_lines, hanging, is_owner, owner_and_guard, profile
from tests.slurm.scenarios import AGAIN, FOREIGN, HERE, WAITING_MINUTE

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def submit(folder, *names, play=AGAIN, module="tests.slurm.scripted", nodes=1, hours=0.5, **fields):
    """Submit runs below ``folder`` as a single job. ``fields``: of the profile."""
    runs = [RunDir(folder / name) for name in names]
    for run in runs:
        if not run.path.exists():
            run.path.mkdir(parents=True)
            write_json(run.path / "play.json", play)
    shape = JobResources(nodes=nodes, cpus=1, hours=hours)
    SlurmBackend(profile(peer_seconds=5, **fields)).submit([Job(run, ROOT, shape, module=module) for run in runs])
    return runs


def state(run):
    return states([run])[run.path].state


def job(run):
    """Return the fields of the run's job."""
    record = read_json(run.path / "job.json")
    row = slurm_cli.queue([record["name"]])[record["name"], record["index"]]
    return slurm_cli.fields_of(slurm_cli.call("scontrol", "show", "job", row.id))


def ready(run, ranks=1):
    wait_until(lambda: len(list(run.path.glob("signals/1.*.jsonl"))) == ranks, "its ranks")


def matching_pids(text):
    """Return the pids of processes with this text in their command line."""
    return [pid for pid, words in command_lines().items() if text in " ".join(words)]


def owners(run):
    """Return the pids of all owners of a run, and of their guards."""
    return [pid for pid, words in command_lines().items() if is_owner(words) and str(run.path) in words]


@pytest.fixture
def home(start_slurm):
    return start_slurm(nodes=2, **HERE)


def test_another_guard_is_forked_and_restarts_job_of_killed_owner(home, tmp_path):
    (run,) = submit(tmp_path / "guarded", "run")
    ready(run)
    fields = job(run)
    owner, guard = owner_and_guard(home, fields)
    os.kill(guard, signal.SIGKILL)
    wait_until(lambda: len(set(owner_and_guard(home, fields)) - {guard}) == 2, "another guard")
    assert owner_and_guard(home, fields)[0] == owner and state(run) == "running"
    os.kill(owner, signal.SIGKILL)
    wait_until(lambda: state(run) == "complete", "its second attempt", 60)
    assert (run.newest_attempt(), job(run)["Restarts"]) == (2, "1")
    assert read_json(run.attempt(1) / "end.json")["cause"] == "stopped", "its rank got TERM, and saved"
    wait_until(lambda: not owners(run), "the end of all guards")


def test_run_is_shown_as_stopped_after_kill_of_owner_and_guard(home, tmp_path):
    """Nothing of the job is left that could restart it."""
    (run,) = submit(tmp_path / "both", "run")
    ready(run)
    for pid in reversed(owner_and_guard(home, job(run))):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: state(run) == "stopped", "the end of the job", 60)
    shown = states([run])[run.path]
    assert "its batch script was killed before it could act: submit again" in shown.reason, shown
    submit(tmp_path / "both", "run")
    wait_until(lambda: state(run) == "complete", "its second attempt", 60)
    assert run.newest_attempt() == 2


@pytest.mark.parametrize("agents", [False, True], ids=["srun", "agents"])
def test_guard_restarts_job_whose_owner_hangs_at_the_wall_limit(agents, home, tmp_path):
    """The owner is in a call of a file system that does not return, so it neither beats nor hears TERM."""
    (run,) = submit(tmp_path / "hangs", "run", hours=WAITING_MINUTE, signal_seconds=30, agents=agents)
    ready(run)
    owner, guard = owner_and_guard(home, job(run))
    with hanging(owner):
        wait_until(lambda: state(run) == "complete", "its second attempt", 240)
    assert (run.newest_attempt(), job(run)["Restarts"]) == (2, "1")
    end = read_json(run.attempt(1) / "end.json")
    assert (end["action"], end["cause"]) in (("requeue", "stopped"), ("requeue", "timeout")), end
    log = run.path.parent / ".slurm"
    assert any("the owner of the job hangs (TIMEOUT): requeue" in path.read_text() for path in log.glob("*/*.err"))
    wait_until(lambda: not owners(run), "the end of all guards")


def test_run_goes_on_after_full_disk(foreign_site, tmp_path):
    """The ranks can write neither causes nor logs and exit with 69. The owner meets the full disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk]).returncode:
        pytest.skip("may not mount a small file system here")
    try:
        (run,) = submit(disk / "full", "run", module="tests.slurm.filling")
        filler = run.path / "filler"
        wait_until(
            lambda: (
                filler.exists()
                and not os.statvfs(disk).f_bavail
                and not matching_pids(f"tests.slurm.filling {run.path}")
            ),
            "a full disk",
        )
        time.sleep(2.0)  # the owner meets the full disk
        assert not run.causes(1) and not (run.attempt(1) / "end.json").exists()
        filler.unlink()
        wait_until(lambda: state(run) == "complete", "its second attempt")
        end = read_json(run.attempt(1) / "end.json")
        assert (end["cause"], end["code"], end["delay"]) == ("storage", 69, 30.0), end
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("lost", [1, 2])
def test_job_without_requeue_continues_after_lost_nodes(lost, start_slurm, tmp_path):
    """Slurm ends the job as NODE_FAIL, but shows COMPLETING, as for a cancelled job.

    If several nodes are lost at once, srun waits for the tasks of the second node until Slurm kills the owner, which
    has submitted the next job before.
    """
    cluster = start_slurm(nodes=6, **FOREIGN)  # with a short SlurmdTimeout Slurm also declares the batch host lost
    (run,) = submit(tmp_path / "requeue_disabled", "run", nodes=lost + 1)
    ready(run, ranks=lost + 1)
    fields = job(run)
    assert fields["Requeue"] == "0"
    nodes = set(cluster.call("scontrol", "show", "hostnames", fields["NodeList"]).split()) - {fields["BatchHost"]}
    for node in sorted(nodes):
        cluster.lose(node)
    wait_until(lambda: state(run) == "complete", "the next job", 240)
    end = read_json(run.attempt(1) / "end.json")
    assert end["action"] == "requeue" and end["cause"] in ("node", "stopped"), end
    assert end["state"] == "NODE_FAIL" or lost > 1, end
    assert run.newest_attempt() == 2


def test_guard_of_killed_owner_exits_with_job_or_next_attempt(start_slurm, tmp_path):
    """Both guards are stopped until Slurm has forgotten their job. The first then asks Slurm and exits; the second is
    killed when the next attempt starts.
    """
    cluster = start_slurm(nodes=4, **{**FOREIGN, "settings": ["MinJobAge=2"]})
    runs = submit(tmp_path / "orphans", "asks", "stays")
    guards = []
    for run in runs:
        ready(run)
        owner, guard = owner_and_guard(cluster, job(run))
        os.kill(owner, signal.SIGKILL)
        wait_until(lambda owner=owner: owner not in command_lines(), "the end of the owner", pause=0.01)
        os.kill(guard, signal.SIGSTOP)  # within OWNER_EXIT_SECONDS; before, the kernel would continue it
        guards.append(guard)
    number = read_json(next((tmp_path / "orphans" / ".slurm").glob("*/submitted.json")))["job"]

    def purged():
        try:
            return not cluster.call("scontrol", "show", "job", number)
        except FlipError as error:
            return "Invalid job id" in str(error)

    wait_until(purged, "Slurm to forget the job", 200)
    assert [state(run) for run in runs] == ["stopped", "stopped"]
    assert [owners(run) for run in runs] == [[guard] for guard in guards]
    os.kill(guards[0], signal.SIGCONT)
    wait_until(lambda: not owners(runs[0]), "the guard whose job is gone")
    submit(tmp_path / "orphans", "stays")
    wait_until(lambda: state(runs[1]) == "complete", "the second attempt")
    wait_until(lambda: not owners(runs[1]), "the guards of both attempts")
    assert runs[0].newest_attempt() == 1
