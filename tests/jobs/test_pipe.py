"""Commands end without a word when the reader of their output has gone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ["jobs/submit", "jobs/status", "jobs/logs", "jobs/cancel", "jobs/report"]
COMMANDS += ["tools/demo_data", "tools/predict", "tools/shards", "tools/tokenizer"]


def unread(*arguments):
    """The command as it ends with nobody at the other end of its output."""
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


def test_a_missing_package_is_named_with_the_remedy():
    code = "from jobs.pipe import quietly; import sys\ndef main():\n    import no_such_package\nsys.exit(quietly(main))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 78 and "no_such_package is not installed" in done.stderr and "make install" in done.stderr
