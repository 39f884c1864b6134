"""Commands end without a word when the reader of their output has gone."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
COMMANDS = ["jobs/submit", "jobs/status", "jobs/logs", "jobs/cancel", "jobs/report"]
COMMANDS += ["tools/demo_data", "tools/predict", "tools/shards", "tools/tokenizer"]


def unread(*arguments):
    """The command with its standard output closed."""
    reader, writer = os.pipe()
    os.close(reader)
    line, buffered = [sys.executable, *arguments], {**os.environ, "PYTHONUNBUFFERED": ""}
    try:
        return subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, text=True, env=buffered, check=False)
    finally:
        os.close(writer)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command):
    done = unread(str(ROOT / f"{command}.py"), "--help")
    assert (done.returncode, done.stderr) == (141, "")


def test_long_logs(tmp_path):
    folder = tmp_path / "sweep" / "run" / "logs" / "1"
    folder.mkdir(parents=True)
    (tmp_path / "sweep" / "run" / "config.yaml").write_text("schema: 1\n")
    (tmp_path / "sweep" / "run" / "attempts" / "1").mkdir(parents=True)
    (folder / "node0.out").write_text("a line\n" * 100_000)
    done = unread(str(ROOT / "jobs" / "logs.py"), "--root", str(tmp_path), "sweep/run")
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    "script, words, hint",
    [
        ("jobs/submit", ["--sweep", "x", "--dryrun"], "--dryrun (did you mean --dry-run?)"),
        ("jobs/submit", ["--sweep", "x", "--chnaged=keep", "seed=1"], "--chnaged=keep (did you mean --changed?)"),
        ("jobs/submit", ["--sweep", "x", "--dry"], "--dry"),
        ("jobs/status", ["--wach"], "--wach (did you mean --watch?)"),
        ("jobs/report", ["--markdwon", "x.md"], "--markdwon (did you mean --markdown?)"),
        ("jobs/evaluate", ["a/b", "--set", "x"], "--set (did you mean --sets?)"),
        ("tools/shards", ["info", "x", "--jsn"], "--jsn (did you mean --json?)"),
        ("jobs/cancel", ["a", "--zzz"], "--zzz"),
    ],
)
def test_a_typing_error_in_an_option_names_the_nearest(capsys, script, words, hint):
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(script.replace("/", ".")).main(words)
    assert caught.value.code == 2 and f"unrecognized arguments: {hint}" in capsys.readouterr().err


def test_a_missing_package_is_named_with_the_remedy():
    main = "def main():\n    import no_such_package\n"
    code = f"import sys\nfrom jobs.common.cli import quietly\n{main}sys.exit(quietly(main))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 78 and "no_such_package is not installed" in done.stderr and "make install" in done.stderr
