"""Tests on a Slurm whose TaskProlog exports PYTHONPATH, with modules that have the names of other modules."""

import pytest

from flip.runs.rundir import RunDir, write_json
from jobs.common.job import Job, JobResources
from jobs.slurm.backend import SlurmBackend
from jobs.submitted_runs.clusters import states
from tests.harness.common import ROOT, wait_until
from tests.harness.slurm_scene import profile
from tests.slurm.conftest import start_cluster
from tests.slurm.scenarios import HERE, SHORT

pytestmark = pytest.mark.slurm
HIDING = "raise ImportError('a module of the site')\n"
NAMES = ("flip", "hashlib", "jobs", "json", "socket", "tests")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("p")
    modules = folder / "modules"
    modules.mkdir()
    for name in NAMES:
        (modules / f"{name}.py").write_text(HIDING)
    prolog = folder / "prolog"
    prolog.write_text(f"#!/bin/sh\necho export PYTHONPATH={modules}\n")
    prolog.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        cluster = start_cluster(folder / "slurm", patch, nodes=2, **HERE, settings=[f"TaskProlog={prolog}"])
        yield folder
        cluster.stop()


@pytest.mark.parametrize("agents", [False, True], ids=["srun", "agents"])
def test_run_completes_although_task_prolog_hides_modules(site, agents):
    run = RunDir(site / "runs" / f"agents-{agents}" / "run")
    run.path.mkdir(parents=True)
    write_json(run.path / "play.json", {"steps": SHORT})
    run.config.write_text("schema: 1\n")
    job = Job(run, ROOT, JobResources(nodes=2, cpus=1, hours=0.5), module="tests.slurm.scripted")
    SlurmBackend(profile(agents=agents, peer_seconds=2)).submit([job])

    def state():
        return states([run])[run.path]

    wait_until(lambda: state().state in ("complete", "failed", "stopped"), "its end", 90, story=state)
    assert (state().state, run.newest_attempt()) == ("complete", 1)
