"""The command as a person types it, from another directory, on small real data."""

import errno
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import webdataset

from flip.config import merge as load_module
from flip.config import schema
from flip.config.merge import read
from flip.config.resolve import DataFacts
from flip.config.schema import Config
from flip.data.manifest.build import index
from flip.data.manifest.manifest import Manifest, write
from flip.data.order import SampleOrder
from flip.monitoring.results import read_run
from flip.runs import commit
from flip.runs.errors import ConfigError, DataError, PermissionDenied, StorageError
from flip.runs.rundir import RunDir, create_json, read_json, write_json
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import JobState
from jobs.planning import plan as planning
from jobs.planning import preflight
from jobs.reporting.goodput import of_run
from jobs.slurm import site
from jobs.submission import apply as folders
from jobs.submission import submission
from jobs.submission.snapshot import Snapshot
from jobs.submission.submission import Submission
from jobs.submit import main as submit_main
from tests.harness.command_line import SubmitCommandLine
from tests.synthetic import encode, make_dataset, picture
from tools.shards import main as shards_main

ROOT = Path(__file__).resolve().parents[2]
SCALING = ("model_scaling", "data_scaling", "schedule_scaling", "joint_scaling")


@pytest.fixture
def desk(tmp_path, data):
    return SubmitCommandLine(tmp_path, data)


@pytest.mark.parametrize("name", SCALING)
def test_dry_run_of_the_papers_sweeps(desk, name):
    done = desk.submit("--dry-run", sweep=f"sweeps/{name}.yaml")
    assert done.returncode == 0, done.stderr
    for words in (
        "GPU-hours at an assumed 40 % of 989 TFLOP/s",
        "not checked here",
        "batch jobs:",
        "nominal",
        "98 of 196" if name != "joint_scaling" else "128 of 256",
    ):
        assert words in done.stdout
    assert not desk.runs.exists() and "nothing started" in done.stdout and "#SBATCH" not in done.stdout


def test_the_numbers_of_a_plan(desk):
    plan = json.loads(desk.submit("--dry-run", "--json", sweep="model_scaling").stdout)
    baseline, model = plan["runs"]
    pretrain = baseline["stages"][0]
    # As the head of the sweep file says; by hand: 3 * forward FLOPs * 12.8e9 pairs / (0.4 * 989e12 FLOP/s) / 3600 s.
    assert pretrain["gpu_hours"] == pytest.approx(1790, abs=0.5) and pretrain["steps"] == 195_313
    assert model["stages"][0]["gpu_hours"] == pytest.approx(4979, abs=0.5)
    assert [batch["runs"] for batch in plan["batches"]] == [["baseline"], ["model"]]
    assert plan["cost"]["gpu_hours"] == pytest.approx(sum(run["cost"]["gpu_hours"] for run in plan["runs"]))


