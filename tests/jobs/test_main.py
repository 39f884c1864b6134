"""``flip COMMAND`` and ``python -m jobs COMMAND``: the behaviour common to all commands."""

import argparse
import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.__main__ import GROUPS, PACKAGES, USAGE, main
from jobs.common.cli import Parser

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "torchvision", "timm", "numpy", "pandas", "rich", "matplotlib", "tqdm", "transformers", "wandb"}
LIGHT = HEAVY | {"yaml", "logging", "asyncio", "importlib.metadata", "flip.config.schema"}
NO_RESULT = {"debug", "tensorboard", "follow", "completion"}
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
            importlib.import_module(f"{PACKAGES[name]}.{name}").main([])
    for parser in created:  # the loop appends to the list
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                created += dict.fromkeys(action.choices.values())
    return created


def test_command_table_names_all_modules_of_its_packages():
    listed = [module for modules in GROUPS.values() for module in modules]
    assert len(listed) == len(PACKAGES)
    for package in ("jobs.commands", "tools.commands"):
        modules = {f"{package}.{path.stem}" for path in (ROOT / package.replace(".", "/")).glob("*.py")}
        assert modules - {f"{package}.__init__"} == {module for module in listed if module.startswith(package)}


@pytest.mark.parametrize("name", PACKAGES)
def test_every_command_has_common_options_and_example(name):
    expected = {"--quiet", "--verbose", "--version", "--help"} | (
        {"--json"} - ({"--json"} if name in NO_RESULT else set())
    )
    for parser in parsers(name):
        assert expected <= set(parser._option_string_actions), parser.prog
        assert parser.description and "examples:" in parser.epilog and f"flip {name}" in parser.epilog, parser.prog
        assert parser.prog.startswith(f"flip {name}")


def test_usage_and_page_name_commands_without_json():
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    (named,) = re.findall(r"Not for (.*), which have no result", page)
    (in_usage,) = re.findall("--json, but for\n(.*)", USAGE)
    assert set(re.findall(r"`(\w+)`", named)) == set(in_usage.split(", ")) == NO_RESULT


def test_help_lists_all_commands_without_heavy_imports():
    done = run("--help")
    assert done.returncode == 0 and "flip submit quickstart" in done.stdout and "  shards  " in done.stdout
    assert all(f"\n  {name} " in done.stdout for name in PACKAGES)
    assert "exit codes: 0 complete, 2 wrong" in done.stdout
    assert not {"torch", "numpy", "yaml", "flip", "argparse"} & imported(done)
    assert max(map(len, done.stdout.splitlines())) <= 80, "it fits a terminal"
    assert done.stdout.index("\ntrain:\n") < done.stdout.index("\nset up:\n  doctor ")


@pytest.mark.parametrize("name", PACKAGES)
def test_command_help_avoids_heavy_imports(name):
    done = run(name, "--help")
    assert done.returncode == 0 and f"usage: flip {name} [options]" in done.stdout
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
    lines = "unknown command: 'statsu'. Did you mean: flip status\nAll commands: flip --help\n"
    assert capsys.readouterr().err == lines
    assert main([]) == 2 and "usage: flip COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["run", "train", "resume", "list", "stop", "search", "help", "version", "delete"])
def test_word_of_another_program_leads_to_a_command(word, capsys):
    assert main([word]) == 2
    first, second = capsys.readouterr().err.splitlines()
    typed = first.partition("Did you mean: flip ")[2].split()
    assert typed and (typed[0] in PACKAGES or typed[0] in ("--help", "--version")), first
    assert second == "All commands: flip --help"


def test_help_names_the_help_of_a_command(capsys):
    assert main(["help", "submit"]) == 2
    assert "Did you mean: flip submit --help\n" in capsys.readouterr().err


