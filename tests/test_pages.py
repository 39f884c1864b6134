"""Tests that commands, links, files, settings and scripts in README, docs/ and --help are valid."""

import argparse
import ast
import contextlib
import importlib
import io
import json
import re
import shlex
import subprocess
import sys
import textwrap
import types
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from benchmarks import table
from flip.config.merge import _paths, merge, read_yaml
from flip.config.schema import Config
from flip.data.augment import AugmentationStep, View
from flip.data.chunk_reader import ChunkReader
from flip.data.manifest.build import index
from flip.data.manifest.manifest import Manifest
from jobs.__main__ import PACKAGES
from jobs.common.cluster_profile import load_profile
from jobs.sweeps import command_file, expansion, sweep_file
from tests.synthetic import make_dataset
from tools.shards_commands.manifest import excepting

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "AGENTS.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = ("jobs/commands", "tools/commands", "lab", "lab/icons", "lab/records", "benchmarks")
COMMAND_SOURCES = [*PAGES, *sorted((ROOT / "sweeps").rglob("*.yaml")), ROOT / "Makefile"]
COMMAND_SOURCES += [path for folder in CODE for path in sorted((ROOT / folder).glob("*.py"))]
COMMAND = r"(?:python3? benchmarks/\w+\.py|python -m lab\.(?!NAME)[a-z]+|flip (?!COMMAND)[a-z][\w-]*)(?: |$)"
LINE = re.compile(rf"^(?:[#\s]|sbatch .*)*({COMMAND}.*)$|^\|[^|]*\| `({COMMAND}.*)` \|$")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NAMED = re.compile(r"`((?:flip|jobs|tools|lab|tests|sweeps|benchmarks|docs)/[\w/]+\.(?:py|yaml|md|json|sh))\b")
HEADING = re.compile(r"(docs/\w+\.md), ([A-Z][^.,:;()`]*)")
"""A page and, after a comma, the heading of one of its sections."""
SETTING = re.compile(
    r"`((?:model|data|augment|stages|optim|compute|checkpoint|evaluate|monitor|resources|init)\.[\w.]+)"
)

HISTORY = ("CHANGELOG",)
"""Pages that name files of older versions."""
CREATED_FILES = ("sweeps/clusters/mine.yaml", "sweeps/recipes/NAME.yaml", "docs/study.md")
"""Files that a user, or a command on a page, creates."""


class Parsed(Exception):
    """Raised when the parser has accepted the arguments."""


@cache
def commands() -> dict[str, str]:
    """Return command -> its place in the documentation. Explanations follow after three spaces or a #."""
    places = {}
    for path in COMMAND_SOURCES:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for number, line in enumerate(text.splitlines(), 1):
            if match := LINE.match(line):
                command = match[1] or match[2].replace("\\|", "|")
                # of sbatch --wrap
                if command.count('"') % 2:
                    command = command.removesuffix('"')
                for part in re.split(r"\s{3,}|\s+#\s", command):
                    if re.match(COMMAND, part):
                        places.setdefault(part.strip(), f"{path.relative_to(ROOT)}:{number}")
    return places


def parsers(kind: type = argparse.ArgumentParser) -> list[type]:
    """Return ``kind`` and all its subclasses."""
    return [kind, *(below for child in kind.__subclasses__() for below in parsers(child))]


def program(line: str) -> tuple[ModuleType, list[str]]:
    """Return the module whose ``main`` a command line calls, and its arguments."""
    _, name, *argv = shlex.split(line)
    if name == "-m":
        name, *argv = argv
        if (ROOT / name.replace(".", "/")).is_dir():
            name += ".__main__"
    elif "/" in name:
        name = name.removesuffix(".py").replace("/", ".")
    else:
        command = name.replace("-", "_")
        name = f"{PACKAGES[command]}.{command}"
    return importlib.import_module(name), argv


