"""Tests of the rows of `flip doctor --measure`, in their CPU form and at a small size."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from flip.files.creation import output_folder
from flip.runs import checkpoint_folder
from flip.runs.lifecycle import RunState
from flip.runs.rundir import RunDir, write_json
from jobs.host.slurm_cli import SlurmUnavailable
from jobs.measuring.functions import agents, arithmetic, collectives, disk, faults, inputs, ranks, steps, trace
from jobs.measuring.verdicts import SLOW, judge
from jobs.planning.core_speeds import rows_of
from jobs.planning.measurement import MEASURED, MeasuredRow
from jobs.reporting.faults import PARTS
from tests.harness.common import make_run
from tests.jobs.planning.test_measurement import example

ROOT = Path(__file__).resolve().parents[4]


def test_matmul_and_copies_have_a_rate_per_device():
    result = arithmetic.matmul("cpu", 0.01)
    assert result["devices"][0]["bf16"] > 0 and result["devices"][0]["fp32"] > 0
    assert arithmetic.copies("cpu", 0.01)["devices"][0]["gbytes"] > 0


def test_cpu_limit_of_an_inner_group_is_seen_below_one_with_a_history():
    before = {"/job": 90.0, "/job/step": 1.0}
    assert arithmetic._most_throttled(before, {"/job": 90.0, "/job/step": 3.5}) == 2.5
    assert arithmetic._most_throttled({}, {}) == 0


def test_step_has_all_numbers_that_plans_use():
    result = steps.step("cpu", "tiny", "0.5", 4, "fp32", False, 0.0)
    assert result["device"] == "cpu" and result["parameters"] == 334_785
    assert result["core_gflops"] > 0 and result["samples_per_second"] > 0 and result["planned_megabytes"] > 0
    assert result["recompilations"] == 0 and "utilisation" not in result


@pytest.mark.long
def test_trace_names_the_longest_operations(tmp_path):
    result = trace.trace("cpu", "tiny", "0.5", 4, "fp32", False, file=str(tmp_path / "trace.json.gz"))
    assert result["kernels"] > 0 and result["busy"] > 0 and len(result["longest"]) == trace.LONGEST
    assert (tmp_path / "trace.json.gz").stat().st_size > 0


def test_losses_in_bf16_are_near_those_in_fp32(monkeypatch):
    result = steps.losses("cpu", "tiny", 4, 3, 1)
    (row,) = result["rows"]
    assert result["last_loss"] < 0.99 * result["first_loss"], "the weights change"
    assert row["form"] == "bf16, eager" and 0 < row["largest_difference"] <= row["tolerance"] == 0.02
    monkeypatch.setattr(steps, "_losses", lambda *form: [1.0, 2.0 if form[4] == "bf16" else 1.0])
    assert steps.losses("cpu", "tiny", 4, 2, 1)["rows"][0]["largest_difference"] == 1
    monkeypatch.setattr(steps, "_losses", lambda *form: [1.0, float("nan") if form[4] == "bf16" else 1.0])
    assert steps.losses("cpu", "tiny", 4, 2, 1)["rows"][0]["largest_difference"] is None


@pytest.mark.long
def test_losses_of_two_ranks_are_those_of_one():
    """Each rank has half of the pairs, and the gradients of both: another batch of negatives would be seen at once."""
    *_, row = steps.losses("cpu", "tiny", 4, 3, 2)["rows"]
    assert row["form"] == "fp32, eager, 2 ranks" and row["largest_difference"] <= row["tolerance"] == 0.001


@pytest.mark.long
def test_input_rows_are_rows_of_core_speeds(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "SYNTHETIC", 32)
    result = inputs.cost(str(tmp_path), "", 0.2)
    rows = rows_of(result["rows"], "here")
    assert {row.mask for row in rows} == {0, 0.5, 0.75} and {row.short for row in rows} == {384}
    assert [stage["stage"] for stage in result["stages"]] == ["read", "walk", "decode", "whole"]
    assert result["limit"] in result["shares"] and result["cached"]
    (judged,) = judge(example(MeasuredRow("input_cost", "cost of a sample", MEASURED, result)))
    assert f"% of its time is {result['limit']}" in judged.because
    monkeypatch.setattr(inputs.photo_shards, "samples", None)  # the row before has made them
    read = inputs.reads(str(tmp_path), "", 0.05, 2)
    assert read["megabytes_per_second_2"] > 0 and read["megabytes_per_second_1"] > 0
    assert read["cached"] and read["read_milliseconds"] > 0


@pytest.mark.long
def test_latency_of_storage_is_that_of_small_reads(tmp_path, monkeypatch):
    """A storage without latency that delivers 1 MB/s: reads of whole chunks take 0.1 s."""
    monkeypatch.setattr(inputs, "SYNTHETIC", 32)
    sizes = []

    class Slow:
        def read(self, key, start, stop):
            sizes.append(stop - start)
            time.sleep((stop - start) / 1e6)
            return bytes(stop - start)

    monkeypatch.setattr(inputs, "ChunkReader", Slow)
    data = inputs._manifest(str(tmp_path), "")
    rate, milliseconds = inputs._read(str(data.folder), 0.05, 0)
    assert max(sizes) > 100_000 and rate <= 1
    assert inputs.SMALL_READ in sizes and 4 <= milliseconds < 1000 * max(sizes) / 1e6


def test_files_are_measured_and_locks_exclude(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "LARGE", 1 << 20)
    result = disk.files(str(tmp_path))
    assert result["locks_exclude"] is True and all(value > 0 for value in result.values())
    monkeypatch.setattr(disk.fcntl, "flock", lambda *_: None)  # as a file system without locks
    (tmp_path / "other").mkdir()
    assert disk.files(str(tmp_path / "other"))["locks_exclude"] is False


def test_slow_syncs_are_a_high_latency_of_the_folder_of_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "LARGE", 1 << 20)
    monkeypatch.setattr(disk, "REPEATS", 2)
    monkeypatch.setattr("os.fsync", lambda handle: time.sleep(0.15))  # as over a distant mount
    (judged,) = judge(example(MeasuredRow("disk", "files", MEASURED, disk.files(str(tmp_path)))))
    assert judged.verdict == SLOW and "high latency" in judged.because and "FLIP_RUNS" in judged.then


def test_save_is_restored_bit_for_bit(tmp_path):
    result = disk.saves(str(tmp_path), "cpu", 1)
    assert result["equal"] and result["save_seconds"] >= result["stall_seconds"] > 0


def test_link_is_shared_by_the_ranks_of_a_node():
    rows = [{"kind": "all-reduce", "gbytes": 3.0}, {"kind": "all-reduce", "gbytes": 7.5}]
    rows += [{"kind": "all-gather", "gbytes": 9.0}]
    assert collectives.link_gbps(rows, 2, 2) == 64 and collectives.link_gbps(rows, 8, 4) == 16


def test_reason_of_a_failed_rank_is_its_exception():
    lines = ["[rank0]: Traceback (most recent call last):", "[rank0]: torch.distributed.DistBackendError: no route"]
    assert ranks.reason("\n".join([*lines, "[rank0]:[W1130 x.cpp] Warning: y"])) == lines[1][9:]
    assert ranks.reason("Killed") == "Killed" and ranks.reason("") == ""


@pytest.mark.long
def test_collectives_and_links_between_three_processes():
    command = [sys.executable, "-m", "jobs.measuring.functions", "collectives", '{"device": "cpu", "ranks": 3}']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert (result["ranks"], result["nodes"], len(result["rows"])) == (3, 1, 9) and result["gbps"] > 0
    assert [link["between"] for link in result["links"]] == [[0, 1], [1, 2], [2, 0]]
    assert all(link["gbytes"] > 0 for link in result["links"])


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_faults_continue_to_the_weights_of_one_undisturbed_run(tmp_path):
    for kind, cause in (("rank", "crash"), ("agent", "stopped"), ("preemption", "stopped")):
        options = {"folder": str(tmp_path), "device": "cpu", "ranks": 2, "seconds": 400, "kind": kind}
        command = [sys.executable, "-m", "jobs.measuring.functions", "fault", json.dumps(options)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=450)
        assert done.returncode == 0, done.stderr[-2000:]
        result = json.loads(done.stdout.strip().splitlines()[-1])
        assert result["attempts"] == 2 and result["different_tensors"] == [] and result["cause"] == cause
        assert (result["steps"], result["ranks"]) == (200, 2)
        parts = [result[f"{part}_seconds"] for part in PARTS]
        assert 0 < sum(parts) <= result["next_step_seconds"] + 2, parts
    (undisturbed,) = (tmp_path / "runs" / "measure" / "undisturbed" / "attempts").iterdir()
    assert undisturbed.name == "1"


def test_agents_of_a_run_are_found_without_its_ranks(monkeypatch):
    words = ["python", "-m", "jobs.runtime.node_agent", "/runs/a", "jobs.worker"]
    known = {5: words, 6: words, 7: ["python", "-m", "jobs.runtime.node_agent", "/runs/b", "jobs.worker"]}
    monkeypatch.setattr(agents.processes, "own_environments", lambda: dict.fromkeys(known, {}))
    monkeypatch.setattr(agents.processes, "arguments", known.get)
    monkeypatch.setattr(agents.processes, "read_stat", lambda pid: ("python", ["S", {5: "1", 6: "5", 7: "1"}[pid]]))
    ended = []
    monkeypatch.setattr(agents.os, "kill", lambda pid, number: ended.append(pid))
    agents.end_agents("/runs/a")
    assert ended == [5], "6 is a rank that 5 has forked"
    with pytest.raises(SystemExit, match="no agent"):
        agents.end_agents("/runs/c")


def test_agents_are_ended_after_the_first_checkpoint(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(agents, "end_agents", ended.append)
    looks = iter([[], [], ["a checkpoint"]])
    monkeypatch.setattr(agents.checkpoint_folder, "checkpoints", lambda run: next(looks))
    agents.end_agents_after_checkpoint(str(tmp_path), 60)
    assert ended == [str(tmp_path)]
    monkeypatch.setattr(agents.checkpoint_folder, "checkpoints", lambda run: [])
    with pytest.raises(SystemExit, match="first checkpoint"):
        agents.end_agents_after_checkpoint(str(tmp_path), 0)
    assert ended == [str(tmp_path)]


@pytest.mark.parametrize(
    ("script", "error"), [("exec sleep 60", None), ("echo srun: error: no node >&2; exit 1", "no n")]
)
def test_step_that_waits_for_a_checkpoint_ends_with_its_run(tmp_path, monkeypatch, script, error):
    """A run may end before its fault; a step that failed says why."""
    command = tmp_path / "srun"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(faults, "_job", lambda run: SimpleNamespace(id="7", nodes="n[1-2]"))
    monkeypatch.setattr(faults.slurm_cli, "call", lambda *words: "n1\nn2\n")
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(faults.subprocess, "Popen", lambda *a, **b: started.append(popen(*a, **b)) or started[-1])
    profile = SimpleNamespace(kind="slurm", hosts_python="python3")
    with faults.DISTURB["agent"](RunDir(tmp_path), profile, time.monotonic() + 60) as disturb:
        if error:
            with pytest.raises(SystemExit, match=error):
                disturb()
    (step,) = started
    assert step.poll() is not None and step.args[1:3] == ["--jobid=7", "--nodelist=n2"]


class _Runs:
    """Submitted runs whose scheduler has an answer, or an exception, for each query of their states."""

    def __init__(self, folder, answer):
        self.folder = folder
        self.answer = answer
        self.runs = []
        self.events = []

    def states(self):
        self.events.append("states")
        if isinstance(self.answer, BaseException):
            raise self.answer
        return {"agent": RunState(*self.answer)}

    def cancel(self, why):
        self.events.append("cancel")

    def wait(self, timeout):
        self.events.append("wait")


@pytest.mark.parametrize(
    ("answer", "error", "detail"),
    [
        (SlurmUnavailable("squeue: no answer"), SlurmUnavailable, "no answer"),
        (("failed", 1, "node17 is gone"), SystemExit, "before the start of the run, a run has failed$"),
        (("running",), SystemExit, "124"),
    ],
)
def test_runs_of_a_fault_end_with_it(tmp_path, monkeypatch, answer, error, detail):
    """Slurm that does not answer, a failed run, whose node is not named, and a run that ends before the fault."""
    runs = _Runs(tmp_path / "runs" / "measure", answer)
    if answer == ("running",):
        write_json(make_run(runs.folder / "agent").result, {})
    monkeypatch.setattr("jobs.measuring.functions.faults.submit", lambda *_, **options: runs)
    monkeypatch.setattr(faults, "_write_sweep", lambda *_: None)
    profile = {"kind": "slurm", "partition": "gpu"}
    with pytest.raises(error, match=detail):
        faults.fault(str(tmp_path), "cpu", 1, 30.0, "agent", 2, profile)
    assert runs.events[-2:] == ["cancel", "wait"]


def test_queries_of_a_scheduler_are_seconds_apart(tmp_path, monkeypatch):
    """Files are looked at often, and the scheduler, which others share, each ``poll_interval``."""
    runs = _Runs(tmp_path, ("running",))
    monkeypatch.setattr(faults, "poll_interval", lambda runs: 60.0)
    looks = iter(range(20))
    faults._wait(lambda: next(looks) == 10, runs, 1e12, "a step", "local")
    assert runs.events == ["states"]


def test_run_is_over_once_its_launcher_has_recorded_its_end(tmp_path):
    """The folder is deleted next: an exit handler that still writes would leave a part of it."""
    run = make_run(tmp_path / "agent")
    output_folder(run.attempt(1))
    write_json(run.result, {})
    assert not faults._is_over(run)
    write_json(run.attempt(1) / "end.json", {})
    assert faults._is_over(run)


def test_different_tensors_are_named(tmp_path, monkeypatch):
    """The comparison sees one bit, and a tensor that one run lacks."""
    import numpy as np
    from safetensors.numpy import save_file

    for name, tensors in (("a", {"x": [1.0, 2.0], "y": [3.0]}), ("b", {"x": [1.0, 2.5]})):
        (tmp_path / name).mkdir()
        save_file(
            {key: np.array(value, np.float32) for key, value in tensors.items()}, tmp_path / name / "s.safetensors"
        )
    monkeypatch.setattr(checkpoint_folder, "checkpoints", lambda run: [run])
    monkeypatch.setattr(faults, "local_copy", _Folder)
    assert faults.different_tensors(tmp_path / "a", tmp_path / "b") == ["s.safetensors x", "s.safetensors y"]
    assert faults.different_tensors(tmp_path / "a", tmp_path / "a") == []


class _Folder:
    def __init__(self, folder):
        self.folder = folder

    def __enter__(self):
        return self.folder

    def __exit__(self, *_):
        return None
