"""``submit`` from another directory on a small real data set: plans, checks, questions and runs."""

import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from flip.config import merge as load_module
from flip.config import schema
from flip.monitoring.results import read_run
from flip.runs.checkpoint_folder import checkpoints
from flip.runs.errors import ConfigError, PermissionDenied
from flip.runs.lifecycle import RunState
from flip.runs.rundir import RunDir, read_json, write_json
from jobs.common.cluster_profile import ClusterProfile
from jobs.local.backend import live_ranks
from jobs.planning import storage_checks
from jobs.reporting.goodput import of_run
from jobs.submission import confirm
from jobs.submission import plan as planning
from jobs.workloads import training_request
from tests.harness.common import wait_until
from tests.harness.first_process import UNSHARE, first_process_of, why_no_namespace
from tests.harness.training_run import last_weights

ROOT = Path(__file__).resolve().parents[3]
SCALING = ("model_scaling", "data_scaling", "schedule_scaling", "joint_scaling")


@pytest.mark.parametrize("name", SCALING)
def test_dry_run_plans_paper_sweeps(desk, name):
    done = desk.submit("--dry-run", sweep=f"sweeps/{name}.yaml")
    assert done.returncode == 0, done.stderr
    for text in (
        "GPU-hours of runs in bf16 from arithmetic at an assumed 40 % of 989 TFLOP/s",
        "exposed communication",
        "not checked here",
        "batch jobs:",
        "nominal",
        "98 of 196" if name != "joint_scaling" else "128 of 256",
    ):
        assert text in done.stdout
    assert not desk.runs.exists() and "nothing started" in done.stdout and "#SBATCH" not in done.stdout


def test_plan_matches_hand_calculated_costs(desk):
    plan = json.loads(desk.submit("--dry-run", "--json", sweep="model_scaling").stdout)
    baseline, model = plan["runs"]
    pretrain = baseline["stages"][0]
    # As in the head of the sweep file. By hand: 3 * forward FLOPs * 12.8e9 pairs / (0.4 * 989e12 FLOP/s) / 3600 s.
    for run, hours in ((baseline, 1790), (model, 4979)):
        arithmetic = run["stages"][0]["compute_seconds"] * run["stages"][0]["steps"]
        assert arithmetic * run["world"] / 3600 == pytest.approx(hours, abs=0.5)
    assert pretrain["steps"] == 195_313
    parts = [pretrain[f"{part}_seconds"] for part in ("compute", "communication", "data")]
    assert sum(parts) == pytest.approx(pretrain["step_seconds"]) and 0 < parts[1] < 0.1 * parts[0]
    assert pretrain["step_seconds"] * 195_313 * baseline["world"] / 3600 == pytest.approx(pretrain["gpu_hours"])
    assert [batch["runs"] for batch in plan["batches"]] == [["baseline"], ["model"]]
    assert plan["cost"]["gpu_hours"] == pytest.approx(sum(run["cost"]["gpu_hours"] for run in plan["runs"]))


