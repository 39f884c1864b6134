"""Preflight checks of a submission: data, containers, disk space, packages, wall limits and checkpoint storage."""

import errno
import json
import os
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import webdataset

from flip.config import schema
from flip.config.resolve import DatasetFacts
from flip.config.schema import Config
from flip.data.manifest.build import index
from flip.data.manifest.manifest import Manifest, write
from flip.data.manifest.weights import write_weights
from flip.data.order import SampleOrder
from flip.runs import checkpoint_folder
from flip.runs.checks import OK, UNKNOWN, run_rules
from flip.runs.errors import ConfigError, DataError, FlipError, StorageError
from flip.runs.lifecycle import RunState
from flip.runs.rundir import RunDir, write_json
from jobs.commands.submit import main as submit_main
from jobs.common.cluster_profile import ClusterProfile
from jobs.planning import data_checks, preflight, software_checks, storage_checks
from jobs.planning.preflight import Start
from jobs.slurm import site
from jobs.submission import plan as planning
from jobs.submission import request as submit_request
from jobs.workloads.training import TrainingCheckpoints
from tests.synthetic import draw_image, encode, make_dataset
from tools.commands.shards import main as shards_main


@pytest.fixture(scope="module")
def with_json(tmp_path_factory, data):
    """A data set of jpg and json members only, with captions in a field of the json, like some public data sets."""
    folder = tmp_path_factory.mktemp("json")
    with webdataset.TarWriter(str(folder / "0.tar"), mtime=0) as writer:
        for i in range(128):
            facts = {"url": "http://here", "caption": [f"an image {i}", "one more"], "width": 16}
            writer.write({"__key__": f"{i:04d}", "jpg": encode(draw_image(i, 16), "jpg"), "json": facts})
    index([str(folder / "0.tar")], folder)
    return folder


def submitted(desk, folder, monkeypatch, capsys, *args):
    """Run submit in this process; return its exit code and its output, stderr after stdout."""
    monkeypatch.setenv("FLIP_RUNS", str(desk.runs))
    data = [f"data.manifest={folder}", "evaluate.sets=[]"]
    code = submit_main(["--sweep", str(desk.sweep), "--yes", *data, *args])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_submit_refuses_json_member_as_caption_and_names_its_fields(desk, with_json, monkeypatch, capsys):
    code, output = submitted(desk, with_json, monkeypatch, capsys, "data.captions=[json]", "--dry-run")
    assert code == 78, output
    assert "data.captions" in output, output
    assert "as json:caption." in output, output
    assert "json:url" in output, output
    without_data = ["data.captions=[json]", "data.manifest=/nowhere", "data.samples=1000", "--dry-run"]
    assert "json:caption" in submitted(desk, with_json, monkeypatch, capsys, *without_data)[1]
    code, output = submitted(desk, with_json, monkeypatch, capsys, "--dry-run")  # default caption member: txt
    assert code == 65 and "JSON fields with text: json:caption, json:url" in output, output
    code, output = submitted(desk, with_json, monkeypatch, capsys, "data.captions=[json:caption]", "--dry-run")
    assert code == 0, output


def test_submit_refuses_block_without_valid_sample_and_names_remedy(desk, data, monkeypatch, capsys):
    """The sample order is known, so such a run would stop at this block with code 65 after every start."""
    manifest = Manifest.load(data)
    order = SampleOrder(0, 128, manifest.chunk, 1, 2)
    config = ["data.lanes=2"]
    bad = order.blocks(range(2), range(16, 17))[0][0, 1].tolist()  # lane 1, S = 32
    assert manifest.chunk == 1 and len(bad) == 1
    reduced = write(desk.folder / "less", manifest, manifest.checksums, dict.fromkeys(bad, "bad"))
    code, output = submitted(desk, reduced.folder, monkeypatch, capsys, *config, "--dry-run")
    assert code == 65 and "lane 1 from S = 32 are excluded" in output, output
    assert f"shards drop {reduced.folder} --out NEW_FOLDER" in output
    code, output = submitted(
        desk, reduced.folder, monkeypatch, capsys, *config, "stages.pretrain.samples=32", "--dry-run"
    )
    assert code == 0, output
    assert shards_main(["drop", str(reduced.folder), "--out", str(desk.folder / "good")]) == 0
    capsys.readouterr()
    code, output = submitted(desk, desk.folder / "good", monkeypatch, capsys, *config, "--dry-run")
    assert code == 0 and "127 samples" in output, output


