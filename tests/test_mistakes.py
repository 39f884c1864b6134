"""Tests that common mistakes yield a single line with mistake, place, value and remedy, and the right exit code."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from flip.runs.rundir import write_json

ROOT = Path(__file__).resolve().parents[1]
EMOJI = "recipe: emoji\ncluster: local\n"
DRY = ["--dry-run"]


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """Work in a folder that holds only runs of a sweep, without Slurm, credentials or data."""
    for name in ("mask50", "mask75"):
        (tmp_path / "runs" / "emoji" / name).mkdir(parents=True)
        (tmp_path / "runs" / "emoji" / name / "config.yaml").write_text("schema: 1\n", encoding="utf-8")
        write_json(tmp_path / "runs" / "emoji" / name / "job.json", {"kind": "local", "after": 0})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLIP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("FLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("PATH", "/nowhere")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def call_main(capsys, script, arguments):
    """Return (exit code, the only line on standard error)."""
    module = script.replace("/", ".") if script.startswith("lab/") else script.replace("/", ".commands.")
    code = importlib.import_module(module).main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and len(err) < 800, out + err
    return code, err


SWEEPS = [
    # the file's text, the command line, the exit code, parts of the message
    ("sett: {seed: 3}\nruns: {a: }", [], 78, ["my.yaml:3", "sett: unknown key", "Did you mean set?"]),
    ("set: {data.worker: 2}\nruns: {a: }", [], 78, ["my.yaml:3", "data.worker", "Did you mean data.workers?"]),
    ("set: {optim.lr: 1e-3}\nruns: {a: }", [], 78, ["optim.lr", "Did you mean stages.NAME.base_lr?"]),
    ("runs: {a: }", ["epochs=3"], 78, ["command line", "epochs: unknown key", "In its place: stages.NAME.samples"]),
    ("runs: {a: }", ["stages.pretain.batch=64"], 78, ["pretain", "Did you mean stages.pretrain?", "a new stage"]),
    ("runs: {a: }", ["stages.pretrain.batch"], 78, ["KEY=VALUE", "'stages.pretrain.batch'", "Example"]),
    ("runs: {a: }", ["stages.pretrain.batch=big"], 78, ["stages.pretrain.batch", "a whole number", "'big'"]),
    ("runs: {a: {stages.pretrain.batch: 100}}", [], 78, ["run a", "64 lanes", "batch 100", "64 or 128"]),
    ("runs: {a: }", ["resources.processes=4", "stages.pretrain.batch=130"], 78, ["4 ranks", "130", "128 or 192"]),
    ("runs: {a: }", ["resources.processes=3"], 78, ["128 does not divide by 3 ranks", "126 or 129"]),
    ("runs: {a: {stages.pretrain.mask: 1.5}}", [], 78, ["stages.pretrain.mask", "below 1", "'1.5'"]),
    ("runs: {a: {stages.pretrain.mask: half}}", [], 78, ["my.yaml:3", "a decimal number", "'half'", "Example: 0.5"]),
    ("runs: {a: {stages.pretrain.warmup: 1e9}}", [], 78, ["warmup", "225280", "1000000000", "of its stage"]),
    ("runs: [a, b]", [], 78, ["my.yaml:3: runs: needs a mapping", "Write {name: , other: }"]),
    ("runs: {a: }\nseeds: 3", [], 78, ["my.yaml:4: seeds: needs a list", "Write [3]."]),
    ("runs: {a: }", ["other.yaml"], 78, ["KEY=VALUE", "'other.yaml'", "Submit one sweep at a time"]),
    ("runs: {a: {model.size: Tiny}}", [], 78, ["unknown model size", "'Tiny'", "Did you mean tiny?"]),
    ("runs: {a: {model.size: B/17}}", [], 78, ["model.size", "'B/17'", "B/16, L/16"]),
    ("runs: {a: {compute.precision: fp16}}", [], 78, ["compute.precision", "'fp16'", "fp32, bf16"]),
    ("runs:\n\ta: ", [], 78, ["my.yaml:4:1", "not valid YAML", "indent with spaces"]),
    ("recipe: paper\nruns: {a: }", [], 78, ["my.yaml:3:1", "'recipe' occurs twice", "line 1"]),
    ("runs: {'a b': }", [], 78, ["my.yaml:3", "'a b'", "A name consists of a-z"]),
    ("grid: {seed: [1, 1]}", [], 78, ["my.yaml:3", "two runs have the same name", "Remove the repeated value"]),
    ("runs: {a: }", ["--only", "b*"], 78, ["my.yaml", "no run of the sweep matches", "'b*'", "Runs: a."]),
    ("runs: {mask50: }", ["--only", "mask05"], 78, ["no run of the sweep matches", "'mask05'", "Did you mean mask50?"]),
    ("runs: {a: }", ["--seeds", "0", "1", "0"], 78, ["--seeds", "a seed is repeated", "0", "Give each seed once."]),
    ("runs: {a: }\nseeds: [3, 3]", [], 78, ["my.yaml:4", "a seed is repeated", "3", "Give each seed once."]),
    ("runs: {a: }", ["stages.pretrain.samples=1e300"], 78, ["stages.pretrain.samples", "9007199254740991", "1"]),
    ("runs: {a: }", ["stages.pretrain.warmup=1e300"], 78, ["stages.pretrain.warmup", "9007199254740991", "1"]),
    ("runs: {a: }", ["--cluster", "h1000"], 78, ["no such cluster profile", "'h1000'", "mean h100? There are:"]),
    ("runs: {a: }", ["--cluster", "bad.yaml"], 78, ["bad.yaml:2", "hourss: unknown key", "Did you mean hours?"]),
    ("runs: {a: }", ["data.manifest=/nowhere", "data.samples=0"], 65, ["/nowhere", "no manifest", "flip shards index"]),
    ("runs: {a: }", ["data.samples=0"], 65, ["cache/emoji/train", "no manifest", "flip demo_data"]),
    ("runs: {a: {init.run: other/run}}", [], 78, ["init.run", "no such run", "'other/run'", "SWEEP/RUN"]),
    ("runs: {a: }\n---\nruns: {b: }", [], 78, ["my.yaml:4:1", "a second YAML document", "remove the line ---"]),
    ("set:\n  seed: 3\n  model.size tiny\nruns: {a: }", [], 78, ["my.yaml:5: not valid YAML: no colon", "'model.si"]),
    ("set:\n  model.size tiny\n  seed: 3\nruns: {a: }", [], 78, ["my.yaml:4: not valid YAML: no colon", "'model.si"]),
    ("set:\n  model.size tiny\nruns: {a: }", [], 78, ["my.yaml:3: set: needs a mapping", "a colon may be missing"]),
    ("set:\n  model.size:\u00a0tiny\nruns: {a: }", [], 78, ["my.yaml:4:14", "U+00A0", "Replace it by a space"]),
    ("set:\n\u00a0 model.size: tiny\nruns: {a: }", [], 78, ["my.yaml:4:1", "U+00A0", "Replace it by a space"]),
    ("set: {monitor.wandb: true}\nruns: {a: }", [], 78, ["my.yaml:3", "needs text", "True", "Project on Weights"]),
    ("set: {init: {run: a/b, export: x}}\nruns: {a: }", [], 78, ["init: run and export are given", "Give only one"]),
    ("set: {data.manifest: [a, b]}\nruns: {a: }", [], 78, ["data.manifest: is a single data set", "under data.sets"]),
    ("set: {data.manifest: 's3://b/m'}\nruns: {a: }", [], 78, ["data.manifest: must be a path", "not an address"]),
    ("set: {data.manifest: '$HOME/m'}\nruns: {a: }", [], 78, ["data.manifest: variables such as $HOME", "~"]),
    ("runs: {a: }", ["seed="], 78, ["command line: seed: has no value", "whole number", "Seed of everything"]),
    ("runs: {a: }", ["resources.nodes=2"], 78, ["resources.nodes", "one node", "2", "Set it to 1"]),
]  # fmt: skip


@pytest.mark.parametrize("text, words, code, parts", SWEEPS, ids=[parts[-2] for *_, parts in SWEEPS])
def test_submit_explains_sweep_mistake_in_single_line(workdir, capsys, text, words, code, parts):
    Path("my.yaml").write_text(EMOJI + text, encoding="utf-8")
    Path("bad.yaml").write_text("kind: local\nhourss: 3\n", encoding="utf-8")
    actual, line = call_main(capsys, "jobs/submit", ["--sweep", "my.yaml", *DRY, *words])
    assert actual == code and not [part for part in parts if part not in line], line
    assert sorted(path.name for path in (workdir / "runs").iterdir()) == ["emoji"], "the command writes nothing"


COMMANDS = [
    ("jobs/submit", ["--sweep", "quickstat", *DRY], 78, ["quickstat", "no such sweep file", "mean quickstart"]),
    ("jobs/submit", ["--sweep", "zzz.yaml", *DRY], 78, ["zzz.yaml", "sweeps/ contains:", "masking", "bad.yaml"]),
    ("jobs/submit", ["ba", *DRY], 78, ["/ba: no such sweep file", "Did you mean bad.yaml"]),
    ("jobs/submit", ["bad.yml", *DRY], 78, ["bad.yml: no such sweep file", "Did you mean bad.yaml"]),
    ("jobs/submit", ["runs", *DRY], 78, ["runs: a folder, not a sweep file", "sweeps/ contains:"]),
    ("jobs/submit", ["h100", *DRY], 78, ["There is a cluster profile of this name", "--cluster h100"]),
    ("jobs/submit", ["clip", *DRY], 78, ["There is a recipe of this name", "`recipe: clip`"]),
    ("jobs/submit", ["profile.yaml", *DRY], 78, ["profile.yaml: a cluster profile, not a sweep", "--cluster profile"]),
    ("jobs/submit", ["recipe.yaml", *DRY], 78, ["recipe.yaml: a recipe, not a sweep", "`recipe: recipe`"]),
    ("jobs/submit", ["s3://b/x.yaml", *DRY], 78, ["not an address", "'s3://b/x.yaml'", "Download it first"]),
    ("jobs/new", ["x", "--cluster", "quickstart"], 78, ["no such cluster profile", "There is a sweep of this name"]),
    ("jobs/new", ["x", "--cluster", "sweep.yaml"], 78, ["sweep.yaml: a sweep, not a cluster profile", "flip submit s"]),
    ("jobs/debug", ["--sweep", "quickstart", "--run", "maske"], 78, ["quickstart.yaml", "'maske'", "Runs: masked"]),
    ("jobs/status", ["emoji/mask5"], 78, ["runs", "'emoji/mask5'", "There are: emoji/mask50, emoji/mask75"]),
    ("jobs/status", ["emoji/msk50"], 78, ["'emoji/msk50'", "Did you mean emoji/mask50"]),
    ("jobs/status", ["emojy"], 78, ["'emojy'", "Did you mean emoji?"]),
    ("jobs/status", ["--root", "/nowhere"], 78, ["/nowhere", "Nothing was submitted there", "FLIP_RUNS=FOLDER"]),
    ("jobs/status", ["runs"], 78, ["'runs'", "This folder has sweeps", "--root runs"]),
    ("jobs/status", ["."], 78, ["'.'", "This folder has sweeps", "--root runs"]),
    ("jobs/new", ["quickstart"], 78, ["sweeps/quickstart.yaml", "'quickstart'", "would mean both", "another name"]),
    ("jobs/new", ["bad"], 78, ["bad.yaml", "already exists", "Choose another name, or move that file away"]),
    ("jobs/logs", ["emoji"], 78, ["emoji/mask50", "no logs of that attempt"]),
    ("jobs/logs", ["emoji/mask50", "--attempt", 3], 78, ["no logs of that attempt", "3", "Attempts begun: none"]),
    ("jobs/cancel", ["emoji"], 78, ["not a terminal", "mask50, mask75", "--yes"]),
    ("jobs/report", ["emoji", "--csv", "/nowhere/x.csv"], 78, ["/nowhere/x.csv", "mkdir -p /nowhere"]),
    ("jobs/report", ["emoji", "--out", "runs"], 78, ["runs: a folder, where a file is written", "--folder"]),
    ("jobs/explain", ["emojis/mask50"], 78, ["no such sweep or run", "'emojis/mask50'", "There are: emoji"]),
    ("jobs/tensorboard", ["emojis"], 78, ["no such sweep or run", "'emojis'", "There are: emoji"]),
    ("jobs/evaluate", ["emoji/mask50", "--sets", "imagenet"], 78, ["imagenet", "imagenet1k", "NAME=PATH"]),
    ("jobs/evaluate", ["--model", "open_clip:/nowhere", "--sets", "dtd"], 78, ["/nowhere", "open_clip_config.json"]),
    ("jobs/evaluate", ["emoji/mask50", "--sets", "dtd", "--gpus", "1"], 78, ["--gpus: no NVIDIA driver", "1", "to 0"]),
    ("jobs/evaluate", ["emoji/mask50", "--sets", "dtd", "--nodes", "2"], 78, ["--nodes: this machine is one", "2"]),
    ("jobs/doctor", [], 78, ["scontrol", "Slurm"]),
    ("tools/shards", ["info", "nowhere"], 65, ["nowhere/manifest.json", "no manifest", "flip shards index"]),
    ("tools/shards", ["index", "data/*.tar", "--out", "m"], 65, ["data/*.tar", "missing", "its pattern"]),
    ("tools/shards", ["index", "bad.yaml", "--out", "m"], 65, ["bad.yaml", "not a whole tar", "--skip-damaged"]),
    ("tools/shards", ["index", "*.png", "--out", "m"], 78, ["*.png", "not a tar file", "flip shards make ."]),
    ("tools/shards", ["make", "hf://a/b", "--out", "m"], 78, ["not an address", "'hf://a/b'", "Download it"]),
    ("tools/shards", ["make", "a.xlsx", "--out", "m"], 78, ["a.xlsx: tables of this form", "CSV", ".parquet"]),
    ("tools/shards", ["make", "classes.csv", "--out", "m"], 78, ["no column is called caption", "--label class"]),
    ("tools/shards", ["make", "gone.csv", "--out", "m"], 65, ["row 1: the image does not exist (./x/y", "--images"]),
    ("tools/predict", ["runs", "x.png", "--labels", "a"], 78, ["runs: no run here", "such as runs/quickstart/masked"]),
    ("jobs/evaluate", ["emoji/mask50", "--sets", "imagnet1k"], 78, ["imagnet1k is not here", "mean imagenet1k"]),
    ("tools/tokenizer", ["show", "no.json", "a"], 78, ["no.json", "no such tokenizer", "flip tokenizer train"]),
    ("tools/prompts", ["imagnet", "--out", "x.json"], 78, ["imagnet", "folder does not exist", "the word imagenet"]),
    ("tools/predict", ["other/run", "x.png", "--labels", "a"], 78, ["'other/run'", "There are: emoji"]),
    ("tools/predict", ["emoji/mask50", "x.png", "--labels", ","], 78, ["--labels", "','", 'Example: --labels "a cat']),
    ("tools/predict", ["emoji/mask50", "--set", "twemoji", "--count", "0"], 78, ["--count", "at least 1", "0"]),
    ("tools/predict", ["emoji/mask50", "--set", "twemoji", "--top", "50"], 78, ["--top", "from 1 to 5", "50"]),
    ("tools/export", ["other/run"], 78, ["'other/run'", "There are: emoji"]),
]  # fmt: skip


@pytest.mark.parametrize(
    "script, words, code, parts", COMMANDS, ids=[" ".join(map(str, [s, *w])) for s, w, *_ in COMMANDS]
)
def test_command_explains_mistake_in_single_line(workdir, capsys, script, words, code, parts):
    Path("bad.yaml").write_text("not a tar", encoding="utf-8")
    Path("profile.yaml").write_text("kind: slurm\npartition: gpu\n", encoding="utf-8")
    Path("recipe.yaml").write_text("model: {size: B/16}\n", encoding="utf-8")
    Path("sweep.yaml").write_text("recipe: emoji\nruns: {a: }\n", encoding="utf-8")
    Path("a.xlsx").write_text("x", encoding="utf-8")
    Path("classes.csv").write_text("image,class\nx.png,cat\n", encoding="utf-8")
    Path("gone.csv").write_text("image,caption\nx/y.png,a cat\n", encoding="utf-8")
    actual, line = call_main(capsys, script, words)
    assert actual == code and not [part for part in parts if part not in line], line


@pytest.mark.parametrize("folder, option", [("runs", "--root ."), ("runs/emoji", "--root ..")])
def test_status_inside_the_folder_of_runs_names_the_option(workdir, monkeypatch, capsys, folder, option):
    monkeypatch.delenv("FLIP_RUNS")
    monkeypatch.chdir(workdir / folder)
    code, line = call_main(capsys, "jobs/status", [])
    assert code == 78 and "has sweeps" in line and line.endswith(f"{option}\n"), line


SHARD = "old/data/00000.tar"
RUN = "emoji/mask50"
MISSING = [
    # the command line; NOWHERE stands for a path that does not exist; shards and manifests have a code of their own
    ("jobs/submit", 78, "NOWHERE.yaml", "--dry-run"),
    ("jobs/submit", 78, "quickstart", "--cluster", "NOWHERE.yaml", "--dry-run"),
    ("jobs/debug", 78, "NOWHERE.yaml", "--run", "a"),
    ("jobs/status", 78, "NOWHERE"),
    ("jobs/status", 78, "--root", "NOWHERE"),
    ("jobs/logs", 78, "NOWHERE"),
    ("jobs/cancel", 78, "NOWHERE"),
    ("jobs/clean", 78, "NOWHERE"),
    ("jobs/explain", 78, "NOWHERE"),
    ("jobs/report", 78, "NOWHERE"),
    ("jobs/tensorboard", 78, "NOWHERE"),
    ("jobs/follow", 78, "NOWHERE", "--once"),
    ("jobs/evaluate", 78, "NOWHERE"),
    ("jobs/evaluate", 78, "--model", "open_clip:NOWHERE", "--sets", "dtd"),
    ("jobs/evaluate", 78, RUN, "--sets", "dtd", "--data", "NOWHERE"),
    ("jobs/evaluate", 78, RUN, "--sets", "zeroshot:pets=NOWHERE"),
    ("jobs/evaluate", 78, RUN, "--cluster", "NOWHERE.yaml"),
    ("jobs/new", 78, "mine", "--cluster", "NOWHERE.yaml"),
    ("jobs/doctor", 78, "--cluster", "NOWHERE.yaml"),
    ("jobs/doctor", 78, "--compare", "NOWHERE", "NOWHERE"),
    ("jobs/doctor", 65, "--measure", "--data", "NOWHERE", "--yes"),
    ("tools/shards", 65, "info", "NOWHERE"),
    ("tools/shards", 65, "exclude", "NOWHERE", "--ids", "1", "--out", "out"),
    ("tools/shards", 65, "drop", "NOWHERE", "--out", "out"),
    ("tools/shards", 65, "recode", "NOWHERE", "--out", "out"),
    ("tools/shards", 65, "move", "NOWHERE", "--to", "old", "--out", "out"),
    ("tools/shards", 65, "move", "old/data", "--to", "NOWHERE", "--out", "out"),
    ("tools/shards", 65, "verify", "NOWHERE"),
    ("tools/shards", 65, "inspect", "NOWHERE", "--id", "1"),
    ("tools/shards", 78, "inspect", "--run", "NOWHERE", "--step", "1"),
    ("tools/shards", 65, "index", "NOWHERE.tar", "--out", "out"),
    ("tools/shards", 65, "index", SHARD, "--add", "NOWHERE", "--out", "out"),
    ("tools/shards", 78, "index", SHARD, "--uids", "NOWHERE", "--out", "out"),
    ("tools/shards", 78, "make", "NOWHERE", "--out", "out"),
    ("tools/shards", 78, "make", "NOWHERE.csv", "--out", "out"),
    ("tools/shards", 78, "make", "old", "--images", "NOWHERE", "--out", "out"),
    ("tools/tokenizer", 78, "train", "--captions", "NOWHERE", "--vocabulary", "300", "--out", "out"),
    ("tools/tokenizer", 78, "table", "NOWHERE", "--captions", "old/data", "--out", "out"),
    ("tools/tokenizer", 78, "table", "old/data/tokenizer.json", "--captions", "NOWHERE", "--out", "out"),
    ("tools/tokenizer", 78, "show", "NOWHERE", "a"),
    ("tools/prompts", 78, "NOWHERE", "--out", "out"),
    ("tools/predict", 78, "NOWHERE", "a.png", "--labels", "a"),
    ("tools/predict", 78, "old/export", "NOWHERE.png", "--labels", "a"),
    ("tools/predict", 78, "old/export", "a.png", "--classes", "NOWHERE"),
    ("tools/export", 78, "NOWHERE"),
    ("lab/study", 78, "--page", "--docs", "NOWHERE"),
    ("lab/records/__main__", 78, "--docs", "NOWHERE"),
]  # fmt: skip


@pytest.mark.parametrize(
    "script, code, words", [(s, c, w) for s, c, *w in MISSING], ids=[" ".join(m[2:]) for m in MISSING]
)
def test_missing_input_is_a_wrong_command_line_except_shards_and_manifests(workdir, capsys, script, code, words):
    Path("old").symlink_to(ROOT / "tests" / "compatibility" / "0.2.0")
    before = sorted(workdir.rglob("*"))
    actual, line = call_main(capsys, script, [word.replace("NOWHERE", "/nowhere/missing") for word in words])
    assert actual == code and "/nowhere/missing" in line, line
    assert sorted(workdir.rglob("*")) == before, "the command writes nothing"


def test_tools_reject_wrong_run_name_before_loading_torch(workdir):
    """The import of torch takes seconds, which is too long for a typing error."""
    for script, arguments in (("predict", ["x.png", "--labels", "a"]), ("export", [])):
        text = (
            f"import sys; from tools.commands.{script} import main\nmain(sys.argv[1:]); print('torch' in sys.modules)"
        )
        command = [sys.executable, "-c", text, "other/run", *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": "/nowhere"}
        )
        assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