def test_planning_loads_no_torch(desk):
    script = (
        "import sys; from jobs.submit import main; code = main(['--sweep', sys.argv[1], '--dry-run']);"
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'torchvision', 'timm')))"
    )
    done = subprocess.run([sys.executable, "-c", script, desk.sweep], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "128 samples in 2 shards" in done.stdout, "it looked at the data"


def test_a_machine_without_slurm_says_so(desk, tmp_path):
    (tmp_path / "far.yaml").write_text("kind: slurm\npartition: gpu\n")
    done = desk.submit("--cluster", str(tmp_path / "far.yaml"), env={"PATH": "/nowhere"})
    assert done.returncode == 78 and "sbatch, srun, squeue, scancel, scontrol" in done.stderr, done.stderr
    done = desk.submit("--cluster", str(tmp_path / "far.yaml"), "--dry-run", env={"PATH": "/nowhere"})
    assert done.returncode == 0 and "Slurm: PATH" in done.stdout.split("not checked here")[1], done.stderr
    assert not desk.runs.exists()


@pytest.mark.long
def test_mistakes_are_one_paragraph_and_leave_nothing(desk, data, tmp_path):
    desk.refuses(78, "stages.pretrain.batch", "stages.pretrain.batch=15", "resources.processes=2")
    desk.refuses(78, "no run of the sweep matches", "--only", "nothing*")
    desk.refuses(78, "vocabulary", "model.text.vocabulary=20")
    desk.refuses(78, "one node", "resources.nodes=2")
    desk.refuses(78, "memory are needed", "model.size=H/14", "stages.pretrain.batch=100000", "data.lanes=1")
    desk.refuses(65, "manifest", "data.manifest=/nowhere")
    desk.refuses(65, "there is no manifest here", "data.manifest=/nowhere", "data.samples=1000")
    desk.refuses(65, "none of the first 8 samples can be trained on", "data.captions=[alt]")
    desk.refuses(78, "class names", "evaluate.sets.small.classes=/nowhere.json")
    few = tmp_path / "few.json"
    few.write_text('{"names": ["a"], "templates": ["{} and {}"]}')
    desk.refuses(78, "a template needs one {}", f"evaluate.sets.small.classes={few}")


@pytest.fixture(scope="module")
def with_json(tmp_path_factory, data):
    """Samples of jpg + json alone, as some data sets come: the captions stand in a field of the json."""
    folder = tmp_path_factory.mktemp("json")
    with webdataset.TarWriter(str(folder / "0.tar"), mtime=0) as writer:
        for i in range(128):
            facts = {"url": "http://here", "caption": [f"a picture {i}", "one more"], "width": 16}
            writer.write({"__key__": f"{i:04d}", "jpg": encode(picture(i, 16), "jpg"), "json": facts})
    index([str(folder / "0.tar")], folder)
    return folder


def submitted(desk, folder, monkeypatch, capsys, *words):
    """In this process: (exit code, both outputs)."""
    monkeypatch.setenv("FLIP_RUNS", str(desk.runs))
    data = [f"data.manifest={folder}", "evaluate.sets=[]"]
    code = submit_main(["--sweep", str(desk.sweep), "--yes", *data, *words])
    shown = capsys.readouterr()
    return code, shown.out + shown.err


def test_a_whole_json_member_is_refused_and_its_fields_are_named(desk, with_json, monkeypatch, capsys):
    code, said = submitted(desk, with_json, monkeypatch, capsys, "data.captions=[json]", "--dry-run")
    assert code == 78 and "data.captions" in said and "as json:caption." in said and "json:url" in said, said
    nowhere = ["data.captions=[json]", "data.manifest=/nowhere", "data.samples=1000", "--dry-run"]
    assert "json:caption" in submitted(desk, with_json, monkeypatch, capsys, *nowhere)[1]
    code, said = submitted(desk, with_json, monkeypatch, capsys, "--dry-run")  # txt
    assert code == 65 and "JSON fields with text: json:caption, json:url" in said, said
    code, said = submitted(desk, with_json, monkeypatch, capsys, "data.captions=[json:caption]", "--dry-run")
    assert code == 0, said


def test_a_run_that_trains_on_a_whole_json_member_may_go_on(desk, with_json, monkeypatch, capsys):
    """As it was begun by a version that took it: the same sweep again changes nothing, another run is refused."""
    monkeypatch.setattr(submission, "take", lambda _, into: Snapshot("c0de", into / "c0de", 1, 1, ()))
    monkeypatch.setattr(submission.MultiBackend, "submit", lambda *_: None)
    with monkeypatch.context() as before:
        before.setattr(preflight, "captions", lambda *_: None)
        code, said = submitted(desk, with_json, monkeypatch, capsys, "data.captions=[json]", "--only", "half")
    assert code == 0, said
    code, said = submitted(desk, with_json, monkeypatch, capsys, "data.captions=[json]", "--only", "half")
    assert code == 0 and "changed" not in said, said
    code, said = submitted(desk, with_json, monkeypatch, capsys, "data.captions=[json]")
    assert code == 78 and "run whole" in said, said


def test_a_block_without_a_good_sample_is_refused_with_the_command_that_helps(desk, data, monkeypatch, capsys):
    """The order is known: the run would stop there with 65, and stop there again each time that it is started."""
    manifest = Manifest.load(data)
    order, config = SampleOrder(0, 128, manifest.chunk, 1, 2), ["data.lanes=2"]
    bad = order.blocks(range(2), range(16, 17))[0][0, 1].tolist()  # lane 1, S = 32
    assert manifest.chunk == 1 and len(bad) == 1
    less = write(desk.folder / "less", manifest, manifest.checksums, dict.fromkeys(bad, "bad"))
    code, said = submitted(desk, less.folder, monkeypatch, capsys, *config, "--dry-run")
    assert code == 65 and "lane 1 from S = 32 are excepted" in said, said
    assert f"tools/shards.py drop {less.folder} --out NEW_FOLDER" in said
    code, said = submitted(desk, less.folder, monkeypatch, capsys, *config, "stages.pretrain.samples=32", "--dry-run")
    assert code == 0, said
    assert shards_main(["drop", str(less.folder), "--out", str(desk.folder / "good")]) == 0
    capsys.readouterr()
    code, said = submitted(desk, desk.folder / "good", monkeypatch, capsys, *config, "--dry-run")
    assert code == 0 and "127 samples" in said, said


def test_a_run_beyond_a_block_without_a_good_sample_may_go_on(data, tmp_path):
    manifest = Manifest.load(data)
    bad = SampleOrder(0, 128, 1, 1, 2).blocks(range(2), range(16, 17))[0][0, 1].tolist()
    less = write(tmp_path / "less", manifest, manifest.checksums, dict.fromkeys(bad, "bad"))
    values = {"manifest": str(less.folder), "samples": 128, "chunk": 1, "lanes": 2, "block": 1}
    config = Config(data=schema.Data(**values), stages=[schema.Stage(name="only", samples=64, batch=16)])
    facts = [DataFacts(128, 1, 1.0, "", False)]
    run = RunDir(tmp_path / "runs" / "sweep" / "run")
    for samples, refused in ((16, True), (48, False)):
        place = commit.folder(run, "only", samples, 1)
        place.mkdir(parents=True)
        commit.commit(place, {"stage": "only", "samples": samples, "attempt": 1})
        with pytest.raises(DataError, match="S = 32") if refused else nullcontext():
            preflight.blocks(config, facts, run)


def test_what_a_container_does_not_see_refuses_what_starts_and_not_a_plan_without_data(desk, data, tmp_path):
    profile, sees = tmp_path / "boxed.yaml", f"container_mounts: [{data}]"
    profile.write_text("kind: slurm\ncontainer: /images/x.sqsh\ncpus_per_node: 8\nmemory_gb: 64\n")
    words = ("--cluster", str(profile), "--dry-run")
    desk.refuses(78, f"Add to its container_mounts, at the same path: {data}", *words)
    nominal = desk.submit(*words, "data.manifest=/not/here", "data.samples=1e5")
    assert nominal.returncode == 0 and "at the same path: /not/here" in nominal.stdout, nominal.stderr
    profile.write_text(profile.read_text() + sees + "\n")
    done = desk.submit(*words)
    assert done.returncode == 0 and "sees all that is read" in done.stdout, done.stderr


def test_the_first_sample_of_an_evaluation_set_is_looked_at(desk, data, tmp_path):
    plain = make_dataset(tmp_path / "plain", samples=8, shards=1)
    desk.refuses(65, "no label 'cls'", f"evaluate.sets.small.manifest={plain}")
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        writer.write({"__key__": "0", "png": encode(picture(0)), "cls": 4})
    index([str(tmp_path / "0.tar")], tmp_path / "labelled")
    desk.refuses(65, "the label has no class name", f"evaluate.sets.small.manifest={tmp_path}/labelled")


def test_what_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    config = Config()
    config.data.decoder = "simplejpeg"
    with pytest.raises(ConfigError, match="data.decoder: is not installed"):
        preflight._libraries(config, ClusterProfile(name="local"))


@pytest.mark.parametrize(
    "hours, start, words",
    [(24, 0, ""), (0.05, 0, "3 min, but"), (0.05, 60, "a start takes 60 s"), (0.1, 300, "a start takes 5 min")],
)
def test_a_wall_limit_that_leaves_no_time_to_train(tmp_path, hours, start, words):
    config, run = Config(), RunDir(tmp_path / "run")
    config.resources.hours = hours
    if start:
        n = run.start_attempt({})
        write_json(run.attempt(n) / "start.json", {"time": 1000.0})
        write_json(run.attempt(n) / "ready.json", {"time": 1000.0 + start})
    found = preflight.wall_limit(config, ClusterProfile(kind="slurm", signal_seconds=120 if start else 180), run)
    assert bool(found) == bool(words) and all(words in check.detail and "warning" in check.detail for check in found)
    assert preflight.wall_limit(config, ClusterProfile(kind="local", signal_seconds=600), run) == []


def test_a_dry_run_writes_nothing(desk, monkeypatch):
    monkeypatch.setattr(preflight, "probe", lambda _: pytest.fail("wrote a probe"))
    place = desk.folder / "runs" / "x"
    assert "may be written" in preflight._writable(ClusterProfile(name="local"), place, True).detail
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        with pytest.raises(PermissionDenied):
            preflight._writable(ClusterProfile(name="local"), place, True)


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP])
@pytest.mark.parametrize("name, kind", [("link", "hard"), ("symlink", "symbolic")])
def test_a_place_without_links_is_found_out_before_a_run_ends_there(tmp_path, monkeypatch, name, kind, number):
    """gcsfuse, vfat: no end of an attempt could be recorded."""
    monkeypatch.setattr(os, name, Mock(side_effect=OSError(number, os.strerror(number))))
    with pytest.raises(ConfigError, match=f"{tmp_path}: this file system has no {kind} links .*FLIP_RUNS=FOLDER"):
        preflight._writable(ClusterProfile(name="local"), tmp_path / "runs" / "x", False)
    assert site.unusable(tmp_path / "runs") == f"{tmp_path}: this file system has no {kind} links"
    monkeypatch.setattr(os, name, Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(StorageError, match="No space left"):
        preflight._writable(ClusterProfile(name="local"), tmp_path / "runs" / "x", False)
    monkeypatch.undo()
    assert not preflight._writable(ClusterProfile(name="local"), tmp_path / "runs" / "x", False).skipped
    assert not list(tmp_path.iterdir()), "nothing is left"


def test_the_end_of_input_is_a_no(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", Mock(side_effect=EOFError))
    with pytest.raises(ConfigError, match="nothing was done"):
        Submission._confirm(SimpleNamespace(args=SimpleNamespace(yes=False)), "This costs much.")


def test_damaged_shards_are_seen_before_anything_starts(desk, tmp_path):
    broken = make_dataset(tmp_path / "broken", samples=64, shards=2)
    shard = broken / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    desk.refuses(65, "bytes, indexed were", f"data.manifest={broken}")
    shard.unlink()
    desk.refuses(65, "the shard is missing", f"data.manifest={broken}")


def test_a_file_in_the_way_of_the_runs(desk):
    desk.runs.write_text("")
    done = desk.submit()
    assert done.returncode == 78 and "a file is where a folder must be" in done.stderr


@pytest.mark.long
def test_from_submission_to_report_and_nothing_twice(desk):
    done = desk.submit("--watch")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "half: complete" in done.stdout and "cannot rank the arms" in done.stdout
    for name in ("half", "whole"):
        outcome = read_run(desk.runs / "demo" / name)
        assert (outcome.state, outcome.progress["samples"], len(outcome.attempts)) == ("complete", 48, 1)
    spent = of_run(outcome)
    assert spent.hours["useful"] > 0 and spent.hours["starting"] > 0 and spent.hours["unknown"] == 0
    assert spent.waiting_hours is not None and (outcome.run.attempt(1) / "ready.json").exists()
    assert 3600 * spent.total < 4 * 600, "no hour is invented"
    code = read_json(outcome.run.identity)["code"]
    assert (desk.runs / "demo" / ".code" / code / "flip" / "training" / "trainer.py").exists()
    again = desk.submit()
    assert again.returncode == 0 and "complete, all 2 runs; nothing to start" in again.stdout
    assert [outcome.run.newest_attempt() for outcome in (read_run(desk.runs / "demo" / "half"),)] == [1]
    assert "changed" in desk.submit("--dry-run", "seed=1").stdout
    refused = desk.submit("seed=1")
    assert refused.returncode == 78 and "seed: 0 -> 1" in refused.stderr


class Typed:
    """The command in this process, on a cluster that does nothing: (exit code, standard output, standard error)."""

    def __init__(self, desk, capsys, monkeypatch):
        self.desk, self.capsys, self.started = desk, capsys, []
        monkeypatch.setenv("FLIP_RUNS", str(desk.runs))
        monkeypatch.setattr(submission, "MultiBackend", lambda _: self)
        monkeypatch.setattr(submission, "take", lambda _, into: Snapshot("c0de", into / "c0de", 1, 1, ()))
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False))

    def submit(self, jobs):
        self.started = [job.run.name for job in jobs]

    def __call__(self, *words, sweep=None):
        self.started = []
        self.desk.sweep.write_text(sweep or self.desk.text)
        code = submit_main(["--sweep", str(self.desk.sweep), *words])
        return (code, *self.capsys.readouterr())

    def there(self):
        return sorted(path.parent.name for path in (self.desk.runs / "demo").glob("[!.]*/config.yaml"))

    def trashed(self):
        return sorted(path.name for path in (self.desk.runs / ".trash").glob("*/demo/*"))