@pytest.mark.parametrize("start", ["jobs", "jobs/submit.py"])
def test_older_python_names_version_and_commands(start, tmp_path):
    """The version of the interpreter is the only thing that differs: modules that Python 3.11 added are not needed."""
    code = (
        f"import runpy, sys; sys.version_info = (3, 8, 18); runpy.run_path({str(ROOT / start)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stdout) == (78, "")
    assert "FLIP needs Python 3.11 or newer" in done.stderr and "is Python 3.8" in done.stderr
    assert "make install" in done.stderr and "source .venv/bin/activate" in done.stderr


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["status", "--help"], ["schema"]])
@pytest.mark.parametrize("error", ["pipe", "/dev/full"])
def test_full_device_of_output_is_an_error_without_traceback(words, error):
    line = [sys.executable, "-m", "jobs", *words]
    with open("/dev/full", "w", encoding="utf-8") as full:
        if error == "pipe":
            done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=60)
            assert done.stderr == "the output cannot be written: No space left on device. Write it to another place.\n"
        else:
            done = subprocess.run(line, stdout=full, stderr=full, cwd=ROOT, timeout=60)
    assert done.returncode == 69


def test_main_accepts_dash_for_underscore_in_command(monkeypatch):
    from tools.commands import demo_data

    started = []
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONSAFEPATH", "")  # the command sets it for its children
    monkeypatch.setattr(demo_data, "main", lambda words: started.append(words) or 75)
    assert main(["demo-data", "--json"]) == 75 and started == [["--json"]]


@pytest.mark.parametrize("start", [["jobs", "submit"], ["jobs/submit.py"]])
@pytest.mark.parametrize("safe", [[], ["-P"]])
def test_checkout_runs_without_installation_from_any_folder(tmp_path, start, safe):
    """A file in the current folder hides no module, nor does jobs/ itself."""
    (tmp_path / "argparse.py").write_text("raise SystemExit('imported from the current folder')")
    line = [sys.executable, *safe, "-S", str(ROOT / start[0]), *start[1:], "--help"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env={}, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: flip submit [options]")


INTERRUPT_AT_IMPORT = """
import os, runpy, signal, sys

class Interrupt:
    def find_spec(name, *_):
        if name == {name!r}:
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for commands in the background
sys.meta_path.insert(0, Interrupt)
sys.argv = {argv!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("start", [["jobs", "status"], ["jobs/submit.py", "quickstart"]])
@pytest.mark.parametrize("name", ["pathlib", "argparse", "jobs.common.cli", "flip.files", "jobs.commands", "flip.runs"])
def test_ctrl_c_while_modules_are_imported_ends_without_traceback(start, name):
    code = INTERRUPT_AT_IMPORT.format(name=name, argv=[str(ROOT / start[0]), *start[1:]])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.long
@pytest.mark.parametrize("module", ["jobs.worker", "jobs.evaluator", "jobs.follow"])
def test_modules_that_records_name_start(module, tmp_path):
    """Records of jobs and queued batch scripts name them; each reports a folder that is no run."""
    environment = {"FLIP_ATTEMPT": "1", "PATH": ""}
    line = [sys.executable, "-m", module, str(tmp_path / "absent")]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60)
    assert "No module" not in done.stderr and str(tmp_path / "absent") in done.stdout + done.stderr


def test_printed_command_starts_with_program_of_this_one(monkeypatch, tmp_path):
    from jobs.common import cli

    program = tmp_path / "bin" / "flip"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(program)])
    monkeypatch.setenv("PATH", str(program.parent))
    assert cli.command("status", "a b") == "flip status 'a b'"
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.command("status") == f"{program} status"
    for started in ("/x/jobs/__main__.py", "jobs/submit.py"):
        monkeypatch.setattr(sys, "argv", [started])
        assert cli.command("status") == f"{sys.executable} {ROOT / 'jobs'} status"


def test_module_flip_names_the_program():
    line = [sys.executable, "-m", "flip", "status"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 2 and "flip COMMAND, or " in done.stderr and "-m jobs COMMAND" in done.stderr
