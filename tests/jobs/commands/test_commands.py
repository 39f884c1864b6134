"""Commands that select runs and profiles: accepted and refused arguments, and a fast --help."""

import importlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from flip.runs.errors import ConfigError
from flip.runs.lifecycle import RunState
from flip.runs.rundir import RunDir, write_json
from jobs.commands import cancel, explain, logs, report, status
from jobs.common import cluster_profile
from jobs.common.cluster_profile import load_profile
from jobs.common.paths import runs_root
from jobs.host import sessions
from jobs.reporting import run_details
from jobs.reporting import status as run_status
from jobs.submitted_runs import clusters, select

ROOT = Path(__file__).resolve().parents[3]
COMMAND_LINE = (
    "flip", "flip.files", "flip.runs", "flip.version", "jobs", "jobs.commands", "jobs.common", "jobs.common.cli",
    "jobs.common.paths",
)  # fmt: skip
LIGHT_PACKAGES = ("flip.files", "flip.runs", "jobs.host", "jobs.host.agents")
"""What every command imports for its --help."""


@pytest.fixture
def root(tmp_path):
    for name in ("one/a", "one/b", "two/a"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text("schema: 1\n")
    (tmp_path / "one" / ".code").mkdir()
    write_json(tmp_path / "one" / "a" / "result.json", {"run": "a"})
    live = {"stage": "pretrain", "samples": 51200, "total": 102400, "step": 400, "loss": 2.5, "attempt": 1}
    write_json(tmp_path / "one" / "b" / "status.json", live)
    run = RunDir(tmp_path / "one" / "b")
    run.start_attempt({})
    (run.logs / "1").mkdir(parents=True)
    (run.logs / "1" / "node0.err").write_text("a warning\n")
    return tmp_path


def call(command, *arguments, cwd=None):
    line = [sys.executable, str(ROOT / "jobs"), command, *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, check=False)


def names(runs):
    return [f"{run.sweep}/{run.name}" for run in runs]


def test_status_row_shows_storage_outage_only_for_running_attempt(root):
    run = RunDir(root / "one" / "b")
    text = "storage does not answer since 14:03:05, 12 retries, the last: 503"
    write_json(run.status, {"attempt": 1, "storage": text, "unsteady": True})
    assert run_status.row(run, RunState("running", 1))["reason"] == text
    assert [run_status.row(run, RunState("running", n))["unsteady"] for n in (1, 2)] == [True, None]
    assert run_status.row(run, RunState("waiting", 1))["reason"] == ""
    assert run_status.row(run, RunState("running", 2))["reason"] == "", "the outage belongs to an older attempt"


def test_select_resolves_sweeps_runs_and_paths_or_lists_candidates(root, monkeypatch):
    assert names(select.select(None, [root])) == ["one/a", "one/b", "two/a"]
    assert names(select.select("one", [root])) == ["one/a", "one/b"]
    assert names(select.select("sweeps/one.yaml", [root])) == ["one/a", "one/b"]
    assert names(select.select("two/a", [root])) == ["two/a"]
    assert names([select.select_single(str(root / "two" / "a"), [root])]) == ["two/a"]
    monkeypatch.chdir(root / "one")
    assert names(select.select("b", [root])) == ["one/b"]
    with pytest.raises(ConfigError, match=r"There are: one/a, one/b"):
        select.select("one/c", [root])
    with pytest.raises(ConfigError, match=r"There are: one, two"):
        select.select("three", [root])
    with pytest.raises(ConfigError, match=r"Choose from: one/a, one/b"):
        select.select_single("one", [root])


@pytest.mark.long
def test_status_reports_progress_and_exit_codes_from_run_directories(root, tmp_path):
    rows = json.loads(call("status", "--root", str(root), "one", "--json", cwd="/").stdout)
    assert [(row["run"], row["state"], row["attempts"]) for row in rows] == [("a", "complete", 0), ("b", "stopped", 1)]
    assert rows[1]["samples"] == 51200 and rows[1]["eta_seconds"] is None
    assert rows[1]["restarts"] == 0 and rows[1]["progress_time"] is None
    watched = call("status", "--root", str(root), "one", "--watch")
    assert watched.returncode == 75 and "b: stopped" in watched.stdout, "75: submit again"
    (spent, *_) = json.loads(call("status", "--root", str(root), "one", "--goodput", "--json").stdout)
    assert spent["name"] == "a" and spent["advice"] is None
    shown = call("status", "--root", str(root), "one").stdout
    assert "2.500" in shown and "51,200 / 102,400" in shown
    wrong = call("status", "--root", str(root), "three")
    assert wrong.returncode == 78 and wrong.stdout == "" and "There are: one, two." in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_commands_accept_several_runs_and_sweeps(root, capsys):
    def answer(command, *argv):
        assert command.main([*argv, "--root", str(root)]) == 0
        return capsys.readouterr().out

    for selectors, expected in (["one/a", "two"], ["a", "a"]), (["one", "!one/a"], ["b"]), ([], ["a", "b", "a"]):
        assert [row["run"] for row in json.loads(answer(status, *selectors, "--json"))] == expected
        assert [row["run"] for row in json.loads(answer(report, *selectors, "--json"))] == expected
    assert json.loads(answer(explain, "one/b", "--json"))["run"] == "b"
    assert [page["run"] for page in json.loads(answer(explain, "one/*", "two", "--json"))] == ["a", "b", "a"]
    assert answer(explain, "one").count("\nstate ") == 2
    (root / "two" / "a" / "logs" / "1").mkdir(parents=True)
    RunDir(root / "two" / "a").start_attempt({})
    (root / "two" / "a" / "logs" / "1" / "node0.err").write_text("an error\n")
    paths = json.loads(answer(logs, "one/b", "two/a", "--err", "--json"))
    assert [Path(path).read_text() for path in paths] == ["a warning\n", "an error\n"]


def test_select_models_accepts_runs_and_exported_folders(root, monkeypatch):
    (root / "export").mkdir()
    monkeypatch.chdir(root)
    exported = root / "export"
    a = root / "one" / "a"
    b = root / "one" / "b"
    assert select.models(["one/*", "export"], str(root)) == [Path("export"), a, b]
    assert select.models([str(exported)], None) == [exported]
    assert select.models(["one"], None) == [a, b], "the folder of a sweep is not a model"
    with pytest.raises(ConfigError, match="There are: one/a, one/b"):
        select.models(["export", "one/c"], str(root))


def test_logs_prints_file_headers_for_several_runs_and_with_follow(root):
    folder = root / "one" / "a" / "logs" / "1"
    folder.mkdir(parents=True)
    RunDir(root / "one" / "a").start_attempt({})
    (folder / "node0.err").write_text("an error\n")
    done = call("logs", "one", "--err", "--root", str(root))
    expected = "==> one/a/logs/1/node0.err <==\nan error\n==> one/b/logs/1/node0.err <==\na warning\n"
    assert (done.returncode, done.stdout) == (0, expected), done.stderr
    followed = call("logs", "one/a", "--err", "-f", "--root", str(root))
    assert followed.stdout == "==> logs/1/node0.err <==\nan error\n"


def test_logs_follow_prints_last_lines_of_attempts_that_restarted_at_once(root, monkeypatch, capfd):
    run = RunDir(root / "one" / "b")
    rounds = iter([False, True])

    def over(*_):
        ended = next(rounds)
        if ended:
            with open(run.logs / "1" / "node0.err", "a") as file:
                file.write("a traceback\n")
            for n in (2, 3):
                run.start_attempt({})
                (run.logs / f"{n}").mkdir()
                (run.logs / f"{n}" / "node0.err").write_text(f"of attempt {n}\n")
        return ended

    monkeypatch.setattr(logs, "_over", over)
    monkeypatch.setattr(clusters, "poll_interval", lambda _: 0.0)
    assert logs.main(["one/b", "--err", "-f", "--root", str(root)]) == 0
    printed = [line for line in capfd.readouterr().out.splitlines() if not line.startswith("==>")]
    assert printed == ["a warning", "a traceback", "of attempt 2", "of attempt 3"]


def complete_row(row, numbers):
    """Whether a row of ``status`` has all keys and the given samples and loss."""
    return len(row) == 24 and (row["samples"], row["loss"]) == numbers


@pytest.mark.parametrize("name, numbers", [("status.json", (None, None)), ("attempts/1/end.json", (51200, 2.5))])
@pytest.mark.parametrize("text, words", [("{", "not JSON"), ("5", "holds no mapping"), ("{}", "")])
@pytest.mark.parametrize("kind", ["local", "slurm"])
def test_status_lists_all_runs_despite_damaged_file(
    root, commands, capsys, monkeypatch, name, numbers, text, words, kind
):
    """``explain`` and ``status --watch`` work, too."""
    bad = RunDir(root / "one" / "b")
    record = {"kind": kind, "name": "one.77aa", "token": "77aa", "index": 0}
    write_json(bad.path / "job.json", {**record, "after": 0, "order": 0})
    (bad.path / name).write_text(text)
    commands("squeue", "")
    commands("scontrol", "")
    assert status.main(["one", "--json", "--root", str(root)]) == 0
    good, row = json.loads(capsys.readouterr().out)
    assert (good["run"], good["state"], row["run"]) == ("a", "complete", "b")
    assert complete_row(good, (None, None)) and complete_row(row, numbers)
    assert not words or row["reason"].count(f"{name}: {words}") == 1
    for more in ([], ["--goodput"]):
        assert status.main(["one", *more, "--root", str(root)]) == 0
    assert "b" in explain.page(run_details.explain(bad))
    if row["state"] == "unknown":
        return  # the watch waits until the file is repaired
    monkeypatch.setattr(run_status, "poll_interval", lambda _: 0.0)
    lines = io.StringIO()
    assert run_status.watch([bad.path, root / "one" / "a"], lines, poll=0.01) in (70, 75)
    assert "a: complete" in lines.getvalue()


@pytest.mark.parametrize("record", ["identity.json", "job.json", "status.json", "result.json"])
def test_run_without_config_is_listed_with_what_is_missing(root, capsys, record):
    """It vanished from the table, and from cancel and logs, while its job went on."""
    bad = RunDir(root / "one" / "b")
    for path in (bad.config, bad.path / "status.json"):
        path.unlink()
    write_json(bad.path / record, {})
    assert names(select.select("one", [root])) == ["one/a", "one/b"]
    status.main(["one", "--json", "--root", str(root)])
    rows = {row["run"]: row for row in json.loads(capsys.readouterr().out)}
    missing = "config.yaml is missing: submit the sweep again, which writes it"
    assert missing in rows["b"]["reason"] and missing not in rows["a"]["reason"]
    assert status.main(["one", "--root", str(root)]) == 0 and missing in capsys.readouterr().out
    assert "config.yaml" in explain.page(run_details.explain(bad))


@pytest.mark.parametrize(
    "text", ['{"loss": "high", "eta_seconds": [1]}', '{"samples": NaN, "total": 1e999, "time": {}}']
)
def test_status_shows_dash_for_non_numeric_values(root, capsys, text):
    (root / "one" / "b" / "status.json").write_text(text)
    assert status.main(["one", "--root", str(root)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:5] == ["b", "stopped", "-", "-", "-"]


@pytest.mark.parametrize(
    "words",
    [
        "status --json --watch",
        "logs quickstart/a --json -f",
        "report --csv - --json",
        "report --csv - --markdown -",
        "report --json --table 8",
        "report --json --markdown page.md",
        "report --csv - --out page.html",
        "report --markdown - --folder results",
    ],
)
def test_commands_refuse_contradictory_or_ignored_flags(words, capsys):
    name, *rest = words.split()
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(f"jobs.commands.{name}").main(rest)
    assert caught.value.code == 2 and ": error: " in capsys.readouterr().err


@pytest.mark.long
def test_logs_selects_files_by_stream_node_and_attempt(root):
    assert call("logs", "--root", str(root), "one/b", "--err").stdout == "a warning\n"
    assert call("logs", "--root", str(root), "one/b", "--err", "-f").stdout.endswith("a warning\n")
    (root / "one" / "b" / "logs" / "1" / "node0.out").touch()
    (root / "one" / "b" / "logs" / "1" / "node1.err").write_text("of another node\n")
    assert call("logs", "--root", str(root), "one/b", "--err", "--node", "1").stdout == "of another node\n"
    paths = json.loads(call("logs", "--root", str(root), "one/b", "--err", "--json").stdout)
    assert [Path(path).name for path in paths] == ["node0.err", "node1.err"]
    nowhere = call("logs", "--root", str(root), "one/b", "--err", "--node", "2")
    assert nowhere.returncode == 78 and "from node 2" in nowhere.stderr
    empty = call("logs", "--root", str(root), "one/b")
    assert (empty.returncode, empty.stdout) == (0, "") and "output of attempt 1 is empty; --err shows" in empty.stderr
    wrong = call("logs", "--root", str(root), "one/b", "--attempt", "7")
    assert wrong.returncode == 78 and "Attempts begun: 1." in wrong.stderr


def test_select_many_supports_patterns_and_exclusions(root):
    assert names(select.select_many(["*/a"], [root])) == ["one/a", "two/a"]
    assert names(select.select_many(["one", "!*/a"], [root])) == ["one/b"]
    assert names(select.select_many(["!one/b"], [root])) == ["one/a", "two/a"], "all runs except the excluded run"
    assert names(select.select_many(["one/a", "one"], [root])) == ["one/a", "one/b"], "each run once"
    assert names(select.select_many(["o*"], [root])) == ["one/a", "one/b"], "a pattern also matches the name of a sweep"
    (root / "one" / "[b]").mkdir()
    (root / "one" / "[b]" / "config.yaml").write_text("schema: 1\n")
    assert names(select.select_many(["one/[b]"], [root])) == ["one/[b]"], "the name of an existing run is not a pattern"
    for patterns, message in (
        (["one/x*"], "no run matches"),
        (["!three"], "no such sweep"),
        (["one", "!one"], "no run"),
    ):
        with pytest.raises(ConfigError, match=message):
            select.select_many(patterns, [root])


def test_commands_search_runs_roots_of_all_profiles(root, tmp_path, monkeypatch, capsys):
    """``submit --cluster mine`` puts runs there, but the other commands do not know which profile was used."""
    profiles = tmp_path / "profiles"
    profiles.mkdir()
    (profiles / "mine.yaml").write_text(f"kind: slurm\nruns_root: {tmp_path}/shared\n")
    (profiles / "damaged.yaml").write_text("{")
    for name in ("far/x", "one/a"):
        (tmp_path / "shared" / name).mkdir(parents=True)
        (tmp_path / "shared" / name / "config.yaml").write_text("schema: 1\n")
    monkeypatch.setattr(cluster_profile, "PROFILES", profiles)
    monkeypatch.setenv("FLIP_RUNS", str(root))
    roots = cluster_profile.roots()
    assert roots == [root, tmp_path / "shared"] and cluster_profile.roots(str(root)) == [root]
    assert names(select.select("far", roots)) == names([select.select_single("far/x", roots)]) == ["far/x"]
    assert [run.path for run in select.select("one/a", roots)] == [root / "one" / "a"], "RUNS_ROOT comes first"
    assert len(select.select_many([], roots)) == 5, "without a name, all runs of all roots"
    # A pattern selects runs of a single root.
    assert len(select.select(None, roots)) == 5
    assert len(select.select_many(["*"], roots)) == 3
    assert names(select.select_many(["f*"], roots)) == ["far/x"]
    for command, argv in ((status, ["far"]), (explain, ["far/x"]), (logs, ["far/x", "--json"])):
        assert command.main(argv) == 0, capsys.readouterr().err
    assert report.main(["far", "--json"]) == 0 and status.main([]) == 0
    with pytest.raises(ConfigError, match="There are: far/x"):
        select.select("far/y", roots)


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_status_exits_with_69_if_all_runs_are_unknown(root, monkeypatch, words):
    monkeypatch.setenv("PATH", "/nowhere")
    for name in ("a", "b"):
        write_json(root / "one" / name / "job.json", {"kind": "slurm", "name": "one.77aa", "token": "77aa", "index": 0})
    assert status.main(["one", "--root", str(root), *words]) == 0, "a is complete"
    assert status.main(["one/b", "--root", str(root), *words]) == 69


def test_cancel_selects_runs_by_pattern(root):
    for name in ("one/b", "two/a"):
        write_json(root / name / "job.json", {"after": 0})
    done = call("cancel", "--root", str(root), "--yes", "--json", "*/*", "!two")
    assert json.loads(done.stdout) == ["b"] and not (root / "two" / "a" / "cancel.json").exists()


def test_cancel_requires_confirmation_or_yes_option(root):
    write_json(root / "two" / "a" / "job.json", {"after": 0})
    refused = call("cancel", "--root", str(root), "two")
    assert refused.returncode == 78
    assert "--yes" in refused.stderr
    assert not (root / "two" / "a" / "cancel.json").exists()
    assert call("cancel", "--root", str(root), "two", "--yes").stdout == "cancelled: a\n"
    assert call("cancel", "--root", str(root), "two", "--yes").stdout.startswith("nothing to cancel")


def test_cancel_continues_if_processes_belong_to_another_user(root, monkeypatch, capsys):
    bad = RunDir(root / "one" / "b")
    pid = os.getpid()
    write_json(bad.attempt(1) / "pids.json", [{"rank": 0, "pid": pid, "start": sessions.start_time(pid)}])
    monkeypatch.setattr(sessions, "is_rank", lambda *_: True)  # this process is no rank
    monkeypatch.setattr(os, "kill", Mock(side_effect=PermissionError(1, "Operation not permitted")))
    assert cancel.main(["one/b", "two/a", "--yes", "--root", str(root)]) == 70
    assert "not signalled (found: 'b: [Errno 1] Operation not permitted')" in capsys.readouterr().err
    assert bad.cancel.exists() and (root / "two" / "a" / "cancel.json").exists()


def test_cancel_does_nothing_at_end_of_input(root, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", Mock(side_effect=EOFError))
    assert cancel.main(["one", "--root", str(root)]) == 0 and not list(root.glob("*/*/cancel.json"))


@pytest.mark.parametrize(
    "command, allowed",
    [
        *((["jobs", name], (*COMMAND_LINE, f"jobs.commands.{name}")) for name in ("status", "logs", "cancel")),
        (["jobs", "explain"], (*COMMAND_LINE, "jobs.commands.explain", "jobs.common.text")),
        (["jobs/host/job.py"], ("flip", "jobs", *LIGHT_PACKAGES)),
    ],
)
def test_help_shows_examples_and_imports_few_project_modules(command, allowed):
    line = [sys.executable, "-X", "importtime", str(ROOT / command[0]), *command[1:], "--help"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert re.search("examples?:", done.stdout)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    project_modules = {name for name in imported if name.split(".")[0] in ("flip", "jobs")}
    assert not {name for name in project_modules if name.rpartition(".")[0] not in LIGHT_PACKAGES} - {*allowed}


def test_builtin_profiles_load_and_use_runs_root_variable(tmp_path, monkeypatch):
    h100 = load_profile("h100")
    assert (h100.name, h100.kind, h100.gpus_per_node, h100.peak_tflops) == ("h100", "slurm", 8, 989.0)
    assert load_profile("local").parallel == 1
    monkeypatch.setenv("FLIP_RUNS", str(tmp_path))
    assert runs_root() == runs_root(load_profile("local").runs_root) == tmp_path


@pytest.mark.parametrize(
    "text, words",
    [
        ("parallel: 1\nparallell: 2\n", r":2: parallell: unknown key. Did you mean parallel\?"),
        ("colour: red\n", "colour: unknown key. Keys here: name, kind, runs_root"),
        ("parallel: two\n", r":1: parallel: needs a whole number \(found: 'two'\)"),
        ("gpu: true\n", r"gpu: needs text \(found: True\)"),
        ("hours:\n", "hours: has no value, and needs a number. It is: Longest wall time of one attempt."),
        ("array_size: 0\n", "above 0"),
        ("env: [TOKEN=abc]\n", "name of an environment variable"),
        ("options: [exclusive]\n", "options and their values"),
        ("options: {gpus-per-task: 1}\n", "hides GPUs from ranks"),
        ("options: {tres-per-task: gres/gpu=1}\n", "hides GPUs from ranks"),
        ("options: {time: 60}\n", "the launcher sets or forbids"),
        ("options: {clusters: other}\n", "the launcher sets or forbids"),
        (
            "container_runtime: docker\n",
            r":1: container_runtime: no such choice \(found: 'docker'\). One of: pyx",
        ),
        ("utilisation: 40\n", "at most 1"),
        ("kind: pbs\n", "local, slurm"),
        ("hours: -1\n", r":1: hours: must be above 0 \(found: -1.0\)"),
        ("gpu: x\nmemory_gb: -2\n", r":2: memory_gb: must be at least 0 \(found: -2.0\)"),
        ("canary: 1e15\n", r":1: canary: must be below 1000000000000000 \(found: 1000000000000000\)"),
        ("env: WANDB\n", "list of texts"),
    ],
)
def test_load_profile_refuses_invalid_fields(tmp_path, text, words):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        load_profile(str(path))
    assert str(path) in str(caught.value)


def test_load_profile_reads_numbers_as_configurations_do(tmp_path):
    """The schema for editors accepts these, too."""
    path = tmp_path / "mine.yaml"
    path.write_text("parallel: 1_000\nhours: '1.5'\npartition: 4\nmemory_gb: 512\nsetup: ['echo ${HOME}']\n")
    profile = load_profile(str(path))
    assert (profile.parallel, profile.hours, profile.partition, profile.memory_gb) == (1000, 1.5, "4", 512.0)
    assert profile.setup == ["echo ${HOME}"] and isinstance(profile.memory_gb, float)


def test_load_profile_lists_known_profiles_for_unknown_name():
    with pytest.raises(ConfigError, match="h100, local"):
        load_profile("h1000")


def test_ctrl_c_ends_logs_as_other_commands(root, monkeypatch):
    """``run_main`` reports it, with exit code 130."""
    from jobs.commands import logs

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(logs, "follow", interrupt)
    with pytest.raises(KeyboardInterrupt):
        logs.main(["one/a", "--err", "-f", "--root", str(root)])