def parser_error(line: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the error of the command's parser, or an empty string. Stop each command after its parser."""
    module, argv = program(line)

    def stopping(real):
        def parse(self, arguments=None, namespace=None):
            real(self, arguments, namespace)
            raise Parsed

        return parse

    stderr = io.StringIO()
    with monkeypatch.context() as patched, contextlib.redirect_stderr(stderr):
        for kind in parsers():
            if "parse_args" in vars(kind):
                patched.setattr(kind, "parse_args", stopping(kind.parse_args))
        try:
            module.main(argv)
        except Parsed:
            return ""
        except SystemExit as exited:
            return exited.code and stderr.getvalue().strip().splitlines()[-1]
    return "it parsed nothing"


def test_documented_commands_parse(monkeypatch):
    assert len(commands()) > 120
    wrong = {
        place: f"{line}: {error}" for line, place in commands().items() if (error := parser_error(line, monkeypatch))
    }
    assert not wrong


def executed(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and error of a command line. ``submit`` only plans, with a profile that every clone has."""
    module, argv = program(line)
    if line.startswith("flip submit "):
        for waiting in ("--watch", "--foreground", "--retry"):
            argv = [word for word in argv if word != waiting]
        argv = [{"mine": "h100"}.get(word, word) for word in [*argv, "--dry-run"]]
    capsys.readouterr()
    code = module.main(argv)
    return code, capsys.readouterr().err


@pytest.mark.long
def test_documented_sweeps_plan_in_empty_folder(tmp_path, monkeypatch, capsys):
    """All shipped sweeps that a page or a comment submits, without data; and what needs nothing else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLIP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("FLIP_CACHE", str(tmp_path / "cache"))
    shipped = "|".join(path.stem for path in (ROOT / "sweeps").glob("*.yaml"))
    sweep = re.compile(rf"flip submit (?:sweeps/)?(?:{shipped})(?:\.yaml)?(?: |$)")
    others = ("flip schema sweep", "flip schema status", "flip evaluate --list", "python -m lab.study --plan")
    lines = [line for line in commands() if sweep.match(line) or line in others]
    lines = [line for line in lines if "~/" not in line and "=/" not in line]  # they need a Slurm, and data
    assert len(lines) > 35 and set(others) <= set(lines)
    wrong = {}
    for line in lines:
        code, error = executed(line, capsys)
        if code and not (code == 65 and "flip demo_data" in error):
            wrong[f"{commands()[line]}: {line}"] = error
    assert not wrong and not list(tmp_path.iterdir())


@pytest.mark.long
def test_start_page_plans_own_sweep_from_shards(tmp_path, monkeypatch, capsys):
    """The commands of its section on an own sweep, one after the other, in an empty folder."""
    place = tmp_path / "data"
    make_dataset(place, samples=200, shards=2, size=32)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setenv("FLIP_RUNS", str(tmp_path / "runs"))
    lines = re.split(r"\s+#.*\n|\n", block("start.md", "flip shards index").strip())
    lines = [line.replace("/data", str(place)).replace(" --watch", " --dry-run") for line in lines]
    assert [line.split()[1] for line in lines] == ["shards", "tokenizer", "new", "submit", "submit", "report"]
    for line in lines[:-1]:
        code, error = executed(line, capsys)
        assert code == 0, (line, error)
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["my.yaml"]


def anchors(path: Path) -> set[str]:
    """Return the anchors of the headings, as sites that render Markdown create them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_links_resolve(page):
    broken = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in link:
            file, _, anchor = link.partition("#")
            target = (page.parent / file) if file else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_every_table_begins_with_its_head(page):
    """An empty line within a table would make paragraphs of the rows below it."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert not [table for table in tables if not re.match(r"\|.*\n\|[ :-]*-", table)]


def test_docs_index_lists_every_page():
    listed = LINK.findall((ROOT / "docs" / "index.md").read_text(encoding="utf-8"))
    pages = {path.name for path in PAGES if path.parent == ROOT / "docs" and path.stem != "index"}
    assert not pages - set(listed), "add a line for each to docs/index.md"


def test_pages_name_existing_files_and_settings():
    keys = {re.sub(r"\.NAME\b", "", key) for key in _paths()}
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
    missing = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        names = {*NAMED.findall(text)} - {*tracked, *CREATED_FILES}
        if page.stem not in HISTORY:
            missing += [f"{page.name}: {name}" for name in names]
        for key in SETTING.findall(text):
            plain = re.sub(r"^(stages|evaluate\.sets|data\.sets)\.(NAME|\w+)(?=\.)", r"\1", key.rstrip("."))
            if not {key, plain} & keys:
                missing += [f"{page.name}: {key}"]
    assert not missing


def test_code_names_existing_headings_of_pages():
    """As in "docs/restarts.md, Stop and resume": sections move to other pages."""
    sources = [
        path for folder in ("flip", "jobs", "tools", "lab", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    ]
    named = {
        (path.relative_to(ROOT), page, title)
        for path in sources
        for page, title in HEADING.findall(re.sub(r"\s+#?\s*", " ", path.read_text(encoding="utf-8")))
    }
    assert len(named) > 30
    missing = [each for each in named if not any(_is_same(each[2], title) for title in headings(ROOT / each[1]))]
    assert not missing


def headings(page: Path) -> list[str]:
    """The headings of a page; none if there is no such page."""
    if not page.exists():
        return []
    return re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)


def _is_same(named: str, title: str) -> bool:
    """Whether the words after the page begin with a heading, or are one up to its first comma."""
    return named.startswith(title) or title.startswith(f"{named},")


def test_command_help_has_usage_examples():
    """Every command with arguments has examples in its help and a docstring."""
    for name, package in PACKAGES.items():
        path = ROOT / package.replace(".", "/") / f"{name}.py"
        text = path.read_text(encoding="utf-8")
        assert re.search(rf"examples:\n.*flip {name} ", text) and ast.get_docstring(ast.parse(text)), path


def block(page: str, first: str) -> str:
    """Return the indented lines of a page from the line that starts with ``first`` on."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    lines = text[text.index(f"    {first}") :].splitlines()
    end = next(i for i, line in enumerate(lines) if line and not line.startswith("    "))
    return "\n".join(line[4:] for line in lines[:end])


def test_laion_page_scripts_run(tmp_path):
    """docs/laion.md has two scripts: the filter of metadata, and the count of downloaded samples."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in ("filter.py", "stats.py"):
        (tmp_path / name).write_text(block("laion.md", f"# {name}"), encoding="utf-8")
    rows = {"url": ["a", "b", "c", "d"], "caption": ["one", "", "three", "four"], "similarity": [0.3] * 4}
    rows |= {"punsafe": [0.1, 0.1, 0.9, None], "pwatermark": [0.2] * 4}
    (tmp_path / "metadata").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "metadata" / "part-00000-x.parquet")
    (tmp_path / "part-00000").mkdir()
    for shard, (requested, downloaded) in enumerate([(10_000, 7000), (10_000, 8000)]):
        file = tmp_path / "part-00000" / f"{shard:05d}_stats.json"
        file.write_text(json.dumps({"count": requested, "successes": downloaded}), encoding="utf-8")

    def output(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, cwd=tmp_path, check=True
        ).stdout

    assert output("filter.py", "metadata/part-00000-x.parquet") == "part-00000-x.parquet 4 1\n"
    assert pq.read_table(tmp_path / "filtered" / "part-00000-x.parquet")["url"].to_pylist() == ["a"]
    assert output("stats.py", str(tmp_path)) == "2 shards, 15000 samples of 20000 links, 75.0 %\n"


def settings() -> list[tuple[str, str]]:
    """Return (page, text) of YAML blocks on all pages except sweeps.md, whose examples test_docs.py plans."""
    examples = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        blocks += [textwrap.dedent(block) for block in re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)]
        blocks = [block for block in blocks if re.match(r"(?:[a-z_]+\.)*[a-z_]+:(?: |\n)", block)]
        examples += [(page.name, block) for block in blocks if page.stem != "sweeps"]
    return examples


