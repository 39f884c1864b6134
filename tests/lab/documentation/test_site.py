"""Tests that `make docs` refuses a broken link, and that its generated pages agree with the code."""

import argparse
import html
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys

import jsonschema
import pytest

import flip
from flip.config.identity import UNHASHED
from flip.config.merge import _paths
from flip.config.schema import Config
from flip.runs import errors, lifecycle
from flip.runs.rundir import RunDir
from jobs.__main__ import PACKAGES
from jobs.common import documents
from jobs.common.documents import DOCUMENTS, schema_of
from jobs.workloads.submitted import SubmittedTraining
from lab.documentation import build, choices, commands, configuration, json_documents, python_api
from tests.harness.common import ROOT
from tests.harness.parsers import parser_of, subcommands


def fields() -> dict[str, configuration.FieldEntry]:
    return {entry.key: entry for _, _, rows in configuration.sections(Config, "", True) for entry in rows}


def test_configuration_page_has_every_field_with_default_and_identity():
    entries = fields()
    sections = {key.rsplit(".", n)[0].removesuffix(".NAME") for key in entries for n in (1, 2) if key.count(".") >= n}
    assert {*entries} == {*_paths()} - sections
    unhashed = {key.replace("*", "NAME") for key in UNHASHED} | {"evaluate.sets.NAME.classes"}
    assert {key for key, entry in entries.items() if entry.identity in ("no", "product")} == unhashed
    tile = entries["compute.loss_tile"]
    assert (tile.default, tile.values, tile.identity) == ("`1024`", "whole number, ≥ 0, ≤ 2^24", "yes, unless `1024`")
    assert "Seconds without a byte after which a request to storage has failed" in configuration.configuration_page()


def test_every_field_is_described():
    """By the text below it in the code. A few names say it all, and some fields share the text of the next one."""
    plain = {"name", "width", "layers", "heads", "brightness", "contrast", "mean", "nodes", "schema"}
    plain |= {"beta1", "beta2", "eps", "weight_decay"}
    missing = [key for key, entry in fields().items() if not entry.meaning and key.rsplit(".", 1)[-1] not in plain]
    assert missing == ["evaluate.sets.NAME.manifest"], "write a text below these fields of flip/config/schema.py"


TYPOGRAPHY = {"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'", "\u2026": "...", "`": ""}


def words(text):
    """Return the text with one space for any white space, and without typography and markup of code."""
    return " ".join(text.translate(str.maketrans(TYPOGRAPHY)).split())


@pytest.fixture(scope="module")
def command_page(tmp_path_factory):
    """Return the words of the page of commands, built alone."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "index.md").write_text(commands.commands_page(), encoding="utf-8")
    line = [sys.executable, "-m", "sphinx", "--fail-on-warning", "-q", "-b", "html", "-C"]
    settings = ["extensions=myst_parser,sphinx_argparse_cli", "default_role=literal", "smartquotes_action=qe"]
    for setting in [*settings, "suppress_warnings=myst.xref_missing"]:
        line += ["-D", setting]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*line, folder, folder / "out"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (folder / "out" / "index.html").read_text(encoding="utf-8")
    return words(html.unescape(re.sub(r"<[^>]+>", "", page)))


@pytest.mark.long
@pytest.mark.parametrize("name", PACKAGES)
def test_command_page_shows_all_that_help_shows(command_page, name):
    top = parser_of(name)
    for parser in (top, *subcommands(top)):
        assert f"{parser.prog} [-h]" in command_page
        for text in (parser.description, parser.epilog):
            for line in (text or "").splitlines():
                assert words(line) in command_page
        formatter = parser._get_formatter()
        for action in parser._actions:
            if action.help not in (None, argparse.SUPPRESS):
                assert words(formatter._expand_help(action)) in command_page, (parser.prog, action)
                assert all(option in command_page for option in action.option_strings)
        for group in parser._action_groups:
            assert not group._group_actions or group.title in command_page


def test_page_of_exit_codes_has_every_code():
    page = json_documents.json_documents_page()
    assert {str(code) for code in errors.CAUSES.values()} <= set(re.findall(r"^\| (\d+) \|", page, re.MULTILINE))


@pytest.mark.parametrize("state", lifecycle.STATES)
def test_page_of_documents_lists_the_commands_that_key_next_has(state, tmp_path):
    names = [shlex.split(line)[-2] for line in SubmittedTraining(RunDir(tmp_path)).next_commands(state)]
    row = f"| `{state}` | {', '.join(f'`{name}`' for name in names)} |\n"
    page = json_documents.json_documents_page()
    assert row in page[page.index("\n## Next commands\n") :]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_schema_of_document_is_valid_and_printed(name, capsys):
    from jobs.commands.schema import main

    assert main([name]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(schema_of(name)))
    jsonschema.Draft7Validator.check_schema(printed)
    assert f"\n## {name}\n" in json_documents.json_documents_page()


def test_documents_have_the_states_of_the_lifecycle():
    assert documents.STATES == lifecycle.STATES


def test_python_page_has_every_public_name():
    assert {name.removeprefix("flip.") for name in python_api.functions()} == {*flip.__all__} - {"__version__"}


def test_page_of_choices_has_every_entry_of_a_table():
    from flip.loss_kinds import LOSSES
    from flip.optimizer_kinds import OPTIMIZERS

    text = choices.choices_page()
    for name, entry in {**LOSSES, **OPTIMIZERS}.items():
        assert f"| `{name}` | {choices.description(entry)}" in text


def test_navigation_contains_every_page_once():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    entries = re.findall(r"^[\w./]+$", build.navigation(index), re.MULTILINE)
    assert len(entries) == len(set(entries))
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    projects = {f"../{name}".removesuffix(".md") for name in build.PROJECT_PAGES}
    assert pages | projects | {f"reference/{name}" for name in build.GENERATED} <= set(entries)


@pytest.mark.long
def test_site_is_built_without_a_warning_and_links_to_references(tmp_path):
    assert importlib.util.find_spec("sphinx"), "run `make dev`"
    line = [sys.executable, "-m", "lab.documentation.build", "--out", str(tmp_path / "site")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "docs" / "contracts.html").read_text(encoding="utf-8")
    assert 'href="reference/configuration.html"' in page and "reference.html#configuration" not in page
    assert (tmp_path / "site" / "docs" / "figures" / "towers.svg").is_file()
    assert "flip.submit" in (tmp_path / "site" / "docs" / "reference" / "python.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("link", ["absent.md", "sweeps.md#absent", "../flip/absent.py"])
def test_broken_link_fails_the_build(link, tmp_path, monkeypatch):
    staged = build.stage

    def stage_with_broken_link(folder):
        staged(folder)
        page = folder / "docs" / "glossary.md"
        page.write_text(f"{page.read_text(encoding='utf-8')}\n[broken]({link})\n", encoding="utf-8")

    monkeypatch.setattr(build, "stage", stage_with_broken_link)
    assert build.main(["--out", str(tmp_path / "site")]) != 0