@pytest.mark.long
def test_plan_counts_only_added_samples_for_cooldown_runs(desk):
    """The trunk is not trained yet. A plan needs no checkpoint of the trunk; a submission does."""
    settings = desk.text.split("runs:")[0]
    desk.sweep.write_text(
        settings
        + """runs:
  trunk: {stages.pretrain: {samples: 1024, schedule: constant}, checkpoint.keep_at: [256, 512]}
  short: {init: {run: trunk, samples: 256, extend: true}, stages.pretrain: {samples: 384, schedule: wsd, cooldown: 128}}
  long: {init: {run: trunk, samples: 512, extend: true}, stages.pretrain: {samples: 768, schedule: wsd, cooldown: 256}}
"""
    )
    done = desk.submit("--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    trunk, short, long = json.loads(done.stdout)["runs"]
    assert [run["cost"]["samples"] for run in (trunk, short, long)] == [1024, 128, 256]
    assert short["cost"]["flops"] * 8 == pytest.approx(trunk["cost"]["flops"])
    text = desk.submit("--dry-run").stdout
    assert "trunk has no checkpoint at S = 256 yet" in text and "--only short" in text
    desk.refuses(78, "init.run: no such run")


def test_dry_run_imports_no_torch_or_rich(desk):
    script = (
        "import sys; from jobs.commands.submit import main; code = main(['--sweep', sys.argv[1], '--dry-run']);"
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'torchvision', 'timm', 'rich')))"
    )
    done = subprocess.run([sys.executable, "-c", script, desk.sweep], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "128 samples in 2 shards" in done.stdout, "the plan reads the data"


@pytest.mark.long
def test_submit_needs_slurm_commands_but_dry_run_does_not(desk, tmp_path):
    (tmp_path / "far.yaml").write_text("kind: slurm\npartition: gpu\n")
    done = desk.submit("--cluster", str(tmp_path / "far.yaml"), env={"PATH": "/nowhere"})
    assert done.returncode == 78 and "sbatch, srun, squeue, scancel, scontrol" in done.stderr, done.stderr
    done = desk.submit("--cluster", str(tmp_path / "far.yaml"), "--dry-run", env={"PATH": "/nowhere"})
    assert done.returncode == 0 and "Slurm: PATH" in done.stdout.split("not checked here")[1], done.stderr
    assert not desk.runs.exists()


@pytest.mark.long
def test_submit_refuses_invalid_settings_and_writes_nothing(desk, data, tmp_path):
    desk.refuses(78, "stages.pretrain.batch", "stages.pretrain.batch=15", "resources.processes=2")
    desk.refuses(78, "no run of the sweep matches", "--only", "nothing*")
    desk.refuses(78, "vocabulary", "model.text.vocabulary=20")
    desk.refuses(78, "one node", "resources.nodes=2")
    desk.refuses(78, "memory are needed", "model.size=H/14", "stages.pretrain.batch=100000", "data.lanes=1")
    desk.refuses(65, "manifest", "data.manifest=/nowhere")
    desk.refuses(65, "no manifest in this folder", "data.manifest=/nowhere", "data.samples=1000")
    desk.refuses(65, "none of the first 8 samples can be trained on", "data.captions=[alt]")
    desk.refuses(78, "class names", "evaluate.sets.small.classes=/nowhere.json")
    few = tmp_path / "few.json"
    few.write_text('{"names": ["a"], "templates": ["{} and {}"]}')
    desk.refuses(78, "a template needs one {}", f"evaluate.sets.small.classes={few}")


def test_dry_run_checks_writability_without_writing(desk, monkeypatch):
    monkeypatch.setattr(storage_checks, "probe", lambda _: pytest.fail("wrote a probe"))
    place = desk.folder / "runs" / "x"
    assert "writable" in storage_checks.check_folder(ClusterProfile(name="local"), place, True).text
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        with pytest.raises(PermissionDenied):
            storage_checks.check_folder(ClusterProfile(name="local"), place, True)


def test_confirm_treats_end_of_input_as_refusal(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", Mock(side_effect=EOFError))
    with pytest.raises(ConfigError, match="nothing was done"):
        confirm._ask("This costs much.", yes=False)


@pytest.mark.long
def test_submit_trains_reports_and_starts_nothing_on_second_call(desk):
    done = desk.submit("--watch")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "half: complete" in done.stdout and "cannot rank the runs" in done.stdout
    for name in ("half", "whole"):
        outcome = read_run(desk.runs / "demo" / name)
        assert (outcome.state, outcome.progress["samples"], len(outcome.attempts)) == ("complete", 48, 1)
    spent = of_run(outcome)
    assert spent.hours["useful"] > 0 and spent.hours["starting"] > 0 and spent.hours["unknown"] == 0
    assert spent.waiting_hours is not None and (outcome.run.attempt(1) / "ready.json").exists()
    assert 3600 * spent.total < 4 * 600, "the total does not exceed the real time"
    code = read_json(outcome.run.identity)["code"]
    assert (desk.runs / "demo" / ".code" / code / "flip" / "training" / "trainer.py").exists()
    again = desk.submit()
    assert again.returncode == 0 and "complete, all 2 runs; nothing to start" in again.stdout
    assert [outcome.run.newest_attempt() for outcome in (read_run(desk.runs / "demo" / "half"),)] == [1]
    assert "changed" in desk.submit("--dry-run", "seed=1").stdout
    refused = desk.submit("seed=1")
    assert refused.returncode == 78 and "seed: 0 -> 1" in refused.stderr


def foreground(desk, *words, shell="", output=subprocess.PIPE, **options):
    """``submit --foreground`` of a long run in a process of its own session, and the run, once it trains.

    ``shell``: text after the command, which then is a child of ``sh -c``.
    """
    argv = [
        sys.executable, str(ROOT / "jobs" / "submit.py"), str(desk.sweep), "--foreground", "--only", "half",
        "stages.pretrain.samples=1e6", "checkpoint.minutes=60", *words,
    ]  # fmt: skip
    if shell:
        argv = ["sh", "-c", f"{shlex.join(argv)}{shell}"]
    process = subprocess.Popen(
        argv, stdout=output, text=True, cwd=desk.folder, env=os.environ | {"FLIP_RUNS": str(desk.runs)},
        start_new_session=True, **options,
    )  # fmt: skip
    run = RunDir(desk.runs / "demo" / "half")
    wait_until(lambda: (read_json(run.status) or {}).get("step", 0) > 2, "the first steps")
    return process, run


def assert_saved_and_ended(run):
    outcome = read_run(run.path)
    assert (outcome.state, len(outcome.attempts)) == ("cancelled", 1)
    assert checkpoints(run)[-1].samples_seen > 0
    assert not live_ranks(run)


@pytest.mark.long
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(each, marks=pytest.mark.slow) for each in (signal.SIGINT, signal.SIGHUP))]
)
def test_foreground_submit_saves_and_stops_runs_on_signal(desk, number):
    process, run = foreground(desk)
    process.send_signal(number)
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 75
    assert "save a checkpoint and end; to continue them, submit with --retry" in shown
    assert_saved_and_ended(run)
    assert number.name in (run.cancel.read_text())