@pytest.fixture
def typed(desk, capsys, monkeypatch):
    return Typed(desk, capsys, monkeypatch)


def test_dropped_runs_go_to_the_trash_when_a_person_agrees(desk, typed):
    more = desk.text + "  other: {seed: 1}\n  last: {seed: 2}\n"
    assert typed(sweep=more)[0] == 0 and typed.started == ["half", "whole", "other", "last"]
    code, out, _ = typed()
    assert code == 0 and "left alone: last (stopped), other (stopped); --prune moves them to the trash" in out
    code, out, err = typed("--prune")
    assert code == 78 and "moves 2 runs to the trash: last, other" in err and "--yes" in err and not typed.started
    shown = json.loads(typed("--prune", "--dry-run", "--json")[1])
    assert [(row["name"], row["prunes"]) for row in shown["dropped"]] == [("last", True), ("other", True)]
    assert "moves 2 runs to the trash" in shown["question"] and len(typed.there()) == 4
    one = desk.text[: desk.text.index("  whole")]
    code, _, err = typed("--prune", "--yes", sweep=one)
    assert code == 78 and "3 of 4 runs" in err and len(typed.there()) == 4
    code, out, _ = typed("--prune", "--yes")
    assert code == 0 and out.count("moved to the trash: ") == 2
    assert typed.there() == ["half", "whole"] and typed.trashed() == ["last", "other"]
    assert typed("--prune-most", "--yes", sweep=desk.text.replace("half", "mid"))[0] == 0
    assert typed.there() == ["mid", "whole"] and typed.started == ["mid", "whole"]