@pytest.mark.parametrize("page, text", settings(), ids=[page for page, _ in settings()])
def test_yaml_blocks_on_pages_are_valid(page, text, tmp_path):
    """A block holds fields of a run, parts of a sweep, or a cluster profile."""
    path = tmp_path / "block.yaml"
    path.write_text(text, encoding="utf-8")
    keys = {key.split(".")[0] for key in read_yaml(path)}
    if keys <= Config.__dataclass_fields__.keys():
        merge([(page, read_yaml(path))])
    elif "command" in keys:
        command_file.load(path)
    elif keys <= sweep_file.KEYS.keys():
        path.write_text(text if keys & set(expansion.KEYS) - {"set"} else f"{text}\nruns: {{a: }}\n", encoding="utf-8")
        sweep_file.read_sweep(path)
    else:
        path.write_text(text if "kind" in keys else f"kind: slurm\n{text}", encoding="utf-8")
        load_profile(str(path))


@pytest.mark.long
def test_shards_page_rewrite_script_keeps_texts(tmp_path):
    """The script rewrite.py of docs/shards.md writes the samples of a manifest, but excluded ones, into new shards."""
    data = make_dataset(tmp_path / "data", samples=13, shards=2, size=16)
    excepting(Manifest.load(data), {12: "bad"}, str(tmp_path / "filtered"))
    (tmp_path / "rewrite.py").write_text(block("shards.md", "# rewrite.py"), encoding="utf-8")
    line = [sys.executable, "rewrite.py", str(tmp_path / "filtered"), str(tmp_path / "small")]
    subprocess.run(line, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=True)
    again = Manifest.load(index([str(tmp_path / "small-00000.tar")], tmp_path / "again", workers=1).folder)
    before, after = ({id: bytes(s["txt"]) for id, s in texts(manifest)} for manifest in (Manifest.load(data), again))
    assert before.pop(12) and len(before) == 12 and before == after


