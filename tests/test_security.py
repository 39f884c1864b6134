"""Tests of SECURITY.md: no secret reaches a file or output, no server binds to all interfaces, named tests exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flip.config.merge import merge
from flip.runs.credentials import scrub
from flip.runs.errors import ConfigError, StorageError
from flip.runs.rundir import RunDir
from jobs.submission.snapshot import take

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for folder in ("flip", "jobs", "tools", "lab") for path in (ROOT / folder).rglob("*.py"))


def test_sources_bind_no_server_to_all_interfaces():
    # two colons that are looked for in a text separate the addresses of a chain of fsspec
    everywhere = re.compile(r"""["'](0[.]0[.]0[.]0|::|\[::\])["'](?! in )""")
    paths = [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    assert not [path.name for path in paths if everywhere.search(path.read_text(encoding="utf-8"))]


# -- secrets -----------------------------------------------------------------------------------------------------------

SECRET = "hush-hush-4711"


@pytest.mark.parametrize("key", ["checkpoint.url", "data.manifest", "stages.pretrain.name"])
def test_merge_rejects_address_with_password(key):
    with pytest.raises(ConfigError) as error:
        merge([("x.yaml", {key: f"https://me:{SECRET}@host/place"})])
    assert SECRET not in str(error.value) and "host/place" in str(error.value)


def test_errors_hide_passwords():
    error = StorageError(
        "no answer from http://me:" + SECRET + "@proxy:3128/", f"https://{SECRET}@b", f"s3://a:{SECRET}@c"
    )
    assert SECRET not in str(error) + error.paragraph() + repr(error.args) and "proxy:3128" in str(error)


@pytest.mark.parametrize(
    "text",
    [
        "https://me:hush@hush-4711@proxy:3128/x", "s3://hush-4711@bucket/a", "https://h/x?sig=hush-4711&se=2030",
        "https://h/x?se=2030&X-Amz-Signature=hush-4711", "http://h/?token=hush-4711 and more", "https://h/x?ApiKey=hush-4711",
        "https://h/x?X-Goog-Credential=hush-4711",
    ],
)  # fmt: skip
def test_scrub_removes_secrets_and_keeps_other_text(text, tmp_path):
    shown = scrub(f"no answer from {text} (refused)")
    assert "hush" not in shown and shown.startswith("no answer from ") and shown.endswith(" (refused)")
    assert "hush" not in StorageError(text, text, text, text).paragraph()
    run = RunDir(tmp_path / "run")
    run.write_cause(run.start_attempt({}), 0, "crash", 70, f"RuntimeError: {text}")
    assert "hush" not in (run.attempt(1) / "cause.0.json").read_text()
    with pytest.raises(ConfigError):
        merge([("x.yaml", {"checkpoint.url": text.split(" ")[0]})])


def test_scrub_keeps_addresses_without_secrets():
    text = "s3://bucket/a@b and https://h/x?prefix=a&max-keys=2 by me@host"
    assert scrub(text) == text


def test_snapshot_omits_link_to_file_outside_repository(tmp_path):
    home = tmp_path / "home" / ".ssh"
    repository = tmp_path / "repository"
    for folder in (home, repository / "flip"):
        folder.mkdir(parents=True)
    (home / "deploy").write_text(SECRET)
    (repository / "flip" / "a.py").write_text("A = 1\n")
    (repository / "flip" / "b.py").symlink_to(home / "deploy")
    (repository / "flip" / "c.py").symlink_to(repository / "flip" / "a.py")
    snapshot = take(repository, tmp_path / "code")
    assert snapshot.left_out == ("flip/b.py",)
    assert sorted(path.name for path in snapshot.path.rglob("*.py")) == ["a.py", "c.py"]
    assert not [path for path in snapshot.path.rglob("*") if path.is_file() and SECRET in path.read_text()]


@pytest.mark.parametrize("words", [["jobs", "status", "--json"], ["jobs/submit.py", "--sweep", "x.yaml", "--dry-run"]])
def test_commands_print_no_secret_environment_variable(tmp_path, words):
    """The secrets appear neither in the output of a command nor in files that it writes."""
    (tmp_path / "x.yaml").write_text("recipe: paper\nset: {data.manifest: m, data.tokenizer: t}\nruns: {a: }\n")
    names = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY", "HTTPS_PROXY")
    environment = {**os.environ, "FLIP_RUNS": str(tmp_path / "runs"), **dict.fromkeys(names, f"http://me:{SECRET}@h")}
    command = [sys.executable, str(ROOT / words[0]), *words[1:]]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert SECRET not in done.stdout + done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET in path.read_text()]


def test_security_page_names_existing_tests_and_files():
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    names = re.findall(r"::(test_\w+)", page)
    assert len(names) > 10 and not [name for name in names if f"def {name}(" not in source]
    files = re.findall(r"(tests/[\w/]+\.py)", page) + [
        "tests/security/" + name for name in re.findall(r"`(test_\w+\.py)", page)
    ]
    assert len(files) > 15 and not [file for file in files if not (ROOT / file).is_file()]


def test_library_log_lines_hide_passwords():
    program = (
        "import logging, sys; from flip.runs.errors import start_logging; start_logging(sys.stdout, 'rank 0 ')\n"
        "logging.getLogger('urllib3').warning('retry %s', 'https://me:p@ss@proxy/x?sig=s3cret')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "rank 0 WARNING retry https://...@proxy/x?sig=..." in done.stdout, done.stdout