def test_plan_says_what_weights_do_and_refuses_those_that_do_not_fit(desk, data, tmp_path, monkeypatch, capsys):
    manifest = Manifest.load(data)
    path = tmp_path / "weights"
    write_weights(path, manifest, [np.resize([4.0, 2.0, 0.0, 4.0], manifest.samples)], 0.0, "a test")
    weighted = [f"data.weights={path}", "data.block=1", "data.lanes=2", "--dry-run"]
    code, output = submitted(desk, data, monkeypatch, capsys, *weighted)
    assert code == 0 and "weights: 96 of 128 samples, as many as 89 of equal weight" in output, output
    assert "views of the rarest sample: 2 an epoch" in output, output
    code, output = submitted(desk, data, monkeypatch, capsys, *weighted, "data.lanes=4", "data.block=4")
    assert code == 78 and "two views of a sample could share a batch" in output, output
    content = bytearray(path.read_bytes())
    content[-512] ^= 1
    path.write_bytes(content)
    code, output = submitted(desk, data, monkeypatch, capsys, *weighted)
    assert code == 65 and "do not have the digest" in output, output
    sets = ["data.manifest=''", f"data.sets=[{{name: a, manifest: {data}}}, {{name: b, manifest: {data}}}]"]
    code, output = submitted(desk, data, monkeypatch, capsys, *weighted, *sets)
    assert code == 78 and "data.weights: several data sets" in output, output


def test_refuse_blank_blocks_accepts_run_past_blank_block(data, tmp_path):
    manifest = Manifest.load(data)
    bad = SampleOrder(0, 128, 1, 1, 2).blocks(range(2), range(16, 17))[0][0, 1].tolist()
    reduced = write(tmp_path / "less", manifest, manifest.checksums, dict.fromkeys(bad, "bad"))
    values = {"manifest": str(reduced.folder), "samples": 128, "chunk": 1, "lanes": 2, "block": 1}
    config = Config(data=schema.Data(**values), stages=[schema.Stage(name="only", samples=64, batch=16)])
    facts = [DatasetFacts(128, 1, 1.0, False)]
    run = RunDir(tmp_path / "runs" / "sweep" / "run")
    for samples, refused in ((16, True), (48, False)):
        place = checkpoint_folder.folder(run, "only", samples, 1)
        place.mkdir(parents=True)
        checkpoint_folder.complete_checkpoint(place, {"stage": "only", "samples": samples, "attempt": 1})
        with pytest.raises(DataError, match="S = 32") if refused else nullcontext():
            list(run_rules([preflight.BLOCKS], Start(config, facts, None, None, None, run)))


@pytest.mark.long
def test_dry_run_refuses_unmounted_data_except_in_plan_without_data(desk, data, tmp_path):
    profile = tmp_path / "boxed.yaml"
    mounts_line = f"container_mounts: [{data}]"
    profile.write_text("kind: slurm\ncontainer: /images/x.sqsh\ncpus_per_node: 8\nmemory_gb: 64\n")
    args = ("--cluster", str(profile), "--dry-run")
    desk.refuses(78, f"Add to its container_mounts, at the same path: {data}", *args)
    nominal = desk.submit(*args, "data.manifest=/not/here", "data.samples=1e5")
    assert nominal.returncode == 0 and "at the same path: /not/here" in nominal.stdout, nominal.stderr
    profile.write_text(profile.read_text() + mounts_line + "\n")
    done = desk.submit(*args)
    assert done.returncode == 0 and "sees all that is read" in done.stdout, done.stderr


