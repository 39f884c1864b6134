"""Tests that files of an earlier release are read: manifests, a complete and a stopped run, an export (``make.py``)."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import flip
from flip.data.manifest.manifest import Manifest

ROOT = Path(__file__).resolve().parents[2]
#: Manifest -> (version, samples, digest) as written by the release.
MANIFESTS = {
    "v1": (1, 24, "b2016530317bc1bea58c062d944ab0b1f4ee9c5d91b20911e3fbe3ac51f2d5f0"),
    "v2": (2, 24, "b2016530317bc1bea58c062d944ab0b1f4ee9c5d91b20911e3fbe3ac51f2d5f0"),
    "v3": (3, 22, "fa60feed26c431986a8c6de4d6722347c7236b89f92eea5f912df1dad0f814c8"),
}


@pytest.fixture
def old(tmp_path):
    """Copy the release's files and insert the paths of this machine, as if the release had written them here."""
    folder = shutil.copytree(Path(__file__).with_name("old"), tmp_path / "old")
    for path in folder.rglob("*"):
        if path.suffix in (".json", ".yaml", ".txt"):
            path.write_text(path.read_text().replace("@OLD@", str(folder)).replace("@PYTHON@", sys.executable))
    for manifest in folder.rglob("manifest.json"):
        keys = manifest.with_name("keys.txt").read_bytes()
        record = json.loads(manifest.read_text())
        record["files"]["keys.txt"] = {"bytes": len(keys), "sha256": hashlib.sha256(keys).hexdigest()}
        manifest.write_text(json.dumps(record))
    return folder


def call(old, *arguments):
    environment = {**os.environ, "FLIP_RUNS": str(old / "runs"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_loads_all_versions_written_by_release(old, name):
    manifest = Manifest.load(old / "data" / name)
    version = json.loads((old / "data" / name / "manifest.json").read_text())["version"]
    assert (version, manifest.samples, manifest.digest) == MANIFESTS[name]


@pytest.mark.long
def test_status_explain_and_report_read_runs_of_release(old):
    rows = {row["run"]: row for row in json.loads(call(old, "jobs", "status", "old", "--json"))}
    assert {name: row["state"] for name, row in rows.items()} == {"complete": "complete", "stopped": "cancelled"}
    assert "cancelled by root" in call(old, "jobs", "explain", "old/stopped")
    assert "complete" in call(old, "jobs", "explain", "old/complete")
    report = {row["run"]: row for row in json.loads(call(old, "jobs", "report", "old", "--json"))}
    assert report["complete"]["state"] == "complete" and report["stopped"]["state"] == "cancelled"


@pytest.mark.long
def test_submit_plans_no_change_for_unchanged_sweep_of_release(old):
    plan = json.loads(call(old, "jobs/submit.py", "--sweep", str(old / "old.yaml"), "--dry-run", "--json"))
    rows = {row["name"]: row for row in plan["runs"]}
    assert {name: row["action"] for name, row in rows.items()} == {"complete": "complete", "stopped": "cancelled"}
    for name, row in rows.items():
        stored = json.loads((old / "runs" / "old" / name / "identity.json").read_text())
        assert (row["identity"], row["changes"], row["starts"]) == (stored["hash"], [], False)
        assert "class names" not in row["reason"]
    names = old / "data" / "classes.json"
    names.write_text(names.read_text().replace('"names": ["', '"names": ["corrected '))
    plan = json.loads(call(old, "jobs/submit.py", "--sweep", str(old / "old.yaml"), "--dry-run", "--json"))
    assert [(row["action"], row["changes"]) for row in plan["runs"]] == [("complete", []), ("cancelled", [])]
    assert "class names of validation have changed" in plan["runs"][0]["reason"]


def test_read_runs_and_load_accept_run_and_export_of_release(old):
    runs = old / "runs" / "old"
    rows = {row["run"]: row for row in flip.read_runs(runs)}
    assert (rows["complete"]["state"], rows["stopped"]["state"]) == ("complete", "cancelled")
    trained = flip.load(runs / "complete")
    exported = flip.load(old / "export")
    texts = ["a red square", "a blue stripe"]
    assert np.array_equal(np.asarray(trained.encode_text(texts)), np.asarray(exported.encode_text(texts)))


@pytest.mark.long
def test_export_and_evaluate_repeat_results_of_release(old):
    run = old / "runs" / "old" / "complete"
    call(old, "jobs", "export", str(run), "--out", str(old / "again"))
    for name in ("open_clip_model.safetensors", "timm/model.safetensors"):
        assert (old / "again" / name).read_bytes() == (old / "export" / name).read_bytes()
    (row,) = json.loads(call(old, "jobs", "evaluate", "old/complete", "--json"))
    (before,) = json.loads((run / "eval" / "unmasked-384.json").read_text())["evaluations"]
    assert (row["predictions"], row["top1"]) == (before["predictions"], before["top1"])
