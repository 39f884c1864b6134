"""Tests of shipped sweeps against published results: plans without data, costs in file heads, settings and rows."""

import json
import re
import sys
from dataclasses import replace

import pytest

from flip.common.host import Host
from flip.common.plain_data import flatten
from flip.common.yaml_io import read_yaml
from flip.config.finish import finish
from flip.config.merge import to_dict
from flip.evaluation.datasets.catalog import DatasetRequest, entries, suites
from flip.evaluation.encoding import open_clip_folder
from flip.evaluation.metrics.result_files import COLUMNS, write_result
from flip.monitoring.results import read_run
from flip.runs.errors import ConfigError
from flip.runs.rundir import RunDir
from jobs.commands.submit import main
from jobs.common.paths import SWEEPS
from jobs.planning import throughput
from jobs.planning.core_speeds import Images
from jobs.reporting.paper_comparison import Line, compare, differences, obstacles
from jobs.sweeps import published as paper
from jobs.sweeps.published import Published, published
from jobs.sweeps.sweep_file import read_sweep
from tests.jobs.outcomes import make

FILES = sorted(path.stem for path in SWEEPS.glob("*.yaml"))
OF_THE_PAPER = [name for name in FILES if read_yaml(SWEEPS / f"{name}.yaml").get("table")]
SINGLE = ["data_scaling", "joint_scaling", "model_scaling", "schedule_scaling"]
OF_OTHERS = ["clipa", "clipa_v2", "cheapest"]
SMALL = [name for name in FILES if name.endswith("_small")]
TABLES = list(read_yaml(paper.RESULTS)["tables"])
H100_NODE = Host(cores=96, memory=10**12, bf16=True, cuda=True)
LAPTOP = Host(cores=2, memory=8 * 10**9)


