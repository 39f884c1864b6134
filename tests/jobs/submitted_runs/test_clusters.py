"""A sweep with runs on several clusters: each run records its cluster, and commands query that cluster."""

import json

import pytest

from flip.runs.errors import StorageError
from flip.runs.rundir import RunDir, read_json, write_json
from jobs.backends.multi import MultiBackend
from jobs.commands.submit import main
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import Job
from jobs.reporting import status as run_status
from jobs.slurm import site
from jobs.submitted_runs import clusters
from tests.jobs.outcomes import make

SWEEP = """
cluster: {folder}/near.yaml
set:
  model: {{size: tiny}}
  data: {{manifest: /nowhere, samples: 1e6, tokenizer: /nowhere.json}}
  stages: [{{name: pretrain, samples: 1e6, batch: 128}}]
  resources: {{processes: 8, gpus: 8, cpus: 8}}
grid:
  place:
    list:
      - {{name: here}}
      - {{name: there, resources.cluster: {folder}/far.yaml}}
  seed: [0, 1, 2]
"""


@pytest.fixture
def desk(tmp_path, monkeypatch):
    monkeypatch.setenv("FLIP_RUNS", str(tmp_path / "runs"))
    for name in ("near", "far"):
        text = f"kind: slurm\npartition: {name}\ncpus_per_node: 64\nmemory_gb: 500\ngpus_per_node: 8\n"
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "demo.yaml").write_text(SWEEP.format(folder=tmp_path))
    site._describe_cluster.cache_clear()
    return tmp_path


@pytest.fixture
def slurm_commands(commands):
    commands("scontrol", "echo 'ClusterName = lab'")
    for name in ("srun", "squeue", "scancel"):
        commands(name, "")
    commands("sbatch", "echo 'Job 9 to start at 2026-11-25T14:00:00 using 8 processors on nodes n1 in partition x' >&2")
    return commands


def plan(desk, capsys, *args):
    assert main(["--sweep", str(desk / "demo.yaml"), "--dry-run", *args]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_plan_batches_runs_by_cluster_and_shows_cluster_per_run(desk, slurm_commands, capsys):
    planned = json.loads(plan(desk, capsys, "--json", "--script"))
    assert {run["name"][:4]: run["cluster"] for run in planned["runs"]} == {"here": "near", "ther": "far"}
    # Each cluster has a canary, after the runs that wait for it.
    assert [[name[:4] for name in batch["runs"]] for batch in planned["batches"]] == [
        ["here"] * 2, ["here"], ["ther"] * 2, ["ther"],
    ]  # fmt: skip
    assert ["--partition=far" in batch["script"] for batch in planned["batches"]] == [False, False, True, True]
    text = plan(desk, capsys)
    assert "6 runs on near, far, below" in text and "cluster" in text.split("all runs")[1]
    overridden = json.loads(plan(desk, capsys, "--json", "--cluster", str(desk / "near.yaml")))
    assert {run["cluster"] for run in overridden["runs"]} == {"near"}


@pytest.mark.parametrize("answer, asked", [("echo 'ClusterName = lab'", 2), ("echo 'no contact' >&2; exit 1", 2)])
def test_dry_run_queries_slurm_once_per_cluster(desk, slurm_commands, capsys, answer, asked):
    slurm_commands("scontrol", answer)
    plan(desk, capsys)
    assert sum(call == "scontrol show config" for call in slurm_commands.calls()) == asked


def test_submit_refuses_clusters_with_different_runs_roots(desk, slurm_commands, capsys):
    (desk / "far.yaml").write_text("kind: slurm\nruns_root: /elsewhere\n")
    assert main(["--sweep", str(desk / "demo.yaml"), "--dry-run"]) == 78
    assert "the runs root of" in capsys.readouterr().err


def test_submit_refuses_different_clusters_with_equal_names(desk, slurm_commands, capsys):
    (desk / "far.yaml").write_text((desk / "far.yaml").read_text() + "name: near\n")
    assert main(["--sweep", str(desk / "demo.yaml"), "--dry-run"]) == 78
    assert "two different cluster profiles have this name" in capsys.readouterr().err


def test_multi_backend_submits_each_job_to_own_cluster_and_records_cluster(desk, slurm_commands):
    slurm_commands("sbatch", 'cp "$1" "$0.$$"; echo "Submitted batch job 57"')
    jobs = []
    for name, cluster in (("a", "near"), ("b", "far"), ("c", "near")):
        run = make(desk / "runs" / "demo", name, steps=0, complete=False)
        jobs.append(Job(run, desk / "code", cluster=cluster))
    MultiBackend([ClusterProfile(name=name, kind="slurm", partition=name) for name in ("near", "far")]).submit(jobs)
    assert [read_json(job.run.path / "job.json")["cluster"] for job in jobs] == ["near", "far", "near"]
    texts = sorted(path.read_text() for path in desk.glob("sbatch.[0-9]*"))
    assert sorted("--partition=far" in text for text in texts) == [False, True]
    rows = run_status.table([job.run for job in jobs])
    assert [row["cluster"] for row in rows] == ["near", "far", "near"] and " far " in run_status.render(rows)
    assert "cluster" not in run_status.render([row for row in rows if row["cluster"] == "near"])


def test_request_cancel_cancels_local_run_if_slurm_command_fails(desk, slurm_commands, field):
    run = field.run(total=10_000)
    field.submit(run)
    field.until_moving(run, 1)
    silent = RunDir(field.sweep / "silent")
    silent.path.mkdir()
    write_json(silent.path / "job.json", {"kind": "slurm", "name": "x.77aa", "token": "77aa", "index": 0})
    slurm_commands("squeue", "exit 1")
    with pytest.raises(StorageError, match="Slurm does not answer.*second cancel kills"):
        clusters.request_cancel([silent, run], "enough")
    field.until_state(run, "cancelled")
    field.until(lambda: not field.left())