@pytest.mark.long
def test_foreground_submit_stops_runs_if_its_terminal_is_closed(desk):
    """The shell of a terminal that closes passes SIGHUP on; output to the terminal fails from then on."""
    own, terminal = os.openpty()
    process, run = foreground(desk, output=terminal, stderr=terminal, stdin=terminal)
    os.close(terminal)
    os.close(own)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 75
    assert_saved_and_ended(run)


@pytest.mark.slow
def test_foreground_submit_stops_runs_if_its_output_is_closed(desk):
    process, run = foreground(desk)
    process.stdout.close()
    assert process.wait(timeout=120) == 75
    assert_saved_and_ended(run)


@pytest.mark.slow
def test_foreground_submit_below_a_shell_stops_runs_if_the_group_is_ended(desk):
    process, run = foreground(desk, shell="; exit $?")
    os.killpg(process.pid, signal.SIGTERM)
    shown, _ = process.communicate(timeout=120)  # the pipe ends with the command
    assert "save a checkpoint and end" in shown
    assert_saved_and_ended(run)


@pytest.mark.long
def test_second_signal_ends_foreground_submit_at_once(desk):
    """A rank that is stopped cannot save, so the command waits for it."""
    process, run = foreground(desk)
    (rank,) = live_ranks(run)
    os.kill(rank["pid"], signal.SIGSTOP)
    try:
        process.send_signal(signal.SIGTERM)
        wait_until(run.cancel.exists, "the first signal")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    finally:
        os.kill(rank["pid"], signal.SIGCONT)
    wait_until(lambda: read_run(run.path).state == "cancelled" and not live_ranks(run), "the end of the run")
    assert checkpoints(run)[-1].samples_seen > 0, "the runs go on saving"


@pytest.mark.slow
def test_foreground_submit_with_retry_continues_stopped_runs(desk):
    """The program of a pod: the same command again and again."""
    process, run = foreground(desk, "--retry")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75
    before = checkpoints(run)[-1].samples_seen
    again, _ = foreground(desk, "--retry")
    wait_until(lambda: (read_json(run.status) or {}).get("samples", 0) > before, "further steps")
    again.send_signal(signal.SIGTERM)
    assert again.wait(timeout=120) == 75
    assert checkpoints(run)[-1].samples_seen > before


