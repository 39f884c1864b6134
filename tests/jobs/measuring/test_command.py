"""Tests of `flip doctor --measure`: options, refusals, the pages, and what they do not name."""

import json
import os
import socket
import time
from dataclasses import replace

import pytest

from flip.files.creation import run_folder
from flip.runs.errors import CONFIG, ConfigError, DataError, StorageError
from flip.runs.lifecycle import RunState
from flip.runs.rundir import write_json
from jobs.commands import doctor
from jobs.host.rank_entry import MALLOC
from jobs.measuring import command, compare, machine, page
from jobs.measuring.limited import LimitedResult
from jobs.measuring.rows import NO_GPU, RowPlan
from jobs.pages.html import render
from jobs.pages.markdown import markdown
from jobs.planning.measurement import (
    FAILED,
    MEASURED,
    SKIPPED,
    TIME_LIMIT,
    MeasuredRow,
    read_measurement,
)
from tests.jobs.measuring.test_verdicts import DISK, GOOD, row
from tests.jobs.planning.test_measurement import example
from tests.synthetic import make_dataset


def measure(tmp_path, monkeypatch, *words):
    monkeypatch.setenv("FLIP_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    return doctor.main(["--measure", *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--minutes", "0.1", "--yes"], "not a time for a measurement"),
        (["--nodes", "2", "--yes"], "nodes of a cluster need its profile"),
        (["--partition", "gpu", "--yes"], "nodes of a cluster need its profile"),
        (["--write", "mine", "--yes"], "a measurement writes no profile"),
        (["--cluster", "h100", "--minutes", "1440", "--yes"], "time limit is too short"),
        (["--cluster", "h100", "--only", "disc", "--yes"], "no such row"),
        (["--only", "disc", "--yes"], "no such row"),
        (["--only", "disk"], "confirmation needed"),
        (["--data", "/no/manifest", "--yes"], "/no/manifest"),
        (["--cluster", "h100", "--data", "/no/manifest", "--yes"], "/no/manifest"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys, words, message):
    assert measure(tmp_path, monkeypatch, *words) in (65, 78)
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] in ([], ["runs"])


def test_partition_of_the_command_line_replaces_that_of_the_profile(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.cluster, "check", lambda *_: None)
    words = ["--cluster", "h100", "--partition", "other", "--account", "vision"]
    assert measure(tmp_path, monkeypatch, *words) == CONFIG  # nobody answers the question
    assert "nodes of partition other" in capsys.readouterr().err


def test_profile_that_cannot_submit_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    """This machine has no Slurm."""
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert measure(tmp_path, monkeypatch, "--cluster", "h100", "--yes") == CONFIG
    assert "sbatch" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_options_of_a_measurement_need_it(capsys):
    assert doctor.main(["--minutes", "3"]) == CONFIG and "Add --measure" in capsys.readouterr().err


def test_manifest_of_another_site_is_refused(tmp_path):
    folder = make_dataset(tmp_path / "data", samples=16, shards=1)
    assert command.checked_manifest(str(folder)) == str(folder)
    for shard in folder.rglob("*.tar"):
        shard.unlink()
    with pytest.raises(DataError, match="another site"):
        command.checked_manifest(str(folder))


def test_folder_of_runs_without_space_is_refused(tmp_path):
    with pytest.raises(StorageError, match="are free"):
        command.usable_root(tmp_path / "runs", 1e18)


