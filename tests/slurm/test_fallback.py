"""Tests on a real Slurm of jobs/slurm/fallback.sh: starts on a node without interpreter go back to the queue.

Stand-ins replace the interpreter of the batch script, and jobs/host/job.py.
"""

import sys

import pytest

from flip.runs.next_step import MAX_FAILED_STARTS
from flip.runs.rundir import RunDir
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import Job, JobResources
from jobs.host import slurm_cli
from jobs.slurm import batch_script
from tests.harness.common import wait_until
from tests.slurm.conftest import start_cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
#: The first start that uses it marks its node, which has no interpreter from then on.
INTERPRETER = """#!/bin/sh
[ -e {folder}/broken ] || echo "$SLURMD_NODENAME" > {folder}/broken
until [ -e {folder}/go ]; do sleep 0.1; done
{fails} || exec {python} "$@"
exit 127
"""
ON_BROKEN_NODE = '[ "$(cat {folder}/broken)" = "$SLURMD_NODENAME" ]'
ONCE = "mkdir {folder}/failed"
ALWAYS = "true"
OWNER = """
import os
with open({folder!r} + "/started." + os.environ["SLURM_RESTART_COUNT"], "a") as file:
    file.write(os.environ["SLURMD_NODENAME"])
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        cluster = start_cluster(tmp_path_factory.mktemp("f") / "slurm", patch, nodes=4, kill_wait=30)
        cluster.call("scontrol", "create", "PartitionName=small", "Nodes=n[1-2]", "State=UP", "MaxTime=60")
        yield cluster
        cluster.stop()


class Start:
    """A submitted job whose interpreter is missing. ``fails``: on which of its starts, as a shell command."""

    def __init__(self, folder, fails, nodes=1, **options):
        self.folder = folder
        code = folder / "code"
        (code / "jobs" / "host").mkdir(parents=True)
        (code / "jobs" / "host" / "job.py").write_text(OWNER.format(folder=str(folder)))
        interpreter = folder / "python"
        fails = fails.format(folder=folder)
        interpreter.write_text(INTERPRETER.format(folder=folder, fails=fails, python=sys.executable))
        interpreter.chmod(0o755)
        submission = folder / "demo" / ".slurm" / "77aa77aa"
        submission.mkdir(parents=True)
        run = RunDir(folder / "demo" / "a")
        (submission / "runs").write_text(f"{run.path}\n")
        fields = {"partition": options.pop("partition", "")}
        options = {name.replace("_", "-"): value for name, value in options.items()}
        profile = ClusterProfile("x", "slurm", host_python=str(interpreter), options=options, **fields)
        text = batch_script.script_text(profile, [Job(run, code, JobResources(nodes, hours=0.1))], submission, "demo")
        (folder / "script.sh").write_text(text)
        self.log = submission
        self.job = slurm_cli.call("sbatch", "--parsable", str(folder / "script.sh")).strip()

    def fields(self):
        return slurm_cli.job_fields(self.job)

    def end(self):
        """Wait for the end of the job; returns its fields."""
        wait_until(lambda: self.fields()["JobState"] in slurm_cli.ENDED, "its end", 120, story=self.fields)
        return self.fields()

    def fail(self):
        """Let the start fail, when it runs; returns the node on which it does."""
        wait_until((self.folder / "broken").exists, "its start", 120, story=self.fields)
        (self.folder / "go").touch()
        return (self.folder / "broken").read_text().strip()


@pytest.fixture
def submit(cluster, tmp_path):
    jobs = []

    def submit(fails, **options):
        jobs.append(Start(tmp_path / str(len(jobs)), fails, **options))
        return jobs[-1]

    yield submit
    for start in jobs:
        slurm_cli.call("scancel", start.job)


def test_start_without_interpreter_goes_on_elsewhere(submit):
    start = submit(ON_BROKEN_NODE, exclude="n[3-4]")
    node = start.fail()
    fields = start.end()
    assert fields["JobState"] == "COMPLETED"
    assert (fields["Restarts"], fields["Comment"]) == ("1", f"away:1:0:0:127:{node}")
    excluded = slurm_cli.host_names(fields["ExcNodeList"])
    assert sorted(excluded) == sorted([node, "n3", "n4"])
    (other,) = {"n1", "n2"} - {node}
    assert (start.folder / "started.1").read_text() == other
    assert f"start 1 failed on {node} with exit code 127" in (start.log / f"{start.job}.err").read_text()


def test_node_is_not_excluded_if_too_few_others_work(submit):
    """Else the job would wait for ever, with the reason BadConstraints."""
    start = submit(ONCE, nodes=2, partition="small")
    node = start.fail()
    fields = start.end()
    assert fields["JobState"] == "COMPLETED"
    assert (fields["Restarts"], fields["Comment"]) == ("1", f"away:1:0:0:127:{node}")
    assert fields["ExcNodeList"] == "(null)"
    assert (start.folder / "started.1").exists()


@pytest.mark.parametrize(
    "options", [{"comment": f"away:{MAX_FAILED_STARTS}:-1:0:127:n1"}, {"no_requeue": ""}], ids=["limit", "no requeue"]
)
def test_start_ends_for_good(submit, options):
    start = submit(ALWAYS, **options)
    start.fail()
    fields = start.end()
    assert fields["JobState"] == "FAILED"
    assert (fields["Restarts"], fields["ExitCode"], fields["ExcNodeList"]) == ("0", "127:0", "(null)")


def test_cancelled_job_is_left_alone(submit):
    """It ignores TERM, so that it meets its cancel before Slurm kills it."""
    start = submit(ALWAYS)
    wait_until((start.folder / "broken").exists, "its start", 120, story=start.fields)
    slurm_cli.call("scancel", start.job)
    wait_until(lambda: start.fields()["JobState"] == "COMPLETING", "its cancel", story=start.fields)
    start.fail()
    fields = start.end()
    assert fields["JobState"] == "CANCELLED"
    assert fields["Restarts"] == "0" and "Comment" not in fields
