"""Fuzz tests of a run's records: commands report the run as damaged and the other runs as usual."""

import contextlib
import csv
import io
import json
import os
import shlex
import shutil
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flip.checkpoint import manager
from flip.config.merge import to_dict
from flip.monitoring import results
from flip.runs import attempts, bad_nodes, checkpoint_folder, lifecycle, wall_limit  # fmt: skip
from flip.runs.errors import FlipError
from flip.runs.lifecycle import STATES  # fmt: skip
from flip.runs.metric_lines import newest_line
from flip.runs.rundir import RunDir, write_json
from jobs.commands import explain, logs, report  # fmt: skip
from jobs.common.cluster_profile import ClusterProfile
from jobs.host import notify  # fmt: skip
from jobs.local import backend  # fmt: skip
from jobs.pages import charts, html, markdown
from jobs.reporting import goodput, run_details  # fmt: skip
from jobs.reporting import outcomes as run_outcomes
from jobs.reporting import report as findings
from jobs.reporting import status as run_status
from jobs.slurm import job_states  # fmt: skip
from jobs.submission import (
    plan,  # fmt: skip
    render,  # fmt: skip
)
from jobs.submitted_runs import clusters, resubmit, select  # fmt: skip
from tests.jobs.outcomes import config, make, score, wanted
from tests.parsers.spoil import DEEP, VALUES, places, texts

pytestmark = [pytest.mark.timeout(300), pytest.mark.long]

SEARCHING = settings.default.max_examples > 100

JOB = {
    "kind": "local", "cluster": "local", "order": 0, "python": "/bin/false", "module": "jobs.runtime.rank_process",
    "snapshot": "/nowhere", "hooks": "/nowhere", "world": 1, "env": {}, "canary": {"steps": 1, "releases": ["demo.00"]},
    "shape": {"nodes": 1, "processes": 1, "gpus": 0, "cpus": 1, "hours": 24.0}, "waits_for": "sound", "notify": None,
    "command": ["jobs/submit.py", "--sweep", "sweeps/quickstart.yaml", "--only", "victim"], "after": 0, "time": 1.0,
    "name": "demo.77aa", "token": "77aa", "index": 0, "site": "", "uid": 1, "signal_seconds": 60,
}  # fmt: skip
END = {
    "action": "stop", "cause": "crash", "reason": "it broke", "delay": 60.0, "exclude": ["node1"], "attempt": 1,
    "code": 70, "state": "FAILED", "commits": 3200, "committed": True, "time": 1700000100.0,
}  # fmt: skip
STATUS = {
    "stage": "pretrain", "samples": 5120, "total": 12800, "step": 40, "steps": 100, "loss": 2.5, "phase": "training",
    "samples_per_second": 400.0, "eta_seconds": 19.2, "attempt": 1, "storage": "", "verdict": "good", "reason": "",
    "time": 1700000050.0,
}  # fmt: skip
CHECKPOINT = {"stage": "pretrain", "samples": 3200, "attempt": 1, "saving": 2.5, "url": "file:///nowhere", "files": {}}
SCORE = {**score("imagenet", "test", 0.5), "stage": "pretrain", "samples": 3200, "precision": "fp32", "seconds": 3.0,
         "note": "a note", "job": "demo", "time": 1.0}  # fmt: skip
ABOUT = {"name": "demo", "title": "A demo", "notes": "", "cluster": "local", "runs": ["victim", "sound"],
         "paper": {"victim": {"row": "8, baseline", "imagenet": 74.3, "within": 0.5, "needs": {}, "near": {},
                              "images": {"imagenet": 50000}}},
         "rows": [{"row": "8, baseline", "imagenet": 74.3}]}  # fmt: skip

RECORDS = {
    "job.json": JOB,
    "status.json": STATUS,
    "cancel.json": {"who": "me", "why": "wrong", "time": 1.0},
    "attempts/1/start.json": {
        "host": "here", "resumes_from": 0, "first_commit": False, "after": 0, "attempt": 1, "time": 1700000000.0,
        "nodes": "node[1-2]", "job": "7", "world": 1,
    },
    "attempts/1/end.json": END,
    "attempts/1/ready.json": {"samples": 0, "time": 1700000001.0},
    "attempts/1/wall.json": {"limit": 3600},
    "attempts/1/cause.0.json": {
        "cause": "crash", "code": 70, "reason": "it broke", "rank": 0, "host": "node1", "signal": "TERM", "time": 1.0,
    },
    "attempts/1/pids.json": [{"rank": 0, "pid": 2**22 + 1, "start": "5"}],
    "checkpoints/pretrain/3200-1/commit.json": CHECKPOINT,
    "checkpoints/url.json": {"url": "file:///nowhere", "folder": "/nowhere"},
    "pins/one.json": {"by": "/nowhere", "stage": "pretrain", "samples": 3200, "time": 1.0},
    "eval/pretrain-3200/demo-1.json": {"stage": "pretrain", "samples": 3200, "job": "demo-1", "evaluations": [SCORE]},
    "../sweep.json": ABOUT,
}  # fmt: skip
"""Records of the damaged run, in addition to the records that ``make`` writes."""