@pytest.mark.long
@pytest.mark.skipif(bool(why_no_namespace()), reason=why_no_namespace())
def test_life_of_pod_ends_with_bits_of_undisturbed_run(desk):
    """Three pods one after the other, each a PID namespace: one is asked to end, one is killed, one completes."""
    words = ("--only", "half", "stages.pretrain.samples=4800", "checkpoint.samples=160", "compute.deterministic=yes")
    calm = desk.submit(*words, "--watch", "--root", str(desk.folder / "calm"))
    assert calm.returncode == 0, calm.stderr
    run = RunDir(desk.runs / "demo" / "half")

    def pod():
        argv = [*UNSHARE, sys.executable, str(ROOT / "jobs" / "submit.py"), str(desk.sweep), "--foreground", "--retry"]
        environment = os.environ | {"FLIP_RUNS": str(desk.runs)}
        return subprocess.Popen([*argv, *words], cwd=desk.folder, env=environment, stdout=subprocess.DEVNULL)

    def samples():
        return (read_json(run.status) or {}).get("samples", 0)

    ended = pod()
    wait_until(lambda: samples() > 48, "the first steps")
    os.kill(first_process_of(ended), signal.SIGTERM)
    assert ended.wait(timeout=120) == 75
    saved = checkpoints(run)[-1].samples_seen
    assert read_run(run.path).state == "cancelled" and saved > 0
    killed = pod()
    wait_until(lambda: checkpoints(run)[-1].samples_seen > saved + 160, "another checkpoint")
    os.kill(first_process_of(killed), signal.SIGKILL)
    assert killed.wait(timeout=120) != 0
    last = pod()
    assert last.wait(timeout=240) == 0
    outcome = read_run(run.path)
    assert (outcome.state, len(outcome.attempts)) == ("complete", 3)
    expected = last_weights(RunDir(desk.folder / "calm" / "demo" / "half"))
    actual = last_weights(run)
    assert actual.keys() == expected.keys() and len(actual) > 50
    assert [key for key in actual if not torch.equal(actual[key], expected[key])] == []


@pytest.mark.parametrize(
    "words",
    ["--script", "--json --watch", "--dry-run --watch", "--dry-run --foreground"],
)
def test_submit_refuses_contradictory_or_ignored_flags(typed, capsys, words):
    with pytest.raises(SystemExit) as caught:
        typed(*words.split())
    assert caught.value.code == 2 and ": error: " in capsys.readouterr().err
    assert not typed.started


@pytest.mark.parametrize(
    "argv, tail, same",
    [
        (["stages.pretrain.mask=0.5"], "", ("half", "whole")),
        (["seed=3", "--only", "half*"], "seeds: [0, 1]\n", ("half", "half-s1")),
        (["--seeds", "0", "5"], "  again: {seed: 1, stages.pretrain.mask: 0}\n", ("whole", "again")),
    ],
)
def test_submit_refuses_options_that_override_what_the_sweep_varies(desk, typed, argv, tail, same):
    code, _, err = typed(*argv, sweep=desk.text + tail)
    assert code == 78 and f"with these options {same[0]} and {same[1]} are the same run" in err and not typed.there()
    assert typed(*argv, "--only", same[0], sweep=desk.text + tail)[0] == 0, "one run of each is no mistake"
    copy = desk.text + "  copy: {stages.pretrain.mask: 0}\n"
    assert typed("--changed", "keep", sweep=copy)[0] == 0, "without options a sweep may repeat a run"


def test_submit_exits_with_69_if_states_of_all_runs_are_unknown(typed, monkeypatch):
    typed()
    states = {"half": RunState("unknown", 1, "Slurm does not answer"), "whole": RunState("unknown")}
    monkeypatch.setattr(planning, "states", lambda runs: {run.path: states[run.name] for run in runs})
    assert [typed(*argv)[0] for argv in ([], ["--json"], ["--dry-run"])] == [69, 69, 69]
    states["half"] = RunState("running", 1)
    assert typed()[0] == 0


