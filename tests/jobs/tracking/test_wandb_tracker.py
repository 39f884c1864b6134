"""The tracker with the real wandb package: all attempts form one run with each step once, also after kills."""

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest

from flip.runs.rundir import read_json
from jobs.commands.follow import main
from tests.harness import wandb_files, wandb_server
from tests.harness.common import ROOT, metric_lines, run_script, wait_until
from tests.harness.training_run import BATCH, TrainingRun, configuration
from tests.jobs.tracking.run_files import attempt, complete, save
from tests.synthetic import make_dataset, make_tokenizer

KILLED = """
import os, sys
from flip.runs.rundir import RunDir
from jobs.tracking.follower import Follower
Follower(RunDir(sys.argv[1]), "wandb", "masking").send()
os.kill(os.getpid(), 9)
"""


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")


def follower_of(arena):
    """The process of the run's follower, or None."""
    for process in psutil.process_iter(["cmdline"]):
        argv = process.info["cmdline"] or []
        if "jobs.follow" in argv and str(arena.run.path) in argv:
            return process
    return None


@pytest.mark.kill
@pytest.mark.slow
def test_wandb_shows_single_run_with_each_step_once_after_three_kills(tmp_path):
    data = make_dataset(tmp_path / "data", samples=200, shards=3, chunk=4, classes=8)
    make_tokenizer(data / "tokenizer.json")
    config = configuration(data, world=1)
    config.monitor.wandb = "team/masking"
    arena = TrainingRun(tmp_path, "tracked", config, pause=0.2)
    arena.submit()
    session = arena.run.path / "trackers" / "wandb" / "from-000000000" / "wandb"
    arena.wait(lambda: list(session.glob("offline-run-*/run-*.wandb")), "the follower's first session")
    os.kill(follower_of(arena).pid, signal.SIGKILL)
    for n, step in ((2, 20), (3, 35), (4, 50)):
        arena.wait_step(step - 5)
        arena.kill()
        arena.wait_attempt(n)
        arena.wait_step(step)
    arena.wait_over()
    wait_until(lambda: follower_of(arena) is None, "the end of the follower")

    state = read_json(arena.run.path / "trackers" / "wandb.json")
    assert state["summary"]["state"] == "complete", (arena.run.logs / "4" / "follow-wandb.log").read_text()
    sessions = wandb_files.sessions(arena.run)
    runs = wandb_files.runs(sessions)
    assert {(logged.run_id, logged.entity, logged.project) for logged in runs} == {(state["id"], "team", "masking")}
    assert {(logged.display_name, logged.run_group) for logged in runs} == {("tracked", "sweep")}
    rows = wandb_files.history(sessions)
    lines = metric_lines(arena.run)
    trained = [row for row in rows if "batch/loss" in row]
    assert [row["_step"] for row in trained] == [line["step"] for line in lines] == list(range(1, 61))
    assert [(row["samples"], row["batch/loss"], row["_timestamp"]) for row in trained] == [
        (line["samples"], line["loss"], line["time"]) for line in lines
    ]
    scored = [row["scored_samples"] for row in rows if "scores/validation_top1" in row]
    assert sorted(scored) == [18 * BATCH, 36 * BATCH, 44 * BATCH, 54 * BATCH, 60 * BATCH]

    repeated = run_script(
        "jobs", "follow", str(arena.run.path), "--once", cwd=tmp_path, runs=tmp_path, env={"PYTHONPATH": ""}
    )
    assert repeated.returncode == 0, repeated.stderr
    assert wandb_files.history(wandb_files.sessions(arena.run)) == rows, "no steps remain to be sent"


@pytest.mark.long
def test_wandb_session_continues_after_kill_and_ends_with_summary(run):
    args = [str(run.path), "--once", "--project", "masking"]
    save(run, attempt(run, 0, (1, 2, 3)), 3)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(run.path)], cwd=ROOT, timeout=60)
    assert killed.returncode == -signal.SIGKILL and (run.path / "trackers" / "wandb" / "from-000000000").is_dir()
    assert main(args) == 0
    save(run, attempt(run, 2, (3, 4, 5)), 5)
    complete(run, 5)
    assert main(args) == 0
    first, second = wandb_files.sessions(run)
    assert [row["_step"] for row in wandb_files.history([first, second])] == [1, 2, 3, 4, 5]
    assert {logged.run_id for logged in wandb_files.runs([first, second])} == {wandb_files.runs([first])[0].run_id}
    assert wandb_files.summary(second)["state"] == "complete"
    assert not list((run.path / "trackers" / "wandb").glob(".from-*"))


@pytest.mark.long
def test_follow_resumes_from_wandb_server_if_local_position_is_lost(run, tmp_path):
    """This happens if a follower is killed before it stores its position."""
    with wandb_server.serving() as server:
        env = {"WANDB_MODE": "online", "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40, "HOME": str(tmp_path)}
        for resumes, steps in ((0, (1, 2, 3)), (2, (3, 4, 5))):
            save(run, attempt(run, resumes, steps), steps[-1])
            args = (str(run.path), "--once", "--project", "team/masking")
            done = run_script("jobs", "follow", *args, cwd=tmp_path, runs=tmp_path, env=env, timeout=120)
            assert done.returncode == 0, done.stderr
            (run.path / "trackers" / "wandb.json").unlink()
    assert server.steps() == [1, 2, 3, 4, 5]
    assert [row["batch/loss"] for row in server.history.values()] == [1.01, 1.02, 1.03, 2.04, 2.05]
    wandb_run = server.run
    assert (wandb_run["entity"], wandb_run["project"], wandb_run["groupName"], wandb_run["displayName"]) == (
        "team", "masking", "sweep", "run",
    )  # fmt: skip
    assert json.loads(wandb_run["config"])["seed"]["value"] == 3 and "secret" not in wandb_run["config"]


def test_follow_reports_missing_wandb_package(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    save(run, attempt(run, 0, (1,)), 1)
    assert main([str(run.path), "--once", "--project", "masking"]) == 78
    assert "pip install wandb" in capsys.readouterr().err
    assert not (run.path / "trackers" / "wandb").exists()
