"""Tests of a full disk, a lost node and a killed batch shell on a real Slurm with the options scenarios.FOREIGN."""

import os
import signal
import subprocess
import time

import pytest

from flip.runs.errors import FlipError
from flip.runs.rundir import RunDir, read_json, write_json
from jobs.common.job import Job, JobResources
from jobs.host import slurm_cli
from jobs.runs.clusters import states
from jobs.slurm.backend import SlurmBackend
from tests.harness.common import ROOT, wait_until
from tests.harness.slurm_scene import batch_shells, profile
from tests.slurm.scenarios import AGAIN, FOREIGN

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def submit(folder, *names, play=AGAIN, module="tests.slurm.scripted", nodes=1):
    """Submit runs below ``folder`` as a single job."""
    runs = [RunDir(folder / name) for name in names]
    for run in runs:
        if not run.path.exists():
            run.path.mkdir(parents=True)
            write_json(run.path / "play.json", play)
    shape = JobResources(nodes=nodes, cpus=1, hours=0.5)
    SlurmBackend(profile(peer_seconds=5)).submit([Job(run, ROOT, shape, module=module) for run in runs])
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


def test_exit_trap_retries_run_after_full_disk(foreign_site, tmp_path):
    """The ranks can write neither causes nor logs and exit with 69. The exit trap meets the full disk."""
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
        time.sleep(2.0)  # the exit trap meets the full disk
        assert not run.causes(1) and not (run.attempt(1) / "end.json").exists()
        filler.unlink()
        wait_until(lambda: state(run) == "complete", "its second attempt")
        end = read_json(run.attempt(1) / "end.json")
        assert (end["cause"], end["code"], end["delay"]) == ("storage", 69, 30.0), end
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def matching_pids(text):
    """Return the pids of processes with this text in their command line."""
    return [int(pid) for pid in subprocess.run(["pgrep", "-f", text], capture_output=True, text=True).stdout.split()]


@pytest.mark.parametrize("lost", [1, 2])
def test_job_without_requeue_continues_after_lost_nodes(lost, start_slurm, tmp_path):
    """Slurm ends the job as NODE_FAIL, but shows COMPLETING, as for a cancelled job.

    If several nodes are lost at once, srun waits for the tasks of the second node until the batch shell is killed, and
    the exit trap never runs: the watcher submits the next job.
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


def test_watcher_of_killed_batch_shell_exits_with_job_or_next_attempt(start_slurm, tmp_path):
    """Both watchers are stopped until Slurm has forgotten their job. The first then polls Slurm and exits; the second
    exits when the next attempt starts.
    """
    cluster = start_slurm(nodes=4, **{**FOREIGN, "settings": ["MinJobAge=2"]})
    runs = submit(tmp_path / "orphans", "asks", "stays")
    watchers = []
    for run in runs:
        ready(run)
        watchers += matching_pids(f"batch_hooks.py watch {run.path}")
        fields = job(run)
        (shell,) = batch_shells(cluster, fields)
        os.kill(shell, signal.SIGKILL)
        wait_until(lambda fields=fields: not batch_shells(cluster, fields), "the end of the shell", pause=0.01)
        os.kill(watchers[-1], signal.SIGSTOP)  # within SHELL_EXIT_SECONDS; before, the kernel would continue it
    number = read_json(next((tmp_path / "orphans" / ".slurm").glob("*/submitted.json")))["job"]

    def purged():
        try:
            return not cluster.call("scontrol", "show", "job", number)
        except FlipError as error:
            return "Invalid job id" in str(error)

    wait_until(purged, "Slurm to forget the job", 200)
    assert [state(run) for run in runs] == ["stopped", "stopped"]
    os.kill(watchers[0], signal.SIGCONT)
    wait_until(lambda: watchers[0] not in matching_pids("batch_hooks.py watch"), "the watcher whose job is gone")
    submit(tmp_path / "orphans", "stays")
    wait_until(lambda: state(runs[1]) == "complete", "the second attempt")
    assert watchers[1] not in matching_pids("batch_hooks.py watch") and runs[0].newest_attempt() == 1
    wait_until(lambda: not matching_pids(f"batch_hooks.py watch {tmp_path}"), "the second attempt's watcher")
