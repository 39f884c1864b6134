"""Tests that files of each release are read: manifests, a complete and a stopped run, an evaluation, an export.

``make.py`` writes the files of a release by its commands.
"""

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
from flip.evaluation.request import EvaluationRequest
from flip.runs.rundir import RunDir

ROOT = Path(__file__).resolve().parents[2]
RELEASES = ["0.2.0"]
#: Manifest -> (version, samples, digest) as written by the releases.
MANIFESTS = {
    "all": (2, 24, "b2016530317bc1bea58c062d944ab0b1f4ee9c5d91b20911e3fbe3ac51f2d5f0"),
    "filtered": (3, 22, "fa60feed26c431986a8c6de4d6722347c7236b89f92eea5f912df1dad0f814c8"),
}


@pytest.fixture(params=RELEASES)
def files(request, tmp_path):
    """Copy a release's files and insert the paths of this machine, as if the release had written them here."""
    folder = shutil.copytree(Path(__file__).with_name(request.param), tmp_path / "files")
    for path in folder.rglob("*"):
        if path.suffix in (".json", ".yaml", ".txt"):
            path.write_text(path.read_text().replace("@FILES@", str(folder)).replace("@PYTHON@", sys.executable))
    for manifest in folder.rglob("manifest.json"):
        keys = manifest.with_name("keys.txt").read_bytes()
        record = json.loads(manifest.read_text())
        record["files"]["keys.txt"] = {"bytes": len(keys), "sha256": hashlib.sha256(keys).hexdigest()}
        manifest.write_text(json.dumps(record))
    return folder


