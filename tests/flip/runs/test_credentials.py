"""Tests of flip/runs/credentials.py: no credential stays in a text, and no setting stores one."""

import json
import logging
import string
import subprocess
import sys
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlsplit

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flip.config.merge import merge, read_config
from flip.runs import credentials
from flip.runs.credentials import exposes, scrub
from flip.runs.errors import ConfigError, DataError
from flip.runs.rundir import RunDir, write_json

ROOT = Path(__file__).resolve().parents[3]
SECRET = "hush/4711+x="

#: A password or token as services make them; without quotes, which end a text that is quoted.
SECRETS = st.text(string.ascii_letters + string.digits + "+/=_.~!$*-@:", min_size=8, max_size=24).map(
    "hush4711".__add__
)
HOSTS = st.sampled_from(["host", "proxy:3128", "bucket.s3.amazonaws.com", "10.0.0.7:9000", "[::1]:80"])
PATHS = st.sampled_from(["", "/", "/a/b.tar", "/a@b", "/?", "/x#y"])
PARAMETERS = st.text(string.ascii_letters + "-_.", min_size=1, max_size=12)


@given(SECRETS, HOSTS, PATHS, st.sampled_from(["", "me"]))
@example("hush4711/a", "host", "/x", "me")
@example("hush4711?a#b", "host", "/x", "me")
def test_passwords_in_addresses_are_removed(secret, host, path, user):
    text = f"no answer from https://{user}:{secret}@{host}{path} (refused)"
    assert "hush4711" not in scrub(text)
    assert scrub(text).startswith("no answer from https://...@") and scrub(text).endswith(" (refused)")
    assert exposes(f"https://{user}:{secret}@{host}{path}")


@given(st.text(min_size=1, max_size=40).filter(lambda text: not any(c.isspace() or c in "\"'<>" for c in text)))
@example("me:p/w@host")
@example("tok@host")
@example("host/?key=1")
@example("host/?prefix=a&Key=1")
@example("host/#access_token=1")
@example("host/?a%6Bey=1")
def test_accepted_address_has_no_userinfo_and_only_harmless_parameters(rest):
    """What urlsplit reads from an address that is accepted as a setting."""
    address = f"https://{rest}"
    if exposes(address):
        return
    try:
        parts = urlsplit(address)
    except ValueError:  # no client can read it either
        return
    assert parts.username is None and parts.password is None
    names = [name.lower() for name, _ in parse_qsl(parts.query) + parse_qsl(parts.fragment)]
    assert set(names) <= credentials.HARMLESS_PARAMETERS


@given(PARAMETERS, SECRETS.filter(lambda secret: not set(secret) & set("@:")), st.sampled_from("?#"))
@example("client_secret", SECRET, "?")
@example("key", SECRET, "?")
@example("access_token", SECRET, "#")
def test_unknown_parameters_are_removed_and_refused(name, secret, mark):
    address = f"https://host/a{mark}prefix=b&{name}={quote(secret, safe='')}&page=2"
    if name.lower() not in credentials.HARMLESS_PARAMETERS:
        assert "hush" not in scrub(f"GET {address}: 403")
        assert scrub(address).endswith("prefix=b&" + name + "=...&page=2")
        assert exposes(address)


@pytest.mark.parametrize(
    "text",
    [
        "client_secret={}", "aws_secret_access_key={}", "aws_secret_access_key = {}", "AWS_SECRET_ACCESS_KEY: {}",
        "{{'aws_secret_access_key': '{}', 'region': 'x'}}", '{{"password": "{}"}}', "password={}", "api-key: {}",
        "HF_TOKEN={}", "Authorization: Bearer {}", "authorization: Basic {}", "{{'Authorization': b'Bearer {}'}}",
        "bearer {}", "Bearer\t{}", "Cookie: session={}",
        "GET /bucket/a?X-Amz-Signature={} HTTP/1.1", "url: /bucket?key={}", "/oauth#access_token={}",
        "AWS4-HMAC-SHA256 Credential={}, SignedHeaders=host, Signature={}",
    ],
)  # fmt: skip
def test_assigned_credentials_are_removed(text):
    assert "hush" not in scrub("failed: " + text.format(*[SECRET] * text.count("{}")))
    assert scrub("failed: " + text).startswith("failed: ")


def test_password_is_removed_from_address_that_lacks_a_slash():
    assert scrub(f"no manifest in s3:/key:a/{SECRET}@bucket/x") == "no manifest in s3:/...@bucket/x"
    assert exposes("s3:/key:secret@bucket")
    assert not exposes("file:/data/a@b:c") and not exposes("C:/data/me@host")


def test_header_is_removed_from_its_first_character_on():
    assert scrub("Authorization: Basic abc") == "Authorization: ..." == scrub("Authorization: bob")
    assert scrub("{'Authorization': b'abc'}") == "{'Authorization': b'...'}"


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a@b and https://h/x?prefix=a&max-keys=2 by me@host", "abfs://container@account/path",
        "unknown key: data.manifst (found: 'x')", "77 tokens; token 5 of 9", "max(items, key=len)",
        "tokenizer=data/tok.json",
        "Basic authentication is off; bearer tokens are refused", "s3://bucket/a#b/0000?.tar", "file:///data/a@b:c",
        "model.text.tokens=77", "a key of 12 bytes: ok", "monkey=banana",
    ],
)  # fmt: skip
def test_other_texts_stay_as_they_are(text):
    assert scrub(text) == text and not exposes(text)


