"""Tests on a real Slurm that the batch script's functions restart a job as their twins in Python do.

The calls are the same, and the effect on the job and its successor.
"""

import re
import shutil
from dataclasses import dataclass

import pytest

from jobs.host import slurm_cli
from tests.harness.common import wait_until
from tests.harness.failed_start import BASH, PYTHON, changes, queries, script
from tests.slurm.conftest import start_cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
RECORDED = ("scontrol", "sbatch", "sinfo", "squeue")
RECORD = """#!/bin/sh
echo "{name} $*" >> {folder}/calls
exec {program} "$@"
"""
#: Of a job, what both must leave equal.
EFFECT = ("JobState", "Reason", "Requeue", "Restarts", "Comment", "ExcNodeList", "Dependency", "Partition", "NumNodes")
COUNT = "away:1:0:0:127:NODE"


@dataclass(frozen=True)
class Situation:
    """``options``: of sbatch. ``changes``: the calls that change something. ``successor``: whether a new job follows.
    ``requeued``: whether Slurm requeues the job while its script runs. ``limited``: whether the start fails when the
    job has reached its limit."""

    changes: list[str]
    options: tuple[str, ...] = ()
    array: bool = False
    successor: bool = False
    requeued: bool = False
    limited: bool = False


def requeue(*updates, comment=COUNT):
    return [f"scontrol update JobId=JOB Comment={comment}", "scontrol requeue JOB", *updates]


