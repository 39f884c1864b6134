"""Tests that all commands name the same state of a run on a real Slurm, with and without its ``squeue``."""

import contextlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

import flip
from flip.runs.rundir import read_json
from jobs.host import processes, slurm_cli
from jobs.submitted_runs import clusters
from tests.harness.command_line import SlurmCommandLine
from tests.harness.common import ROOT, run_script, wait_until
from tests.slurm.scenarios import LONG

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
EXPECTED = {
    "complete": "complete",
    "running": "running",
    "scancelled": "cancelled",
    "scancelled_queued": "stopped",
    "node_failed": "waiting",
    "held": "waiting",
    "requeued": "waiting",
    "dead": "stopped",
    "deleted": None,
    "queued": "queued",
}
"""Run -> its state; None: no command lists it. No file proves that a queued job was cancelled by scancel."""
ON_NODES = [name for name in EXPECTED if "queued" not in name or name == "requeued"]
PYTHON = """#!/bin/sh
# The Python of the ranks: a rank process that does not train takes the place of the trainer's.
case "$*" in *rank_entry.py*) exec {python} {script};; esac
exec {python} "$@"
"""
RANK = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
os.environ["RANK"] = os.environ["SLURM_PROCID"]
from flip.runs.rundir import RunDir, exists, write_json
from tests.slurm import scripted
run = RunDir(os.environ["FLIP_RUN"])
write_json(run.path / "play.json", {{"steps": 10 if run.name == "complete" else {LONG}}})
scripted.signal.pthread_sigmask(scripted.signal.SIG_BLOCK, [scripted.signal.SIGTERM, scripted.signal.SIGUSR2])
os._exit(scripted.main(str(run.path)))
"""


@pytest.fixture
def desk(start_slurm, tmp_path, emoji):
    """A sweep of scripted ranks: all runs but two are on nodes, and no job starts any more."""
    # on a busy machine, nodes are silent for seconds
    cluster = start_slurm(nodes=len(ON_NODES), gpus=0, cpus=2, node_timeout=120)
    desk = SlurmCommandLine(cluster, tmp_path, emoji)
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "python").write_text(PYTHON.format(python=sys.executable, script=tmp_path / "rank.py"))
    (tmp_path / "python").chmod(0o755)
    text = f"python: {tmp_path}/python\nhost_python: {sys.executable}\n"
    desk.cluster.write_text(desk.cluster.read_text() + text)
    head = desk.text.partition("runs:\n")[0]
    desk.text = head + "runs:\n" + "".join(f"  {name}: {{}}\n" for name in EXPECTED)
    desk.submit("--only", *ON_NODES)
    wait_until(lambda: all(ready(desk, name) for name in ON_NODES), "all ranks", 120, story=desk.logs)
    cluster.call("scontrol", "update", f"NodeName={','.join(cluster.site.names)}", "State=DRAIN", "Reason=test")
    desk.submit("--only", "queued", "scancelled_queued")
    return desk


def ready(desk, name):
    return bool(list(desk.run(name).path.glob("signals/1.0.jsonl")))


def job(desk, name):
    """The job's state and number. Slurm forgets an element of an array at once if it is cancelled before its start."""
    record = read_json(desk.run(name).path / "job.json")
    row = slurm_cli.queue([record["name"]]).get((record["name"], record["index"]))
    if row:
        return slurm_cli.job_fields(row.id)
    return {"JobState": "CANCELLED"}


def cause_events(desk):
    """Cause the event that each run is named after, and wait until Slurm has carried it out."""
    call = desk.here.call
    call("scancel", desk.job("scancelled").id)
    call("scancel", desk.job("scancelled_queued").id)
    call("scontrol", "requeue", desk.job("requeued").id)
    call("scontrol", "requeuehold", desk.job("held").id)
    lost = desk.job("node_failed").nodes
    desk.here.lose(lost)
    call("scontrol", "update", f"NodeName={lost}", "State=DOWN", "Reason=lost")  # as after node_timeout
    kill_host_processes(desk, "dead")
    shutil.rmtree(desk.run("deleted").path)
    ended = {"scancelled": "CANCELLED", "scancelled_queued": "CANCELLED", "dead": "FAILED", "complete": "COMPLETED"}
    ended |= dict.fromkeys(("requeued", "held", "node_failed"), "PENDING")
    for name, expected in ended.items():
        desk.until(lambda name=name, expected=expected: job(desk, name)["JobState"] == expected, f"{name}: {expected}")


def kill_host_processes(desk, name):
    """Kill the owner, its guard and the ranks of a run, so that nothing records the end of its attempt."""
    path = str(desk.run(name).path)
    victims = [pid for pid, environ in processes.own_environments().items() if environ.get("FLIP_RUN") == path]
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def without_squeue(folder):
    """A folder with links to all commands on PATH but ``squeue``."""
    folder.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        for command in Path(place).glob("*") if Path(place).is_dir() else []:
            if command.name != "squeue" and not (folder / command.name).is_symlink():
                (folder / command.name).symlink_to(command)
    return str(folder)


def answers(desk, path):
    """Command -> run -> its state."""

    def ask(script, *arguments):
        done = run_script(script, *arguments, cwd=desk.folder, runs=desk.runs, env={"PATH": path}, timeout=120)
        assert done.stdout.startswith(("[", "{")), done.stdout + done.stderr
        return json.loads(done.stdout)

    plan = ask("jobs/submit.py", "--sweep", desk.sweep, "--cluster", desk.cluster, "--dry-run", "--json")
    explained = ask("jobs", "explain", "demo", "--json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", path)
        seen = clusters.seen([desk.run(name) for name in EXPECTED if desk.run(name).path.exists()])
    return {
        "status": _by_run(ask("jobs", "status", "demo", "--json")),
        "explain": {row["run"]: row["state"]["state"] for row in explained},
        "report": _by_run(ask("jobs", "report", "demo", "--json")),
        "read_runs": _by_run(flip.read_runs(desk.runs / "demo", seen)),
        "dry run": {row["name"]: row["action"] for row in plan["runs"]},
    }


def _by_run(rows):
    return {row["run"]: row["state"] for row in rows}


def test_commands_agree(desk, tmp_path):
    """Without squeue, the state is the same or unknown; `read_runs` without an answer of a scheduler gives the same."""
    cause_events(desk)
    asked = answers(desk, os.environ["PATH"])
    blind = answers(desk, without_squeue(tmp_path / "bin"))
    blind["read_runs, no scheduler"] = _by_run(flip.read_runs(desk.runs / "demo"))
    wrong = _differing(asked, known=True) + _differing(blind, known=False)
    assert not wrong, "\n".join(wrong)
    for shown in blind.values():
        assert shown["complete"] == "complete", "files prove it"
    assert not (desk.run("dead").attempt(1) / "end.json").exists()


def _differing(table, known):
    """Lines for all states that differ from EXPECTED. ``known``: whether the scheduler has answered; else a state may
    be unknown."""
    lines = []
    for command, shown in table.items():
        for name, expected in EXPECTED.items():
            absent = "new" if command == "dry run" else None
            allowed = {expected or absent} | (set() if known or expected is None else {"unknown"})
            if shown.get(name) not in allowed:
                where = "with" if known else "without"
                lines.append(f"{command} {where} squeue: {name} is {shown.get(name)}, not {expected}")
    return lines
