"""``flip COMMAND`` and ``python -m jobs COMMAND``: the behaviour common to all commands."""

import argparse
import functools
import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.__main__ import COMMANDS, SCRIPTS, USAGE, main
from jobs.common import cli
from jobs.common.cli import Parser

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "torchvision", "timm", "numpy", "pandas", "rich", "matplotlib", "tqdm", "transformers", "wandb"}
LIGHT = HEAVY | {"yaml", "logging", "asyncio", "importlib.metadata", "flip.config.schema"}
NO_RESULT = {"debug", "tensorboard", "follow", "completion", "study"}
"""Commands without --json, because they print no result."""
HEAVY_PARSERS = {"slurm_sandbox"}
"""Commands whose parser shows the options of a package with heavier imports."""


def run(*argv, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "jobs", *argv], capture_output=True, text=True, cwd=cwd, timeout=60
    )


def imported(done):
    return {line.split("|")[-1].strip() for line in done.stderr.splitlines()}


@functools.cache
def parsers(name):
    """The parsers of a command and of its subcommands, captured when the command creates them."""
    created = []
    with pytest.MonkeyPatch.context() as patched:

        def capture(parser, *_):
            created.append(parser)
            raise SystemExit

        patched.setattr(Parser, "parse_args", capture)
        with pytest.raises(SystemExit):
            importlib.import_module(f"{SCRIPTS[name]}.{name}").main([])
    for parser in created:  # the loop appends to the list
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                created += dict.fromkeys(action.choices.values())
    return created


def test_command_table_matches_scripts():
    assert all((ROOT / folder / f"{name}.py").is_file() for name, folder in SCRIPTS.items())
    for folder in COMMANDS:
        scripts = {path.stem for path in (ROOT / folder).glob("*.py") if "quietly(main)" in path.read_text()}
        assert scripts - {"slurm_here"} == set(COMMANDS[folder])


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_command_has_common_options_and_example(name):
    expected = {"--quiet", "--verbose", "--version", "--help"} | (
        {"--json"} - ({"--json"} if name in NO_RESULT else set())
    )
    for parser in parsers(name):
        assert expected <= set(parser._option_string_actions), parser.prog
        assert parser.description and f"{name}" in parser.epilog and "examples:" in parser.epilog, parser.prog


def test_usage_and_page_name_commands_without_json():
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    (named,) = re.findall(r"Not for (.*), which have no result", page)
    (in_usage,) = re.findall("--json, but for (.*)", USAGE)
    assert set(re.findall(r"`(\w+)`", named)) == set(in_usage.split(", ")) == NO_RESULT


def test_help_lists_all_commands_without_heavy_imports():
    done = run("--help")
    assert done.returncode == 0 and "flip submit quickstart" in done.stdout and "  shards  " in done.stdout
    assert all(f"\n  {name} " in done.stdout for name in SCRIPTS) and "exit codes: 0 complete, 2 wrong" in done.stdout
    assert not {"torch", "numpy", "yaml", "flip", "argparse"} & imported(done)


@pytest.mark.parametrize("name", SCRIPTS)
def test_command_help_avoids_heavy_imports(name):
    done = run(name, "--help")
    assert done.returncode == 0 and f"usage: python -m jobs {name} [options]" in done.stdout
    assert "python jobs/" not in done.stdout, "examples use the name by which the command was started"
    assert not (HEAVY if name in HEAVY_PARSERS else LIGHT) & imported(done)


@pytest.mark.parametrize("words", [["status", "--goodputt"], ["shards", "info", "x", "--batchs=3"]])
def test_unknown_option_exits_with_2_and_suggestion(words):
    done = run(*words)
    assert done.returncode == 2 and "unrecognized arguments" in done.stderr and "did you mean --" in done.stderr


@pytest.mark.parametrize("words", [["--version"], ["status", "--version"], ["shards", "info", "--version"]])
def test_version_option_prints_version_path_and_python(words):
    from flip import __version__

    assert run(*words).stdout == f"flip {__version__} ({ROOT}, Python {sys.version.split()[0]})\n"


def test_main_refuses_unknown_command_with_suggestion(capsys):
    assert main(["statsu"]) == 2
    assert "unknown command: statsu. Did you mean status?" in capsys.readouterr().err
    assert main([]) == 2 and "usage: flip COMMAND" in capsys.readouterr().err


def test_main_accepts_dash_for_underscore_in_command(monkeypatch):
    started = []
    monkeypatch.setattr(runpy, "run_path", lambda path, run_name: started.append((path, sys.argv)))
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/flip"])
    monkeypatch.setattr(cli, "program", "")
    assert main(["demo-data", "--json"]) == 0
    script = str(ROOT / "tools" / "demo_data.py")
    assert started == [(script, [script, "--json"])]
    assert cli.command("status", "a b") == "flip status 'a b'"
    assert cli.as_typed("see python tools/shards.py info") == "see flip shards info"