def test_dry_run_without_squeue_lists_unknown_runs_as_not_checked(desk, typed, monkeypatch):
    """It does not guess whether they run or would start."""
    typed()
    job = {"kind": "slurm", "name": "demo.77aa", "token": "77aa", "index": 0, "after": 0}
    for name in ("half", "whole"):
        run = RunDir(desk.runs / "demo" / name)
        write_json(run.path / "job.json", job)
        run.start_attempt({})
    write_json(run.result, {})
    monkeypatch.setenv("PATH", "/nowhere")
    code, out, _ = typed("--dry-run")
    unchecked = out.partition("\nnot checked here:\n")[2]
    assert code == 0 and "state (half): Slurm does not answer: squeue" in unchecked and "whole" not in unchecked
    half, whole = json.loads(typed("--dry-run", "--json")[1])["runs"]
    assert (half["action"], half["starts"], whole["action"]) == ("unknown", False, "complete")


def test_submit_names_changed_schema_default(desk, typed, monkeypatch):
    """A newer version may do this: the sweep file is the same, but the default of the schema differs."""
    typed()
    monkeypatch.setattr(schema.Optim, "weight_decay", 0.3)
    monkeypatch.setattr(schema.Optim.__init__, "__defaults__", tuple(
        0.3 if value == 0.2 else value for value in schema.Optim.__init__.__defaults__
    ))  # fmt: skip
    load_module._build_section.cache_clear()
    try:
        code, _, err = typed()
        result = typed("--changed", "keep")
    finally:
        load_module._build_section.cache_clear()
    assert code == 78 and "optim.weight_decay: 0.2 -> 0.3, which the sweep does not set: a default moved" in err
    assert result[0] == 0 and typed.started == ["half", "whole"]


def test_dry_run_shows_differences_from_base_with_resolved_values(desk, typed):
    text = desk.text.replace("  half: {", "  half: {model.size: B/16, data.workers: -1, ")
    code, out, _ = typed("--dry-run", sweep=text)
    assert code == 0 and "model.size: tiny -> B/16" in out and "model.image.width" not in out
    assert "whole: new\n  from base    stages.pretrain.mask: 0.5 -> 0\n" in out
    base = {row["key"]: row for row in json.loads(typed("--dry-run", "--json", sweep=text)[1])["runs"][0]["base"]}
    assert base["model.image.width"]["now"] == 768 and base["data.workers"]["now"] >= 0


def test_dry_run_shows_overrides_of_model_size(desk, typed):
    text = desk.text.replace("  half: {", "  half: {model.image.layers: 1, ")
    code, out, _ = typed("--dry-run", sweep=text)
    assert code == 0 and "  model        tiny with image.layers 1: " in out and "  model        tiny: " in out


def test_submit_asks_before_expensive_runs(desk, typed, monkeypatch):
    real = training_request.estimate

    def expensive(config, profile):
        estimated = real(config, profile)
        return replace(estimated, cost=replace(estimated.cost, gpu_hours=60.0, price=120.0))

    monkeypatch.setattr(training_request, "estimate", expensive)
    assert typed("--only", "half")[0] == 0 and typed.started == ["half"], "60 GPU-hours need no confirmation"
    code, out, err = typed()
    question = "This starts 2 runs of 120 GPU-hours, a price of 240."
    assert code == 78 and question in err and not typed.started and typed.there() == ["half"]
    assert f"asked first: {question}" in typed("--dry-run")[1]
    assert typed("--yes")[0] == 0 and typed.started == ["half", "whole"]


@pytest.mark.parametrize("second", [None, 0.0])
def test_submit_asks_despite_unknown_or_zero_gpu_hours_of_another_run(desk, typed, monkeypatch, second):
    """``half`` costs 120 GPU-hours. ``whole`` costs an unknown number of GPU-hours, or runs on CPUs."""
    real = training_request.estimate

    def costs(config, profile):
        estimated = real(config, profile)
        hours = 120.0 if config.stages[0].mask == "0.5" else second
        return replace(estimated, cost=replace(estimated.cost, gpu_hours=hours))

    monkeypatch.setattr(training_request, "estimate", costs)
    code, _, err = typed()
    assert code == 78 and "120 GPU-hours" in err and not typed.started
    assert ("1 run of unknown GPU-hours (whole)" in err) == (second is None)
    code, _, err = typed("--only", "whole")
    assert (code, bool(typed.started)) == ((78, False) if second is None else (0, True)), err