def call(files, *arguments):
    environment = {**os.environ, "FLIP_RUNS": str(files / "runs"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_loads_all_versions_written_by_release(files, name):
    manifest = Manifest.load(files / "data" / name)
    version = json.loads((files / "data" / name / "manifest.json").read_text())["version"]
    assert (version, manifest.samples, manifest.digest) == MANIFESTS[name]


@pytest.mark.long
def test_status_explain_and_report_read_runs_of_release(files):
    rows = {row["run"]: row for row in json.loads(call(files, "-m", "jobs", "status", "demo", "--json"))}
    assert {name: row["state"] for name, row in rows.items()} == {"complete": "complete", "stopped": "cancelled"}
    assert "cancelled by root" in call(files, "-m", "jobs", "explain", "demo/stopped")
    assert "complete" in call(files, "-m", "jobs", "explain", "demo/complete")
    report = {row["run"]: row for row in json.loads(call(files, "-m", "jobs", "report", "demo", "--json"))}
    assert report["complete"]["state"] == "complete" and report["stopped"]["state"] == "cancelled"


@pytest.mark.long
def test_submit_plans_no_change_for_unchanged_sweep_of_release(files):
    plan = json.loads(call(files, "-m", "jobs", "submit", str(files / "demo.yaml"), "--dry-run", "--json"))
    rows = {row["name"]: row for row in plan["runs"]}
    assert {name: row["action"] for name, row in rows.items()} == {"complete": "complete", "stopped": "cancelled"}
    for name, row in rows.items():
        stored = json.loads((files / "runs" / "demo" / name / "identity.json").read_text())
        assert (row["identity"], row["changes"], row["starts"]) == (stored["hash"], [], False)
        assert "class names" not in row["reason"]
    names = files / "data" / "classes.json"
    names.write_text(names.read_text().replace('"names": ["', '"names": ["corrected '))
    plan = json.loads(call(files, "-m", "jobs", "submit", str(files / "demo.yaml"), "--dry-run", "--json"))
    assert [(row["action"], row["changes"]) for row in plan["runs"]] == [("complete", []), ("cancelled", [])]
    assert "class names of validation have changed" in plan["runs"][0]["reason"]


def test_read_runs_and_load_accept_run_and_export_of_release(files):
    runs = files / "runs" / "demo"
    rows = {row["run"]: row for row in flip.read_runs(runs)}
    assert (rows["complete"]["state"], rows["stopped"]["state"]) == ("complete", "cancelled")
    trained = flip.load(runs / "complete")
    exported = flip.load(files / "export")
    texts = ["a red square", "a blue stripe"]
    assert np.array_equal(np.asarray(trained.encode_text(texts)), np.asarray(exported.encode_text(texts)))


@pytest.mark.long
def test_export_and_evaluate_repeat_results_of_release(files):
    run = files / "runs" / "demo" / "complete"
    call(files, "-m", "jobs", "export", str(run), "--out", str(files / "again"))
    for name in ("open_clip_model.safetensors", "timm/model.safetensors"):
        assert (files / "again" / name).read_bytes() == (files / "export" / name).read_bytes()
    (row,) = json.loads(call(files, "-m", "jobs", "evaluate", "demo/complete", "--json"))
    (before,) = json.loads((run / "eval" / "unmasked-384.json").read_text())["evaluations"]
    assert (row["predictions"], row["top1"]) == (before["predictions"], before["top1"])


def test_request_of_an_evaluation_is_read(files):
    (job,) = (files / "runs" / "demo" / ".evaluate").glob("complete-*")
    assert EvaluationRequest.read(RunDir(job)).subject == str(files / "runs" / "demo" / "complete")


PLAN = ("submit", "demo.yaml", "--dry-run")
EXPORT = ("export", "runs/demo/complete", "--out", "again")
#: File, what becomes of its number, and a command that obeys the file.
OTHER_FORMS = {
    "older run": ("runs/demo/complete/identity.json", ('"schema": 2', '"schema": 1'), PLAN),
    "newer run": ("runs/demo/complete/identity.json", ('"schema": 2', '"schema": 3'), PLAN),
    "half a run": ("runs/demo/complete/identity.json", ('"schema": 2', '"uid": 0'), PLAN),
    "older run next to others": ("runs/demo/stopped/identity.json", ('"schema": 2', '"schema": 1'), PLAN),
    "newer configuration": ("runs/demo/complete/config.yaml", ("schema: 1", "schema: 2"), EXPORT),
    "older data set": ("data/manifest.json", ('"version": 2', '"version": 1'), PLAN),
    "newer data set": ("data/manifest.json", ('"version": 2', '"version": 5'), PLAN),
    "newer export": ("export/export.json", ('"form": 1', '"form": 2'), ("predict", "export", "x", "--labels", "a")),
    "half a score file": (
        "runs/demo/complete/eval/unmasked-384.json",
        ('"evaluations"', '"scores"'),
        EXPORT,
    ),
}
REFUSALS = ("an older version wrote", "a newer version wrote", "states no format", "lacks `evaluations`")


@pytest.mark.long
@pytest.mark.parametrize("case", OTHER_FORMS)
def test_other_forms_are_refused_by_name(files, case):
    name, (before, after), command = OTHER_FORMS[case]
    path = files / name
    text = path.read_text()
    assert text.count(before) == 1
    path.write_text(text.replace(before, after))
    words = [command[0], *(str(files / word) if (files / word).exists() else word for word in command[1:])]
    environment = {**os.environ, "FLIP_RUNS": str(files / "runs")}
    done = subprocess.run(
        [sys.executable, "-m", "jobs", *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 78 and str(path) in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and any(words in done.stderr for words in REFUSALS), done.stderr


@pytest.mark.long
def test_lists_show_run_of_another_form_and_the_others(files):
    path = files / "runs" / "demo" / "complete" / "identity.json"
    path.write_text(path.read_text().replace('"schema": 2', '"schema": 1'))
    for command in ("status", "report"):
        rows = {row["run"]: row for row in json.loads(call(files, "-m", "jobs", command, "demo", "--json"))}
        assert rows.keys() == {"complete", "stopped"}
    assert "an older version wrote this format" in call(files, "-m", "jobs", "explain", "demo/complete")