@pytest.mark.long
def test_preflight_checks_first_sample_of_evaluation_set(desk, data, tmp_path):
    plain = make_dataset(tmp_path / "plain", samples=8, shards=1)
    desk.refuses(65, "no label 'cls'", f"evaluate.sets.small.manifest={plain}")
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        writer.write({"__key__": "0", "png": encode(draw_image(0)), "cls": 4})
    index([str(tmp_path / "0.tar")], tmp_path / "labelled")
    desk.refuses(65, "1 of 1 labels have no class name", f"evaluate.sets.small.manifest={tmp_path}/labelled")


@pytest.mark.long
def test_preflight_compares_all_labels_with_class_names_without_reading_the_set(desk, tmp_path, monkeypatch):
    """With 2 names and 8 labels all runs trained, and failed in the final evaluation."""
    labelled = make_dataset(tmp_path / "labelled", samples=64, shards=2, classes=8)
    (tmp_path / "two.json").write_text('{"names": ["a", "b"], "templates": ["a {}"]}')
    small = (
        "--dry-run",
        f"evaluate.sets.small.manifest={labelled}",
        f"evaluate.sets.small.classes={tmp_path}/two.json",
    )
    refused = desk.submit(*small)
    assert refused.returncode == 65 and "48 of 64 labels have no class name: the largest is 7, with 2" in refused.stderr
    manifest = Manifest.load(labelled)
    assert data_checks.check_labels(str(labelled), str(labelled / "classes.json"), 8) == "8 of 8 classes"
    old = write(tmp_path / "old", manifest, manifest.checksums)  # of a release that counted no labels
    done = desk.submit("--dry-run", f"evaluate.sets.small.manifest={old.folder}", small[2])
    assert done.returncode == 0 and "no counts of labels: the job compares them before its" in done.stdout, done.stderr
    reads = []
    read_chunk = data_checks.ChunkReader.read_chunk
    monkeypatch.setattr(
        data_checks.ChunkReader, "read_chunk", lambda self, *where: reads.append(where) or read_chunk(self, *where)
    )
    data_checks.check_labels(str(old.folder), "names.json", 9)
    assert len(reads) == 1


def test_libraries_check_refuses_decoder_if_not_installed(monkeypatch):
    monkeypatch.setattr(software_checks, "find_spec", lambda name: None)
    config = Config()
    config.data.decoder = "simplejpeg"
    with pytest.raises(ConfigError, match="data.decoder: is not installed"):
        software_checks.check_libraries(config, ClusterProfile(name="local"))


