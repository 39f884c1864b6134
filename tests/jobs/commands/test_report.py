"""``report``: tables, charts and pages of complete, failed, partial and hostile sweeps."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import Mock
from xml.etree import ElementTree

import pytest
from PIL import Image

from flip.config import merge
from flip.config.schema import Init
from flip.monitoring import results as monitoring
from flip.monitoring.results import find_runs, read_run
from flip.monitoring.results import row as results_row
from flip.runs.rundir import read_json, write_json
from jobs.pages.document import Figure, Table
from jobs.pages.html import render
from jobs.pages.markdown import markdown
from jobs.reporting import outcomes as results
from jobs.reporting import paper_comparison as against
from jobs.reporting import ranking, seed_groups
from jobs.reporting.figures import accuracy, focus
from jobs.reporting.report import findings, result_cells, title
from tests.jobs import gallery
from tests.jobs.outcomes import make
from tests.jobs.outcomes import write_result as store_result
from tests.jobs.pages.svg_lines import lines_of

ROOT = Path(__file__).resolve().parents[3]
CRASH = {"action": "stop", "cause": "crash", "reason": "three crashes without a checkpoint"}


@pytest.fixture
def sweep(tmp_path):
    """Two complete groups, one that failed half way, and one that never started."""
    folder = tmp_path / "runs" / "demo"
    make(folder, "mask50", "0.5", top1=0.25)
    make(folder, "clip", "0", top1=0.2, speed=200.0)
    make(folder, "mask75", "0.75", steps=50, end=CRASH, complete=False)
    make(folder, "mask90", "0.9", steps=0, complete=False)
    names = ["mask50", "mask75", "clip", "mask90"]
    about = {"name": "demo", "title": "A demonstration", "runs": names, "paper": {"clip": {"twemoji": 19.5}}}
    write_json(folder / "sweep.json", about)
    return folder


def command(*argv, root):
    environment = {**os.environ, "FLIP_RUNS": str(root)}
    return subprocess.run(
        [sys.executable, ROOT / "jobs", "report", *argv], capture_output=True, text=True, env=environment, cwd=root
    )


def page(run_outcomes):
    return render(title(run_outcomes), findings(run_outcomes))


def outcomes(folder):
    return results.outcomes([read_run(path.parent).run for path in sorted(folder.glob("*/config.yaml"))])


@pytest.mark.long
def test_report_prints_results_table_in_sweep_order(sweep):
    done = command("demo", root=sweep.parent)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["mask50", "mask75", "clip", "mask90"], "in the sweep's order"
    assert "25.0 (22.5-27.5)" in lines[1] and "32 s" in lines[1]
    (paper_row,) = [line for line in lines if "19.5" in line]
    assert paper_row.split()[:6] == ["-", "clip", "twemoji", "19.5", "20.0", "(17.7-22.3)"] and "+0.5" in paper_row
    assert "failed" in lines[2] and "stopped" in lines[4]
    assert "mask75 is failed: three crashes without a checkpoint" in done.stdout
    assert "useful training steps; lost work, evaluation and start-up not counted" in done.stdout
    assert "One seed of each cannot rank the runs" in done.stdout
    assert (sweep / "report.html").exists()


def test_seed_groups_merge_seeds_into_single_arm(tmp_path):
    for seed, top1 in enumerate((0.2, 0.3, 0.1)):
        make(tmp_path / "demo", f"mask50-s{seed}", seed=seed, top1=top1)
    run_outcomes = outcomes(tmp_path / "demo")
    (group,) = seed_groups.group_by_seed(run_outcomes)
    score = group.score("twemoji")
    assert group.name == "mask50" and (score.low, score.high, score.runs) == (0.1, 0.3, 3)
    assert score.mean == pytest.approx(0.2)
    assert "20.0 (10.0-30.0)" in results.terminal_page(run_outcomes)
    assert "cannot rank" not in results.terminal_page(run_outcomes)


def test_seeds_with_other_settings_without_influence_are_one_arm(tmp_path):
    """Seed 1 came later: with another wall limit, on a node of other memory."""
    for seed, hours, recompute in ((0, 24.0, None), (1, 12.0, "block")):
        run = make(tmp_path / "demo", f"mask50-s{seed}", seed=seed, top1=0.2 + 0.1 * seed)
        config = merge.read_config(run.config)
        config.resources.hours = hours
        config.stages[0].compute.recompute = recompute
        config.data.buffer += seed
        config.checkpoint.keep_at = [128] * seed
        run.config.write_text(merge.dump(config), encoding="utf-8")
    run_outcomes = outcomes(tmp_path / "demo")
    (group,) = seed_groups.group_by_seed(run_outcomes)
    assert str(group.score("twemoji")) == "25.0 (20.0-30.0)"
    assert "24.0, 12.0" in markdown(findings(run_outcomes))
    config.seed = 0
    run.config.write_text(merge.dump(config), encoding="utf-8")
    # One seed twice: the sweep compares the settings.
    assert len(seed_groups.group_by_seed(outcomes(tmp_path / "demo"))) == 2
    assert {"data.workers", "data.sets.*.weight", "stages.*.compute.recompute", "monitor.wandb"} <= seed_groups.FREE
    changing = {"optim.clip", "stages.*.mask", "data.lanes", "resources.nodes", "compute.threads", "init.commit"}
    assert not changing & seed_groups.FREE


def test_seeds_that_start_from_runs_of_their_own_seeds_are_one_group(tmp_path):
    folder = tmp_path / "demo"
    for name, seed in (("short", 0), ("short-s1", 1)):
        run = make(folder, name, seed=seed)
        config = merge.read_config(run.config)
        trunk = str(folder / name.replace("short", "trunk"))
        config.init = Init(run=trunk, stage="pretrain", samples=6400, commit=f"{seed:016d}", extend=True)
        run.config.write_text(merge.dump(config), encoding="utf-8")
    (group,) = seed_groups.group_by_seed(outcomes(folder))
    assert [outcome.run.name for outcome in group.outcomes] == ["short", "short-s1"]


def test_run_that_is_repeated_with_its_seed_is_no_second_seed(tmp_path):
    for name, seed in (("a-s0", 0), ("a-s1", 1), ("again", 0), ("third", 0)):
        make(tmp_path / "demo", name, seed=seed)
    groups = seed_groups.group_by_seed(outcomes(tmp_path / "demo"))
    assert [[outcome.run.name for outcome in group.outcomes] for group in groups] == [
        ["a-s0", "a-s1"],
        ["again"],
        ["third"],
    ]
    assert "One seed of each" in seed_groups.seeds_caution(groups[1:])


def test_score_other_than_accuracy_has_no_interval_and_is_drawn_and_exported(tmp_path):
    """Accuracy and the mean over classes may differ by points; the interval is that of accuracy."""
    for name in ("a", "b"):
        run = make(tmp_path / "demo", name, mask="0.5" if name == "a" else "0.75", top1=0.9)
        result = read_json(run.result)
        item = next(item for item in result["evaluations"] if item["name"] == "twemoji")
        item |= {"metric": "mean per class", "score": 0.81 if name == "a" else 0.809}
        store_result(run, result)
    run_outcomes = outcomes(tmp_path / "demo")
    grouped = seed_groups.group_by_seed(run_outcomes)
    assert result_cells(grouped, run_outcomes)[0]["twemoji (mean per class)"] == "81.0"
    (headline,) = ranking.headlines(grouped, run_outcomes)
    assert "a 81.0" in headline.sentence and headline.explanation == "Not all have intervals."
    blocks = accuracy(grouped, run_outcomes, focus(grouped, run_outcomes))
    figures = [item for block in blocks for item in getattr(block, "blocks", [block]) if isinstance(item, Figure)]
    plots = [plot for figure in figures for plot in figure.plots if plot.y.startswith("twemoji")]
    marks = [mark for plot in plots for series in plot.series if series.name == "a" for mark in series.marks]
    assert marks and all((mark.y, mark.low, mark.high) == (pytest.approx(81.0),) * 3 for mark in marks)
    assert {mark.label for mark in marks} == {"a: 81.0 %"}
    assert results_row(run_outcomes[0])["test.twemoji.score"] == 0.81


def test_result_cells_show_scoring_precision_unless_all_scores_are_fp32(tmp_path):
    for name, precision in (("new", "fp32"), ("fast", "bf16")):
        run = make(tmp_path / name, name)
        result = read_json(run.result)
        for item in result["evaluations"]:
            item["precision"] = precision
        store_result(run, result)
    by_name = {name: outcomes(tmp_path / name) for name in ("new", "fast")}
    mixed = [*by_name["new"], *by_name["fast"]]
    scored = {row["run"]: row["scored in"] for row in result_cells(seed_groups.group_by_seed(mixed), mixed)}
    assert scored == {"new": "fp32", "fast": "bf16"}
    assert "scored in" not in result_cells(seed_groups.group_by_seed(by_name["new"]), by_name["new"])[0]
    assert "scored in fp32 unless a column says otherwise" in results.terminal_page(by_name["new"])


def test_rows_and_cells_compare_all_runs_once(sweep, monkeypatch):
    """Not once per run: that made the report of a large sweep quadratic."""
    differing = Mock(wraps=results.differing)
    monkeypatch.setattr(results, "differing", differing)
    assert len(results.rows(outcomes(sweep))) == 4 and differing.call_count == 1
    merged = Mock(wraps=monitoring.shown)
    read = Mock(wraps=seed_groups.SeedGroup.precision.fget)
    monkeypatch.setattr(monitoring, "shown", merged)
    monkeypatch.setattr(seed_groups.SeedGroup, "precision", property(read))
    results.terminal_page(outcomes(sweep))
    assert merged.call_count == 4, "the scores of a run"
    assert read.call_count == 4, "each group's once: all are fp32, so that no column shows them"


def test_sets_include_columns_of_retrieval_and_probe_tasks(tmp_path):
    """Retrieval has two result columns and a probe has one; each has its own suffix."""
    outcome = outcomes(make(tmp_path / "demo", "mask50").path.parent)[0]
    for name, task in (("icons", "retrieval"), ("carbon", "probe")):
        outcome.settings.update({f"evaluate.sets.{name}.role": "test", f"evaluate.sets.{name}.task": task})
    tests = ["twemoji", "openmoji", "icons-text", "icons-image", "carbon-probe"]
    assert list(seed_groups.sets([outcome])) == [*tests, "validation"]


def test_arm_progress_averages_only_complete_seeds(tmp_path):
    for seed in (0, 1):
        make(tmp_path / "demo", f"mask50-s{seed}", seed=seed)
    make(tmp_path / "demo", "mask50-s2", seed=2, steps=20, end=CRASH, complete=False, speed=10.0)
    run_outcomes = outcomes(tmp_path / "demo")
    (group,) = seed_groups.group_by_seed(run_outcomes)
    assert (group.progress("samples"), group.progress("seconds")) == (12_800, 32)
    # Without a complete seed, incomplete seeds count.
    assert seed_groups.group_by_seed(run_outcomes[2:])[0].progress("samples") == 2560
    assert result_cells([group], run_outcomes)[0]["seeds"] == "2 of 3"


def test_report_refuses_unwritable_output_path_before_printing(sweep):
    for option in ("--out", "--csv"):
        done = command("demo", option, "absent/results", root=sweep.parent)
        assert (done.returncode, done.stdout) == (78, ""), done.stderr
        assert "absent/results: " in done.stderr and "mkdir -p" in done.stderr and "Free space" not in done.stderr


def test_csv_text_escapes_spreadsheet_formulas():
    rows = [{"run": "=HYPERLINK(1)", "reason": "@x", "loss": -1.5, "sweep": "a"}]
    assert results.csv_text(rows) == "run,reason,loss,sweep\n'=HYPERLINK(1),'@x,-1.5,a\n"


def test_report_csv_and_json_have_row_per_run(sweep):
    rows = json.loads(command("demo", "--json", root=sweep.parent).stdout)
    assert [row["run"] for row in rows] == ["mask50", "mask75", "clip", "mask90"]
    assert rows[0]["test.twemoji.top1"] == 0.25 and rows[1]["test.twemoji.top1"] is None
    assert rows[0]["stages.pretrain.mask"] == "0.5" and rows[1]["samples"] == 50 * 128
    assert (rows[2]["paper.twemoji.top1"], rows[2]["paper.twemoji.comparable"]) == (0.195, "yes")
    assert rows[0]["paper.twemoji.top1"] is None
    done = command("demo", "--csv", "-", root=sweep.parent)
    table = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [row["state"] for row in table] == ["complete", "failed", "complete", "stopped"]


class Texts(HTMLParser):
    """A parser that checks the balance of tags and collects tags and text."""

    VOID = ("meta", "br")

    def __init__(self):
        super().__init__()
        self.open = []
        self.tags = []
        self.text = ""

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def parsed(html):
    parser = Texts()
    parser.feed(html)
    assert not parser.open
    return parser


@pytest.mark.long
def test_html_page_shows_all_results_without_external_resources(sweep):
    html = page(outcomes(sweep))
    parser = parsed(html)
    for text in (
        "A demonstration",
        "2 of 4 runs complete",
        "lost work, evaluation and start-up not counted",
        "25.0 (22.5-27.5)",
        "three crashes",
        "stages.pretrain.mask",
    ):
        assert text in parser.text
    figures = [tag for tag, _ in parser.tags if tag in ("figure", "details")]
    assert figures[:6] == ["figure", "details", *["figure"] * 4], "a large chart, folded costs of three sets, training"
    for tag, attributes in parser.tags:
        assert tag not in ("script", "link", "img", "iframe") and "src" not in attributes
        assert attributes.get("href", "#").startswith("#")
    ids = [attributes["id"] for _, attributes in parser.tags if "id" in attributes and "run" in attributes["id"]]
    assert {"run-mask50", "run-mask75", "run-clip", "run-mask90"} <= set(ids) and len(ids) == len(set(ids))
    links = {attributes["href"][1:] for _, attributes in parser.tags if "href" in attributes}
    assert links <= {attributes.get("id") for _, attributes in parser.tags}, "every link has a target"
    assert ("mask50", 4) in lines_of(html), "four scores on the validation set, and none of another set"
    assert not re.search(r"url\((?!#)", html) and "@import" not in html
    assert "mask50: 25.0 % (22.5 to 27.5)" in parser.text, "the mark of the final score"
    assert "mask50: 24.0 % (21.6 to 26.4)" in parser.text, "the mark of the final score on the other set"


def test_html_page_escapes_hostile_names(tmp_path):
    name = "<script>alert(1)<&'\""
    run = make(tmp_path / "demo", name.replace("/", "_"), steps=20, end={**CRASH, "reason": name}, complete=False)
    write_json(run.path.parent / "sweep.json", {"title": name, "notes": name, "runs": []})
    parser = parsed(page(outcomes(tmp_path / "demo")))
    assert "script" not in [tag for tag, _ in parser.tags]
    assert parser.text.count(name) >= 5


def test_result_cells_show_no_gpu_hours_for_cpu_run(tmp_path):
    for name, gpus in (("cpu", 0), ("gpu", 2)):
        run = make(tmp_path / "s", name, mask="0.5" if gpus else "0.75")
        config = merge.read_config(run.config)
        config.resources.gpus = gpus
        run.config.write_text(merge.dump(config), encoding="utf-8")
    run_outcomes = results.outcomes(find_runs(tmp_path))
    rows = result_cells(seed_groups.group_by_seed(run_outcomes), run_outcomes)
    assert [(row["run"], row["GPU-hours"] == "-") for row in rows] == [("cpu", True), ("gpu", False)]


def test_html_page_renders_sweep_with_only_damaged_run(tmp_path):
    run = make(tmp_path / "demo", "broken", steps=20, complete=False)
    run.status.write_text("{")
    html = page(outcomes(tmp_path / "demo"))
    assert "not JSON" in html and "No run is complete yet" in html


@pytest.mark.long
def test_report_folder_contains_page_markdown_csv_and_figures(sweep, tmp_path):
    out = tmp_path / "deep" / "results"
    done = command("demo", "--folder", str(out), root=sweep.parent)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == {"report.html", "report.md", "results.csv", "figures"}
    assert (out / "report.html").read_text() == (sweep / "report.html").read_text()
    text = (out / "report.md").read_text(encoding="utf-8")
    named = re.findall(r"\]\((figures/[^)]+\.svg)\)", text)
    figures = {path.name for path in (out / "figures").iterdir()}
    assert len(named) == 3 * 4 + 2
    assert {Path(name).name for name in named} | {Path(name).with_suffix(".png").name for name in named} == figures
    for name in figures:
        content = (out / "figures" / name).read_bytes()
        if name.endswith(".png"):
            with Image.open(io.BytesIO(content)) as image:
                assert image.size == ((1600, 840) if name == "accuracy-validation-1.png" else (840, 580))
                assert len(image.convert("RGB").getcolors(1 << 20)) > 10
        else:
            assert ElementTree.fromstring(content).tag == "{http://www.w3.org/2000/svg}svg"
    assert [row["run"] for row in csv.DictReader(io.StringIO((out / "results.csv").read_text()))][0] == "mask50"


def test_report_markdown_has_headline_summary_and_tables(sweep):
    done = command("demo", "--markdown", "-", root=sweep.parent)
    assert done.returncode == 0
    title, _, headline = done.stdout.splitlines()[:3]
    assert title == "# A demonstration"
    assert headline.startswith("**Highest on twemoji: mask50 25.0 %, clip 20.0 % (one seed each, chance 0.0853 %);")
    assert headline.endswith("; openmoji agrees**")
    assert "\n\ndemo: 2 of 4 runs complete, 1 failed" in done.stdout and "| **25.0 (22.5-27.5)** |" in done.stdout
    tables = re.findall(r"(?:^\|.*\|\n)+", done.stdout, re.MULTILINE)
    for table in tables:
        # All rows have the same number of cells.
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert "| mask75 | failed | 50 % |" in done.stdout and "figures/" not in done.stdout


@pytest.mark.long
def test_focus_colours_best_seven_arms_and_greys_rest(tmp_path):
    for i in range(20):
        make(tmp_path / "demo", f"r{i:02}", f"0.{i + 10}", top1=0.1 + 0.01 * i)
    run_outcomes = outcomes(tmp_path / "demo")
    styles = focus(seed_groups.group_by_seed(run_outcomes), run_outcomes)
    assert [i for i, style in enumerate(styles) if style is not None] == list(range(13, 20)), "the best seven"
    assert styles[19] == 0 and "Grey: 13 others." in parsed(page(run_outcomes)).text


def test_headlines_rank_arms_and_name_indistinguishable_arms(tmp_path):
    folder = tmp_path / "demo"
    for name, mask, top1 in (("clip", "0", 0.188), ("mask75", "0.75", 0.276), ("mask50", "0.5", 0.269)):
        make(folder, name, mask, top1=top1)
    make(folder, "broken", "0.9", steps=50, end=CRASH, complete=False)
    run_outcomes = outcomes(folder)
    (headline,) = ranking.headlines(seed_groups.group_by_seed(run_outcomes), run_outcomes)
    ranked = "mask75 27.6 %, mask50 26.9 %, clip 18.8 % (one seed each, chance 0.0853 %)"
    assert headline.sentence == f"No clear winner on twemoji: {ranked}; openmoji agrees"
    assert headline.explanation == "Not distinguishable on twemoji, as their intervals overlap: mask75 and mask50."
    for seed in (1, 2):
        make(folder, f"clip-s{seed}", "0", seed=seed, top1=0.188 + seed / 1000)
    run_outcomes = outcomes(folder)
    (headline,) = ranking.headlines(seed_groups.group_by_seed(run_outcomes), run_outcomes)
    assert "clip 18.9 % (1 to 3 seeds, chance " in headline.sentence
    text = parsed(page(run_outcomes)).text
    assert text.index("mask75 27.6 %, mask50") < text.index("5 of 6 runs complete")
    assert ranking.headlines(seed_groups.group_by_seed(run_outcomes), run_outcomes[:0]) == []


def test_report_marks_best_value_per_column_and_varying_throughput(tmp_path):
    """The speed and costs of a run whose throughput varies are never marked as the best."""
    folder = tmp_path / "demo"
    make(folder, "a", "0.5", top1=0.2, speed=400.0)
    make(folder, "b", "0.75", top1=0.3, speed=500.0)
    varying = make(folder, "c", "0.9", top1=0.1, speed=900.0)
    lines = [json.loads(line) for line in (varying.metrics / "1.jsonl").read_text().splitlines()]
    lines = [line | {"step": 20 * i + step, "samples_per_second": 900.0 if i else 300.0}
             for i in (0, 1) for step, line in enumerate(lines)]  # fmt: skip
    (varying.metrics / "1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_outcomes = outcomes(folder)
    assert [outcome.throughput_varies for outcome in run_outcomes] == [None, None, True]
    html = page(run_outcomes)
    rows = re.findall(r"<tr>(.*?)</tr>", html[html.index('id="results"') :], re.DOTALL)[1:4]
    assert [row.count("★") for row in rows] == [0, 6, 0] and "900 †" in rows[2], "scores, samples/s, time, hours"
    assert "Throughput varies (†): c. " in results.terminal_page(run_outcomes)
    assert "Throughput varies (†): c. " in html and html.count("c 10.0 †") > 1
    assert "**30.0 (27.4-32.6)**" in markdown(findings(run_outcomes))


def test_equal_costs_have_no_best_mark(tmp_path):
    """Costs within 5 % are equal: marked together if other runs cost more, and not marked if all cost the same."""
    folder = tmp_path / "demo"
    for name, mask, speed in (("a", "0.5", 400.0), ("b", "0.6", 404.0)):
        make(folder, name, mask, speed=speed)
    (results_table,) = [block for block in findings(outcomes(folder)) if isinstance(block, Table) and block.links]
    assert results_table.best == {}
    make(folder, "c", "0", speed=200.0)
    (results_table,) = [block for block in findings(outcomes(folder)) if isinstance(block, Table) and block.links]
    assert results_table.best == {"samples/s": [0, 1], "training": [0, 1], "core-hours": [0, 1]}


def test_baseline_of_the_sweep_is_a_row_of_the_results(tmp_path):
    folder = tmp_path / "demo"
    for name, mask in (("a", "0.5"), ("b", "0.75")):
        make(folder, name, mask)
    write_json(folder / "sweep.json", {"runs": ["a", "b"], "baselines": {"nearest drawing": {"twemoji": 48.0}}})
    run_outcomes = outcomes(folder)
    (results_table,) = [block for block in findings(run_outcomes) if isinstance(block, Table) and block.links]
    row = results_table.rows[-1]
    assert (row["run"], row["state"], row["twemoji"], row["openmoji"]) == ("nearest drawing", "baseline", "48.0", "-")
    assert set(row) == set(results_table.rows[0])
    assert "nearest drawing" in parsed(page(run_outcomes)).text and 'href=""' not in page(run_outcomes)


def test_findings_tabulate_differing_settings_by_run(tmp_path):
    for i in range(10):
        make(tmp_path / "demo", f"r{i}", f"0.{i}5")
    blocks = findings(outcomes(tmp_path / "demo"))
    first, second = (block for block in blocks if isinstance(block, Table) and "setting" in block.rows[0])
    assert list(first.rows[0]) == ["setting", *(f"r{i}" for i in range(8))] and list(second.rows[0])[1:] == ["r8", "r9"]
    assert first.rows == [{"setting": "stages.pretrain.mask", **{f"r{i}": f"0.{i}5" for i in range(8)}}]


def test_paper_comparison_uses_runs_of_other_sweeps(tmp_path, monkeypatch):
    """Table 1b needs two runs of the sweep ``masking``. One row is not complete; one run has another recipe."""
    monkeypatch.setenv("FLIP_CACHE", str(tmp_path / "cache"))
    gallery.sweep(tmp_path, "masking")
    more = ["stages.pretrain.warmup=25.6e6"]
    folder = gallery.sweep(tmp_path, "batch", {"mask75-16k": (0.5, "running")}, more=more)
    run_outcomes = outcomes(folder)
    lines = {line.row.row: line for line in against.compare(seed_groups.group_by_seed(run_outcomes), run_outcomes)}
    assert list(lines) == [f"1b, {mask} %, {batch}k" for mask in (50, 75) for batch in (16, 32, 64)]
    assert lines["1b, 50 %, 32k"].run == "masking/mask50" and lines["1b, 50 %, 32k"].obstacles == []
    assert lines["1b, 50 %, 16k"].obstacles == ["stages.pretrain.warmup is 25.6 M, published 51.2 M"]
    assert lines["1b, 75 %, 16k"].obstacles[0] == "mask75-16k is stopped" and lines["1b, 75 %, 16k"].gap is None
    assert "not comparable yet" in results.terminal_page(run_outcomes)
    assert "agrees within 0.5" in results.terminal_page(run_outcomes)
    tuned = against.compare(seed_groups.group_by_seed(run_outcomes), run_outcomes, "1e")
    assert [(line.run, line.verdict) for line in tuned if line.row.row.startswith("1e, 50")] == [
        ("masking/mask50", "agrees within 0.5"),
        ("tuning/mask50", "not comparable yet"),
    ]
    # Whole and masked images.
    assert len({line.set for line in against.compare(seed_groups.group_by_seed(run_outcomes), run_outcomes, "1d")}) == 5


def test_paper_comparison_has_line_for_each_run_with_plain_numbers(sweep):
    about = read_json(sweep / "sweep.json")
    write_json(sweep / "sweep.json", about | {"paper": {"clip": {"validation": 19.5}, "mask50": {"validation": 30.0}}})
    run_outcomes = outcomes(sweep)
    lines = against.compare(seed_groups.group_by_seed(run_outcomes), run_outcomes)
    assert {line.run: line.paper for line in lines} == {"clip": 19.5, "mask50": 30.0}


def test_flops_of_run_match_plan(tmp_path, monkeypatch):
    monkeypatch.setenv("FLIP_CACHE", str(tmp_path / "cache"))
    for name in ("tuning", "tuning_small", "text_masking", "quickstart", "superclip"):
        for outcome in outcomes(gallery.sweep(tmp_path, name)):
            assert seed_groups.flops(outcome) == pytest.approx(outcome.result["flops"], rel=1e-12)
            assert seed_groups.flops(outcome, 1000) < seed_groups.flops(outcome, 2000)