def test_pruning_asks_on_a_terminal_and_a_no_does_nothing(desk, typed, monkeypatch):
    typed(sweep=desk.text + "  other: {seed: 1}\n")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    asked = Mock(return_value="n")
    monkeypatch.setattr("builtins.input", asked)
    code, _, err = typed("--prune")
    assert code == 78 and "nothing was done" in err and len(typed.there()) == 3 and not typed.started
    assert asked.call_args.args == ("This moves 1 run to the trash: other. Go on? [y/N] ",)
    asked.return_value = "y"
    assert typed("--prune")[0] == 0 and typed.trashed() == ["other"]


def test_a_restart_asks_and_says_how_to_bring_the_old_run_back(desk, typed):
    typed()
    write_json(desk.runs / "demo" / "half" / "result.json", {"run": "half"})
    words = ["--changed", "restart"]
    changed = desk.text.replace("mask: 0.5", "mask: 0.25")
    code, _, err = typed(*words, sweep=changed)
    question = "This moves 1 run to the trash and starts it from zero: half (complete)."
    assert code == 78 and question in err and not typed.trashed() and not typed.started
    assert json.loads(typed(*words, "--dry-run", "--json", sweep=changed)[1])["question"] == question
    code, out, err = typed(*words, "--yes", sweep=changed)
    assert code == 0 and typed.trashed() == ["half"], err
    (line,) = [line for line in out.splitlines() if line.startswith("moved to the trash: half")]
    subprocess.run(line.partition("bring it back with: ")[2], shell=True, check=True)
    assert (desk.runs / "demo" / "half-old" / "result.json").exists() and (desk.runs / "demo" / "half").exists()


