"""Tests of plans as text on terminals of several widths and on a pipe, and of their estimates of time."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flip.common.host import Host
from flip.config.identity import identity
from flip.config.resolve import DatasetFacts, dataset_facts, resolve_auto
from flip.runs.checks import OK, UNKNOWN, Check
from jobs.commands.submit import main
from jobs.common.cluster_profile import ClusterProfile, load_profile
from jobs.common.paths import SWEEPS
from jobs.common.terminal import show
from jobs.planning.run_cost import estimate, makespan
from jobs.submission import render
from jobs.submission.dry_run import PlannedJob
from jobs.submission.plan import Action, Plan
from jobs.submission.render import PlanView
from jobs.sweeps.sweep_file import read_sweep
from jobs.workloads.training import TrainingWorkload
from tests.harness.common import ROOT
from tests.harness.terminal import Terminal, golden

GOLDEN = Path(__file__).parent / "golden"
HOSTILE = "[red]\x1b[2J"
NODE = Host(cores=96, memory=10**12, bf16=True, cuda=True)
DATA = {"quickstart_full": [DatasetFacts(55_070, 9, 1.0, True)]}


def planned(name, profile, **options):
    """A plan of sweeps/NAME.yaml: the first run is new, the second has failed, the third has changed."""
    sweep = read_sweep(SWEEPS / f"{name}.yaml", **options)
    actions = []
    for run, (kind, reason, starts) in zip(
        sweep.runs, [("new", "", True), ("failed", f"CUDA error {HOSTILE}", True), ("changed", "seed: 0 -> 1", False)],
        strict=False,
    ):  # fmt: skip
        config = resolve_auto(run.config, NODE, DATA.get(name) or dataset_facts(run.config, nominal=True))
        run_estimate = estimate(config, profile)
        # fixed for the golden text
        devices = [replace(device, memory={"total": 20e9}) for device in run_estimate.devices]
        run_estimate = replace(run_estimate, devices=devices)
        resolved = TrainingWorkload(run.name, config, identity(config, ""), run_estimate, profile=profile)
        actions.append(Action(resolved, kind, reason, starts))
    return Plan(Path("/runs") / name, actions), sweep


@pytest.mark.parametrize("columns", [40, 80, 200, None])
@pytest.mark.parametrize("name, cluster", [("quickstart_full", "local"), ("masking", "h100")])
def test_plan_page_matches_golden_text(name, cluster, columns, monkeypatch):
    for variable in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FLIP_KERNEL", "0")  # on machines with and without the kernel
    profile = load_profile(cluster)
    plan, sweep = planned(name, profile)
    shape = plan.actions[0].wanted.resources
    jobs = [
        PlannedJob([plan.actions[0].name], shape, "#!/bin/sh\n#SBATCH --a-long-option-to-copy=value --and another", "")
    ]
    checks = {
        Check(OK, "55,070 samples in 9 shards, /data/of/a/long/path", name="data set"): [],
        Check(UNKNOWN, HOSTILE, name="Slurm"): [],
    }
    page = render.details(PlanView(plan, sweep, profile, checks, batches=jobs, script=True))
    if columns is None:
        golden(GOLDEN / f"plan-{name}-piped.txt", page)
        return
    with Terminal(columns, 50) as screen:
        show(page, screen.file)
        golden(GOLDEN / f"plan-{name}-{columns}.txt", screen.close().text())
        assert b"\x1b[2J" not in screen.raw


@pytest.mark.parametrize("name", ["clip-b16", "clip-l16"])
def test_removed_stage_is_one_line_also_with_another_model_size(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FLIP_CACHE", str(tmp_path))
    monkeypatch.setenv("FLIP_RUNS", str(tmp_path))
    assert main(["sizes", "--dry-run", "--only", name]) == 0
    lines = capsys.readouterr().out.split("from base")[1].split("model   ")[0].splitlines()
    assert [line.strip() for line in lines if "unmasked" in line] == ["stages.unmasked: removed"]


def test_plan_of_many_passes_has_no_exponent(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FLIP_RUNS", str(tmp_path))
    small = ["data.manifest=nowhere", "data.samples=4600", "data.chunk=1", "data.lanes=128"]
    assert main(["masking_small", "--dry-run", "--only", "mask50", *small, "stages.pretrain.samples=7666666"]) == 0
    text = capsys.readouterr().out
    assert "1,667 passes" in text and "e+0" not in text.split("passes", 1)[0]


@pytest.mark.long
def test_submit_command_prints_styled_plan_on_terminal(desk):
    command = (sys.executable, ROOT / "jobs" / "submit.py", "--sweep", desk.sweep, "--dry-run")
    with Terminal(80, 50) as screen:
        env = {**os.environ, "FLIP_RUNS": str(desk.runs), "TERM": "xterm-256color"}
        assert screen.start(*command, cwd=desk.folder, env=env).wait(60) == 0
        text = screen.close().text()
        assert "wall-clock" in text and "attempts" in text and b"\x1b[1m" in screen.raw and screen.cursor


def test_plan_page_shows_range_and_spares(monkeypatch):
    profile = load_profile("h100")
    plan, sweep = planned("masking", profile, overrides=["resources.nodes=[2, 4]", "resources.spares=1"])
    shape = plan.actions[0].wanted.resources
    page = render.details(PlanView(plan, sweep, profile, batches=[PlannedJob([plan.actions[0].name], shape, "", "")]))
    assert "nodes        2: 16 ranks" in page and "1 spare: 25 % more nodes than work" in page
    assert "2-5 nodes, 8 ranks a node" in page


def test_cpu_estimate_derives_wall_hours_from_core_gflops():
    (action, *_) = planned("quickstart_full", load_profile("local"))[0].actions
    profile = load_profile("local")
    run_estimate = action.wanted.estimate
    threads = action.wanted.config.compute.threads
    assert run_estimate.wall_hours == pytest.approx(run_estimate.cost.flops / (threads * 100e9) / 3600)
    assert run_estimate.attempts == 1
    twice = estimate(action.wanted.config, ClusterProfile(kind="slurm", core_gflops=profile.core_gflops / 2))
    assert twice.wall_hours == pytest.approx(2 * run_estimate.wall_hours)
    assert twice.as_dict()["wall_hours"] == twice.wall_hours and twice.as_dict()["attempts"] == 1


def test_gpu_estimate_derives_attempts_from_wall_limit():
    (action, *_) = planned("masking", profile := load_profile("h100"))[0].actions
    _ = None
    run_estimate = action.wanted.estimate
    config = action.wanted.config
    world = config.resources.nodes * config.resources.processes
    assert run_estimate.wall_hours == pytest.approx(run_estimate.cost.gpu_hours / world)
    config.resources.hours = run_estimate.wall_hours / 2.5
    assert estimate(config, profile).attempts == 3
    # Without a known GPU the number of attempts is unknown.
    assert estimate(config, ClusterProfile(kind="slurm")).attempts is None


@pytest.mark.parametrize(
    "kind, parallel, hours", [("local", 0, 9.0), ("local", 2, 4.5), ("slurm", 0, 4.0), ("slurm", 1, 9.0)]
)
def test_makespan_depends_on_backend_and_parallel_runs(kind, parallel, hours):
    profile = ClusterProfile(kind=kind, parallel=parallel)
    assert makespan([4.0, 3.0, 2.0], profile) == hours
    assert makespan([4.0, None], profile) is None and makespan([], profile) is None


def test_seeds_of_one_configuration_are_one_row():
    profile = load_profile("h100")
    sweep = read_sweep(SWEEPS / "masking.yaml", seeds=[0, 1, 2])
    actions = []
    for run in sweep.runs:
        config = resolve_auto(run.config, NODE, dataset_facts(run.config, nominal=True))
        resolved = TrainingWorkload(run.name, config, identity(config, ""), estimate(config, profile), profile=profile)
        actions.append(Action(resolved, "new", starts=True))
    actions[1] = replace(actions[1], kind="failed")
    page = render.details(PlanView(Plan(Path("/runs/masking"), actions), sweep, profile))
    (table,) = [part for part in page.parts if not isinstance(part, str) and "run" in part.rows[0]]
    names = [row["run"] for row in table.rows]
    first, second = [run.name for run in sweep.runs if run.config.seed == 0][:2]
    assert names[:3] == [f"{first} (2 seeds, each)", f"{first}-s1", f"{second} (3 seeds, each)"]
    assert names[-1] == "total to start" and "seeds        0, 2\n" in page and "seeds        0, 1, 2\n" in page
