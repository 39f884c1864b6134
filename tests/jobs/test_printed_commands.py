"""Every command that a program prints can be pasted as it is, in any folder and without FLIP_RUNS."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from flip.monitoring.results import read_outcomes
from flip.runs.rundir import RunDir, write_json
from jobs.__main__ import PACKAGES
from jobs.commands import explain, new, report, status, submit
from jobs.local import backend
from jobs.reporting.document import Text
from jobs.reporting.report import findings
from jobs.submission import submission
from jobs.submission.snapshot import Snapshot
from tests.harness.common import ROOT
from tests.jobs.outcomes import make

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


@pytest.fixture(params=["absolute", "relative"])
def printed(request, tmp_path, data, monkeypatch, capsys):
    """All commands that a session with two sweeps prints, relative paths being typed in its folder.

    The paths of the sweep file are absolute, or relative to that folder.
    """
    monkeypatch.setattr(submission, "take", lambda _, into, *rest: Snapshot("c0de", into / "c0de", ()))
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


@pytest.mark.long
def test_printed_commands_work_in_empty_folder(printed, tmp_path):
    names = {shlex.split(line.rpartition("&& ")[2])[2] for line in printed}
    assert names >= {"submit", "status", "logs", "report", "tensorboard", "explain"}, printed
    (tmp_path / "empty").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "FLIP_RUNS"}
    for line in printed:
        folder, and_then, typed = line.partition(". ")[0].rpartition("&& ")
        words = shlex.split(typed)
        name = words[2]
        if name == "tensorboard":  # a server
            assert Path(words[3]).is_dir()
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


def test_pages_messages_and_sweeps_name_existing_commands():
    """They write ``flip NAME``; of files of jobs/ and tools/, users start only jobs/submit.py."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in listed if _is_read_by_users(name)}
    assert len(texts) > 300
    typed = {(name, found[1]) for name, text in texts.items() for found in TYPED.finditer(text)}
    assert {word.replace("-", "_") for _, word in typed} >= set(PACKAGES) - {"audit"}
    assert not [(name, word) for name, word in typed if word.replace("-", "_") not in PACKAGES]
    files = [(name, found[0]) for name, text in texts.items() for found in SCRIPTS.finditer(text)]
    assert not [(name, line) for name, line in files if "jobs/submit.py" not in line and "jobs/host/" not in line]


def _is_read_by_users(name):
    parts = name.split("/")
    is_history = name == "CHANGELOG.md"
    return parts[0] not in ("tests", "benchmarks") and name.endswith((".md", ".yaml", ".py")) and not is_history