def test_pruning_respects_only_and_says_how_to_bring_runs_back(desk, typed):
    typed(sweep=desk.text + "  other: {seed: 1}\n  last: {seed: 2}\n")
    assert "no longer in the sweep" not in typed("--only", "half")[1]
    assert typed("--only", "half", "--prune", "--yes")[0] == 0 and not typed.trashed()
    code, out, _ = typed("--only", "oth*", "--prune", "--yes")
    assert code == 0 and typed.trashed() == ["other"] and typed.there() == ["half", "last", "whole"]
    assert not typed.started
    (line,) = [line for line in out.splitlines() if line.startswith("moved to the trash: other")]
    subprocess.run(line.partition("bring it back with: ")[2], shell=True, check=True)
    assert typed.there() == ["half", "last", "other", "whole"]
    code, _, err = typed("--only", "nothing", "--prune")
    assert code == 78 and "no run of the sweep matches" in err


@pytest.mark.parametrize(
    "words",
    ["--script", "--json --watch", "--dry-run --watch"],
)
def test_contradictory_or_ignored_flags_are_refused(typed, capsys, words):
    with pytest.raises(SystemExit) as caught:
        typed(*words.split())
    assert caught.value.code == 2 and ": error: " in capsys.readouterr().err
    assert not typed.started


