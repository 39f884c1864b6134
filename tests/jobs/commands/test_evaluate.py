"""flip evaluate end to end: real ranks under a real supervisor score checkpoints and foreign models."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest

import flip
from flip.config import merge
from flip.data.chunk_reader import ChunkReader
from flip.data.manifest.manifest import Manifest
from flip.data.manifest.manifest import write as write_manifest
from flip.evaluation.metrics import predictions, result_files
from flip.monitoring.results import read_run
from flip.runs import checkpoint_folder
from flip.runs.errors import ConfigError
from flip.runs.rundir import RunDir, read_json, write_json, write_text
from jobs.commands import evaluate, explain, report, status
from jobs.common.documents import schema_of
from jobs.common.text import percent
from jobs.slurm import site
from jobs.submission import evaluation
from jobs.submission.snapshot import Snapshot
from tests.flip.evaluation.datasets.test_catalog import images, wds
from tests.flip.evaluation.encoding.test_encoders import make_folder
from tests.harness.evaluation_place import run_evaluate

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("environment")]

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.timeout(600)
def test_evaluate_scores_all_set_types_with_two_ranks(place, capsys):
    run = RunDir(place / "runs" / "sweep" / "run")
    argv = ["sweep/run", "--sets", "flickr30k", "faces=" + str(place / "data" / "faces"), "mnist", "probe:mnist"]
    results = run_evaluate(
        capsys, *argv, "--processes", "2", "--batch", "4", "--mask", "0.5", "--ensemble", "--probe-c", "1"
    )
    names = [
        name + view for name in ("flickr30k", "faces", "mnist", "mnist") for view in ("", "-mask0.5", "-ensemble0.5")
    ]
    expected = []
    for i, name in enumerate(names):
        if i < 3:
            expected += [f"{name}-text", f"{name}-image"]
        else:
            expected += [f"{name}-probe" if i > 8 else name]
    assert [result["name"] for result in results] == expected
    assert {result["n"] for result in results} == {10, 20, 9} and {result["samples"] for result in results} == {64}
    last = checkpoint_folder.checkpoints(run)[-1]
    points = result_files.read_scores(run, at=("pretrain", 64))  # of this evaluation, and of tests before it
    scores = {score["name"]: score for point in points for score in point.scores}
    for result in results:
        assert result["commit"]["digest"] == checkpoint_folder.sha256(last.path / "commit.json")
        assert len(result["data"]) == 64 and result["seconds"] > 0 and result["precision"] == "fp32"
        assert scores[result["name"]]["predictions"] == result["predictions"]
        if result["task"] == "zeroshot":
            stored = predictions.read(predictions.path_of(run, "pretrain", 64, result["name"]))
            assert (stored.digest, len(stored.images)) == (result["predictions"], result["n"])
    stored = {path.name.removesuffix(".predictions.jsonl") for path in run.eval.rglob("*.jsonl")}
    assert stored >= set(names[3:9]), "two sets in three views"
    assert not {name for name in stored if name.startswith("flickr30k") or name.endswith("-probe")}
    assert list((place / "cache" / "features").rglob("texts-*"))
    assert list((place / "cache" / "features").rglob("images-*"))
    (row,) = flip.read_runs(run.path)
    assert row["test.flickr30k-text.top1"] == results[0]["top1"] and row["test.mnist-probe.n"] == 10
    assert report.main([str(run.path)]) == 0
    assert "mnist-probe" in capsys.readouterr().out
    repeated = run_evaluate(capsys, *argv[:2], "mnist", "--batch", "4")  # one rank, cached features
    (same,) = [other for other in results if other["name"] == "mnist"]
    assert repeated[0]["predictions"] == same["predictions"] and repeated[0]["correct5"] == same["correct5"]


@pytest.mark.timeout(600)
def test_evaluate_suite_uses_metric_per_set_and_lists_missing_sets(place, capsys, tmp_path):
    """The data are tiny stand-ins for four of the 38 sets of DataComp."""
    wds(tmp_path / "wds_vtab-pets")
    wds(tmp_path / "wds_wilds-fmow", metadata=lambda i: [i % 4, 2000])
    wds(tmp_path / "wds_flickr30k", captions=True)
    images(tmp_path / "winogavil", [f"images/{i}.png" for i in range(10)])
    rows = {"cue": "owl", "candidates": [f"{i}.png" for i in range(10)], "associations": ["1.png", "4.png"]}
    write_text(tmp_path / "winogavil" / "associations.jsonl", json.dumps(rows) + "\n")
    argv = ["sweep/run", "--sets", "datacomp38", "--data", str(tmp_path), "--batch", "4"]
    assert evaluate.main([*argv, "--json"]) == 0
    output = capsys.readouterr()
    results = {result["name"]: result for result in json.loads(output.out)}
    assert list(results) == ["pets", "flickr30k-text", "flickr30k-image", "winogavil", "fmow"]
    assert output.err.count("left out: ") == 34 and "wds_wilds-iwildcam_test" in output.err
    assert {name: result.get("metric") for name, result in results.items()} == {
        "pets": "mean_per_class", "flickr30k-text": None, "flickr30k-image": None, "winogavil": "jaccard",
        "fmow": "worst_group",
    }  # fmt: skip
    assert evaluation.row(results["fmow"])["metric"] == "worst-group top-1"
    assert evaluation.row(results["fmow"])["score"] == percent(results["fmow"]["score"])
    assert 0 <= results["fmow"]["score"] <= results["fmow"]["top1"] < 1 and results["fmow"]["n"] == 10
    assert results["winogavil"]["score"] in (0.0, 1 / 3, 1.0) and results["winogavil"]["n"] == 1
    assert report.main(["sweep/run"]) == 0 and "fmow" in capsys.readouterr().out
    assert evaluate.main(["sweep/run", "--sets", "paper-table3", "--data", str(tmp_path)]) == 78


@pytest.mark.timeout(600)
def test_evaluate_scores_all_checkpoints_on_configured_sets(place, capsys):
    run = RunDir(place / "runs" / "sweep" / "run")
    own = {"name": "own", "task": "zeroshot", "top1": 0.5, "precision": "fp32"}
    own |= {"predictions": "other", "data": "other"}
    run.eval.mkdir(exist_ok=True)
    write_json(run.eval / "pretrain-32.json", {"stage": "pretrain", "samples": 32, "evaluations": [own]})
    results = run_evaluate(capsys, "sweep/run", "--checkpoint", "all")
    assert [(result["name"], result["n"], result["samples"]) for result in results] == [
        ("own", 30, 32),
        ("own", 30, 64),
    ]
    assert results[0]["predictions"] != results[1]["predictions"]
    stored = [predictions.path_of(run, "pretrain", samples, "own").exists() for samples in (32, 64)]
    assert stored == [False, True], "predictions are those of the score that is shown: at 32 the run's own"
    assert {result["view"] for result in results} == {"64px-resize_crop"}, "the run's view, not a default"
    points = {
        point["samples"]: [result["name"] for result in point["evaluations"]] for point in read_run(run.path).curve()
    }
    assert points[32] == ["own"] and "own" in points[64]
    # The pin counts only until the evaluation is complete.
    assert list(run.pins.iterdir())
    assert not checkpoint_folder.pinned(run)
    newest = max((place / "runs" / "sweep" / ".evaluate").iterdir(), key=lambda folder: folder.stat().st_mtime)
    assert RunDir(newest).has_progress(1), "each recorded score counts as progress, like a checkpoint"


def test_evaluate_gives_a_name_to_the_first_of_two_models(place, tmp_path, capsys, monkeypatch):
    """Both were accepted while the job of the first was queued, and the job of the second failed."""
    submitted = []

    def submit(jobs):
        submitted.extend(job.run for job in jobs)

    monkeypatch.setattr(evaluation, "open_backend", lambda _: SimpleNamespace(submit=submit))
    monkeypatch.setattr(evaluation, "take", lambda _, into: Snapshot("c0de", into / "c0de", ()))
    argv = ["--sets", "mnist", "--save-as", "others/name", "--root", str(tmp_path), "--detach", "--quiet"]
    for name in ("first", "second"):
        make_folder(tmp_path / "models" / name)
    for name, code in (("first", 0), ("second", 78), ("first", 0)):
        model = tmp_path / "models" / name
        assert evaluate.main([*argv, "--model", f"open_clip:{model}"]) == code
    message = capsys.readouterr().err
    assert "is the directory of another run or model" in message and "No score of that model was stored" in message
    assert len(submitted) == 2 and flip.read_runs(tmp_path) == [], "the directory is no run before it has a score"


@pytest.mark.timeout(600)
def test_evaluate_adds_foreign_model_to_report(place, capsys):
    model = make_folder(place / "models" / "theirs")
    results = run_evaluate(capsys, "--model", f"open_clip:{model}", "--sets", "mnist", "--into", "sweep/theirs")
    output = [(result["name"], result["n"], result["stage"], result["precision"]) for result in results]
    assert output == [("mnist", 10, "foreign", "fp32")]
    jsonschema.validate(results, schema_of("evaluate"))
    rows = {row["run"]: row for row in flip.read_runs(place / "runs" / "sweep")}
    assert rows["theirs"]["test.mnist.top1"] == results[0]["top1"] and rows["theirs"]["state"] == "complete"
    assert report.main(["sweep"]) == 0
    assert "theirs" in capsys.readouterr().out
    assert evaluate.main(["--model", f"open_clip:{model}", "--sets", "mnist", "--into", "sweep/run"]) == 78
    assert "is the directory of another run or model" in capsys.readouterr().err


def test_table_names_published_model_in_place_of_a_stage():
    """It had the stage `foreign`, which stays in records and in --json."""
    result = {"name": "mnist", "stage": "foreign", "samples": 0, "n": 10, "top1": 0.5, "task": "zeroshot"}
    result["precision"] = "fp32"
    assert evaluation.row(result)["stage"] == "published model"
    assert evaluation.row({**result, "stage": "pretrain"})["stage"] == "pretrain"


def damage(folder, into):
    """Copy the model and add an export.json whose checksum does not match the weights."""
    shutil.copytree(folder, into)
    weights = into / "open_clip_model.safetensors"
    facts = {"bytes": weights.stat().st_size, "sha256": checkpoint_folder.sha256(weights)}
    record = {"form": 1, "stage": "pretrain", "samples": 64, "attempt": 1, "files": {weights.name: facts}}
    write_json(into / "export.json", record)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    return into


@pytest.mark.timeout(600)
def test_evaluate_fails_without_retry_if_foreign_model_is_damaged(place, tmp_path, capsys):
    model = damage(make_folder(tmp_path / "whole"), tmp_path / "damaged")
    argv = ["--model", f"open_clip:{model}", "--sets", "mnist", "--into"]
    assert evaluate.main([*argv, "damaged/theirs"]) == 65
    assert "damaged" in capsys.readouterr().out
    (job,) = (place / "runs" / "damaged" / ".evaluate").glob("theirs-*")
    assert RunDir(job).newest_attempt() == 1, "no retry"
    assert not RunDir(job).config.exists() and read_json(job / "job.json")["job_kind"] == "evaluate"
    for command, known in ((status, "failed"), (explain, "request it again")):
        assert command.main([str(job)]) in (0, 65)
        shown = capsys.readouterr().out
        assert known in shown
    assert f"what      evaluation of open_clip:{model}\nsets      mnist\n" in shown and "differs" not in shown
    assert flip.read_runs(place / "runs" / "damaged") == []


def test_evaluate_names_the_conversion_of_pickled_weights(place, tmp_path, capsys):
    weights = tmp_path / "epoch_32.pt"
    weights.write_bytes(b"never opened")
    for argv in ([str(weights)], ["--model", f"open_clip:{weights}"]):
        assert evaluate.main([*argv, "--sets", "mnist"]) == 78
        shown = capsys.readouterr()
        assert "open_clip.create_model_and_transforms" in shown.out
        assert f"--model open_clip:{tmp_path}/epoch_32" in shown.err


@pytest.mark.parametrize("kind, code, message", [("none", 78, "is no folder of open_clip"), ("short", 65, "be read")])
def test_evaluate_refuses_invalid_model_folder_and_writes_nothing(place, tmp_path, capsys, kind, code, message):
    model = tmp_path / kind
    model.mkdir()
    if kind == "short":
        (model / "open_clip_config.json").write_text('{"model_cfg": {"vision_cfg": {}, "text_cfg": {}}}')
        (model / "open_clip_model.safetensors").write_bytes(b"\xff\0\0\0\0\0\0\0{")
    before = sorted((place / "runs").rglob("*"))
    assert evaluate.main(["--model", f"open_clip:{model}", "--sets", "mnist"]) == code
    assert message in capsys.readouterr().err
    assert sorted((place / "runs").rglob("*")) == before


@pytest.mark.parametrize(
    "words, output",
    [
        (["sweep/none"], "There are: sweep/run"),
        (["sweep/run", "--sets", "imagenet1k"], "clip-benchmark/wds_imagenet1k"),
        (["sweep/run", "--checkpoint", "7"], "There are: pretrain/32-1, pretrain/64-1"),
        *((["sweep/run", "--mask", mask], "the share of patches") for mask in ("1.5", "1/2", "nan", "half", "0")),
        (["sweep/run", "--ensemble"], "Add --mask"),
        (["sweep/run", "--nodes", "0"], "--nodes: must be at least 1"),
        (["sweep/run", "--templates", "80"], "Name data sets with --sets"),
        (["sweep/run", "--sets", "mnist", "mnist"], "named twice"),
        (["--model", "x:y", "--sets", "mnist"], "open_clip:FOLDER"),
        (["--model", "open_clip:/nowhere", "--sets", "mnist"], "no such folder"),
    ],
)
def test_evaluate_refuses_wrong_arguments_and_starts_no_job(place, words, output, capsys):
    before = sorted((place / "runs").rglob("job.json"))
    assert evaluate.main(words) == 78
    error = capsys.readouterr().err
    assert output in error and error.count(str(place / "runs")) < 2, "a folder of runs is named once"
    assert sorted((place / "runs").rglob("job.json")) == before


def test_evaluate_reports_missing_slurm_and_variables_before_submission(place, capsys, monkeypatch, tmp_path):
    """The checks are those of runs: Slurm is missing; jobs do not get the variables for the bucket of a set."""
    write_text(tmp_path / "our.yaml", "kind: slurm\nenv: [AWS_REGION]\n")
    argv = ["sweep/run", "--cluster", str(tmp_path / "our.yaml"), "--sets", "probe:far=s3://b/far", "mnist"]
    before = sorted((place / "runs").rglob("task.json"))
    with monkeypatch.context() as bare:
        bare.setenv("PATH", str(tmp_path))
        assert evaluate.main(argv) == 78
    assert "these commands of Slurm are not on this machine" in capsys.readouterr().err
    monkeypatch.setattr(site, "check_ready", lambda *_: "it answers")
    for name in ("AWS_REGION", "AWS_PROFILE"):
        monkeypatch.setenv(name, "x")
    assert evaluate.main(argv) == 78
    output = capsys.readouterr().err
    assert "are not forwarded to jobs" in output and "env: [AWS_REGION, " in output and "AWS_PROFILE]" in output
    assert sorted((place / "runs").rglob("task.json")) == before


def test_evaluate_writes_masks_as_in_the_columns_of_the_paper(tmp_path):
    argv = ["two", "--root", str(tmp_path), "--mask", ".5", "0.50", "5e-1", "0.5", "0.75"]
    request = evaluation.EvaluateCommand(evaluate.build_parser().parse_args(argv))
    assert request.builder._views() == (("0", False), ("0.5", False), ("0.75", False))
    argv[:1] = ["--model", "open_clip:x"]
    with pytest.raises(ConfigError, match="only runs of this toolkit"):
        evaluation.EvaluateCommand(evaluate.build_parser().parse_args(argv)).builder._views()


def test_evaluate_takes_set_of_suite_from_given_path_and_each_once(tmp_path):
    for name in ("wds_vtab-cifar10", "elsewhere"):
        wds(tmp_path / name)
    sets = ["datacomp38", f"imagenet1k={tmp_path}/elsewhere", "paper-table4"]
    argv = ["two", "--root", str(tmp_path), "--data", str(tmp_path), "--sets", *sets]
    requested = evaluation.EvaluateCommand(evaluate.build_parser().parse_args(argv)).builder._requested
    assert [request.name for request in requested] == ["cifar10", "imagenet1k"]


@pytest.mark.parametrize("own", [True, False])
def test_evaluate_refuses_labels_without_class_names_before_a_job_exists(place, tmp_path, capsys, monkeypatch, own):
    """By the counts of the manifest: no sample is read. A set without counts is left to the job."""
    data = place / "data" / "own"
    run = RunDir(tmp_path / "two" / "a")
    shutil.copytree(place / "runs" / "sweep" / "run", run.path)
    names = tmp_path / "names.json"
    write_text(names, '{"names": ["a", "b"], "templates": ["{}"]}')
    argv = ["two/a", "--root", str(tmp_path)]
    if own:
        config = merge.read_config(run.config)
        config.evaluate.sets[0].classes = str(names)
        write_text(run.config, merge.dump(config))
    else:
        argv += ["--sets", f"own={data}", "--classes", str(names)]
    monkeypatch.setattr(ChunkReader, "read_chunk", None)
    assert evaluate.main(argv) == 78
    error = capsys.readouterr().err
    assert "18 of 30 labels have no class name: the largest is 4, with 2 class names" in error and str(names) in error
    assert not (tmp_path / "two" / ".evaluate").exists()
    manifest = Manifest.load(data)
    write_manifest(tmp_path / "old", manifest, manifest.checksums)
    submitted = []
    monkeypatch.setattr(evaluation, "open_backend", lambda _: SimpleNamespace(submit=submitted.extend))
    monkeypatch.setattr(evaluation, "take", lambda _, into: Snapshot("c0de", into / "c0de", ()))
    argv = ["two/a", "--root", str(tmp_path), "--sets", f"zeroshot:own={tmp_path / 'old'}", "--classes", str(names)]
    assert evaluate.main([*argv, "--detach"]) == 0 and len(submitted) == 1


def test_name_of_a_set_of_the_run_is_no_unknown_data_set(place, tmp_path, capsys):
    argv = ["sweep/run", "--root", str(place / "runs"), "--data", str(tmp_path), "--sets"]
    own = [item.name for item in merge.read_config(place / "runs" / "sweep" / "run" / "config.yaml").evaluate.sets]
    assert evaluate.main([*argv, own[0]]) == 78
    error = capsys.readouterr().err
    assert "this is one of the run's own sets" in error
    assert f"Leave out --sets, which scores all of them: {own[0]}" in error
    assert evaluate.main([*argv, f"{own[0]}=nowhere"]) == 78 and "nowhere" in capsys.readouterr().err


def test_evaluate_refuses_folders_without_class_names_before_a_job_exists(place, tmp_path, capsys):
    run = RunDir(tmp_path / "two" / "a")
    shutil.copytree(place / "runs" / "sweep" / "run", run.path)
    for name in ("cat", "dog", "horse"):
        image = tmp_path / "animals" / "test" / name / "1.png"
        image.parent.mkdir(parents=True)
        image.write_bytes(b"never opened")
    names = tmp_path / "names.json"
    write_text(names, '{"names": ["cat", "dog"], "templates": ["{}"]}')
    argv = ["two/a", "--root", str(tmp_path), "--sets", f"animals={tmp_path / 'animals'}"]
    assert evaluate.main([*argv, "--classes", str(names)]) == 78
    error = capsys.readouterr().err
    assert "1 of 3 folders match no class name (of 2): horse" in error and str(names) in error
    assert evaluate.main(argv) == 78
    assert "has no names of its classes" in capsys.readouterr().err
    assert not (tmp_path / "two" / ".evaluate").exists()


@pytest.mark.timeout(600)
def test_evaluation_job_compares_uncounted_labels_before_it_scores_a_set(place, tmp_path, capsys):
    run = RunDir(tmp_path / "two" / "a")
    shutil.copytree(place / "runs" / "sweep" / "run", run.path, ignore=shutil.ignore_patterns("eval"))
    manifest = Manifest.load(place / "data" / "own")
    write_manifest(tmp_path / "old", manifest, manifest.checksums)
    write_text(tmp_path / "old" / "classes.json", '{"names": ["a", "b"], "templates": ["{}"]}')
    argv = ["two/a", "--root", str(tmp_path), "--sets", "mnist", f"zeroshot:own={tmp_path / 'old'}"]
    assert evaluate.main(argv) == 65
    assert "18 of 30 labels have no class name: the largest is 4, with 2" in capsys.readouterr().err
    assert not run.eval.exists(), "no set is scored before"


def test_evaluate_list_shows_sets_and_local_availability(place, capsys):
    assert evaluate.main(["--list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert (rows["mnist"]["here"], rows["imagenet1k"]["here"]) == ("yes", "no")
    assert rows["imagenet1k"]["images"] == "50000"


@pytest.mark.timeout(600)
def test_evaluate_prints_pairing_of_folders_with_class_names(place, capsys):
    assert evaluate.main(["sweep/run", "--sets", f"faces={place / 'data' / 'faces'}", "--precision", "bf16"]) == 0
    output = capsys.readouterr().out
    assert "faces: folders are numbers or WordNet ids, so folder c is class name c: 0 = a ... 2 = c" in output
    head, row = output.splitlines()[1:3]
    assert "precision" in head and "bf16" in row
    cache_keys = {tuple(folder.name.split("-")[1:3]) for folder in (place / "cache" / "features").glob("*/*")}
    assert ("cpu", "bf16") in cache_keys, "features of each precision have their own folder"


def test_evaluate_modules_do_not_import_torch():
    script = "import sys; from jobs.commands import evaluate; from jobs.submission import evaluation; "
    script += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


def test_evaluate_follows_url_of_untrusted_record_only_below_url_option(place, tmp_path, capsys):
    source = place / "runs" / "sweep" / "run"
    run = RunDir(tmp_path / "sweep" / "run")
    shutil.copytree(source, run.path, ignore=shutil.ignore_patterns("eval"))
    last = checkpoint_folder.checkpoints(run)[-1]
    remote = tmp_path / "there"
    remote.mkdir()
    for file in last.path.glob("*.safetensors"):
        shutil.move(file, remote)
    write_json(last.path / checkpoint_folder.COMMIT_FILE, {**last.record, "url": f"file://{remote}"})
    (last.path / checkpoint_folder.COMMIT_FILE).chmod(0o666)
    assert evaluate.main([str(run.path), "--root", str(tmp_path)]) == 77
    assert "flip evaluate --url ADDRESS" in capsys.readouterr().err
    assert not (run.path.parent / ".evaluate").exists()
    (result,) = run_evaluate(capsys, str(run.path), "--root", str(tmp_path), "--url", f"file://{remote}")
    assert result["samples"] == 64
