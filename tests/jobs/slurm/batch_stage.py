"""A batch script in a real bash, with stand-ins for Slurm: the harness of the tests of this folder."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from flip.runs.rundir import RunDir, read_json
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import Job, JobResources
from jobs.slurm import batch_script
from tests.harness.job_records import write_job

ROOT = Path(__file__).resolve().parents[3]
CODE = Path("/runs/demo/.code")
JOB = Job(
    RunDir("/runs/demo/a"),
    CODE / "c0de",
    JobResources(2, 8, 8, 12, 23.9),
    {"NCCL_DEBUG": "WARN x"},
    host_snapshot=CODE / "today",
)


def script(profile, job=JOB, elements=3, folder="/runs/demo/.slurm/0123abcd", monkeypatch=None):
    """The script that sbatch would get."""
    return batch_script.script_text(profile, [job] * elements, Path(folder), "demo.0123abcd")


class Stage:
    """Runs a batch script in a real bash; srun and scontrol are small scripts at the front of PATH."""

    def __init__(self, folder, commands, monkeypatch):
        self.folder = folder / "my sweep" / ".slurm" / "77aa77aa"
        self.commands = commands
        self.run = RunDir(folder / "my sweep" / "run with space")
        self.run.path.mkdir(parents=True)
        self.folder.mkdir(parents=True)
        (self.folder / "runs").write_text(f"/nowhere\n{self.run.path}\n")
        write_job(self.run, token="77aa77aa")
        job = Job(self.run, ROOT)
        text = script(ClusterProfile(name="x", kind="slurm"), job, 2, self.folder, monkeypatch)
        self.script = folder / "script.sh"
        self.script.write_text(text)
        commands(
            "scontrol", "case $2 in job) echo 'JobState=RUNNING Restarts=0 Partition=gpu';; hostnames) echo $3;; esac"
        )
        commands("sinfo", "printf 'n%s|idle\\n' 1 2 3 4 5 6 7 8 9")

    def start(self, *arguments, **env):
        variables = {"SLURM_JOB_ID": "58", "SLURM_ARRAY_JOB_ID": "57", "SLURM_ARRAY_TASK_ID": "1"}
        variables |= {"SLURM_JOB_PARTITION": "gpu", "SLURM_JOB_NAME": "demo", "SLURMD_NODENAME": "n7", **env}
        command = ["bash", str(self.script), *arguments]
        return subprocess.Popen(command, env={**os.environ, **variables}, start_new_session=True)

    def end(self, n=1):
        return read_json(self.run.attempt(n) / "end.json")


OWNER = """
import json, os, pathlib, sys
facts = {"pid": os.getpid(), "arguments": sys.argv[1:], "environ": dict(os.environ), "umask": os.umask(0)}
facts["status"] = pathlib.Path("/proc/self/status").read_text()
pathlib.Path(__file__).parents[2].joinpath("started").write_text(json.dumps(facts))
print("the owner")
sys.exit(64)
"""
"""A stand-in for jobs/host/job.py: it records how it was started."""
OWNER_CODE = 64


class OwnedStage(Stage):
    """The same for a script of a job that a process owns: ``OWNER``."""

    def __init__(self, folder, commands, monkeypatch):
        super().__init__(folder, commands, monkeypatch)
        self.code = folder / "code"
        self.owner = self.code / "jobs" / "host" / "job.py"
        self.owner.parent.mkdir(parents=True)
        self.owner.write_text(OWNER)
        self.write()

    def write(self, changes=None, folder=None, **fields):
        """Write the script of a profile with these fields. ``changes``: of the job. ``folder``: of the submission."""
        profile = ClusterProfile(**{"name": "x", "kind": "slurm", "python": sys.executable, **fields})
        job = replace(Job(self.run, self.code), **(changes or {}))
        self.script.write_text(script(profile, job, 2, folder or self.folder))

    def started(self):
        """The start of the owner as it has recorded it; None if it has not started."""
        return read_json(self.code / "started")


def ignored_signals(status):
    """Numbers of the signals that a process ignores, from the text of its /proc/PID/status."""
    (line,) = [line for line in status.splitlines() if line.startswith("SigIgn:")]
    mask = int(line.split()[1], 16)
    return {number + 1 for number in range(64) if mask >> number & 1}