def test_changed_runs_are_kept_forked_or_begun_again(desk, typed):
    typed()
    changed = desk.text.replace("mask: 0.5", "mask: 0.25")
    code, out, err = typed(sweep=changed)
    assert code == 78 and "stages.pretrain.mask: '0.5' -> '0.25')" in err and "--changed keep" in err
    code, out, _ = typed("--changed", "keep", sweep=changed)
    assert code == 0 and "kept as it is (stages.pretrain.mask: '0.5' -> '0.25')" in out
    assert read(desk.runs / "demo" / "half" / "config.yaml").stages[0].mask == "0.5" and "half" in typed.started
    code, out, _ = typed("--changed", "fork", sweep=changed + "paper: {half: {small: 50.0}}\n")
    assert code == 0 and "half-v2" in typed.started and typed.there() == ["half", "half-v2", "whole"]
    assert read(desk.runs / "demo" / "half-v2" / "config.yaml").stages[0].mask == "0.25"
    about = read_json(desk.runs / "demo" / "sweep.json")
    assert about["runs"] == ["half", "half-v2", "whole"] and about["paper"]["half-v2"] == {"small": 50.0}
    assert typed(sweep=changed)[0] == 0 and typed.started == ["half-v2", "whole"], "from now on it lives there"
    assert typed("--changed", "keep", sweep=changed)[0] == 0 and typed.started == ["half-v2", "whole"]
    assert typed("--prune", sweep=changed)[0] == 0 and not typed.trashed(), "a fork is no dropped run"
    (desk.runs / "demo" / "whole" / "identity.json").write_text('{"hash": "x"}')
    code, _, err = typed("--changed", "keep", sweep=changed)
    assert code == 78 and "run whole" in err and "cannot be kept: its identity.json is damaged" in err
    again = changed.replace("0.25", "0.75")
    assert typed("--changed", "restart", "--yes", sweep=again)[0] == 0
    assert (
        typed.trashed() == ["half", "whole"]
        and read(desk.runs / "demo" / "half" / "config.yaml").stages[0].mask == "0.75"
    )


def test_a_scheduler_that_does_not_answer_has_an_exit_code_of_its_own(typed, monkeypatch):
    typed()
    states = {"half": JobState("unknown", 1, "Slurm does not answer"), "whole": JobState("unknown")}
    monkeypatch.setattr(planning, "states", lambda runs: {run.path: states[run.name] for run in runs})
    assert [typed(*words)[0] for words in ([], ["--json"], ["--dry-run"])] == [69, 69, 69]
    states["half"] = JobState("running", 1)
    assert typed()[0] == 0


def test_who_is_cancelled_while_they_are_submitted_is_said(typed, monkeypatch):
    def cancelled(jobs):
        create_json(jobs[0].run.cancel, {"who": "ann"})

    monkeypatch.setattr(typed, "submit", cancelled)
    code, out, _ = typed()
    assert code == 0 and "cancelled meanwhile, and so not started: half\n" in out


def test_a_default_that_moved_is_named(desk, typed, monkeypatch):
    """As a newer version would: the sweep file is the same, the schema's default is not."""
    typed()
    monkeypatch.setattr(schema.Optim, "weight_decay", 0.3)
    monkeypatch.setattr(schema.Optim.__init__, "__defaults__", tuple(
        0.3 if value == 0.2 else value for value in schema.Optim.__init__.__defaults__
    ))  # fmt: skip
    load_module._section.cache_clear()
    try:
        code, _, err = typed()
        kept = typed("--changed", "keep")
    finally:
        load_module._section.cache_clear()
    assert code == 78 and "optim.weight_decay: 0.2 -> 0.3, which the sweep does not set: a default moved" in err
    assert kept[0] == 0 and typed.started == ["half", "whole"]


