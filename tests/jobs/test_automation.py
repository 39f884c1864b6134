"""Tests that the script and the keys of docs/automation.md are those of real runs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from flip.runs.records import checked
from flip.runs.run_files import RUN_FILES, described
from jobs.common.documents import DOCUMENTS, schema_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "automation.md").read_text(encoding="utf-8")


def named_keys(start: str, end: str) -> set[str]:
    """The words in code style of the page from ``start`` to ``end``."""
    text = PAGE[PAGE.index(start) :]
    return set(re.findall(r"`([a-z_]+)`", text[: text.index(end)]))


def keys_of(document: object) -> set[str]:
    """All keys in a document."""
    if isinstance(document, dict):
        return set(document) | keys_of(list(document.values()))
    if isinstance(document, list):
        return set().union(*map(keys_of, document))
    return set()


def check(name: str, document: object) -> None:
    """Validate a document, in which each key must be one of its schema: an unlisted key is no promise to a reader."""

    def closed(node):
        if isinstance(node, list):
            return [closed(item) for item in node]
        if not isinstance(node, dict):
            return node
        inside = {key: closed(item) for key, item in node.items()}
        return {**inside, "additionalProperties": False} if "required" in inside else inside

    jsonschema.validate(document, closed(schema_of(name)))
    _, table = DOCUMENTS[name]
    assert checked(document, table) == document


@pytest.mark.long
def test_script_of_automation_page_trains_sweep_and_page_names_real_keys(desk, tmp_path):
    program = tmp_path / "bin" / "flip"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT / "jobs"}" "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "FLIP_RUNS": str(desk.runs), "PATH": f"{program.parent}:{os.environ['PATH']}"}

    def call(*words):
        return subprocess.run(words, cwd=desk.folder, env=environment, capture_output=True, text=True, timeout=300)

    (script,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (desk.folder / "drive.py").write_text(script.replace("time.sleep(30)", "time.sleep(1)"))
    refused = call(sys.executable, "drive.py", "demo.yaml", "-1")
    assert refused.returncode == 1 and "above the budget" in refused.stderr and not desk.runs.exists()
    done = call(sys.executable, "drive.py", "demo.yaml", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^half \{'test\.small\.top1': [\d.]+\}\nwhole \{", done.stdout, re.MULTILINE)

    for name, words in {"status": ["status", "demo"], "explain": ["explain", "demo/half"]}.items():
        check(name, json.loads(call("flip", *words, "--json").stdout))
    plan = json.loads(call("flip", "submit", "demo.yaml", "--yes", "--json").stdout)
    check("plan", plan)
    assert named_keys("| the plan: ", "| `flip") | named_keys("| the plan, ", "| `flip") <= keys_of(plan)
    assert not plan["outcome"]["started"], "all runs are complete"
    for name, words in {"goodput": ["status", "demo", "--goodput"], "logs": ["logs", "demo/half"]}.items():
        check(name, json.loads(call("flip", *words, "--json").stdout))
    check("error", json.loads(call("flip", "explain", "demo/absent", "--json").stderr))
    report = json.loads(call("flip", "report", "demo", "--json").stdout)
    check("report", report)
    (*_, row) = report
    assert {f"test.small.{key}" for key in ("top1", "low", "high", "n", "precision")} <= row.keys()
    files = [
        path.relative_to(desk.runs / "demo" / "half").as_posix() for path in (desk.runs / "demo" / "half").rglob("*")
    ]
    unknown = [
        file for file in files if (desk.runs / "demo" / "half" / file).is_file() and not described(file, RUN_FILES)
    ]
    assert len(files) > 20 and not unknown, "describe these files in flip/runs/run_files.py"
    assert json.loads(call("flip", "cancel", "demo", "--yes", "--json").stdout) == []
    freed = json.loads(call("flip", "clean", "--all", "--dry-run", "--json").stdout)
    check("clean", freed)
    assert freed.keys() == named_keys("| `folders`", "| `flip")
