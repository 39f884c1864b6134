"""``new NAME`` writes a valid sweep file that ``submit`` accepts."""

import json
import shlex

import jsonschema
import pytest

from flip.config.yaml_io import read_yaml
from jobs import new, submit
from jobs.common import paths
from jobs.common.paths import SWEEPS
from jobs.sweeps.sweep_schema import SCHEMAS


def written(capsys, *argv):
    assert new.main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_new_sweep_passes_dry_run(tmp_path, data, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLIP_RUNS", str(tmp_path / "runs"))
    report = written(capsys, "mine", "--data", str(data), "--tokenizer", str(data / "tokenizer.json"))
    assert report["file"] == "mine.yaml" and len(report["next"]) == 2
    lines = (tmp_path / "mine.yaml").read_text().splitlines()
    assert len([line for line in lines if not line.startswith("#")]) <= 11
    argv = shlex.split(report["next"][0])
    assert argv[-2:] == [str(tmp_path / "mine.yaml"), "--dry-run"] and submit.main([*argv[-2:], "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in plan["runs"]] == ["mask0.5", "mask0.75"] and plan["sweep"] == "mine"
    assert submit.main(["mine", "--dry-run"]) == 0, "a name also refers to a file in the current folder"


def test_new_sweep_gets_the_wall_limit_of_its_profile(tmp_path, data, monkeypatch, capsys):
    """A site may limit jobs to less than a day; of a longer limit, a day is used."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLIP_RUNS", str(tmp_path / "runs"))
    for limit, expected in ((2, "2 h"), (168, "24 h")):
        (tmp_path / "site.yaml").write_text(f"kind: slurm\npartition: cpu\nhours: {limit}\n")
        arguments = "--data", str(data), "--tokenizer", str(data / "tokenizer.json"), "--cluster", "./site.yaml"
        report = written(capsys, f"of{limit}", *arguments)
        assert submit.main([report["file"], "--dry-run"]) == 0
        assert f"ranks a node, {expected}: mask0.5" in capsys.readouterr().out
    assert submit.main([report["file"], "--dry-run", "resources.hours=200"]) == 78


@pytest.mark.parametrize(
    "options", [[], ["--cluster", "h100"], ["--size", "L/14", "--data", "a: b/'#\""], ["--recipe", "clip"]]
)
def test_new_sweep_matches_referenced_schema(tmp_path, monkeypatch, capsys, options):
    monkeypatch.chdir(tmp_path)
    written(capsys, "mine", *options)
    table = json.loads(json.dumps(read_yaml(tmp_path / "mine.yaml")))
    jsonschema.Draft7Validator(SCHEMAS["sweep"]()).validate(table)
    first = (tmp_path / "mine.yaml").read_text().splitlines()[0]
    assert first == f"# yaml-language-server: $schema={SWEEPS / 'schemas' / 'sweep.json'}"
    assert table["set"]["data"]["manifest"] == str(tmp_path / (options[-1] if "--data" in options else "data/manifest"))
    gpus = 8 if "h100" in options else 0
    assert (table["set"]["resources"]["gpus"], table["set"]["resources"]["processes"]) == (gpus, gpus or 1)
    assert table["set"]["model.size"] == ("L/14" if "L/14" in options else "B/16" if gpus else "emoji")
    assert table["recipe"] == ("clip" if "clip" in options else "portable2")
    assert ("model.text" in table["set"]) == ("clip" in options)


@pytest.mark.parametrize(
    "typed, manifest, tokenizer",
    [
        ([], "HERE/data/manifest", "HERE/data/tokenizer.json"),
        (["--data", "cache:laion/manifest/"], "cache:laion/manifest", "cache:laion/tokenizer.json"),
        (["--data", "cache:laion"], "cache:laion", "cache:tokenizer.json"),
        (["--data", "a/", "--tokenizer", "cache:t.json"], "HERE/a", "cache:t.json"),
        (["--data", "s3://b/m"], "s3://b/m", "s3://b/tokenizer.json"),
    ],
)
def test_new_sweep_keeps_paths_in_the_cache(tmp_path, monkeypatch, capsys, typed, manifest, tokenizer):
    monkeypatch.chdir(tmp_path)
    written(capsys, "mine", *typed)
    data = read_yaml(tmp_path / "mine.yaml")["set"]["data"]
    expected = [path.replace("HERE", str(tmp_path)) for path in (manifest, tokenizer)]
    assert [data["manifest"], data["tokenizer"]] == expected


@pytest.mark.parametrize(
    "options, message",
    [
        (["mine"], "mine.yaml: already exists"),
        (["No Name"], "not a valid name of a sweep"),
        (["other", "--size", "L/15"], "Did you mean L/16 or L/14"),
        (["other", "--cluster", "h200"], "Did you mean h100"),
        (["absent/other"], "absent"),
    ],
)
def test_new_refuses_wrong_arguments_and_preserves_existing_file(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("own")
    assert new.main(options) in (69, 77, 78)
    assert message in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
    assert (tmp_path / "mine.yaml").read_text() == "own"


@pytest.mark.parametrize("size, batch", [("tiny", 128), ("2M/8", 128), ("8M/8", 128), ("B/32", 4096)])
def test_new_sweep_settings_fit_model_size(tmp_path, monkeypatch, capsys, size, batch):
    monkeypatch.chdir(tmp_path)
    written(capsys, "mine", "--size", size)
    (stage,) = read_yaml(tmp_path / "mine.yaml")["set"]["stages"]
    assert stage["batch"] == batch


def test_new_sweep_in_repository_uses_relative_schema_path(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "REPOSITORY", tmp_path)
    monkeypatch.setattr(paths, "SWEEPS", tmp_path / "sweeps")
    (tmp_path / "sweeps").mkdir()
    written(capsys, str(tmp_path / "sweeps" / "mine"))
    first = (tmp_path / "sweeps" / "mine.yaml").read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=schemas/sweep.json"