def test_what_differs_from_the_base_is_shown_resolved(desk, typed):
    text = desk.text.replace("  half: {", "  half: {model.size: B/16, data.workers: -1, ")
    code, out, _ = typed("--dry-run", sweep=text)
    assert code == 0 and "model.size: tiny -> B/16" in out and "model.image.width" not in out
    assert "whole: new\n  differs      stages.pretrain.mask: 0.5 -> 0\n" in out
    base = {row["key"]: row for row in json.loads(typed("--dry-run", "--json", sweep=text)[1])["runs"][0]["base"]}
    assert base["model.image.width"]["now"] == 768 and base["data.workers"]["now"] >= 0


def test_a_size_that_is_overridden_is_not_called_by_its_name_alone(desk, typed):
    text = desk.text.replace("  half: {", "  half: {model.image.layers: 1, ")
    code, out, _ = typed("--dry-run", sweep=text)
    assert code == 0 and "  model        tiny with image.layers 1: " in out and "  model        tiny: " in out


def test_what_costs_much_is_asked_for(desk, typed, monkeypatch):
    real = submission.estimate

    def dear(config, profile):
        made = real(config, profile)
        return replace(made, cost=replace(made.cost, gpu_hours=60.0, price=120.0))

    monkeypatch.setattr(submission, "estimate", dear)
    assert typed("--only", "half")[0] == 0 and typed.started == ["half"], "60 of them are nothing"
    code, out, err = typed()
    question = "This starts 2 runs of 120 GPU-hours, a price of 240."
    assert code == 78 and question in err and not typed.started and typed.there() == ["half"]
    assert f"asked first: {question}" in typed("--dry-run")[1]
    assert typed("--yes")[0] == 0 and typed.started == ["half", "whole"]


@pytest.mark.parametrize("second", [None, 0.0])
def test_an_unknown_or_a_cpu_cost_does_not_silence_the_question(desk, typed, monkeypatch, second):
    """``half`` costs 120 GPU-hours; ``whole`` costs an unknown number of them, or runs on CPUs."""
    real = submission.estimate

    def costs(config, profile):
        made = real(config, profile)
        hours = 120.0 if config.stages[0].mask == "0.5" else second
        return replace(made, cost=replace(made.cost, gpu_hours=hours))

    monkeypatch.setattr(submission, "estimate", costs)
    code, _, err = typed()
    assert code == 78 and "120 GPU-hours" in err and not typed.started
    assert ("1 run of unknown GPU-hours (whole)" in err) == (second is None)
    code, _, err = typed("--only", "whole")
    assert (code, bool(typed.started)) == ((78, False) if second is None else (0, True)), err


def test_a_gpu_run_on_a_profile_without_a_gpu_name_asks(desk, typed, tmp_path):
    (tmp_path / "bare.yaml").write_text("kind: slurm\ngpus_per_node: 8\ncpus_per_node: 8\nmemory_gb: 64\n")
    words = ["--cluster", str(tmp_path / "bare.yaml"), "--only", "half", "--dry-run", "--json"]
    plan = json.loads(typed(*words, "resources.gpus=1")[1])
    assert plan["cost"]["gpu_hours"] is None and "unknown GPU-hours" in plan["question"]
    plan = json.loads(typed(*words)[1])
    assert plan["cost"]["gpu_hours"] == 0 and plan["question"] == "", "a CPU run never asks"


def test_a_dry_run_exits_as_the_submission_would(desk, typed):
    typed(sweep=desk.text + "  other: {seed: 1}\n  last: {seed: 2}\n  more: {seed: 3}\n")
    changed = desk.text.replace("mask: 0.5", "mask: 0.25")
    for words, says in (([], "another configuration"), (["--changed", "keep", "--prune"], "3 of 5 runs")):
        real, dry = typed(*words, sweep=changed), typed(*words, "--dry-run", sweep=changed)
        assert real[0] == dry[0] == 78 and says in dry[2] and says in real[2]
        assert dry[1].startswith("demo: A demonstration"), "the plan is shown all the same"
    assert typed("--dry-run", "--prune", "--allow-prune-majority")[0] == 0, "a question is no refusal"
    assert not typed.trashed() and not typed.started


def test_free_space_is_that_of_all_runs_that_start(desk, typed, monkeypatch):
    """100 bytes a run, 150 are free."""
    monkeypatch.setattr(preflight, "_checkpoint_bytes", lambda _: 100)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=150))
    for words in ([], ["--dry-run"]):
        code, _, err = typed(*words)
        assert code == 69 and "checkpoints of 2 runs" in err and not typed.started and not desk.runs.exists(), err
    assert typed("--only", "half")[0] == 0 and typed.started == ["half"]
    assert typed()[0] == 69 and not typed.started
    checkpoint = desk.runs / "demo" / "half" / "checkpoints" / "pretrain" / "16-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_bytes(bytes(75))
    assert typed()[0] == 0 and typed.started == ["half", "whole"], "what a run holds is not needed again"


