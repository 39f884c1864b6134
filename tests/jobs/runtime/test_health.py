"""Tests the health check of a node with real processes, disks and files."""

import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flip.runs.checks import FAILS, FAILS_FOR_ALL, OK, UNKNOWN, Check, Rule
from jobs.host.agents.node_health import PRODUCT, SHARED_FOLDER
from jobs.runtime import check_process, health
from jobs.runtime.health import HealthSettings

ROOT = Path(__file__).resolve().parents[3]
ON_ALL_NODES = {SHARED_FOLDER, "local disk", "/dev/shm", "memory", PRODUCT}

pytestmark = pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="Linux alone")


def finish(check):
    """The results of a check, by name."""
    while not check.poll():
        select.select([check.output], [], [], 1.0)
    check.close()
    return {row.name: row for row in check.results}


FORKED = """
import json, sys
from tests.jobs.runtime.test_health import finish, health
check = health.start(health.HealthSettings(sys.argv[1]), may_fork=True)
print(json.dumps({name: row.state for name, row in finish(check).items()}))
"""


def test_healthy_node_passes_in_new_interpreter(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    results = finish(health.start(HealthSettings(str(tmp_path)), may_fork=False))
    assert {name: row.state for name, row in results.items()} == dict.fromkeys(ON_ALL_NODES, OK)
    assert not list(tmp_path.iterdir())


def test_healthy_node_passes_in_fork(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == dict.fromkeys(ON_ALL_NODES, OK), done.stderr


def test_check_removes_files_of_killed_checks(tmp_path, monkeypatch):
    """Nothing else does it in /dev/shm and on the local disk. Another check may be at work at the same time."""
    monkeypatch.setattr(health.ownership, "is_mine", lambda path: path.name != ".health.tmp.foreign")
    for name, age in (("old", 3600), ("old.tmp.0", 3600), ("foreign", 3600), ("new", 0)):
        path = tmp_path / f".health.tmp.{name}"
        path.write_bytes(b"")
        os.utime(path, (time.time() - age,) * 2)
    (tmp_path / ".health").write_bytes(b"")
    os.utime(tmp_path / ".health", (0, 0))
    assert health.check_folder(tmp_path).state == OK
    assert sorted(os.listdir(tmp_path)) == [".health", ".health.tmp.foreign", ".health.tmp.new"]


@pytest.mark.long
def test_missing_gpu_fails_with_evidence(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    results = finish(health.start(HealthSettings(str(tmp_path), gpus=2), may_fork=False))
    assert results["GPUs"].state == FAILS
    assert results["GPUs"].text == "0 of 2 GPUs can be used (CUDA_VISIBLE_DEVICES=)"
    assert results[PRODUCT].state == UNKNOWN


def test_full_disk_fails_and_leaves_no_file(small_disk):
    row = of_check(lambda: health.check_folder(small_disk))
    assert row["state"] == FAILS and "No space left on device" in row["text"] and str(small_disk) in row["text"]
    assert not list(small_disk.iterdir())


@pytest.mark.parametrize("name, result", [("local disk", FAILS), (SHARED_FOLDER, FAILS_FOR_ALL)])
def test_full_disk_is_the_fault_of_its_node_only_if_it_is_local(small_disk, monkeypatch, name, result):
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    row = of_rule(name, small_disk)
    assert row["state"] == result and "No space left on device" in row["text"]


def test_nearly_full_shared_folder_is_no_fault_of_its_node(tmp_path, monkeypatch):
    monkeypatch.setattr(health, "LEAST_FREE", 1 << 62)
    assert of_rule(SHARED_FOLDER, tmp_path)["state"] == FAILS_FOR_ALL


def test_read_only_disk_fails(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    row = of_check(lambda: health.check_folder(small_disk))
    assert row["state"] == FAILS and "Read-only file system" in row["text"]


def test_missing_folder_fails(tmp_path):
    row = of_check(lambda: health.check_folder(tmp_path / "unmounted"))
    assert row["state"] == FAILS and "No such file" in row["text"]


def of_rule(name, folder):
    """The row of a rule of every node."""
    settings = HealthSettings(str(folder))
    (row,) = reported([rule for rule in health.rules(settings) if rule.name == name], 5.0, settings)
    return row


def of_check(check):
    """The row that a check reports."""
    (row,) = reported([Rule("it", lambda node: check(), "")], 5.0)
    return row


def reported(rules, seconds, settings=None):
    output, inner = os.pipe()
    health.run_checks(rules, settings, inner, seconds)
    os.close(inner)
    with os.fdopen(output) as file:
        *rows, end = map(json.loads, file)
    assert end == check_process.END
    return rows


@pytest.mark.parametrize(("name", "result"), [("local disk", FAILS), (SHARED_FOLDER, FAILS), (PRODUCT, UNKNOWN)])
def test_only_disk_without_answer_fails_and_others_are_reported(name, result):
    release = threading.Event()
    rules = [
        Rule(name, lambda node: release.wait() and Check(OK, ""), ""),
        Rule("works", lambda node: Check(OK, "fine"), ""),
    ]
    works, hangs = reported(rules, 0.3)
    release.set()
    assert (works["name"], works["state"]) == ("works", OK)
    assert (hangs["name"], hangs["state"], hangs["text"]) == (name, result, "no answer in 0.3 s")


def test_process_that_dies_shows_nothing_of_node(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (row,) = finish(health.start(HealthSettings(str(tmp_path)), may_fork=False)).values()
    assert row == Check(UNKNOWN, "its process ended early", name="health check")


def test_process_without_answer_shows_nothing_of_node(tmp_path, monkeypatch):
    monkeypatch.setattr(health, "SECONDS", 0.1)
    monkeypatch.setattr(health, "GRACE", 0.1)
    monkeypatch.setattr(check_process, "_become_check", lambda *_: time.sleep(60))
    check = health.start(HealthSettings(str(tmp_path)), may_fork=False)
    (row,) = finish(check).values()
    assert row == Check(UNKNOWN, "no answer in 0.2 s", name="health check")


@pytest.mark.parametrize(
    ("answer", "result", "evidence"),
    [
        ("echo '0, No, No, [N/A], 0'; echo '1, No, No, [N/A], 2'", OK, "uncorrected errors: GPU 0: 0, GPU 1: 2"),
        ("echo '0, No, Yes, [N/A], 1'", FAILS, "GPU 0: remapped_rows.pending is Yes"),
        ("echo '0, Yes, No, No, 1'", FAILS, "GPU 0: remapped_rows.failure is Yes"),
        ("echo NVIDIA-SMI has failed; exit 9", UNKNOWN, "nvidia-smi ended with 9: NVIDIA-SMI has failed"),
        (None, UNKNOWN, "nvidia-smi cannot be started"),
    ],
)
def test_memory_errors_are_those_of_nvidia_smi(tmp_path, monkeypatch, answer, result, evidence):
    monkeypatch.setenv("PATH", str(tmp_path))
    if answer is not None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{answer}\n")
        program.chmod(0o755)
    assert health.check_memory_errors() == Check(result, evidence)


FATAL = "3,1,2,-;NVRM: Xid (PCI:0000:3b:00): 79, GPU has"


@pytest.mark.parametrize(
    ("line", "own", "result", "evidence"),
    [
        ("6,1,2,-;usb 1-1: new device", [], OK, "since boot: no Xid"),
        ("3,1,2,-;NVRM: Xid (PCI:0000:3b:00): 13, pid=7", ["0000:3b:00"], OK, "since boot: Xid 13 of GPU 0000:3b:00"),
        (FATAL, ["0000:3b:00", "0000:5e:00"], FAILS, "since boot: Xid 79 of GPU 0000:3b:00"),
        (FATAL, ["0000:5e:00"], OK, "since boot: Xid 79 of GPU 0000:3b:00"),
        (FATAL, [], UNKNOWN, "since boot: Xid 79 of GPU 0000:3b:00; perhaps of another job"),
        (None, [], UNKNOWN, "the log of the kernel cannot be read: No such file or directory"),
    ],
)
def test_driver_log_names_errors_since_boot(tmp_path, line, own, result, evidence):
    path = tmp_path / "kmsg"
    if line is not None:
        path.write_text(f"{line}\n")
    assert health.check_driver_log(path, lambda: own) == Check(result, evidence)


@pytest.mark.parametrize(
    ("available", "result"), [(health.LEAST_MEMORY, OK), (health.LEAST_MEMORY - 1, FAILS), (None, UNKNOWN)]
)
def test_node_with_little_memory_fails(monkeypatch, available, result):
    monkeypatch.setattr(health, "available_memory", lambda: available)
    assert health.check_memory().state == result


@pytest.mark.gpu
def test_every_gpu_of_this_machine_passes(tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(ROOT)
    gpus = torch.cuda.device_count()
    results = finish(health.start(HealthSettings(str(tmp_path), gpus=gpus), may_fork=False))
    assert not [row for row in results.values() if row.state == FAILS]
    assert len(results[PRODUCT].rates) == gpus