def test_plan_asks_for_gpu_run_if_profile_has_no_gpu_name(desk, typed, tmp_path):
    (tmp_path / "bare.yaml").write_text("kind: slurm\ngpus_per_node: 8\ncpus_per_node: 8\nmemory_gb: 64\n")
    argv = ["--cluster", str(tmp_path / "bare.yaml"), "--only", "half", "--dry-run", "--json"]
    plan = json.loads(typed(*argv, "resources.gpus=1")[1])
    assert plan["cost"]["gpu_hours"] is None and "unknown GPU-hours" in plan["question"]
    plan = json.loads(typed(*argv)[1])
    assert plan["cost"]["gpu_hours"] == 0 and plan["question"] == "", "a CPU run needs no confirmation"


def test_dry_run_exits_with_code_of_submission(desk, typed):
    typed(sweep=desk.text + "  other: {seed: 1}\n  last: {seed: 2}\n  more: {seed: 3}\n")
    changed = desk.text.replace("mask: 0.5", "mask: 0.25")
    for argv, message in (([], "another configuration"), (["--changed", "keep", "--prune"], "3 of 5 runs")):
        real = typed(*argv, sweep=changed)
        dry = typed(*argv, "--dry-run", sweep=changed)
        assert real[0] == dry[0] == 78 and message in dry[2] and message in real[2]
        assert dry[1].startswith("demo: A demonstration"), "the plan is shown despite the refusal"
    assert typed("--dry-run", "--prune", "--allow-prune-majority")[0] == 0, "a question is not a refusal"
    assert not typed.trashed() and not typed.started


def test_submit_and_dry_run_warn_of_implausible_settings(typed):
    code, out, _ = typed("stages.pretrain.base_lr=2000", "--only", "half")
    assert code == 0 and "warning (half): stage pretrain: the peak learning rate is 125 (" in out and typed.started
    runs = json.loads(typed("--dry-run", "--json", "stages.pretrain.base_lr=2000", "--changed", "keep")[1])["runs"]
    rate, training_data = runs[1]["warnings"]
    assert "peak learning rate" in rate and "is the data set that the run trains on" in training_data
    assert "warning: stage pretrain" in typed("--dry-run", "--only", "half")[1]


def test_dry_run_prints_batch_scripts_with_script_option(desk):
    shown = desk.submit("--dry-run", "--script", sweep="model_scaling").stdout
    assert "16 nodes, 8 ranks a node, 8 GPUs a node, 24 h: baseline\n" in shown, "Slurm does not answer on this machine"
    assert "#SBATCH --nodes=16\n" in shown and "#SBATCH --nodes=32\n" in shown


@pytest.mark.long
def test_dry_run_executes_no_program_named_in_sweep(desk, tmp_path):
    """A sweep from another person may bring its own profile."""
    folder = tmp_path / "bin"
    marker = tmp_path / "ran"
    folder.mkdir()
    texts = {name: "echo 'ClusterName = far'" for name in ("sbatch", "srun", "squeue", "scancel", "scontrol")}
    for name, text in {**texts, "evil": f"touch {marker}"}.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    profile = tmp_path / "theirs.yaml"
    profile.write_text(f"kind: slurm\npython: {folder}/evil\nhost_python: {folder}/evil\n")
    desk.sweep.write_text(f"cluster: {profile}\n{desk.text}")
    environment = {"PATH": f"{folder}:{os.environ['PATH']}"}
    done = desk.submit("--dry-run", env=environment)
    assert done.returncode == 0 and "host_python is not executed" in done.stdout, done.stderr
    assert not marker.exists()
    assert desk.submit("--dry-run", "--cluster", profile, env=environment).returncode == 0 and marker.exists()


def test_submission_writes_a_missing_config_again(desk, typed):
    """As the row of such a run in ``status`` says."""
    assert typed()[0] == 0
    config = desk.runs / "demo" / "half" / "config.yaml"
    written = config.read_bytes()
    config.unlink()
    code, out, err = typed()
    assert (code, typed.started) == (0, ["half", "whole"]), out + err
    assert config.read_bytes() == written
