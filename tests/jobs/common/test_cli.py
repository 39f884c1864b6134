"""Common behaviour of command lines: closed output, misspelled options, notes, --verbose and errors."""

import argparse
import importlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flip.runs.errors import ConfigError
from jobs.__main__ import PACKAGES
from jobs.commands import submit
from jobs.common import cli
from jobs.common.cli import Number, Parser, note, run_command
from jobs.common.completion import actions_of
from tests.harness.parsers import parser_of
from tools.commands import shards

ROOT = Path(__file__).resolve().parents[3]
COMMANDS = ["submit", "status", "logs", "cancel", "report", "demo_data", "predict", "shards", "tokenizer"]


def unread(*arguments):
    """Run the command with a standard output whose reader has closed."""
    reader, writer = os.pipe()
    os.close(reader)
    line = [sys.executable, *arguments]
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    try:
        return subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, text=True, env=buffered, check=False)
    finally:
        os.close(writer)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_exits_silently_with_141_if_stdout_is_closed(command):
    done = unread(str(ROOT / "jobs"), command, "--help")
    assert (done.returncode, done.stderr) == (141, "")


def test_logs_exits_silently_with_141_if_stdout_is_closed(tmp_path):
    folder = tmp_path / "sweep" / "run" / "logs" / "1"
    folder.mkdir(parents=True)
    (tmp_path / "sweep" / "run" / "config.yaml").write_text("schema: 1\n")
    (tmp_path / "sweep" / "run" / "attempts" / "1").mkdir(parents=True)
    (folder / "node0.out").write_text("a line\n" * 100_000)
    done = unread(str(ROOT / "jobs"), "logs", "--root", str(tmp_path), "sweep/run")
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
        (
            "tools/shards",
            ["inspect", "x", "--sample", "1"],
            "--sample (did you mean --samples?)",
        ),
        ("jobs/cancel", ["a", "--zzz"], "--zzz"),
    ],
)
def test_parser_refuses_unknown_option_and_suggests_nearest_match(capsys, script, words, hint):
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(script.replace("/", ".commands.")).main(words)
    assert caught.value.code == 2 and f"unrecognized arguments: {hint}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, sweep, overrides",
    [
        (["my.yaml"], "my.yaml", []),
        (["my.yaml", "seed=1", "--only", "a*", "data.workers=2"], "my.yaml", ["seed=1", "data.workers=2"]),
        (["--dry-run", "my.yaml", "seed=1"], "my.yaml", ["seed=1"]),
        (["seed=1", "--sweep", "my.yaml", "data.workers=2"], "my.yaml", ["seed=1", "data.workers=2"]),
        (["--sweep", "my.yaml", "seed"], "my.yaml", ["seed"]),
    ],
)
def test_submit_accepts_sweep_as_positional_argument_or_option(words, sweep, overrides):
    args = submit.build_parser().parse_args(words)
    assert (args.sweep, args.overrides) == (sweep, overrides) and "name" not in args


@pytest.mark.parametrize("words", [[], ["seed=1"], ["--dry-run"]])
def test_submit_exits_with_usage_error_if_sweep_is_missing(words, capsys):
    with pytest.raises(SystemExit) as caught:
        submit.main(words)
    assert caught.value.code == 2 and "the sweep is missing" in capsys.readouterr().err


def test_parser_suggests_nearest_choice_and_subcommand(capsys):
    for script, args, hint in [
        (submit, ["x", "--changed", "frok"], "Did you mean fork?"),
        (shards, ["verfy"], "Did you mean verify?"),
    ]:
        with pytest.raises(SystemExit):
            script.main(args)
        assert hint in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--json", "info", "x"], {"json": True, "quiet": False, "verbose": False}),
        (["info", "x", "-q"], {"json": False, "quiet": True, "verbose": False}),
        (["-v", "info", "x", "--json"], {"json": True, "quiet": False, "verbose": True}),
    ],
)
def test_common_options_work_before_and_after_subcommand(words, expected):
    options = shards._parser().parse_args(words)
    assert {name: getattr(options, name) for name in expected} == expected


def test_note_goes_to_stderr_with_json_and_is_hidden_by_quiet(capsys):
    """A note is not part of the result. The options apply only until the command ends."""

    def work(options):
        note("a note")
        print("the result")
        logging.getLogger("flip.data").warning("a warning")
        return 7

    def called(*args):
        assert run_command(work, Parser().parse_args(args)) == 7
        return capsys.readouterr()

    assert called().out == "a note\nthe result\n"
    assert called("--json") == ("the result\n", "a note\n")
    assert called("--quiet").out == "the result\n" and note("after") is None
    assert capsys.readouterr().out == "after\n", "the options do not apply after the command"


def test_verbose_logs_file_reads_and_external_commands(tmp_path):
    (tmp_path / "squeue").write_text("#!/bin/sh\n")
    (tmp_path / "squeue").chmod(0o755)
    (tmp_path / "sweep" / "run").mkdir(parents=True)
    (tmp_path / "sweep" / "run" / "config.yaml").write_text("schema: 1\n")
    record = {"kind": "slurm", "name": "sweep.77aa", "token": "77aa", "index": 0, "after": 0, "order": 0}
    (tmp_path / "sweep" / "run" / "job.json").write_text(json.dumps(record))
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FLIP_RUNS": str(tmp_path)}
    for options in [], ["-v"]:
        done = subprocess.run(
            [sys.executable, str(ROOT / "jobs"), "explain", "sweep/run", "--json", *options],
            capture_output=True, text=True, check=False, env={**os.environ, **environment},
        )  # fmt: skip
        assert done.returncode == 0 and json.loads(done.stdout)["run"] == "run", done.stderr
        expected = ["DEBUG jobs.host.slurm_cli: running squeue", "DEBUG flip.common.yaml_io: reading /"]
        assert [text in done.stderr for text in expected] == [bool(options)] * 2, done.stderr