@pytest.fixture(autouse=True)
def empty_environment(tmp_path, monkeypatch):
    """An empty cache, an empty runs folder, and no commands but Python, which programs of sweeps need."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(sys.executable)
    monkeypatch.setenv("FLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FLIP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def head(name):
    lines = (SWEEPS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return [line for line in lines[: lines.index("")] if line.startswith("#")]


@pytest.mark.parametrize("name", [name for name in FILES if name != "quickstart_full"])
def test_shipped_sweep_is_planned_without_data(name, capsys):
    assert main(["--sweep", name, "--dry-run", "--json"]) == 0, capsys.readouterr().err
    plan = json.loads(capsys.readouterr().out)
    assert {run["action"] for run in plan["runs"]} == {"new"}
    command = f"flip submit {name}"
    assert any(command in line for line in head(name)), "the file head contains the submit command"


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (SWEEPS / "recipes").glob("*.yaml")))
def test_shipped_recipe_is_planned_without_data(recipe, tmp_path, capsys):
    run = {"data.samples": 400_000_000, "compute.accumulate": 16}
    sweep = {"title": "T", "cluster": "h100", "recipe": recipe, "runs": {"a": run}}
    (tmp_path / "planned.yaml").write_text(json.dumps(sweep))
    assert main(["--sweep", str(tmp_path / "planned.yaml"), "--dry-run"]) == 0, capsys.readouterr().err


def arithmetic_hours(run):
    """GPU-hours at 40 % of the peak, without communication and input, which depend on further values of the profile."""
    return sum(stage["compute_seconds"] * stage["steps"] for stage in run["stages"]) * run["world"] / 3600


@pytest.fixture
def kernel(monkeypatch):
    """Heads are for nodes with the visible-patch kernel, whatever this machine has."""
    monkeypatch.setattr(throughput, "uses_kernel", lambda *_: True)


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_paper_sweep_head_states_published_top1_and_cost(name, capsys, kernel):
    assert main(["--sweep", name, "--dry-run", "--json"]) == 0, capsys.readouterr().err
    plan = json.loads(capsys.readouterr().out)
    sweep = read_sweep(SWEEPS / f"{name}.yaml")
    for run in plan["runs"]:
        (line,) = [line for line in head(name) if re.match(rf"#   {re.escape(run['name'])} (?!submit )", line)]
        assert line.endswith(f", planned {run['cost']['gpu_hours']:,.0f}") and f" {arithmetic_hours(run):,.0f}" in line
        if run["name"] not in sweep.paper:
            assert "not published" in line
            continue
        row = published(sweep.paper[run["name"]])
        assert f" {row.top1['imagenet']:.1f} %" in line and (f"+- {row.within:g}" in line or row.not_yet)


@pytest.mark.parametrize("name", OF_OTHERS)
def test_other_sweep_head_states_samples_and_cost_of_source(name, capsys, kernel):
    """The head gives the cost that our plans calculate for the training length of the source, within 2 %."""
    assert main(["--sweep", name, "--dry-run", "--json"]) == 0, capsys.readouterr().err
    plan = json.loads(capsys.readouterr().out)
    sweep = read_sweep(SWEEPS / f"{name}.yaml")
    for run in plan["runs"]:
        (line,) = [line for line in head(name) if re.match(rf"#   {re.escape(run['name'])} (?!submit )", line)]
        parts = re.findall(r"([0-9.]+) ([BM])(?= )", line)
        samples = sum(float(number) * {"B": 1e9, "M": 1e6}[unit] for number, unit in parts)
        assert run["cost"]["samples"] == pytest.approx(samples, rel=0.02)
        by_flops, as_planned = re.search(r" ([0-9,]+), planned ([0-9,]+)$", line).groups()
        assert arithmetic_hours(run) == pytest.approx(float(by_flops.replace(",", "")), rel=0.02)
        assert f"{run['cost']['gpu_hours']:,.0f}" == as_planned
        assert f" {sweep.paper[run['name']]['imagenet']} %" in line


@pytest.mark.parametrize("name", [*OF_THE_PAPER, *OF_OTHERS, "superclip"])
def test_head_of_sweep_states_planned_hours_of_all_runs(name, capsys, kernel):
    assert main(["--sweep", name, "--dry-run", "--json"]) == 0, capsys.readouterr().err
    hours = json.loads(capsys.readouterr().out)["cost"]["gpu_hours"]
    lines = [line for line in head(name) if line.startswith("#   all ")]
    assert all(line.endswith(f", planned {hours:,.0f}") for line in lines) and (lines or name in SINGLE)


def test_head_of_clipa_states_what_kernel_and_recoded_shards_save(monkeypatch, capsys):
    monkeypatch.setattr(throughput, "uses_kernel", lambda *_: False)
    hours = []
    for images in (None, [Images(256, markers=True, stated=True)]):
        if images:
            monkeypatch.setattr(throughput, "images_of", lambda config, images=images: images)
        assert main(["--sweep", "clipa", "--dry-run", "--json"]) == 0
        hours.append(json.loads(capsys.readouterr().out)["cost"]["gpu_hours"])
    assert f"planned {hours[0]:,.0f} in all, and on the shards" in "\n".join(head("clipa"))
    assert f"`flip shards recode --short 256` writes {hours[1]:,.0f}." in "\n".join(head("clipa")) and hours[1] < 350


def test_recoded_shards_and_kernel_let_the_mask_save_hours(monkeypatch, capsys):
    """With whole images of 384 px, 389 samples/s a core, B/16 costs the same with the mask, and clipa 726 hours."""
    monkeypatch.setattr(throughput, "uses_kernel", lambda *_: True)
    monkeypatch.setattr(throughput, "images_of", lambda config: [Images(256, markers=True, stated=True)])
    hours = []
    for sweep in (["clipa"], *(["superclip", "--only", "b16-clip", f"stages.pretrain.mask={m}"] for m in (0, 0.5))):
        assert main(["--sweep", *sweep, "--dry-run", "--json"]) == 0
        hours.append(json.loads(capsys.readouterr().out)["cost"]["gpu_hours"])
    assert hours[0] <= 350 and hours[2] <= 0.6 * hours[1]


@pytest.mark.parametrize("name", FILES)
def test_shipped_sweep_matches_settings_of_its_published_rows(name):
    sweep = read_sweep(SWEEPS / f"{name}.yaml", ["data.samples=5507"] if name == "quickstart_full" else [])
    for run in sweep.runs:
        config = finish(run.config, LAPTOP if sweep.cluster == "local" else H100_NODE).config
        if run.name in sweep.paper and sweep.rows:
            row = published(sweep.paper[run.name])
            settings = flatten(to_dict(config))
            assert row.not_yet or not list(differences(row, settings))
            assert len(row.needs) > 30, "the required settings include those of the recipe"
    if sweep.rows and sweep.cluster != "local":
        assert {sweep.paper[name]["row"].split(",")[0] for name in sweep.paper} == {sweep.rows[0]["row"].split(",")[0]}


@pytest.mark.parametrize("table", TABLES)
def test_published_row_names_existing_run_and_known_columns(table):
    for name, entry in paper.rows(table).items():
        row = published(entry)
        assert row.run or row.not_yet, name
        if row.run.startswith("others/"):
            assert not row.needs, "an external model has no required settings"
        elif row.run:
            sweep, _, run = row.run.partition("/")
            assert run in {run.arm for run in read_sweep(SWEEPS / f"{sweep}.yaml").runs}
        if table in ("3", "4", "5", "6"):  # the suites of evaluations
            datasets = {DatasetRequest.parse(text) for text in suites()[f"paper-table{table}"]}
            columns = {
                dataset.name + suffix
                for dataset in datasets
                for suffix in COLUMNS[dataset.task or entries()[dataset.name]["task"]]
            }
            assert row.top1.keys() == columns
        else:
            allowed = {"imagenet", "imagenet1k"}
            if table == "8":  # its columns of retrieval, and of the linear probe
                allowed |= {"flickr30k", "mscoco_captions"}
            assert {name.split("-")[0] for name in row.top1} <= allowed
        assert all(18 < number < 99 for number in row.top1.values())


def test_small_sweep_head_states_lack_of_published_numbers():
    twins = {"masking_small", "batch_small", "tuning_small", "grid_small", "scaling_small", "regularise_small"}
    assert set(SMALL) == twins
    for name in SMALL:
        sweep = read_sweep(SWEEPS / f"{name}.yaml")
        assert not sweep.paper and "The paper has no numbers for this size" in "\n".join(head(name))
        for run in sweep.runs:
            assert run.config.resources.gpus == 0 and run.config.resources.cpus <= 2


def test_load_refuses_unknown_row_or_table_and_lists_known_names(tmp_path):
    path = tmp_path / "s.yaml"
    text = "set: {stages: [{name: pretrain, samples: 128, batch: 128}]}\nruns: {a: }\n"
    for line, expected in (("paper: {a: '1a, mask 51 %'}", "1a, mask 50 %"), ("table: 9z", "1a, 1b")):
        path.write_text(text + line + "\n", encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            read_sweep(path)
        assert expected in caught.value.paragraph() and "s.yaml:3" in caught.value.paragraph()


def test_obstacles_list_reasons_against_comparison(tmp_path):
    outcome = read_run(make(tmp_path / "demo", "mask50", "0.5").path)
    row = published(paper.row("1a, mask 50 %"))
    reasons = obstacles(row, [outcome], "imagenet")
    for expected in (
        "model.size is tiny, published L/16",
        "stages.pretrain.samples is 12,800, published 2.56 B",
        "data.samples is 5,000, published 400 M",
        "not scored on imagenet",
    ):
        assert expected in reasons
    # Equal and derived settings are not listed.
    assert not any("mask" in reason or "width" in reason for reason in reasons)
    assert obstacles(row, [], "imagenet") == ["no run yet"]
    masked = Published("", {}, images={"twemoji": 5000})
    (reason,) = obstacles(masked, [outcome], "twemoji-mask0.5")
    assert reason == "not scored on twemoji-mask0.5: flip evaluate demo/mask50 --mask 0.5 --ensemble"
    (protocol,) = obstacles(Published("", {}), [outcome], "voc2007")[:1]
    assert protocol == "another protocol: published with 11-point mAP over images"
    small = Published("", {"twemoji": 20.0}, images={"twemoji": 5000})
    assert obstacles(small, [outcome], "twemoji") == ["scored on 1,172 images of twemoji, published on 5,000"]
    late = Published("", {}, needs={"stages.pretrain": None, "data.samples": 5500}, near={"data.samples": 0.1})
    assert obstacles(late, [outcome], "twemoji") == ["has stages.pretrain, the published run has none"]
    assert obstacles(Published("", {}, not_yet="no masked test"), [outcome], "twemoji") == ["no masked test"]


def test_verdict_depends_on_gap_and_tolerance():
    def verdict(score, why=(), within=0.5):
        return Line(Published("r", {}, within=within), "imagenet", "a", 69.6, score, None, None, list(why)).verdict

    assert verdict(70.1) == verdict(69.1) == "agrees within 0.5"
    assert (verdict(70.2), verdict(68.0)) == ("above by more than 0.5", "below by more than 0.5")
    assert (verdict(None), verdict(69.6, ["short"])) == ("not comparable yet", "not comparable")
    assert verdict(69.6, within=None) == "no tolerance given"


@pytest.mark.parametrize("table", TABLES)
def test_score_on_fewer_images_of_imagenet_is_not_comparable(table, tmp_path):
    outcome = read_run(make(tmp_path / "sizes", "flip-b16", "0.5").path)
    for row in map(published, paper.rows(table).values()):
        for test in row.top1:
            if test in ("imagenet", "imagenet1k"):
                few = replace(outcome, result={"evaluations": [{"name": test, "n": 1000}]})
                assert f"scored on 1,000 images of {test}, published on 50,000" in obstacles(row, [few], test)


def test_comparison_includes_registered_external_model(tmp_path):
    """Such a model has a published number and a score measured here, but no settings to compare."""
    outcome = read_run(make(tmp_path / "sizes", "flip-b16", "0.5").path)
    external = RunDir(tmp_path / "others" / "openclip-b16")
    open_clip_folder.register(external, "/models/openclip-b16")
    checkpoint = {"path": "", "stage": "foreign", "samples": 0, "digest": "0" * 64}
    score = {"name": "imagenet1k", "set": "imagenet1k", "task": "zeroshot", "role": "test", "top1": 0.671}
    score["precision"] = "fp32"
    write_result(external, score | {"n": 50_000, "interval": [0.667, 0.675], "chance": 0.001}, checkpoint, "job")
    lines = {line.row.row: line for line in compare([], [outcome], "2")}
    comparison = lines["2, OpenCLIP B/16"]
    assert (comparison.run, comparison.paper, comparison.verdict) == ("others/openclip-b16", 67.1, "agrees within 0.5")
    assert comparison.result == pytest.approx(67.1)
    assert lines["2, OpenCLIP L/14"].verdict == "not comparable yet"