#: States of the damaged run.
SCENES = ("failed", "running", "complete", "slurm")
NAMES = (*RECORDS, "config.yaml", "identity.json", "result.json", "eval/pretrain-3200.json", "metrics/1.jsonl")


def build(root, scene):
    make(root / "demo", "sound", "0.5")
    run = make(root / "demo", "victim", "0.5", steps=100, complete=scene == "complete")
    for name, record in RECORDS.items():
        if name == "cancel.json" or (name.endswith("end.json") and scene == "running"):
            continue
        path = run.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**record, "kind": "slurm"} if name == "job.json" and scene == "slurm" else record)
    (run.logs / "1").mkdir(parents=True)
    (run.logs / "1" / "node0.err").write_bytes(b"\x1b[2Jlast words\xff\n")
    (run.logs / "1" / "node0.out").write_text("out\n")
    return run


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return {scene: build(tmp_path_factory.mktemp(scene), scene) for scene in SCENES}


@pytest.fixture(autouse=True)
def silent_slurm(monkeypatch):
    monkeypatch.setattr(job_states.slurm_cli, "queue", lambda names: {list_[0]: list_[1] for list_ in QUEUE})
    monkeypatch.setattr(job_states.slurm_cli, "config", lambda: {})


@pytest.fixture(scope="module", autouse=True)
def chart_cache():
    """Draws each chart once: few damaged values change a chart, and drawing takes most of the time of a report."""
    drawn = {}
    draw = charts.svg

    def svg(plot, small=False):
        key = (repr(plot), small)
        if key not in drawn:
            if len(drawn) > 200:
                drawn.clear()
            drawn[key] = draw(plot, small)
        return drawn[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "svg", svg)
        yield


QUEUE = [(("demo.77aa", 0), job_states.QueueRow("7_0", "PENDING", "JobHeldUser", ""))]


@pytest.fixture(scope="module")
def desired_runs():
    return [wanted("victim"), wanted("sound")]


@contextlib.contextmanager
def replaced(path, content):
    """Replace the file by ``content`` within the context."""
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before) if before is not None else path.unlink()