def test_checks_name_the_runs_that_they_are_about(desk, typed):
    text = desk.text.replace("mask: 0.5", "mask: 0.5, compute.threads: 2")
    checks = json.loads(typed("--dry-run", "--json", sweep=text)[1])["checks"]
    about = {check["name"]: check["runs"] for check in checks}
    assert about["tokenizer"] == [] and sorted(c["runs"] for c in checks if c["name"] == "cores") == [
        ["half"],
        ["whole"],
    ]
    out = typed("--dry-run", sweep=text)[1]
    assert "  cores (half): 2 threads" in out and "  cores (whole): 1 threads" in out and "  tokenizer: " in out


@pytest.mark.parametrize("cores, skipped, words", [("", True, "gives no cpus_per_node"), (96, False, "on 96 cores")])
def test_cores_are_those_of_the_profile_and_not_of_the_login_node(typed, tmp_path, cores, skipped, words):
    line = f"cpus_per_node: {cores}\n" if cores else ""
    (tmp_path / "far.yaml").write_text(f"kind: slurm\nmemory_gb: 64\n{line}")
    plan = json.loads(typed("--dry-run", "--json", "--cluster", str(tmp_path / "far.yaml"))[1])
    (check,) = [check for check in plan["checks"] if check["name"] == "cores"]
    assert check["skipped"] == skipped and words in check["detail"]


def test_what_is_implausible_is_said_at_the_submission_too(typed):
    code, out, _ = typed("stages.pretrain.base_lr=2000", "--only", "half")
    assert code == 0 and "warning (half): stage pretrain: the peak learning rate is 125 (" in out and typed.started
    runs = json.loads(typed("--dry-run", "--json", "stages.pretrain.base_lr=2000", "--changed", "keep")[1])["runs"]
    assert len(runs[1]["warnings"]) == 1 and "warning: stage pretrain" in typed("--dry-run", "--only", "half")[1]


def test_too_little_space_refuses_what_starts_and_not_a_plan_without_data(desk, typed):
    much = ["model.size=B/16", "checkpoint.keep=1000", "data.lanes=0"]
    for words in ([], ["--dry-run"]):
        code, _, err = typed("--only", "half", *much, *words)
        assert code == 69 and "are free, up to 1" in err and "FLIP_RUNS=" in err
    code, out, err = typed("--dry-run", "--only", "half", *much, "data.manifest=/nowhere", "data.samples=1000000")
    assert code == 0 and ": only " in out.split("not checked here")[1], err
    assert not desk.runs.exists()


def test_batch_scripts_on_request(desk):
    shown = desk.submit("--dry-run", "--script", sweep="model_scaling").stdout
    assert "16 nodes, 8 ranks a node, 8 GPUs a node, 24 h: baseline\n" in shown, "no Slurm answers here"
    assert "#SBATCH --nodes=16\n" in shown and "#SBATCH --nodes=32\n" in shown


def test_two_submits_at_once(desk):
    with folders.lock(desk.runs / "demo"):
        done = desk.submit()
    assert done.returncode == 78 and "another submit is at work" in done.stderr


def test_a_dry_run_executes_nothing_that_a_sweep_names(desk, tmp_path):
    """A sweep that somebody sent may bring its own profile."""
    folder, ran = tmp_path / "bin", tmp_path / "ran"
    folder.mkdir()
    texts = {name: "echo 'ClusterName = far'" for name in ("sbatch", "srun", "squeue", "scancel", "scontrol")}
    for name, text in {**texts, "evil": f"touch {ran}"}.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    profile = tmp_path / "theirs.yaml"
    profile.write_text(f"kind: slurm\npython: {folder}/evil\nhost_python: {folder}/evil\n")
    desk.sweep.write_text(f"cluster: {profile}\n{desk.text}")
    environment = {"PATH": f"{folder}:{os.environ['PATH']}"}
    done = desk.submit("--dry-run", env=environment)
    assert done.returncode == 0 and "host_python is not executed" in done.stdout, done.stderr
    assert not ran.exists()
    assert desk.submit("--dry-run", "--cluster", profile, env=environment).returncode == 0 and ran.exists()
