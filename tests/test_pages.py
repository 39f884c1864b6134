"""What README, docs/ and --help tell a person to type can be typed; what they point to is there."""

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
from functools import cache
from pathlib import Path

import pytest

from flip.config.load import _paths

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
SPEAKING = [*PAGES, *sorted((ROOT / "sweeps").rglob("*.yaml")), ROOT / "Makefile"]
SPEAKING += [path for room in ("jobs", "tools", "benchmarks") for path in sorted((ROOT / room).glob("*.py"))]
LINE = re.compile(r"^(?:[#\s]|sbatch .*)*(python3? (?:jobs|tools|benchmarks)/\w+\.py .*)$")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NAMED = re.compile(r"`((?:flip|jobs|tools|tests|sweeps|benchmarks|docs)/[\w/]+\.(?:py|yaml|md|json|sh))\b")
SETTING = re.compile(
    r"`((?:model|data|augment|stages|optim|compute|checkpoint|evaluate|monitor|resources|init)\.[\w.]+)"
)

THEIRS = ("sweeps/clusters/mine.yaml", "sweeps/recipes/NAME.yaml")
"""Files that a user makes."""


class Parsed(Exception):
    """The arguments were understood."""


@cache
def commands() -> dict[str, str]:
    """A command as somebody may type it -> where it stands. Explanations stand three spaces behind, or after a #."""
    found = {}
    for path in SPEAKING:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for number, line in enumerate(text.splitlines(), 1):
            if match := LINE.match(line):
                said = match[1].removesuffix('"') if match[1].count('"') % 2 else match[1]  # of sbatch --wrap
                for part in re.split(r"\s{3,}|\s+#\s", said):
                    if part.startswith("python"):
                        found.setdefault(part.strip(), f"{path.relative_to(ROOT)}:{number}")
    return found


def understood(command: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Nothing, or what the command's own parser says of the arguments."""
    _, script, *words = shlex.split(command)
    real = argparse.ArgumentParser.parse_args

    def parse(self, arguments=None, namespace=None):
        real(self, arguments, namespace)
        raise Parsed

    said = io.StringIO()
    with monkeypatch.context() as patched, contextlib.redirect_stderr(said):
        patched.setattr(argparse.ArgumentParser, "parse_args", parse)
        try:
            importlib.import_module(script.removesuffix(".py").replace("/", ".")).main(words)
        except Parsed:
            return ""
        except SystemExit:
            return said.getvalue().strip().splitlines()[-1]
    return "it parsed nothing"


def test_commands_can_be_typed(monkeypatch):
    assert len(commands()) > 120
    wrong = {where: f"{line}: {said}" for line, where in commands().items() if (said := understood(line, monkeypatch))}
    assert not wrong


def anchors(path: Path) -> set[str]:
    """Of the headings, as they are made on the sites that show such pages."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    dead = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in link:
            file, _, anchor = link.partition("#")
            target = (page.parent / file) if file else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                dead.append(link)
    assert not dead


def test_every_page_is_in_the_index():
    listed = LINK.findall((ROOT / "docs" / "index.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(path.name for path in PAGES if path.parent.name == "docs" and path.stem != "index")


def test_files_and_settings_that_are_named_exist():
    keys = {re.sub(r"\.NAME\b", "", key) for key in _paths()}
    kept = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
    gone = []
    for page in PAGES:
        text = (
            re.sub(r"^\| `.*", "", page.read_text(encoding="utf-8"), flags=re.M)
            if page.stem == "scale"
            else page.read_text(encoding="utf-8")
        )
        gone += [f"{page.name}: {name}" for name in NAMED.findall(text) if name not in kept and name not in THEIRS]
        for key in SETTING.findall(text):
            plain = re.sub(r"^(stages|evaluate\.sets|data\.sets)\.(NAME|\w+)(?=\.)", r"\1", key.rstrip("."))
            gone += [f"{page.name}: {key}"] if not {key, plain} & keys else []
    assert not gone


def test_examples_of_help_are_examples():
    """A command that a person types has some."""
    for path in [*(ROOT / "jobs").glob("*.py"), *(ROOT / "tools").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        if "add_argument" in text and "__main__" in text:
            assert re.search(rf"examples:\n +python3? {path.parent.name}/{path.name} ", text), path
            assert ast.get_docstring(ast.parse(text)), path


def block(page: str, first: str) -> str:
    """The indented lines of a page from one that says ``first`` on."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    lines = text[text.index(f"    {first}") :].splitlines()
    end = next(i for i, line in enumerate(lines) if line and not line.startswith("    "))
    return "\n".join(line[4:] for line in lines[:end])


def test_scripts_for_laion_run(tmp_path):
    """What docs/laion.md tells to write into a file: the filter of metadata, and the count of what came."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in ("filter.py", "stats.py"):
        (tmp_path / name).write_text(block("laion.md", f"# {name}"), encoding="utf-8")
    rows = {"url": ["a", "b", "c", "d"], "caption": ["one", "", "three", "four"], "similarity": [0.3] * 4}
    rows |= {"punsafe": [0.1, 0.1, 0.9, None], "pwatermark": [0.2] * 4}
    (tmp_path / "metadata").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "metadata" / "part-00000-x.parquet")
    (tmp_path / "part-00000").mkdir()
    for shard, (asked, had) in enumerate([(10_000, 7000), (10_000, 8000)]):
        file = tmp_path / "part-00000" / f"{shard:05d}_stats.json"
        file.write_text(json.dumps({"count": asked, "successes": had}), encoding="utf-8")

    def said(*words: str) -> str:
        return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=tmp_path, check=True).stdout

    assert said("filter.py", "metadata/part-00000-x.parquet") == "part-00000-x.parquet 4 1\n"
    assert pq.read_table(tmp_path / "filtered" / "part-00000-x.parquet")["url"].to_pylist() == ["a"]
    assert said("stats.py", str(tmp_path)) == "2 shards, 15000 samples of 20000 links, 75.0 %\n"