def printed(text):
    """Return the output of ``report --csv -`` and ``--markdown -``."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        report._save("-", text)
    return out.getvalue()


def read_by_commands(run, desired_runs):
    """Run status, watch, report, explain, logs, a plan and ``flip.read_runs`` on all runs of the folder."""
    folder = run.path.parent
    runs = [run, RunDir(folder / "sound")]
    rows = run_status.table(runs)
    shown = [run_status.render(rows), json.dumps(rows)]
    assert rows[1]["state"] == "complete" and rows[1]["samples"] is None and not rows[1]["reason"], rows[1]
    run_status._Lines(io.StringIO()).draw(rows)
    shown.append(run_status.screen(rows, 80, 24))
    clusters.worst_exit_code((run, row["state"]) for run, row in zip(runs, rows, strict=True))
    accounts = goodput.of_runs(runs)
    shown += [goodput.render(accounts), json.dumps(goodput.as_dict(accounts))]
    outcomes = run_outcomes.outcomes(runs)
    states = {outcome.run.name: outcome.state for outcome in outcomes}
    assert states["sound"] == "complete" and states[run.name] in STATES
    blocks = findings.findings(outcomes, 1.7e9)
    table = run_outcomes.rows(outcomes)
    shown += [run_outcomes.terminal_page(outcomes), json.dumps(table)]
    assert [row["validation.validation.top1"] for row in table if row["run"] == "sound"] == [0.2]
    assert [row["state"] for row in results.read_runs(folder) if row["run"] == "sound"] == ["complete"]
    facts = run_details.explain(run)
    shown += [explain.page(facts), json.dumps(facts)]
    resubmit.command(run), logs.files(run, None, True), clusters.poll_interval(runs)
    scanned = plan.scan_runs(folder, ["victim", "sound"])
    planned = plan.compare(desired_runs, scanned, folder, options=plan.PlanOptions(retry=True))
    assert planned.actions[1].kind in ("changed", "complete") and scanned["sound"].state == "complete"
    desired = SimpleNamespace(name="demo", title="A \x1b[2J title")
    shown += [
        render.summary(render.PlanView(planned, desired, ClusterProfile())),
        render.details(render.PlanView(planned, desired, ClusterProfile())),
    ]
    shown += [printed(run_outcomes.csv_text(table)), printed(markdown.markdown(blocks))]
    for text in shown:
        lines = text.split("\n")
        assert all(line.isprintable() for line in lines), "no escape sequence reaches the terminal"
        assert max(map(len, lines)) < 100_000
    files = (html.render("x", blocks), run_outcomes.csv_text(table), markdown.markdown(blocks))
    assert all(text.encode("utf-8") for text in files)


def read_by_hosts(run):
    """Call the readers of the supervisor, the exit trap and the trainer, which may raise OSError or ValueError."""
    calls = (
        lambda: attempts.last_end(run), lambda: attempts.current_end(run), lambda: attempts.submitted_after(run),
        lambda: attempts.earlier_ends(run, 0, 9),
        lambda: attempts.cancel_reason(run), lambda: run.causes(1), lambda: checkpoint_folder.checkpoints(run),
        lambda: checkpoint_folder.pinned(run), lambda: checkpoint_folder.pin_holders(run),
        lambda: wall_limit.measured(run), lambda: wall_limit.recorded_limit(run, 1),
        lambda: wall_limit.why_too_short(run, 9),
        lambda: manager.uptime_and_interruptions(run, 9), lambda: newest_line(run), lambda:
        bad_nodes.find_suspect(run, 1, 1.7e9), lambda: notify._sweep_ended(run), lambda: backend.live_ranks(run),
        lambda: lifecycle.awaited_canaries([run]), lambda: job_states.invisible_jobs([run]),
    )  # fmt: skip
    for call in calls:
        with contextlib.suppress(OSError, ValueError, FlipError):
            call()


def check(run, name, content, desired_runs):
    path = run.path / name
    with replaced(path, content):
        read_by_commands(run, desired_runs)
        read_by_hosts(run)


@pytest.mark.slow
@pytest.mark.parametrize("scene", SCENES)
@given(data=st.data())
def test_commands_survive_any_value_in_any_record(scenes, desired_runs, scene, data):
    run = scenes[scene]
    name = data.draw(st.sampled_from([n for n in NAMES if n.endswith(".json") and (run.path / n).exists()]))
    check(run, name, data.draw(texts(json.loads((run.path / name).read_text()))), desired_runs)


SIZES = [10**18, 10**30, 10**400, -1, 1e308, "x" * 100_000, True, None, [], {}, [[]], "\x1b[2J\n; rm -rf ~"]


@pytest.mark.parametrize("name", RECORDS)
def test_commands_survive_extreme_value_in_each_field(scenes, desired_runs, name):
    """Each field gets a single value; with the profile ``search`` each field gets all values."""
    record = RECORDS[name]
    for i, field in enumerate(record if isinstance(record, dict) else {}):
        for value in SIZES if SEARCHING else [SIZES[(i + len(name)) % len(SIZES)]]:
            if i % 2:
                scene = "slurm"
            else:
                scene = "running" if "start" in name else "failed"
            check(scenes[scene], name, json.dumps({**record, field: value}).encode(), desired_runs)


WHOLE = [
    b"", b"{", b"[]", b"5", b'"x"', b"null", b"\xff\xfe", b'{"a": NaN}', b'{"time": 1e999}', DEEP,
    b'{"a":' * 500 + b"1" + b"}" * 500,
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_commands_survive_records_replaced_by_other_content(scenes, desired_runs, name):
    first = NAMES.index(name)
    for i in range(len(WHOLE)) if SEARCHING else (first, first + 4, first + 7):
        check(scenes[SCENES[i % 3]], name, WHOLE[i % len(WHOLE)], desired_runs)


@pytest.mark.slow
@given(data=st.data())
def test_commands_survive_any_value_in_config(scenes, desired_runs, data):
    values = to_dict(config())
    *above, last = data.draw(st.sampled_from([path for path in places(values) if path]))
    section = values
    for key in above:
        section = section[key]
    section[last] = data.draw(VALUES)
    check(scenes["failed"], "config.yaml", json.dumps(values).encode(), desired_runs)


@pytest.mark.parametrize("name, content, words", [
    ("job.json", {"after": "x"}, "job.json: `after` is not a whole number"),
    ("attempts/1/start.json", {"time": 1e300}, "start.json: `time` is not a time in seconds"),
    ("attempts/1/end.json", {"reason": 5}, "end.json: `reason` is not text"),
    ("status.json", {"loss": []}, "status.json: `loss` is not a number"),
    ("result.json", {"evaluations": [{"name": "x"}]}, "result.json: lacks `evaluations.0.top1`"),
    ("cancel.json", [], "cancel.json: holds no mapping"),
])  # fmt: skip
def test_status_names_file_and_field_of_damaged_record(scenes, name, content, words):
    run = scenes["failed"]
    with replaced(run.path / name, json.dumps(content).encode()):
        (row,) = run_status.table([run])
        assert row["reason"].count(words) == 1 and words in explain.page(run_details.explain(run))
        assert words in run_outcomes.terminal_page(run_outcomes.outcomes([run]))


@pytest.mark.parametrize("words", [
    ["rm", "-rf", "/home"],
    ["jobs/submit.py", "--sweep", "a.yaml", "; rm -rf ~"],
    ["jobs/submit.py", "--sweep", "a.yaml\n; rm -rf ~"],
    ["jobs/submit.py", "--sweep", "a.yaml", "--only", "$(reboot)"],
    ["jobs/submit.py", "--sweep", "a.yaml", "seed=1\x1b[2J"],
    ["jobs/submit.py", "--sweep", "--yes", "--prune-most"],
])  # fmt: skip
def test_explain_hides_recorded_command_of_unexpected_form(scenes, monkeypatch, words):
    monkeypatch.setattr(job_states.slurm_cli, "queue", lambda names: {})
    for scene, kind, state in (("failed", "local", "failed"), ("running", "slurm", "stopped")):
        run = scenes[scene]
        with replaced(run.path / "job.json", json.dumps({**JOB, "kind": kind, "command": words}).encode()):
            facts = run_details.explain(run)
            assert facts["state"]["state"] == state and words[-1] not in json.dumps(facts, ensure_ascii=False)
            assert "--only victim" in facts["next"]["what"] and facts["next"]["command"] is None


@pytest.mark.parametrize("folder", ["relative", "/a\nreboot", "/a\x1b[2J", "-P"])
def test_explain_hides_command_with_recorded_folder_of_unexpected_form(scenes, folder):
    run = scenes["failed"]
    with replaced(run.path / "job.json", json.dumps({**JOB, "command_folder": folder}).encode()):
        assert run_details.explain(run)["next"]["command"] is None


def test_explain_quotes_folder_of_command(scenes):
    run = scenes["failed"]
    with replaced(run.path / "job.json", json.dumps({**JOB, "command_folder": "/a b/$(reboot) && x"}).encode()):
        command = run_details.explain(run)["next"]["command"]
    assert shlex.split(command)[:3] == ["cd", "/a b/$(reboot) && x", "&&"]


def test_explain_quotes_command_and_hides_it_if_record_is_world_writable(scenes):
    run = scenes["failed"]
    argv = ["jobs/submit.py", "--sweep", "/a b/$(reboot).yaml", "data.manifest=`reboot`; reboot", "--only", "victim"]
    with replaced(run.path / "job.json", json.dumps({**JOB, "command": argv}).encode()):
        command = run_details.explain(run)["next"]["command"]
        words = shlex.split(command)
        assert words[1].endswith("/jobs") and words[2 : 2 + len(argv)] == ["submit", *argv[1:]] and "--retry" in words
        assert command == shlex.join(words)
        assert command in explain.page(run_details.explain(run))
        (run.path / "job.json").chmod(0o666)  # any user may have written the record
        next_step = run_details.explain(run)["next"]
        assert next_step["command"] is None and "reboot" not in next_step["what"]
        (run.path / "job.json").chmod(0o644)


def test_logs_escape_control_characters_and_refuse_links(scenes, capfdbinary):
    run = scenes["failed"]
    logs.follow([run], None, True, False)
    assert capfdbinary.readouterr().out == b"\\x1b[2Jlast words\\xff\n"
    (run.logs / "1" / "node1.err").symlink_to("/dev/null")
    with pytest.raises(FlipError, match="not a regular file"):
        logs.follow([run], None, True, False)
    (run.logs / "1" / "node1.err").unlink()


def test_select_ignores_run_folder_with_undecodable_name(tmp_path, desired_runs):
    run = build(tmp_path, "failed")
    copied = tmp_path / "demo" / os.fsdecode(b"bad\xff\x1b[2J")
    shutil.copytree(run.path, copied)
    assert [selected.name for selected in select.select(None, [tmp_path])] == ["sound", "victim"]
    assert {row["run"] for row in results.read_runs(tmp_path)} == {"sound", "victim"}
    with pytest.raises(FlipError, match="no such sweep or run"):
        select.select(str(copied), [tmp_path])
    read_by_commands(run, desired_runs)


def test_csv_text_escapes_formulas_in_cells_and_headings(tmp_path):
    run = make(tmp_path / "demo", "=1+1", steps=100, complete=False, end={**END, "reason": "@SUM(A1)"})
    result = {"stage": "pretrain", "samples": 3200, "evaluations": [{**SCORE, "role": "=cmd()"}]}
    write_json(run.result, result)
    write_json(run.eval / "pretrain-3200.json", result)
    rows = run_outcomes.rows(run_outcomes.outcomes([run]))
    cells = [cell for line in csv.reader(io.StringIO(run_outcomes.csv_text(rows))) for cell in line]
    assert "'=cmd().imagenet.top1" in cells and "'=1+1" in cells
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]