def test_verbose_adds_traceback_to_error():
    for options, has_traceback in ([], False), (["--verbose"], True):
        done = subprocess.run(
            [sys.executable, str(ROOT / "jobs"), "status", "absent", "--root", "/nowhere", *options],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (78, "") and "no such sweep or run" in done.stderr
        assert ("Traceback" in done.stderr and " DEBUG jobs." in done.stderr) == has_traceback


def test_run_main_reports_missing_package_with_install_command():
    main = "def main():\n    import no_such_package\n"
    code = f"import sys\nfrom jobs.common.cli import run_main\n{main}sys.exit(run_main(main))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 78
    assert "no_such_package is not installed" in done.stderr
    assert "make install" in done.stderr


def test_run_main_ends_without_traceback_on_keyboard_interrupt():
    main = "def main():\n    raise KeyboardInterrupt\n"
    code = f"import sys\nfrom jobs.common.cli import run_main\n{main}sys.exit(run_main(main))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_error_with_json_is_one_document_on_standard_error(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert submit.main(["nowhere", "--json"]) == 78
    shown = capsys.readouterr()
    error = json.loads(shown.err)["error"]
    assert shown.out == "" and error["what"] == "no such sweep file" and error["code"] == 78
    assert error["where"] == str(tmp_path / "nowhere") and error["remedy"].startswith("sweeps/ contains: ")
    assert submit.main(["nowhere"]) == 78
    assert capsys.readouterr().err == error["message"] + "\n"


def test_error_with_json_contains_no_credentials(capsys):
    def work(_):
        value = ["s3://key:secret@host/x", 10**300, Path("x")]
        raise ConfigError("s3://key:secret@host is refused", "https://a:b@c", value, "Use https://x?token=abc")

    assert run_command(work, argparse.Namespace(**{**cli.DEFAULTS, "json": True})) == 78
    text = capsys.readouterr().err
    assert json.loads(text)["error"]["value"] is not None
    assert not any(word in text for word in ("secret", "a:b", "abc")) and text.count("\n") == 1


@pytest.mark.parametrize("name", PACKAGES)
def test_numeric_options_of_every_command_have_bounds(name):
    """A limit of -1 hours, or 0 images/s, once passed silently."""
    unbounded = [
        action.option_strings or action.dest
        for action in actions_of(parser_of(name))
        if action.type in (int, float) and action.choices is None
    ]
    assert not unbounded, "use a Number of jobs/common/cli.py as the type"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--hours", "-1"], "--hours: must be above 0 (found: -1.0)."),
        (["--hours", "0"], "--hours: must be above 0 (found: 0.0)."),
        (["--hours", "nan"], "--hours: must be a finite number (found: nan)."),
        (["--ids", "3", "0", "4"], "--ids: must be at least 1 (found: 0)."),
        (["below", "--share", "1"], "--share: must be below 1 (found: 1.0)."),
        (["below", "--share", "-0.1"], "--share: must be above 0 (found: -0.1)."),
        (["below", "--most", "3"], "--most: must be at most 2 (found: 3)."),
    ],
)
def test_numbers_out_of_bounds_are_configuration_errors(capsys, words, message):
    parser = Parser()
    parser.add_argument("--hours", type=Number(float, above=0))
    parser.add_argument("--ids", type=Number(int, least=1), nargs="+", default=[])
    commands = parser.add_subparsers()
    below = commands.add_parser("below")
    group = below.add_argument_group("some").add_mutually_exclusive_group()
    group.add_argument("--share", type=Number(float, above=0, below=1))
    group.add_argument("--most", type=Number(int, most=2))
    assert run_command(lambda _: 0, parser.parse_args(words)) == 78
    assert capsys.readouterr().err == f"{message}\n"
    assert run_command(lambda _: 0, parser.parse_args(["--json", *words])) == 78
    assert json.loads(capsys.readouterr().err)["error"]["code"] == 78


def test_text_that_is_no_number_is_a_usage_error(capsys):
    parser = Parser()
    parser.add_argument("--hours", type=Number(float, above=0))
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--hours", "four"])
    assert caught.value.code == 2 and "argument --hours: must be a number (found: 'four')" in capsys.readouterr().err


@pytest.mark.parametrize(
    "script, words, parts",
    [
        ("tools/predict", [".", "a.jpg", "--classes", "cat"], ["--classes: no such file", "--labels 'cat, dog'"]),
        ("jobs/report", [".", "--out", __file__ + "/page.html"], ["test_cli.py is a file: name another place"]),
        (
            "jobs/doctor",
            ["--cluster", "local"],
            ["not a profile of a Slurm cluster", "Name a profile with kind: slurm"],
        ),
        ("jobs/doctor", ["--measure", "--compare", "a", "b"], ["(found: 'No such file or directory')"]),
    ],
)
def test_wrong_places_and_kinds_of_files_are_answered_with_a_remedy(capsys, script, words, parts):
    assert importlib.import_module(script.replace("/", ".commands.")).main(words) == 78
    message = capsys.readouterr().err
    assert all(part in message for part in parts), message