@pytest.mark.parametrize(
    "hours, start, words",
    [(24, 0, ""), (0.05, 0, "3 min, but"), (0.05, 60, "a start takes 60 s"), (0.1, 300, "a start takes 5 min")],
)
def test_wall_limit_check_warns_if_no_time_remains_for_training(tmp_path, hours, start, words):
    config = Config()
    run = RunDir(tmp_path / "run")
    config.resources.hours = hours
    if start:
        n = run.start_attempt({})
        write_json(run.attempt(n) / "start.json", {"time": 1000.0})
        write_json(run.attempt(n) / "ready.json", {"time": 1000.0 + start})
    checks = preflight.wall_limit(config, ClusterProfile(kind="slurm", signal_seconds=120 if start else 180), run)
    assert bool(checks) == bool(words) and all(words in check.text and "warning" in check.text for check in checks)
    assert preflight.wall_limit(config, ClusterProfile(kind="local", signal_seconds=600), run) == []


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP])
@pytest.mark.parametrize("name, kind", [("link", "hard"), ("symlink", "symbolic")])
def test_writable_check_refuses_file_system_without_links(tmp_path, monkeypatch, name, kind, number):
    """gcsfuse and vfat have no links, so the end of an attempt cannot be recorded there."""
    monkeypatch.setattr(os, name, Mock(side_effect=OSError(number, os.strerror(number))))
    with pytest.raises(ConfigError, match=f"{tmp_path}: this file system has no {kind} links .*FLIP_RUNS=FOLDER"):
        storage_checks.check_folder(ClusterProfile(name="local"), tmp_path / "runs" / "x", False)
    assert site.write_problem(tmp_path / "runs") == f"{tmp_path}: this file system has no {kind} links"
    monkeypatch.setattr(os, name, Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(StorageError, match="No space left"):
        storage_checks.check_folder(ClusterProfile(name="local"), tmp_path / "runs" / "x", False)
    monkeypatch.undo()
    assert storage_checks.check_folder(ClusterProfile(name="local"), tmp_path / "runs" / "x", False).state != UNKNOWN
    assert not list(tmp_path.iterdir()), "the check leaves no files"


@pytest.mark.long
def test_submit_refuses_damaged_or_missing_shards(desk, tmp_path):
    broken = make_dataset(tmp_path / "broken", samples=64, shards=2)
    shard = broken / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    desk.refuses(65, "bytes, indexed were", f"data.manifest={broken}")
    shard.unlink()
    desk.refuses(65, "the shard is missing", f"data.manifest={broken}")


def test_disk_check_sums_checkpoints_of_all_starting_runs(desk, typed, monkeypatch):
    """Each run needs 100 bytes, and 150 bytes are free."""
    monkeypatch.setattr(TrainingCheckpoints, "bytes", 100)
    monkeypatch.setattr(storage_checks.shutil, "disk_usage", lambda _: SimpleNamespace(free=150))
    for args in ([], ["--dry-run"]):
        code, _, err = typed(*args)
        assert code == 69 and "checkpoints of 2 runs" in err and not typed.started and not desk.runs.exists(), err
    assert typed("--only", "half")[0] == 0 and typed.started == ["half"]
    assert typed()[0] == 69 and not typed.started
    checkpoint = desk.runs / "demo" / "half" / "checkpoints" / "pretrain" / "16-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_bytes(bytes(75))
    # Existing checkpoints of a run reduce its required space.
    assert typed()[0] == 0
    assert typed.started == ["half", "whole"]


@pytest.mark.parametrize(
    "state, code", [("queued", 69), ("waiting", 69), ("running", 69), ("complete", 0), ("failed", 0), ("unknown", 0)]
)
def test_disk_check_counts_runs_with_active_jobs(state, code, desk, typed, monkeypatch):
    """Of 150 free bytes, the new run needs 100, and so does the other one while it has a job."""
    monkeypatch.setattr(TrainingCheckpoints, "bytes", 100)
    monkeypatch.setattr(storage_checks.shutil, "disk_usage", lambda _: SimpleNamespace(free=150))
    assert typed("--only", "half")[0] == 0
    monkeypatch.setattr(planning, "states", lambda runs: {run.path: RunState(state) for run in runs})
    assert typed()[0] == code and typed.started == ([] if code else ["whole"])


def test_checks_list_their_runs(desk, typed):
    text = desk.text.replace("mask: 0.5", "mask: 0.5, compute.threads: 2")
    checks = json.loads(typed("--dry-run", "--json", sweep=text)[1])["checks"]
    runs_by_check = {check["name"]: check["runs"] for check in checks}
    assert runs_by_check["tokenizer"] == []
    assert sorted(c["runs"] for c in checks if c["name"] == "cores") == [
        ["half"],
        ["whole"],
    ]
    out = typed("--dry-run", sweep=text)[1]
    assert "  cores (half): 2 threads" in out and "  cores (whole): 1 threads" in out and "  tokenizer: " in out


@pytest.mark.parametrize(
    "cores, skipped, words",
    [
        ("", True, "gives no cpus_per_node"),
        (96, False, "on 96 cores"),
        (1, False, "the job requests them all; set resources.cpus to 1"),
    ],
)
def test_cores_check_uses_cores_of_profile_not_of_login_node(typed, tmp_path, cores, skipped, words):
    line = f"cpus_per_node: {cores}\n" if cores else ""
    (tmp_path / "far.yaml").write_text(f"kind: slurm\nmemory_gb: 64\n{line}")
    plan = json.loads(typed("compute.threads=2", "--dry-run", "--json", "--cluster", str(tmp_path / "far.yaml"))[1])
    (check,) = [check for check in plan["checks"] if check["name"] == "cores"]
    assert check["skipped"] == skipped and words in check["detail"]


def test_submit_warns_of_busy_machine_and_expected_slowdown(typed, monkeypatch):
    """Other processes use 1.2 of two cores during a second of submit, then 0.2; at last only the load is known."""
    monkeypatch.setattr(submit_request, "core_seconds", lambda: (50.0, 100.0))
    monkeypatch.setattr(preflight, "cores", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (3.0, 0.0, 0.0))
    for now, expected in (
        ((51.2, 102.0), "1.2 of 2 cores: expect 1.6 times"),
        ((50.2, 102.0), ""),
        ((50.0, 100.0), "2.0 of 2"),
    ):
        monkeypatch.setattr("flip.common.host.core_seconds", lambda now=now: now)
        code, out, _ = typed()
        assert code == 0 and typed.started and (f"other processes use {expected}" in out) == bool(expected)
    assert "other processes" not in typed("--dry-run")[1]


def test_disk_check_counts_checkpoints_that_are_kept_for_branches():
    config = Config()
    without = TrainingCheckpoints(config).bytes
    config.checkpoint.keep_at = [64, 128, 192]
    number = config.checkpoint.keep + len(config.stages) + 1
    assert TrainingCheckpoints(config).bytes == without * (number + 3) // number


def test_disk_check_refuses_full_disk_except_in_plan_without_data(desk, typed):
    overrides = ["model.size=B/16", "checkpoint.keep=1000", "data.lanes=0"]
    for args in ([], ["--dry-run"]):
        code, _, err = typed("--only", "half", *overrides, *args)
        assert code == 69 and "are free, up to 1" in err and "FLIP_RUNS=" in err
    code, out, err = typed("--dry-run", "--only", "half", *overrides, "data.manifest=/nowhere", "data.samples=1000000")
    assert code == 0 and ": only " in out.split("not checked here")[1], err
    assert not desk.runs.exists()


def test_probe_url_writes_to_folder_and_leaves_no_files(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert "can be written" in storage_checks.probe_url(str(tmp_path / "checkpoints"))
    assert not [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FlipError):
        storage_checks.probe_url(str(tmp_path / "file" / "checkpoints"), deadline=0.5)


def save_time(run, seconds):
    """The text of the check, "" if there is none."""
    return "".join(check.text for check in preflight.save_time(ClusterProfile(signal_seconds=seconds), run))


def test_save_time_asks_for_earlier_signal_if_saves_are_slow(tmp_path):
    run = RunDir(tmp_path / "sweep" / "run")
    assert save_time(run, 90) == ""
    for samples, seconds in ((8, 30.0), (16, 50.0)):
        path = checkpoint_folder.folder(run, "pretrain", samples, 1)
        path.mkdir(parents=True)
        checkpoint_folder.complete_checkpoint(
            path, {"stage": "pretrain", "samples": samples, "attempt": 1, "saving": seconds}
        )
    assert save_time(run, 120) == "50.0 s at most until now, the warning comes 120 s before the end"
    assert "raise signal_seconds" in save_time(run, 90)


def test_save_time_includes_three_steps(tmp_path):
    run = RunDir(tmp_path / "sweep" / "run")
    path = checkpoint_folder.folder(run, "pretrain", 8, 1)
    path.mkdir(parents=True)
    record = {"stage": "pretrain", "samples": 8, "attempt": 1, "saving": 50.0, "step": 4, "seconds": 100.0}
    checkpoint_folder.complete_checkpoint(path, record)
    assert save_time(run, 175).startswith("50.0 s at most until now, a step 25.0 s, the warning")
    assert "raise" not in save_time(run, 175) and "raise signal_seconds" in save_time(run, 174)


def test_evaluation_set_of_a_probe_is_checked_with_its_training_set(data):
    config = Config()
    config.evaluate.sets = [schema.EvaluationSet(name="probed", task="probe", manifest=str(data), train=str(data))]
    (check,) = data_checks.check_evaluation_sets(config, nominal=False)
    assert (check.state, check.name) == (OK, "evaluation set probed")
    assert check.text.count("samples in ") == 2
    assert f"{data}; fitted on " in check.text
