"""Tests of commands and launcher features on a real Slurm, with scripted ranks instead of training."""

import json
import subprocess
import sys

import pytest

from flip.runs.rundir import RunDir, read_json, write_json
from jobs.backends.multi import MultiBackend
from jobs.common.job import Job, JobResources
from jobs.host import slurm_cli
from jobs.submitted_runs.clusters import states
from tests.harness.common import ROOT, wait_until
from tests.harness.slurm_scene import profile
from tests.slurm.scenarios import AGAIN, HERE, LONG, SHORT

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
BROKEN = "AcceleratorError: CUDA error: uncorrectable ECC error encountered"
PLAYS = {
    "done": {"steps": SHORT},
    "broken": {"steps": SHORT, "attempts": {"1": {"crash": BROKEN}}},
    "away": {"steps": SHORT, "attempts": {"1": {"exit": 69}}},
    "wrong": {"exit": 78},
    "gone1": AGAIN,
    "gone2": AGAIN,
    "stays": {"steps": LONG},
    "lacking": {"steps": SHORT, "attempts": {"1": {"steps": LONG}}},
}
LACKS = """#!/bin/sh
# The interpreter, which the job's second node does not have the first time.
[ "$SLURM_NODEID.$FLIP_ATTEMPT" != 1.1 ] || exit 127
exec {python} "$@"
"""
NOTES = "import sys; open(sys.argv[1], 'a').write(sys.stdin.read() + chr(10))"


@pytest.fixture
def sweep(start_slurm, tmp_path):
    cluster = start_slurm(**HERE, nodes=4, gpus=0, cpus=4)
    events_file = tmp_path / "heard"
    jobs = []
    for name, play in PLAYS.items():
        run = RunDir(tmp_path / "runs" / "demo" / name)
        run.path.mkdir(parents=True)
        write_json(run.path / "play.json", play)
        write_json(run.identity, {"hash": name, "schema": 2})
        run.config.write_text("schema: 1\n")  # commands recognise runs by this file
        profile_name = {"done": "second", "lacking": "third"}.get(name, "first")
        shape = JobResources(nodes=2 if name == "lacking" else 1, cpus=1, hours=0.5)
        jobs.append(Job(run, ROOT, shape, module="tests.slurm.scripted", cluster=profile_name))
    (tmp_path / "python").write_text(LACKS.format(python=sys.executable))
    (tmp_path / "python").chmod(0o755)
    write_json(tmp_path / "runs" / "demo" / "sweep.json", {"runs": list(PLAYS)})
    options = {"notify": [sys.executable, "-c", NOTES, str(events_file)]}
    third = {"name": "third", "python": str(tmp_path / "python"), "host_python": sys.executable, "peer_seconds": 5}
    other_profiles = profile(name="second", partition="high", **options), profile(**third, **options)
    MultiBackend([profile(name="first", **options), *other_profiles]).submit(jobs)
    return cluster, {job.run.name: job.run for job in jobs}, events_file


def test_launcher_delays_excludes_notifies_cancels_and_follows_logs(sweep, tmp_path):
    cluster, runs, events_file = sweep

    def start_command(command, *args):
        line = [sys.executable, ROOT / "jobs", command, *args, "--root", tmp_path / "runs"]
        return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def output_of(command, *args):
        process = start_command(command, *args)
        text, _ = process.communicate(timeout=60)
        assert process.returncode == 0, text
        return text

    def state(name):
        return states([runs[name]])[runs[name].path]

    def fields(name):
        record = read_json(runs[name].path / "job.json")
        row = slurm_cli.queue([record["name"]])[record["name"], record["index"]]
        text = cluster.call("scontrol", "show", "job", row.id)
        return row.id, dict(pair.split("=", 1) for pair in text.split() if "=" in pair)

    # each profile uses its partition
    assert fields("done")[1]["Partition"] == "high" and fields("stays")[1]["Partition"] == "low"
    # `logs --follow` continues until the run ends
    wait_until(lambda: state("stays").attempt == 1, "its start")
    follower = start_command("logs", "demo/stays", "--follow")
    # Slurm delays the retry if storage is unavailable
    wait_until(lambda: state("away").state == "waiting", "an attempt without storage")
    assert read_json(runs["away"].attempt(1) / "end.json")["delay"] == 30
    wait_until(lambda: fields("away")[1]["JobState"] == "PENDING", "its requeue")
    job, job_fields = fields("away")
    delay = slurm_cli.timestamp(job_fields["StartTime"]) - read_json(runs["away"].attempt(1) / "end.json")["time"]
    assert 25 < delay < 60 and state("away").starts == job_fields["StartTime"]
    # start sooner, but not within the second of the requeue: the node would still treat the job's credential as revoked
    cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now+3")
    # a node with a broken GPU is excluded
    wait_until(lambda: state("broken").state == "complete", "another node")
    first, second = (read_json(runs["broken"].attempt(n) / "start.json")["nodes"] for n in (1, 2))
    assert first != second and fields("broken")[1]["ExcNodeList"] == first
    # a node that can start no rank is excluded, although the job's first node, which runs the batch script, can
    wait_until(lambda: state("lacking").state == "complete", "two other nodes")
    end = read_json(runs["lacking"].attempt(1) / "end.json")
    nodes = cluster.call("scontrol", "show", "hostnames", read_json(runs["lacking"].attempt(1) / "start.json")["nodes"])
    assert (end["cause"], end["exclude"]) == ("node", nodes.split()[1:]) and len(end["exclude"]) == 1
    # cancel by patterns: runs that match a pattern after ! continue
    for name in ("gone1", "gone2"):
        wait_until(lambda name=name: (runs[name].path / "signals" / "1.0.jsonl").exists(), "its ranks")
    assert json.loads(output_of("cancel", "demo/[gs]*", "!demo/stays", "--yes", "--json")) == ["gone1", "gone2"]
    wait_until(lambda: state("gone1").state == state("gone2").state == "cancelled", "both ends")
    assert state("stays").state == "running" and follower.poll() is None
    output_of("cancel", "demo/stays", "--yes")
    assert "==> logs/1/job.out <==" in follower.communicate(timeout=60)[0] and follower.returncode == 0
    # a single event for the run that stopped for good, and another for the end of the sweep
    wait_until(lambda: state("away").state == "complete", "the run that waited")
    wait_until(lambda: events_file.exists() and "sweep_ended" in events_file.read_text(), "the end of the sweep")
    events = [json.loads(line) for line in events_file.read_text().splitlines()]
    assert [(event["event"], event.get("run")) for event in events] == [("run_stopped", "wrong"), ("sweep_ended", None)]
    assert events[1]["failed"] == ["wrong"] and sorted(events[1]["cancelled"]) == ["gone1", "gone2", "stays"]