SITUATIONS = {
    "requeue": Situation(requeue("scontrol update JobId=JOB ExcNodeList=NODE")),
    "requeue_disabled": Situation(
        requeue("sbatch --parsable --dependency=afterany:JOB --exclude=NODE --comment=away:1:-1:0:127:NODE"),
        ("no-requeue",),
        successor=True,
    ),
    "exclusion": Situation(
        requeue("scontrol update JobId=JOB StartTime=now+180 ExcNodeList=n4,NODE", comment="away:4:0:12:127:NODE"),
        ("exclude=n4,n3", "comment=away:3:-1:12:127:n3"),
    ),
    "exclusion_guard": Situation(requeue(), ("partition=small", "nodes=2")),
    "exclusion_guard_successor": Situation(
        requeue("sbatch --parsable --dependency=afterany:JOB --comment=away:1:-1:0:127:NODE"),
        ("partition=small", "nodes=2", "no-requeue"),
        successor=True,
    ),
    "limit": Situation([], ("comment=away:100:-1:0:127:n1",)),
    "requeued_by_slurm": Situation([f"scontrol update JobId=JOB Comment={COUNT}"], requeued=True),
    "at_its_limit": Situation(
        [
            "scontrol requeue JOB",
            "scontrol update JobId=JOB ExcNodeList=NODE",
            f"scontrol update JobId=JOB Comment={COUNT}",
        ],
        ("time=1",),
        limited=True,
    ),
    "element": Situation(requeue("scontrol update JobId=JOB ExcNodeList=NODE"), array=True),
    "element_successor": Situation(
        requeue("sbatch --parsable --dependency=afterany:JOB --array=1 --exclude=NODE --comment=away:1:-1:0:127:NODE"),
        ("no-requeue",),
        array=True,
        successor=True,
    ),
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        cluster = start_cluster(
            tmp_path_factory.mktemp("r") / "slurm", patch, nodes=4, kill_wait=30, settings=["FirstJobId=5001"]
        )
        cluster.call("scontrol", "create", "PartitionName=small", "Nodes=n[1-2]", "State=UP", "MaxTime=60")
        yield cluster
        cluster.stop()


class FailedStart:
    """A job whose first start fails, and whose later starts and successors do nothing."""

    def __init__(self, variant, name, folder):
        self.situation = SITUATIONS[name]
        self.name = f"{name}.{variant}"
        self.folder = folder
        folder.mkdir()
        for command in RECORDED:
            (folder / command).write_text(RECORD.format(name=command, folder=folder, program=shutil.which(command)))
            (folder / command).chmod(0o755)
        before = [
            f"mkdir {folder}/first.$SLURM_ARRAY_TASK_ID 2>/dev/null || exec sleep 300",
            '[ "${SLURM_ARRAY_TASK_ID:-1}" = 1 ] || exec sleep 300',
            f"trap 'touch {folder}/ended' EXIT",
            f"export PATH={folder}:$PATH",
            f'echo "$SLURM_JOB_ID $SLURMD_NODENAME" > {folder}/facts.new; mv {folder}/facts.new {folder}/facts',
        ]
        if self.situation.requeued:
            before.append(f"until [ -e {folder}/go ]; do sleep 0.1; done")
        if self.situation.limited:
            before.append("until scontrol show job $SLURM_JOB_ID | grep -q JobState=COMPLETING; do sleep 0.2; done")
        options = [f"--{option}" for option in self.situation.options]
        options += ["--requeue"] * ("no-requeue" not in self.situation.options)
        options += ["--array=0-1"] * self.situation.array
        text = script(
            variant,
            ["--time=10", "--output=/dev/null", f"--error={folder}/log", f"--job-name={self.name}", *options],
            before,
        )
        (folder / "script.sh").write_text(text)
        self.job = slurm_cli.call("sbatch", "--parsable", "--chdir=/", str(folder / "script.sh")).strip()
        self.job += "_1" * self.situation.array
        wait_until((folder / "facts").exists, "its start", 60, story=self.fields)
        self.id, self.node = (folder / "facts").read_text().split()

    def fields(self, job=""):
        return slurm_cli.job_fields(job or self.job)

    def plain(self, text):
        """The text without what differs between the jobs of both variants."""
        names = {self.id: "ID", self.job: "JOB", self.node: "NODE", self.name: "NAME"}
        return re.sub(r"\w[\w.]*", lambda match: names.get(match[0], match[0]), text)

    def end(self):
        if self.situation.requeued:
            slurm_cli.call("scontrol", "requeue", self.job)
            (self.folder / "go").touch()
        wait_until((self.folder / "ended").exists, "its end", 120, story=self.fields)
        wait_until(
            lambda: self.fields()["JobState"] not in ("RUNNING", "COMPLETING"), "its state", 60, story=self.fields
        )

    def calls(self):
        return [self.plain(line) for line in (self.folder / "calls").read_text().splitlines()]

    def effect(self):
        """What is left of the job and, if it has one, of its successor."""
        found = [self.fields()]
        row = slurm_cli.queue([self.name])[self.name, int(self.situation.array)]
        assert (row.id != self.job) == self.situation.successor
        if self.situation.successor:
            wait_until(
                lambda: self.fields(row.id)["JobState"] == "RUNNING", "it", 60, story=lambda: self.fields(row.id)
            )
            found.append(self.fields(row.id))
        return [{key: self.plain(fields.get(key, "")) for key in EFFECT} for fields in found]

    def cancel(self):
        rows = slurm_cli.queue([self.name]).values()
        slurm_cli.call("scancel", *sorted({row.id.partition("_")[0] for row in rows}))


@pytest.mark.parametrize("name", SITUATIONS)
def test_batch_functions_restart_job_as_python_does(name, cluster, tmp_path):
    starts = []
    try:
        for variant in (BASH, PYTHON):
            starts.append(FailedStart(variant, name, tmp_path / variant))
        for start in starts:
            start.end()
        bash, python = starts
        assert changes(bash.calls()) == changes(python.calls()) == SITUATIONS[name].changes
        assert queries(bash.calls()) == queries(python.calls())
        assert bash.effect() == python.effect()
        if starts[0].situation.array:
            assert {start.fields(start.job.replace("_1", "_0"))["Restarts"] for start in starts} == {"0"}
    finally:
        for start in starts:
            start.cancel()