def test_disk_row_is_measured_written_and_continued(tmp_path, monkeypatch, capsys):
    assert measure(tmp_path, monkeypatch, "--only", "disk", "--yes", "--out", "result") == 0
    output = capsys.readouterr().out
    assert "folder of runs" in output and "for plans" in output
    first = read_measurement(str(tmp_path / "result" / "measured.json"))
    assert first.row("disk").values["locks_exclude"] is True
    assert sorted(path.name for path in (tmp_path / "result").iterdir()) == [
        "measured.json",
        "report.html",
        "report.md",
    ]
    assert list((tmp_path / "runs").iterdir()) == [], "the row's folder is deleted"
    assert measure(tmp_path, monkeypatch, "--only", "disk", "--yes", "--out", "result", "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["rows"][0]["values"] == first.row("disk").values, "a measured row is kept"
    assert [verdict["about"] for verdict in again["verdicts"] if verdict["about"] != "load of the machine"] == [
        "folder of runs"
    ]


def test_result_of_another_machine_is_not_continued(tmp_path):
    facts = example().machine
    (tmp_path / "measured.json").write_text(json.dumps(example(row("disk", **DISK)).as_dict()))
    with pytest.raises(ConfigError, match="another machine"):
        command.earlier_rows(tmp_path / "measured.json", replace(facts, cores=4), force=False)
    assert command.earlier_rows(tmp_path / "measured.json", facts, force=True) == {}


@pytest.mark.long
def test_failed_row_is_recorded_without_paths_and_others_run(tmp_path):
    rows = [
        RowPlan("reads", "reads", "reads", {"manifest": "/shared/secret/manifest", "seconds": 1, "processes": 1}, 60)
    ]
    rows += [RowPlan("disk", "files", "disk", {}, 30)]
    measured = machine.measure(rows, example().machine, tmp_path, 3.0)
    assert [each.status for each in measured.rows] == [FAILED, MEASURED]
    assert "secret" not in json.dumps(measured.as_dict()) and measured.rows[0].detail


def test_row_has_the_allocator_of_a_rank(tmp_path, monkeypatch):
    """Without it, a step on a CPU returns its memory to the kernel, and takes longer than that of a run."""
    for name in ("GLIBC_TUNABLES", "PYTORCH_ALLOC_CONF", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    seen = []

    def run_limited(command, limit, environment, stopped):
        seen.append({name: environment.get(name) for name in ("GLIBC_TUNABLES", "PYTORCH_ALLOC_CONF")})
        return LimitedResult(MEASURED, "{}", "", 1.0)

    monkeypatch.setattr(machine, "run_limited", run_limited)
    for device in ("cpu", "cuda"):
        machine.run_row(RowPlan("step", "a step", "step", {"device": device}, 30), tmp_path, time.monotonic() + 60)
    expandable = "expandable_segments:True"
    assert seen == [
        {"GLIBC_TUNABLES": MALLOC, "PYTORCH_ALLOC_CONF": expandable},
        {"GLIBC_TUNABLES": None, "PYTORCH_ALLOC_CONF": expandable},
    ]


def test_row_without_time_is_skipped_with_remedy(tmp_path):
    measured = machine.measure([RowPlan("disk", "files", "disk", {}, 30)], example().machine, tmp_path, 0.0)
    assert "--minutes" in measured.rows[0].detail


@pytest.mark.parametrize(("own_limit", "status"), [(60, SKIPPED), (5, TIME_LIMIT)])
def test_row_that_the_total_time_ends_is_not_called_broken(tmp_path, monkeypatch, own_limit, status):
    """Ten seconds are left: a row with a limit of 60 would have had more, one with a limit of 5 has had its own."""
    monkeypatch.setattr(machine, "run_limited", lambda _, limit, *more: LimitedResult(TIME_LIMIT, "", "", limit))
    plan = RowPlan("link_node", "collectives in a node", "collectives", {}, own_limit)
    done = machine.run_row(plan, tmp_path, time.monotonic() + 10)
    assert done.status == status and done.seconds > 4
    assert (done.detail == machine.NO_TIME) == (status == SKIPPED)


def test_interrupted_fault_ends_its_runs_without_a_save(tmp_path, monkeypatch):
    events = []

    def interrupted(*_):
        write_json(run_folder(tmp_path / "runs" / "measure" / "agent") / "job.json", {"kind": "slurm"})
        raise KeyboardInterrupt

    monkeypatch.setattr(machine, "run_limited", interrupted)
    monkeypatch.setattr(machine.clusters, "states", lambda runs: {run.path: RunState("running") for run in runs})
    monkeypatch.setattr(machine.clusters, "request_cancel", lambda runs, why: events.extend(run.name for run in runs))
    monkeypatch.setattr(machine.clusters, "cancel", lambda runs, again: events.extend(again))
    plan = RowPlan("fault_agent", "a killed agent", "fault", {}, 240)
    with pytest.raises(KeyboardInterrupt):
        machine.run_row(plan, tmp_path, time.monotonic() + 100, shared=tmp_path)
    assert events == ["agent", tmp_path / "runs" / "measure" / "agent"]


def test_names_are_private_unless_asked(tmp_path):
    text = f"/home/ann/runs/x.json of {socket.gethostname()}: cannot write {tmp_path}/y (1/2 done)"
    assert machine.private(text, tmp_path) == "... of ...: cannot write ... (1/2 done)"
    measured = machine.measure([], example().machine, tmp_path, 1.0)
    assert not measured.names and machine.measure([], example().machine, tmp_path, 1.0, names=True).names


def test_gpus_are_those_that_the_job_may_use(tmp_path, monkeypatch):
    """A fake nvidia-smi shows four GPUs."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nfor i in 1 2 3 4; do echo NVIDIA H100 80GB HBM3; done\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine.gpu_names() == [], "no driver"
    monkeypatch.setattr(machine, "driver", lambda: "570.86.10")
    assert len(machine.gpu_names()) == 4
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert len(machine.gpu_names()) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.gpu_names() == []
    facts = machine.describe_machine(["NVIDIA H100 80GB HBM3"] * 2)
    assert (facts.gpu, facts.gpus, facts.driver) == ("NVIDIA H100 80GB HBM3", 2, "570.86.10")


def test_page_shows_verdicts_first_and_escapes():
    rows = [row(name, **values) for name, values in GOOD.items()]
    rows += [MeasuredRow("reads", "reads of shards", FAILED, {}, "<b>broken</b>", 1.0)]
    parts = page.blocks(example(*rows, minutes=9.5))
    text = markdown(parts)
    assert text.index("1 does not work, 11 work") < text.index("## What to do") < text.index("## What works")
    assert "Does not work: reads of shards." in text and text.index("## What works") < text.index("## Training steps")
    assert "Measured 2026-11-29 on 2 nodes in 9 min 30 s" in text and "driver 570.86.10" in text
    html = render(page.TITLE, parts)
    assert "&lt;b&gt;broken" in html and "<b>broken" not in html


def test_page_says_first_what_was_left_out_and_what_to_do_if_all_works():
    """A reader who was not there must not take a small model on a CPU for the model of a cluster."""
    step = {"device": "cpu", "size": "emoji", "mask": "0.5", "samples_per_second": 700.0, "spread": 0.1}
    rows = [row("step_emoji_0.5", **step), row("trace", longest={"addmm": 0.4}, busy=0.9, milliseconds=1.0)]
    rows += [MeasuredRow(f"step_{size}", f"step of {size}", SKIPPED, detail=NO_GPU) for size in ("B/16", "H/14")]
    measured = example(*rows)
    text = markdown(page.blocks(replace(measured, machine=replace(measured.machine, gpus=0, gpu=""))))
    assert f"Left out ({NO_GPU}): step of B/16; step of H/14." in text.partition("## What to do")[0]
    assert "Nothing. Plans use these numbers" in text and "training of a small model (emoji), mask 0.5" in text
    assert ". No GPU; 96 cores" in text and "**4 rows, 2 s**" in text
    assert "| row step\\_emoji\\_0.5 | measured | 1.0 | - |" in text
    assert "| of | share of a step |" in text and "| addmm | 0.4 |" in text


def test_rows_without_a_verdict_have_a_page():
    measured = example(row("trace", device="cpu", busy=0.9))
    assert page.terminal_text(measured).endswith("no verdicts") and "no verdicts" in markdown(page.blocks(measured))


def test_comparison_names_versions_verdicts_and_slower_numbers(tmp_path, capsys):
    first = example(*(row(name, **values) for name, values in GOOD.items()))
    slow = {**GOOD, "disk": {**DISK, "replace_milliseconds": 400.0}, "link_node": {"device": "cuda", "gbps": 2000.0}}
    second = example(*(row(name, **values) for name, values in slow.items() if name != "save"))
    second = replace(second, machine=replace(second.machine, driver="580.1.2"), packages={"torch": "2.14.0"})
    files = []
    for name, each in (("a", first), ("b", second)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "measured.json").write_text(json.dumps(each.as_dict()))
        files.append(str(tmp_path / name))
    assert doctor.main(["--compare", *files, "--out", str(tmp_path / "both")]) == 0
    text = capsys.readouterr().out
    assert "| driver | 570.86.10 | 580.1.2 |" in text and "| torch | 2.13.0 | 2.14.0 |" in text
    assert "| folder of runs | works | slow |" in text and "| save and restore | works | - |" in text
    assert "| link\\_node | gbps | 2,900 | 2,000 | 0.69 |" in text
    assert compare.is_worse("gbps", 2900, 2000) and not compare.is_worse("gbps", 2000, 2900)
    assert compare.is_worse("replace_milliseconds", 2, 400) and not compare.is_worse("save_seconds", 2.0, 2.1)
    assert sorted(os.listdir(tmp_path / "both")) == ["comparison.html", "comparison.md"]
    assert doctor.main(["--compare", *files, "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)["numbers"]
    assert {"row": "link_node", "number": "gbps", "a": 2900.0, "b": 2000.0} in numbers