def test_augmentation_step_on_contributing_page_blackens_a_square():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    source = re.search(r"^      class Erase\(.*?view\.changes\.append\(erase\)\n", text, re.MULTILINE | re.DOTALL)[0]
    scope = {"AugmentationStep": AugmentationStep}
    exec(textwrap.dedent(source), scope)
    step = scope["Erase"]()
    purposes = re.findall(r"^\| (\d+) \w+ \|", (ROOT / "docs" / "contracts.md").read_text("utf-8"), re.MULTILINE)
    assert step.purpose == max(map(int, purposes)) + 1, "the next free one"
    view = View(width=64, height=64, size=32)
    step.apply(view, types.SimpleNamespace(erase=0.25), np.array([0.0, 0.99]))
    (change,) = view.changes
    white = np.full((32, 32, 3), 255, dtype=np.uint8)
    expected = white.copy()
    expected[:8, 24:] = 0
    assert (change(white) == expected).all() and white.all()


def texts(manifest: Manifest):
    for j in range(manifest.chunks):
        yield from zip(manifest.chunk_ids(j), ChunkReader().read_chunk(manifest, j), strict=True)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_no_comment_begins_a_line_of_a_paragraph(page):
    """Such a line is a block of HTML: code hosts end the paragraph before it, and show its links as typed."""
    assert not re.findall(r"^ {0,3}<!--.*-->.*\S.*$", page.read_text(encoding="utf-8"), re.MULTILINE)


def test_readme_names_the_best_peer_of_the_stream_benchmark():
    """benchmarks/table.py fills in the ratios; which peer is the best one may change with the next measurement."""
    prefix = "S3 to batch on one core, 256 px, mask 0.5, beside "
    of_peers = {}
    for row in table.rows(table.read(table.RESULTS))["stream"]:
        peer = row.what.removeprefix(prefix).removesuffix(", samples/s")
        if row.what.startswith(prefix) and row.ratio is not None and not peer.startswith("bare"):
            of_peers[peer] = row.ratio
    quoted = re.findall(rf"<!-- figure stream: {prefix}(.+?), samples/s -->", (ROOT / "README.md").read_text("utf-8"))
    best = min(of_peers, key=of_peers.__getitem__)
    assert quoted == ["open_clip", best], "name the best peer in README.md, in its comment and in its sentence"


def test_readme_shows_the_plan_as_the_dry_run_of_its_command_prints_it():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- dry run: (\w+) (\w+) -->\n\n((?: {6}.*\n)+)", readme)
    sweep, cluster, block = shown.groups()
    command = [sys.executable, "jobs/submit.py", "--sweep", f"sweeps/{sweep}.yaml", "--dry-run", "--cluster", cluster]
    assert " ".join(["python", *command[1:]]) in readme
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    printed = {line.strip() for line in done.stdout.splitlines()}
    *rows, assumption = textwrap.dedent(block).splitlines()
    assert len(rows) == 3 and set(rows) <= printed
    assert any(line.startswith(assumption) for line in printed)