@given(st.text(max_size=200))
def test_scrub_is_idempotent(text):
    assert scrub(scrub(text)) == scrub(text)


@pytest.mark.parametrize(
    "piece", ["a", "://", "a:", "secret", "authorization", "bearer ", "?key", "x@", "é=", "https://a:"]
)
def test_scrub_of_long_text_takes_linear_time(piece):
    """A hostile value may be long. A quadratic pattern would take minutes here; the limit is that of the test."""
    scrub(piece * (300_000 // len(piece)))


# -- values of this process's own variables --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY", "PGPASSWORD", "CLIENT_SECRET", "TOKEN", "my_secret"],
)  # fmt: skip
def test_values_of_secret_variables_are_removed_in_each_form(monkeypatch, name):
    value = 'a"b/c d\\e+12'
    monkeypatch.setenv(name, value)
    for shown in (value, quote(value), quote(value, safe=""), json.dumps(value), repr(value)):
        assert scrub(f"sent {shown} to it") in ("sent ... to it", 'sent "..." to it', "sent '...' to it")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X_KEY", "default"), ("X_TOKEN", ""), ("KEYBOARD", "pc105-layout"), ("TOKENIZER", "data/tokenizer"),
        ("A_SECRET_FILE", "/run/secret"),
    ],
)  # fmt: skip
def test_short_values_and_other_variables_stay(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert scrub(f"the value {value} is shown") == f"the value {value} is shown"


def test_each_line_of_a_secret_of_several_lines_is_removed(monkeypatch):
    monkeypatch.setenv("DEPLOY_KEY", "-----BEGIN KEY-----\nabcdefghijkl\n-----END KEY-----")
    assert scrub("line 2: abcdefghijkl") == "line 2: ..."


def test_setting_is_not_refused_for_a_variable_of_this_process(monkeypatch):
    monkeypatch.setenv("ANY_KEY", "data/manifest")
    assert merge([("x.yaml", {"data.manifest": "data/manifest"})]).data.manifest == "data/manifest"


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    ["https://me:hu/sh@host/a", "https://h/x?client_secret=hush", "https://h/x?key=hush", "https://h/x#token=hush", "gs://b/x?abc=hush"],
)  # fmt: skip
def test_setting_with_credentials_is_refused_and_stored_one_continues(tmp_path, caplog, value):
    with pytest.raises(ConfigError) as error:
        merge([("x.yaml", {"checkpoint.url": value})])
    assert "sh@" not in str(error.value) and "hush" not in str(error.value)
    assert "checkpoint.url" in str(error.value) and error.value.code == 78
    path = tmp_path / "config.yaml"
    path.write_text(f"schema: 1\ncheckpoint: {{url: '{value}'}}\n")
    with caplog.at_level(logging.WARNING):
        assert read_config(path).checkpoint.url == value
        read_config(path)
    (line,) = [record.getMessage() for record in caplog.records if "credentials" in record.getMessage()]
    assert "checkpoint.url" in line and "hush" not in line


# -- where text leaves the process ------------------------------------------------------------------------------------


def test_records_hold_no_credentials(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", SECRET)
    run = RunDir(tmp_path / "run")
    attempt = run.start_attempt({})
    text = f"RuntimeError: {SECRET} from https://me:pa/ss-hush@h"
    run.write_cause(attempt, 0, "crash", 70, text, trace=text)
    write_json(run.status, {"reason": text, "storage": text, "stage": "pretrain"})
    write_json(run.cancel, {"why": text})
    written = "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    assert "hush" not in written and written.count("RuntimeError: ... from https://...@h") == 5
    assert "hush" not in str(DataError(text, text, text, text))


PROGRAM = """
import logging, os, sys, threading, warnings
from multiprocessing import get_context
from flip.runs.errors import start_logging

def fail(text): raise RuntimeError(text)

if __name__ == "__main__":
    start_logging(sys.stdout)
    text = "denied: " + os.environ["SOME_TOKEN"]
    logging.getLogger("x").warning("%s", text)
    warnings.warn(text)
    print(text, file=sys.stderr)
    thread = threading.Thread(target=fail, args=(text,)); thread.start(); thread.join()
    fail(text)
"""


def test_logs_warnings_and_tracebacks_of_a_process_hold_no_credentials(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "SOME_TOKEN": SECRET}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert SECRET not in done.stdout + done.stderr
    assert "WARNING denied: ..." in done.stdout
    assert done.stderr.count("denied: ...") >= 4 and done.returncode == 1, done.stderr


def test_traceback_of_a_command_holds_no_credentials(tmp_path):
    script = tmp_path / "command.py"
    script.write_text(
        "import os, sys\nfrom jobs.common.cli import run_main\n"
        "def main(): raise RuntimeError(os.environ['SOME_TOKEN'])\nsys.exit(run_main(main))\n"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "SOME_TOKEN": SECRET}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert "RuntimeError: ..." in done.stderr and SECRET not in done.stderr


def _fail(_):
    raise RuntimeError("denied: " + SECRET)


def _prepare():
    return _fail


@pytest.mark.long
def test_traceback_of_a_child_process_holds_no_credentials(tmp_path):
    program = (
        "from flip.concurrency import map_in_processes\nfrom tests.flip.runs.test_credentials import _prepare\n"
        "if __name__ == '__main__':\n    list(map_in_processes(_prepare, (), [1], 1, 'x'))\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(program)
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "SOME_TOKEN": SECRET}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert "RuntimeError: denied: ..." in done.stderr and SECRET not in done.stderr
