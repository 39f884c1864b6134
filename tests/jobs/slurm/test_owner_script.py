"""Tests of the batch script whose owner is jobs/host/job.py: its text against golden files, and in a real bash.

Stand-ins replace Slurm and job.py.
"""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import JobResources
from jobs.slurm import batch_script
from tests.jobs.slurm.batch_stage import JOB, script

GOLDEN = Path(__file__).with_name("golden")
ELASTIC = JobResources(4, 8, 8, 12, 23.9, least_nodes=2, spares=1, usable=(2, 4))


@pytest.mark.parametrize(
    "name, fields, changes",
    [
        ("plain", {"partition": "gpu"}, {}),
        ("agents", {"partition": "gpu", "agents": True}, {}),
        ("elastic", {"partition": "gpu", "agents": True, "options": {"exclude": "n[07-08]"}}, {"resources": ELASTIC}),
        ("canary", {"partition": "gpu", "agents": True}, {"canary": 50}),
        ("tracked", {"container": "/img/torch.sif", "container_runtime": "apptainer"}, {"trackers": ["wandb"]}),
        (
            "apptainer",
            {
                "container": "/img/torch 2.sif", "container_runtime": "apptainer", "python": "python3.12",
                "host_python": "/usr/bin/python3", "modules": ["cuda/12.8"], "setup": ["ulimit -n 65536"],
                "options": {"gres": "gpu:h100:8"}, "master_addr": "10.0.0.1",
            },
            {},
        ),
        (
            "pyxis",
            {"container": "nvcr.io#nvidia/pytorch:25.09-py3", "container_mounts": ["/data", "/scratch/cache:/cache"]},
            {"trackers": ["wandb"]},
        ),
    ],
)  # fmt: skip
def test_script_matches_golden_file(name, fields, changes):
    profile = ClusterProfile(name=name, kind="slurm", owner=True, **{"python": "/opt/py/bin/python", **fields})
    text = script(profile, replace(JOB, **changes))
    program = batch_script.ownership_program()
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert text.count(program) == 1
    text = text.replace(program, "(flip/files/acl.py and flip/files/ownership.py)\n")
    path = GOLDEN / f"owner-{name}.sh"
    if os.environ.get("FLIP_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text(), "FLIP_GOLDEN=write updates the file; review the diff"
