"""Tests on a real Slurm of starts that cannot write to their run: the calls of ``JobRestart.later``, and what they
leave of the job and its successor. tests/slurm/test_fallback.py tests the starts that have no interpreter.
"""

import re
import shlex
import shutil
import sys
from dataclasses import dataclass

import pytest

from jobs.host import slurm_cli
from tests.harness.common import ROOT, wait_until
from tests.slurm.conftest import start_cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
RECORDED = ("scontrol", "sbatch", "sinfo", "squeue")
RECORD = """#!/bin/sh
echo "{name} $*" >> {folder}/calls
exec {program} "$@"
"""
PROGRAM = """
import sys, time
sys.path.insert(0, {root!r})
from flip.runs.rundir import RunDir
from jobs.host.job_restart import JobRestart
from jobs.host.scheduler import SlurmScheduler
log = lambda text, name="": print(text, file=sys.stderr)
JobRestart(RunDir("/nowhere"), SlurmScheduler(), log, time.sleep).later(137, 0, avoid_node=True)
"""
#: Calls that change something; the others are queries.
CHANGE = re.compile("scontrol (update|requeue) |sbatch ")
COUNT = "away:1:0:0:137:NODE"


@dataclass(frozen=True)
class Situation:
    """``changes``: the calls that change something. ``comment``, ``excluded``: of the next start. ``options``: of
    sbatch. ``successor``: whether a new job follows. ``requeued``: whether Slurm requeues the job while its script
    runs. ``limited``: whether the start fails when the job has reached its limit."""

    changes: list[str]
    comment: str = COUNT
    excluded: str = "NODE"
    options: tuple[str, ...] = ()
    array: bool = False
    successor: bool = False
    requeued: bool = False
    limited: bool = False


def requeue(*updates, comment=COUNT):
    return [f"scontrol update JobId=JOB Comment={comment}", "scontrol requeue JOB", *updates]


SUCCESSOR = "sbatch --parsable --dependency=afterany:JOB"
INHERITED = "away:1:-1:0:137:NODE"
SITUATIONS = {
    "requeue": Situation(requeue("scontrol update JobId=JOB ExcNodeList=NODE")),
    "requeue_disabled": Situation(
        requeue(f"{SUCCESSOR} --exclude=NODE --comment={INHERITED}"),
        INHERITED,
        options=("no-requeue",),
        successor=True,
    ),
    "exclusion": Situation(
        requeue("scontrol update JobId=JOB StartTime=now+180 ExcNodeList=n4,NODE", comment="away:4:0:12:137:NODE"),
        "away:4:0:12:137:NODE",
        "n4,NODE",
        ("exclude=n4,n3", "comment=away:3:-1:12:127:n3"),
    ),
    "exclusion_guard": Situation(requeue(), excluded="", options=("partition=small", "nodes=2")),
    "exclusion_guard_successor": Situation(
        requeue(f"{SUCCESSOR} --comment={INHERITED}"),
        INHERITED,
        "",
        ("partition=small", "nodes=2", "no-requeue"),
        successor=True,
    ),
    "limit": Situation([], "away:100:-1:0:127:n1", "", ("comment=away:100:-1:0:127:n1",)),
    "requeued_by_slurm": Situation(
        [f"scontrol update JobId=JOB Comment={COUNT}"],
        excluded="",
        requeued=True,
    ),
    "at_its_limit": Situation(
        [
            "scontrol requeue JOB",
            "scontrol update JobId=JOB ExcNodeList=NODE",
            f"scontrol update JobId=JOB Comment={COUNT}",
        ],
        options=("time=1",),
        limited=True,
    ),
    "element": Situation(requeue("scontrol update JobId=JOB ExcNodeList=NODE"), array=True),
    "element_successor": Situation(
        requeue(f"{SUCCESSOR} --array=1 --exclude=NODE --comment={INHERITED}"),
        INHERITED,
        options=("no-requeue",),
        array=True,
        successor=True,
    ),
}


