"""Every command that a program prints can be pasted as it is, in any folder and without FLIP_RUNS."""

import argparse
import ast
import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from flip.config.merge import merge
from flip.config.resolve import dataset_facts
from flip.data.chunk_reader import ChunkReader
from flip.data.manifest.manifest import Manifest
from flip.monitoring.results import read_outcomes
from flip.runs.errors import DataError
from flip.runs.rundir import RunDir, write_json
from jobs.__main__ import PACKAGES
from jobs.commands import explain, new, report, status, submit
from jobs.common.cluster_profile import load_profile
from jobs.local import backend
from jobs.pages.document import Text
from jobs.planning import preflight, step_time
from jobs.reporting.report import findings
from jobs.submission import start_runs
from jobs.submission.snapshot import Snapshot
from tests.harness.common import ROOT
from tests.harness.parsers import parser_of, subcommands
from tests.jobs.outcomes import make
from tests.synthetic import make_dataset
from tools.commands import shards

SWEEP = """
name: printed
set:
  model: {{size: tiny}}
  data: {{manifest: {manifest}, tokenizer: {tokenizer}, workers: 0, block: 1}}
  stages: [{{name: pretrain, samples: 48, batch: 16, mask: 0.5}}]
  compute: {{threads: 1}}
runs:
  trunk:
  longer: {{init.run: trunk, init.samples: 32, init.extend: true, stages.pretrain.samples: 96}}
"""

TYPED = re.compile(r"(?<![\w./-])(?<!from )(?<!import )(?<!horizontal )flip ([a-z][\w-]+)")
"""A command line in a page, a message or a comment."""
SCRIPTS = re.compile(r"python3? (?:\S*/)?(?:jobs|tools)/\S+\.py")
LINE = re.compile(TYPED.pattern + r"([^\n`]*)")
"""The same with the rest of its line: words of the command line, and perhaps of the sentence."""
END = re.compile(r"\s{3,}|\s#\s|[.:;] |\.?$|[()\"|]| && | -- ")
"""What ends a command line within a text."""
OLD_NAMES = re.compile(rf"(?<![\w/.-])(?:{'|'.join({*PACKAGES} - {'submit'})})\.py(?! (?:is|has)\b)")
"""Command files of release 0.1; ``submit.py`` alone stays."""
PLACEHOLDER = "1"
"""Stands for a value in an f-string: a path, a name or a number."""


@pytest.fixture(params=["absolute", "relative"])
def printed(request, tmp_path, data, monkeypatch, capsys):
    """All commands that a session with two sweeps prints, relative paths being typed in its folder.

    The paths of the sweep file are absolute, or relative to that folder.
    """
    monkeypatch.setattr(start_runs, "take", lambda _, into, *rest: Snapshot("c0de", into / "c0de", ()))
    monkeypatch.setattr(backend, "start_supervisor", lambda *_: None)
    monkeypatch.setenv("FLIP_RUNS", "some runs")
    session = tmp_path / "the folder's name"
    session.mkdir()
    monkeypatch.chdir(session)
    manifest = data
    if request.param == "relative":
        manifest = Path("small")
        manifest.symlink_to(data)
    Path("mine.yaml").write_text(SWEEP.format(manifest=manifest, tokenizer=manifest / "tokenizer.json"))
    texts = []

    def typed(command, *words, code=0):
        assert command.main(list(words)) == code, capsys.readouterr()
        shown = capsys.readouterr()
        texts.append(shown.out + shown.err)
        if command is not new:
            assert command.main([*words, "--json"]) == code
            following = next_lines(json.loads(capsys.readouterr().out))
            assert following, (command, words)
            texts.append("\n".join(following))

    Path("profile.yaml").write_text("kind: local\n")
    words = ["--data", str(manifest), "--tokenizer", str(manifest / "tokenizer.json"), "--cluster", "profile.yaml"]
    typed(new, "fresh", *words)
    typed(submit, "mine.yaml", "--dry-run")
    typed(submit, "mine.yaml", "--only", "trunk")
    run = RunDir(session / "some runs" / "printed" / "trunk")
    run.start_attempt({"host": "here"})
    (run.logs / "1").mkdir(parents=True)
    (run.logs / "1" / "node0.out").write_text("a line\n")
    write_json(run.attempt(1) / "end.json", {
        "attempt": 1, "action": "stop", "cause": "config", "reason": "wrong", "delay": 0, "commits": 0,
        "committed": False, "code": 78, "time": 1.0,
    })  # fmt: skip
    typed(explain, "printed/trunk")
    typed(status, "printed")
    typed(report, "printed")
    blocks = findings(read_outcomes(session / "some runs" / "printed"))
    texts.extend(block.text for block in blocks if isinstance(block, Text))
    finished = make(session / "some runs" / "printed", "finished")
    typed(explain, str(finished.path.relative_to(session)))
    start = rf"(cd [^&\n]* && )?{re.escape(shlex.quote(sys.executable))} "
    lines = {found[0].rstrip(" .") for text in texts for found in re.finditer(rf"{start}[^\n`)]*", text)}
    changes_folder = any(line.startswith("cd ") for line in lines)
    assert changes_folder == (request.param == "relative"), lines
    return sorted(lines)


