"""``new NAME`` writes a valid sweep file that ``submit`` accepts."""

import json
import shlex

import jsonschema
import pytest
from PIL import Image

from flip.common.yaml_io import read_yaml
from flip.data.manifest.manifest import Manifest
from flip.tokenizer import train_byte_pairs
from jobs.commands import new, submit
from jobs.common import paths
from jobs.common.documents import schema_of
from jobs.common.paths import SWEEPS
from jobs.sweeps.json_schemas import SCHEMAS
from tests.synthetic import draw_image, encode, make_dataset, make_tokenizer
from tools.commands.shards import main as shards_main


def written(capsys, *argv):
    assert new.main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_new_sweep_passes_dry_run(tmp_path, data, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLIP_RUNS", str(tmp_path / "runs"))
    assert new.main(["early"]) == 0
    assert f"{tmp_path}/data/manifest: no manifest yet. Make it before the dry run" in capsys.readouterr().out
    assert new.main(["mine", "--data", str(data), "--tokenizer", str(data / "tokenizer.json"), "--json"]) == 0
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert not shown.err
    assert report["file"] == "mine.yaml" and len(report["next"]) == 2
    jsonschema.validate(report, schema_of("new"))
    lines = (tmp_path / "mine.yaml").read_text().splitlines()
    assert len([line for line in lines if not line.startswith("#")]) <= 11
    argv = shlex.split(report["next"][0])
    assert argv[-2:] == [str(tmp_path / "mine.yaml"), "--dry-run"] and submit.main([*argv[-2:], "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in plan["runs"]] == ["mask0.5", "mask0.75"] and plan["sweep"] == "mine"
    assert submit.main(["mine", "--dry-run"]) == 0, "a name also refers to a file in the current folder"


def test_help_describes_each_option(capsys):
    """The text of --tokenizer was that of --test."""
    with pytest.raises(SystemExit):
        new.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--test FOLDER manifest of images" in text and "--tokenizer FILE its file, see `tokenizer train`" in text


def made(tmp_path, count, **images):
    """Make data of ``count`` images, a fifth apart as a test set, and a tokenizer."""
    folder = tmp_path / "pictures"
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(draw_image(i, 16)))
    for name, save in images.items():
        save(folder / "a" / name)
    command = ["make", str(folder), "--split", "0.2", "--out", str(tmp_path / "data" / "mine")]
    assert shards_main(command) == 0
    make_tokenizer(tmp_path / "data" / "tokenizer.json")
    return tmp_path / "data" / "mine"


def test_new_sweep_on_split_data_has_length_test_set_and_settings_of_images(tmp_path, monkeypatch, capsys):
    """1e6 samples were 3,115 passes over 321 images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLIP_RUNS", str(tmp_path / "runs"))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = {f"t{i}.jpg": lambda path: Image.new("RGB", (16, 8)).save(path, exif=exif) for i in range(9)}
    clear = {f"c{i}.png": lambda path: Image.new("RGBA", (8, 8)).save(path) for i in range(9)}
    data = made(tmp_path, 200, **turned, **clear)
    capsys.readouterr()
    report = written(capsys, "mine", "--data", str(data))
    settings = read_yaml(tmp_path / "mine.yaml")["set"]
    size = Manifest.load(data).samples
    assert (settings["data"]["to_rgb"], settings["data"]["exif"]) == ("flatten", "apply")
    (stage,) = settings["stages"]
    assert stage["batch"] == 64 and 90 * size <= int(stage["samples"]) <= 110 * size
    assert settings["evaluate.sets"] == [
        {"name": "mine", "manifest": f"{data}/test", "classes": f"{data}/test/classes.json"}
    ]
    argv = shlex.split(report["next"][0])
    assert submit.main([argv[-2], "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["runs"][0]["warnings"] == []
    one = written(capsys, "one", "--data", str(data), "--test", str(data))
    assert submit.main([one["file"], "--dry-run"]) == 0
    assert "evaluate.sets.one: is the data set that the run trains on" in " ".join(capsys.readouterr().out.split())
    assert submit.main([one["file"], "--dry-run", "stages.pretrain.base_lr=0"]) == 0
    assert "base_lr is 0, so no weight changes" in " ".join(capsys.readouterr().out.split())


def test_new_sweep_scores_captions_of_test_set_without_classes(tmp_path, data, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    plain = make_dataset(tmp_path / "plain", samples=8, shards=1)
    written(capsys, "mine", "--data", str(data), "--test", str(plain))
    sets = read_yaml(tmp_path / "mine.yaml")["set"]["evaluate.sets"]
    assert sets == [{"name": "mine", "manifest": str(plain), "task": "retrieval"}]
    assert new.main(["other", "--data", str(data), "--test", "nowhere"]) == 78
    assert "flip shards make SOURCE --split" in capsys.readouterr().err and not (tmp_path / "other.yaml").exists()


def test_folder_in_place_of_tokenizer_names_the_file(tmp_path, data, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert new.main(["mine", "--data", str(data), "--tokenizer", str(data)]) == 78
    assert f"--tokenizer {data}/tokenizer.json" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "mine.yaml").exists()


def test_images_in_place_of_manifest_name_shards_make(tmp_path, data, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "birds" / "wren").mkdir(parents=True)
    (tmp_path / "birds" / "wren" / "0.png").write_bytes(encode(draw_image(0, 16)))
    (tmp_path / "t.csv").write_text("path,text\n")
    named = {"birds/wren/0.png": "birds/wren"}  # the folder of a single image
    for i, name in enumerate(["birds", "birds/wren", "birds/wren/0.png", "t.csv"]):
        written(capsys, f"of{i}", "--data", name, "--tokenizer", str(data / "tokenizer.json"))
        assert submit.main([f"of{i}.yaml", "--dry-run"]) == 65
        assert f"flip shards make {tmp_path}/{named.get(name, name)} --out data/mine" in capsys.readouterr().err
        assert shards_main(["info", name]) == 65
        assert f"flip shards make {tmp_path}/{named.get(name, name)} --out data/mine" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert shards_main(["info", "empty"]) == 65 and "flip shards index SHARDS" in capsys.readouterr().err


def test_tars_in_place_of_manifest_name_shards_index(tmp_path, data, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "laion").mkdir()
    (tmp_path / "laion" / "00000.tar").touch()
    tars = {".": "'{}/laion/*.tar'", "laion": "'{}/laion/*.tar'", "laion/00000.tar": "{}/laion/00000.tar"}
    for i, (name, pattern) in enumerate(tars.items()):
        remedy = f"flip shards index {pattern.format(tmp_path)} --out data/manifest"
        assert new.main([f"of{i}", "--data", name, "--tokenizer", str(data / "tokenizer.json")]) == 0
        assert remedy in " ".join(capsys.readouterr().out.split())
        assert submit.main([f"of{i}.yaml", "--dry-run"]) == 65
        assert remedy in capsys.readouterr().err


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
    gpus = 0
    size = "emoji"
    if "h100" in options:
        gpus = 8
        size = "B/16"
    elif "L/14" in options:
        size = "L/14"
    assert (table["set"]["resources"]["gpus"], table["set"]["resources"]["processes"]) == (gpus, gpus or 1)
    assert table["set"]["model.size"] == size
    assert table["recipe"] == ("clip" if "clip" in options else "portable2")
    assert ("model.text" in table["set"]) == ("clip" in options)


def test_new_sweep_has_the_recipe_of_its_tokenizer(tmp_path, data, monkeypatch, capsys):
    """Byte pairs with recipe portable2 were refused by the dry run, not before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLIP_RUNS", str(tmp_path / "runs"))
    size = train_byte_pairs(["a photo of a cat", "two dogs"], 600, tmp_path / "bpe.json")
    pairs = ["--data", str(data), "--tokenizer", "bpe.json"]
    assert new.main(["mine", *pairs, "--recipe", "portable2"]) == 78 and not (tmp_path / "mine.yaml").exists()
    assert "a tokenizer of byte pairs" in (error := capsys.readouterr().err) and "Use --recipe clip" in error
    written(capsys, "mine", *pairs)
    table = read_yaml(tmp_path / "mine.yaml")
    assert table["recipe"] == "clip" and table["set"]["model.text"]["vocabulary"] == size
    assert submit.main(["mine.yaml", "--dry-run"]) == 0
    capsys.readouterr()
    own = ["--data", str(data), "--tokenizer", str(data / "tokenizer.json")]
    assert new.main(["other", *own, "--recipe", "clip"]) == 78 and "Use --recipe portable2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "typed, manifest, tokenizer",
    [
        ([], "HERE/data/manifest", "HERE/data/tokenizer.json"),
        (["--data", "cache:laion/manifest/"], "cache:laion/manifest", "cache:laion/tokenizer.json"),
        (["--data", "cache:laion"], "cache:laion", "cache:tokenizer.json"),
        (["--data", "a/", "--tokenizer", "cache:t.json"], "HERE/a", "cache:t.json"),
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
        (["absent/other"], "absent: no such folder"),
        (["other", "--data", "s3://b/m"], "--data: must be a path on this machine, not an address"),
        (["other", "--tokenizer", "$HOME/t.json"], "--tokenizer: variables such as $HOME are not replaced"),
    ],
)
def test_new_refuses_wrong_arguments_and_preserves_existing_file(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("own")
    assert new.main(options) in (69, 77, 78)
    assert message in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
    assert (tmp_path / "mine.yaml").read_text() == "own"


@pytest.mark.parametrize("size, batch", [("tiny", 128), ("emoji", 128), ("B/32", 4096)])
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
