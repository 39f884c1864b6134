"""``python -m jobs COMMAND``."""

import subprocess
import sys
from pathlib import Path

import pytest

from jobs.__main__ import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]


def run(*words, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "jobs", *words], capture_output=True, text=True, cwd=cwd, timeout=60
    )


def test_every_command_is_a_script():
    assert all((ROOT / folder / f"{name}.py").is_file() for folder, names in COMMANDS.items() for name in names)
    scripts = {path.stem for path in (ROOT / "jobs").glob("*.py") if "quietly(main)" in path.read_text()}
    assert scripts == set(COMMANDS["jobs"])


def test_help_lists_commands_and_imports_nothing_large():
    done = run("--help")
    assert done.returncode == 0 and "flip submit --sweep" in done.stdout and "  shards  " in done.stdout
    assert not {"torch", "numpy", "yaml", "flip"} & {line.split("|")[-1].strip() for line in done.stderr.splitlines()}


@pytest.mark.parametrize("name", ["status", "tokenizer"])
def test_a_command_gets_its_arguments_and_returns_its_code(name):
    done = run(name, "--help")
    assert done.returncode == 0 and f"{name}.py" in done.stdout
    assert run(name, "--absent").returncode == 2


def test_unknown_command(capsys):
    assert main(["statsu"]) == 2
    assert "unknown command: statsu. Did you mean status?" in capsys.readouterr().err