def next_lines(document: object) -> list[str]:
    """The values of keys ``next`` in a document, which are lists of command lines; ``commands`` in that of explain."""
    if isinstance(document, list):
        return [line for each in document for line in next_lines(each)]
    if not isinstance(document, dict):
        return []
    own = document.get("next", [])
    if isinstance(own, dict):
        own = own["commands"]
    return [*own, *(line for value in document.values() for line in next_lines(value))]


@pytest.mark.long
def test_printed_commands_work_in_empty_folder(printed, tmp_path):
    names = {shlex.split(line.rpartition("&& ")[2])[2] for line in printed}
    expected = {"submit", "status", "logs", "report", "tensorboard", "explain", "evaluate", "export"}
    assert names == expected, printed
    (tmp_path / "empty").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "FLIP_RUNS"}
    for line in printed:
        folder, and_then, typed = line.partition(". ")[0].rpartition("&& ")
        words = shlex.split(typed)
        name = words[2]
        if name in ("tensorboard", "evaluate", "export"):  # a server; the others need a model
            assert Path(words[3]).is_dir() and not _usage_error(words[2:])
            continue
        words = [word for word in words if word not in ("-f", "--watch")]
        if name == "submit" and "--dry-run" not in words:
            words += ["--dry-run"]
        pasted = folder + and_then + shlex.join(words)
        where = {"cwd": tmp_path / "empty", "env": environment}
        done = subprocess.run(["bash", "-c", pasted], **where, capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        assert name in ("submit", "explain", "report") or "trunk" in done.stdout or "a line" in done.stdout, line
    assert not list((tmp_path / "empty").iterdir())


@pytest.mark.long
def test_commands_about_damaged_shards_repair_them(tmp_path, capsys, monkeypatch):
    """Those that verify, reading, planning and recode print, executed one after the other from an empty folder."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    folder = make_dataset(tmp_path / "the data", samples=32, shards=2, size=96, fmt="jpg", chunk=4)
    original = Manifest.load(folder)
    with open(original.keys[0], "r+b") as file:
        file.seek(original.chunk_reads(1)[0][1] + 600)
        file.write(b"rotten")
    places = (f"the new {number}" for number in range(9))

    def execute(text: str) -> tuple[str, Path]:
        """Execute the last command line of a text, with a new folder; returns its output and that folder."""
        line = re.findall(r"(?:\S*python\S* \S*jobs|flip) (shards [^\n]*NEW_FOLDER)", text)[-1]
        new_folder = tmp_path / next(places)
        words = [
            sys.executable,
            str(ROOT / "jobs"),
            *shlex.split(line.replace("NEW_FOLDER", shlex.quote(str(new_folder)))),
        ]
        done = subprocess.run(words, cwd=tmp_path / "empty", capture_output=True, text=True)
        assert done.returncode in (0, 65), (line, done.stdout, done.stderr)
        return done.stdout, new_folder

    assert shards.main(["verify", str(folder), "--workers", "1"]) == 65
    _, without = execute(capsys.readouterr().out)
    assert set(Manifest.load(without).exceptions) == {4, 5, 6, 7}
    with pytest.raises(DataError) as error:
        ChunkReader().read_chunk(original, 1)
    _, excluding = execute(error.value.remedy)
    assert set(Manifest.load(excluding).exceptions) == {4, 5, 6, 7}

    data = {"manifest": str(excluding), "samples": 32, "chunk": 4, "block": 1, "lanes": 2}
    config = merge([("test", {"data": data, "stages": [{"samples": 640, "batch": 8}]})])
    with pytest.raises(DataError) as error:
        preflight.BLOCKS.look(preflight.Start(config, dataset_facts(config), None, None, None, None, anew=True))
    _, dropped = execute(error.value.remedy.replace(". Name it", "\nName it"))
    assert Manifest.load(dropped).samples == 28

    monkeypatch.setattr(
        step_time, "_gpu_hours", lambda config, profile, images: 100.0 if images[0].short > 256 else 50.0
    )
    monkeypatch.setattr(step_time, "RECODED_SHORT", 64)
    config.data.manifest = str(dropped)
    advice = step_time.recoding_advice(config, load_profile("h100"))
    output, recoded = execute(advice)
    assert "images recoded" in output and Manifest.load(recoded).samples == 28
    assert not list((tmp_path / "empty").iterdir())


def test_pages_messages_and_sweeps_name_existing_commands():
    """They write ``flip NAME``; of files of jobs/ and tools/, users start only jobs/submit.py."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in listed if _is_read_by_users(name)}
    assert len(texts) > 300
    typed = {(name, found[1]) for name, text in texts.items() for found in TYPED.finditer(text)}
    assert {word.replace("-", "_") for _, word in typed} >= set(PACKAGES)
    assert not [(name, word) for name, word in typed if word.replace("-", "_") not in PACKAGES]
    files = [(name, found[0]) for name, text in texts.items() for found in SCRIPTS.finditer(text)]
    assert not [(name, line) for name, line in files if "jobs/submit.py" not in line and "jobs/host/" not in line]


@pytest.mark.parametrize("name", ["flip", "jobs", "tools", "docs", "sweeps"])
def test_options_that_follow_a_command_exist(name):
    """In messages, help texts, comments and pages: a line that is pasted must not end with a wrong usage."""
    lines = {line: place for place, text in _texts(name) for line in _command_lines(text)}
    assert len(lines) > 10
    wrong = {f"{place}: {line}": word for line, place in lines.items() if (word := _unknown_word(line))}
    assert not wrong


@pytest.mark.parametrize(
    "line, word",
    [
        ("flip shards exclude data --id 3", "--id"),
        ("flip shards difference old new", "difference"),
        ("flip tokenizer --member json:caption", "--member"),
        ("flip tensorboard mine --port 7007", "--port"),
        ("flip shards verify data/manifest --out NEW_FOLDER", ""),
        ("flip submit my.yaml --only 'mask*' data.workers=2", ""),
    ],
)
def test_check_of_options_names_the_unknown_word(line, word):
    assert _unknown_word(line) == word


def test_calls_of_command_are_accepted_by_its_parser():
    """The arguments of ``cli.command(name, ...)`` in the code, with placeholders for values.

    An argument ``*values`` may be one or none.
    """
    calls = [call for package in ("jobs", "tools") for call in _calls_of_command(package)]
    assert len(calls) > 15
    errors = {place: [_usage_error(words) for words in ways] for place, ways in calls}
    assert not {place: refused for place, refused in errors.items() if all(refused)}


def test_messages_name_no_command_files_of_earlier_releases():
    texts = [
        (place, text) for name in ("flip", "jobs", "tools", "lab") for place, text in _texts(name, docstrings=False)
    ]
    assert OLD_NAMES.search("see evaluate.py --url ADDRESS")
    assert not [(place, found[0]) for place, text in texts for found in OLD_NAMES.finditer(text)]


def test_values_in_command_lines_of_messages_are_quoted():
    """A folder with a space must not become two words. Numbers and names of runs need no quotes."""
    plain = {"id", "first", "last", "name", "run", "masked_1_"}
    found = [
        (place, line, value)
        for folder in ("flip", "jobs", "tools", "lab")
        for place, text in _texts(folder, docstrings=False, keep_values=True)
        for line in _command_lines(text)
        for value in re.findall(r"<([a-z][\w.]*)>", line)
    ]
    assert len(found) > 8
    assert not [each for each in found if not each[2].startswith("shlex.quote_") and each[2] not in plain]


def _texts(name, docstrings=True, keep_values=False) -> Iterator[tuple[str, str]]:
    """(file, text) of the pages and files below a folder: all of a page, the strings of a program."""
    listed = subprocess.run(["git", "ls-files", name], cwd=ROOT, capture_output=True, text=True, check=True)
    for path in listed.stdout.split():
        if path.endswith((".md", ".yaml")):
            yield path, (ROOT / path).read_text(encoding="utf-8").replace("\\\n", " ")
        elif path.endswith(".py"):
            for text in _strings((ROOT / path).read_text(encoding="utf-8"), docstrings, keep_values):
                yield path, text


def _strings(source: str, docstrings: bool, keep_values: bool) -> Iterator[str]:
    """The strings of a program; in f-strings, values are placeholders, or ``<expression>`` without brackets."""
    tree = ast.parse(source)
    skipped = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    if not docstrings:
        skipped |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(_part(part, keep_values) for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.value


def _part(part: ast.expr, keep_values: bool) -> str:
    if isinstance(part, ast.Constant):
        return str(part.value)
    assert isinstance(part, ast.FormattedValue)
    if not keep_values:
        return PLACEHOLDER
    expression = re.sub(r"[^\w.]", "_", ast.unparse(part.value))
    return f"<{expression}>"


def _command_lines(text: str) -> Iterator[str]:
    for found in LINE.finditer(text):
        if found[1].replace("-", "_") in PACKAGES:
            yield f"flip {found[1]} {END.split(found[2])[0].lstrip(' ,')}".strip()


@cache
def _parser(name: str) -> argparse.ArgumentParser:
    return parser_of(name.replace("-", "_"))


def _unknown_word(line: str) -> str:
    """The first option, or the subcommand, that the command does not have; empty: all exist."""
    _, name, *words = line.split()
    top = _parser(name)
    known = {option for action in top._actions for option in action.option_strings}
    subparsers = {parser.prog.split()[-1]: parser for parser in subcommands(top)}
    if subparsers and words and words[0].strip(",").islower():
        if words[0].strip(",") not in subparsers:
            return words[0]
        known |= {option for action in subparsers[words[0].strip(",")]._actions for option in action.option_strings}
    for word in words:
        option = word.strip(",'\"").partition("=")[0]
        if re.fullmatch(r"--?[a-z][\w-]*", option) and option not in known:
            return option
    return ""


def _calls_of_command(package: str) -> Iterator[tuple[str, list[list[str]]]]:
    """(place, the words with and without ``*values``) of each call of ``command`` with the name of a command."""
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) not in ("command", "cli.command"):
                continue
            if not isinstance(node.args[0], ast.Constant) or node.args[0].value not in PACKAGES:
                continue
            single = [each for each in node.args if not isinstance(each, ast.Starred)]
            yield f"{path.relative_to(ROOT)}:{node.lineno}", [_words(node.args), _words(single)]


def _words(arguments: list[ast.expr]) -> list[str]:
    return [str(each.value) if isinstance(each, ast.Constant) else PLACEHOLDER for each in arguments]


def _usage_error(words: list[str]) -> str:
    """What the parser of the command says of these words; empty: it accepts them."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            _parser(words[0]).parse_args(words[1:])
        except SystemExit:
            return errors.getvalue().strip().rpartition("\n")[2]
    return ""


def _is_read_by_users(name):
    parts = name.split("/")
    is_history = name == "CHANGELOG.md"
    return parts[0] not in ("tests", "benchmarks") and name.endswith((".md", ".yaml", ".py")) and not is_history
