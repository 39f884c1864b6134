"""Tests that a real Slurm accepts each command line that tests with stand-ins fake, as it is written."""

import os
import re

import pytest

from jobs.host import slurm_cli
from tests.harness.common import wait_until
from tests.harness.slurm_command_lines import LINES
from tests.jobs.slurm.golden_scripts import golden_script
from tests.slurm_site import require
from tools.sandbox.cluster import SandboxCluster

pytestmark = pytest.mark.slurm
STEP = re.compile(r"^srun (.*) \S+/python -I \S+/rank_entry.py jobs.worker$", re.MULTILINE)
KINDS = re.compile(r"^  flip_options=\((.*)\)$", re.MULTILINE)
SCRIPT = "#!/bin/sh\n#SBATCH --output=/dev/null\nexec sleep 300\n"
#: Values of a golden script that the sandbox does not have.
SMALLER = {
    "ntasks-per-node=8": "ntasks-per-node=1",
    "cpus-per-task=12": "cpus-per-task=1",
    "partition=gpu": "partition=low",
    "nodes=2-5": "nodes=2-3",
    "exclude='n[07-08]'": "exclude=n4",
}


class Jobs:
    """Jobs in the states that command lines need."""

    def __init__(self, folder):
        self.folder = folder
        self.submitted = []

    def submit(self, *options):
        fixed = ("--parsable", "--output=/dev/null", "--chdir=/", "--requeue", "--job-name=lines", "--time=30")
        self.submitted.append(slurm_cli.call("sbatch", *fixed, *options, "--wrap=exec sleep 300").strip())
        return self.submitted[-1]

    def state(self, job):
        return slurm_cli.job_fields(job)["JobState"]

    def make(self, kind):
        """The number of a new job that is running, requeued (and waits) or held."""
        job = self.submit(*(["--hold"] if kind == "held" else []))
        if kind != "held":
            wait_until(lambda: self.state(job) == "RUNNING", "a running job")
        if kind == "requeued":
            slurm_cli.call("scontrol", "requeue", job)
            wait_until(lambda: self.state(job) == "PENDING", "a requeued job")
        return job

    def cancel(self):
        for job in self.submitted:
            slurm_cli.call("scancel", job)
        self.submitted.clear()


@pytest.fixture(scope="module")
def open_cluster(tmp_path_factory):
    """``open_cluster(accounting)`` starts a Slurm unless it runs, and puts it into this process's environment."""
    running = []
    before = dict(os.environ)

    def leave():
        while running:
            running.pop()[1].stop()
        os.environ.clear()
        os.environ.update(before)

    def enter(accounting):
        if not running or running[0][0] != accounting:
            leave()
            require(accounting)
            options = {}
            if accounting:
                options = {"accounting": True, "preempt": "qos"}
            cluster = SandboxCluster(tmp_path_factory.mktemp("s"), nodes=4, kill_wait=2, **options)
            running.append((accounting, cluster))
            cluster.start()
            os.environ.update(cluster.env())
        return running[0][1]

    yield enter
    leave()


def values(cluster, job, folder):
    """What stands in a command line for the words in angle brackets."""
    script = folder / "script.sh"
    script.write_text(SCRIPT)
    return {
        "JOB": job, "JOBS": job, "NAMES": "lines,other.0123abcd", "NODES": "n2,n2", "PARTITION": "low", "N": "1",
        "PARTITIONS": "low,high",
        "COMMENT": "away:1:0:0:127:n3", "FILE": str(script), "UID": str(os.geteuid()), "USER": cluster.site.user,
        "CLUSTER": "here", "ACCOUNT": "acc", "QOS": "low", "WORDS": "true",
    }  # fmt: skip


def lines():
    """The lines but for those of srun, which needs an allocation; those that need accounting come last."""
    for line in sorted(LINES, key=lambda line: line.accounting):
        if not line.text.startswith("srun"):
            yield pytest.param(line, id=line.text, marks=[pytest.mark.slow] if line.accounting else [])


@pytest.mark.parametrize("line", lines())
def test_real_slurm_accepts_command_line(line, open_cluster, tmp_path):
    cluster = open_cluster(line.accounting)
    jobs = Jobs(tmp_path)
    job = ""
    try:
        for words in line.variants(values(cluster, "JOB", tmp_path)):
            if line.job and (not job or words[0] == "scancel"):
                job = jobs.make(line.job)
            words = [word.replace("JOB", job) if "JobId=" in word or word.endswith("JOB") else word for word in words]
            text = slurm_cli.call(*words, text=SCRIPT if line.script else "")
            if words[0] == "sbatch" and "--test-only" not in words:
                jobs.submitted.append(re.search("[0-9]+", text)[0])
            elif words[0] in ("sinfo", "squeue") or words[:2] == ["scontrol", "show"]:
                assert text.strip() or words[0] == "squeue", words
    finally:
        jobs.cancel()


def test_real_slurm_accepts_options_of_batch_scripts_and_steps(open_cluster, tmp_path):
    """Those of the golden files, except for containers of pyxis, which the sandbox does not have."""
    open_cluster(False)
    for name in ("plain", "agents", "elastic"):
        golden = golden_script(name)
        options = "\n".join(line for line in golden.splitlines() if line.startswith("#SBATCH"))
        for old, new in SMALLER.items():
            options = options.replace(old, new)
        step = STEP.search(golden)[1].replace("/runs/demo/.slurm/0123abcd", str(tmp_path)).replace("=12", "=1")
        starts = [f"srun {small(kind)} {step} true" for kind in KINDS.findall(golden)]
        assert len(starts) == 2
        debug = "srun --kill-on-bad-exit=1 --export=ALL true"
        script = " && ".join([*starts, debug, f"touch {tmp_path}/{name}.$SLURM_ARRAY_TASK_ID\n"])
        (tmp_path / "script.sh").write_text(f"#!/bin/sh\n{options}\n{script}")
        slurm_cli.call("sbatch", str(tmp_path / "script.sh"))
        wait_until(lambda name=name: len(list(tmp_path.glob(f"{name}.*"))) == 3, f"three elements of {name}")


def small(options):
    """Options of a kind of step, on two nodes of the sandbox."""
    for word, value in (('"$(($3 * 8))"', "2"), ('"$3"', "2"), ("=96", "=1"), ("=12", "=1")):
        options = options.replace(word, value)
    return options


def test_squeue_shows_reason_and_comment_of_job(open_cluster, tmp_path):
    open_cluster(False)
    jobs = Jobs(tmp_path)
    jobs.submit("--hold", "--comment=away:1:0:0:127:n3")
    row = slurm_cli.queue(["lines"])["lines", 0]
    jobs.cancel()
    assert (row.state, row.reason, row.start, row.comment) == ("PENDING", "JobHeldUser", "", "away:1:0:0:127:n3")