class FailedStart:
    """A job whose first start fails, and whose later starts and successors do nothing."""

    def __init__(self, name, folder):
        self.situation = SITUATIONS[name]
        self.name = f"start.{name}"
        self.folder = folder
        folder.mkdir()
        for command in RECORDED:
            (folder / command).write_text(RECORD.format(name=command, folder=folder, program=shutil.which(command)))
            (folder / command).chmod(0o755)
        options = [
            "time=10",
            "output=/dev/null",
            f"error={folder}/log",
            f"job-name={self.name}",
            *self.situation.options,
        ]
        options += ["requeue"] * ("no-requeue" not in self.situation.options)
        options += ["array=0-1"] * self.situation.array
        lines = ["#!/bin/bash", *(f"#SBATCH --{option}" for option in options), *self._script()]
        (folder / "script.sh").write_text("\n".join([*lines, ""]))
        self.job = slurm_cli.call("sbatch", "--parsable", "--chdir=/", str(folder / "script.sh")).strip()
        self.job += "_1" * self.situation.array

    def _script(self):
        folder = self.folder
        lines = [
            f"mkdir {folder}/first.$SLURM_ARRAY_TASK_ID 2>/dev/null || exec sleep 300",
            '[ "${SLURM_ARRAY_TASK_ID:-1}" = 1 ] || exec sleep 300',
            "trap '' TERM USR1 USR2",
            f"trap 'touch {folder}/ended' EXIT",
            f"export PATH={folder}:$PATH",
            f'echo "$SLURM_JOB_ID $SLURMD_NODENAME" > {folder}/facts.new; mv {folder}/facts.new {folder}/facts',
        ]
        if self.situation.requeued:
            lines.append(f"until [ -e {folder}/go ]; do sleep 0.1; done")
        if self.situation.limited:
            lines.append("until scontrol show job $SLURM_JOB_ID | grep -q JobState=COMPLETING; do sleep 0.2; done")
        return [*lines, f"{sys.executable} -c {shlex.quote(PROGRAM.format(root=str(ROOT)))}; exit 137"]

    def fields(self, job=""):
        return slurm_cli.job_fields(job or self.job)

    def end(self):
        wait_until((self.folder / "facts").exists, "its start", 60, story=self.fields)
        self.id, self.node = (self.folder / "facts").read_text().split()
        if self.situation.requeued:
            slurm_cli.call("scontrol", "requeue", self.job)
            (self.folder / "go").touch()
        wait_until((self.folder / "ended").exists, "its end", 120, story=self.fields)
        wait_until(self._has_left, "its state", 60, story=self.fields)

    def _has_left(self):
        """Whether the first start is over for Slurm. A second one may run."""
        fields = self.fields()
        running = fields["JobState"] == "RUNNING" and fields["Restarts"] == "0"
        return not running and fields["JobState"] != "COMPLETING"

    def changes(self):
        """The calls that change something, without what differs between two jobs."""
        names = {self.id: "ID", self.job: "JOB", self.node: "NODE", self.name: "NAME"}
        calls = (self.folder / "calls").read_text().splitlines()
        plain = [re.sub(r"\w[\w.]*", lambda match: names.get(match[0], match[0]), call) for call in calls]
        return [call for call in plain if CHANGE.match(call)]

    def next(self):
        """The fields of the job that follows: itself, or its successor."""
        row = slurm_cli.queue([self.name])[self.name, int(self.situation.array)]
        assert (row.id != self.job) == self.situation.successor
        return self.fields(row.id)

    def expected(self, text):
        return text.replace("NODE", self.node)


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """All situations at once, each a job of its own."""
    folder = tmp_path_factory.mktemp("r")
    with pytest.MonkeyPatch.context() as patch:
        options = {"nodes": 4, "cpus": 8, "kill_wait": 30, "settings": ["FirstJobId=5001"]}
        cluster = start_cluster(folder / "slurm", patch, **options)
        cluster.call("scontrol", "create", "PartitionName=small", "Nodes=n[1-2]", "State=UP", "MaxTime=60")
        try:
            yield {name: FailedStart(name, folder / name) for name in SITUATIONS}
        finally:
            cluster.stop()


@pytest.mark.parametrize("name", SITUATIONS)
def test_start_that_cannot_write_restarts_its_job(name, starts):
    start = starts[name]
    start.end()
    situation = start.situation
    assert start.changes() == situation.changes
    fields = start.next()
    assert fields.get("Comment", "") == start.expected(situation.comment)
    excluded = fields["ExcNodeList"].replace("(null)", "")
    names = slurm_cli.host_names(excluded) if excluded else []
    assert sorted(names) == sorted(start.expected(situation.excluded).split(",") if situation.excluded else [])
    goes_on = "scontrol requeue JOB" in situation.changes and not situation.successor or situation.requeued
    assert start.fields()["Restarts"] == str(int(goes_on))
    if situation.array:
        assert start.fields(start.job.replace("_1", "_0"))["Restarts"] == "0", "the other element is left alone"
