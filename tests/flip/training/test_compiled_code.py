"""Tests the copy of compiled code in the run directory. ``tests/cuda_stub`` tests what torch puts into it."""

from types import SimpleNamespace

import pytest
import torch
from torch.compiler import CacheInfo

from flip.config.schema import Compute, Config, Stage
from flip.distributed import parallel
from flip.monitoring.collector import CompiledGraphs
from flip.runs.rundir import RunDir
from flip.training import compiled_code
from flip.training.compiled_code import CompiledCode
from flip.training.sample_log import VARIABLE
from flip.training.standard_callbacks import standard_callbacks


class Compiler:
    """What a process has compiled: names of parts. A file of it has a name in each line."""

    def __init__(self):
        self.parts = []
        self.loaded = []

    def load(self, data):
        self.loaded = data.decode().split()
        return self._about(self.loaded)

    def save(self):
        if not self.parts:
            return None
        return "\n".join(self.parts).encode(), self._about(self.parts)

    def _about(self, parts):
        about = CacheInfo()
        about.artifacts["inductor"] += parts
        return about


@pytest.fixture
def compiler(monkeypatch):
    compiler = Compiler()
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", compiler.load)
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", compiler.save)
    monkeypatch.setattr(CompiledGraphs, "count", lambda: len(compiler.parts))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return compiler


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "sweep" / "run")
    run.path.mkdir(parents=True)
    return run


def stage(name):
    return SimpleNamespace(span=SimpleNamespace(stage=SimpleNamespace(name=name)))


def attempt(run, rank=0):
    return CompiledCode(run, parallel.World(rank, 1, torch.device("cpu"), None, None))


@pytest.mark.parametrize(
    ("fields", "copied"), [({}, True), ({"device": "cpu"}, False), ({"compile": "no"}, False)], ids=str
)
def test_code_for_gpus_alone_is_copied(fields, copied):
    assert compiled_code.is_copied(Compute(**{"device": "cuda", "compile": "yes"} | fields)) == copied


def test_later_attempt_loads_code_of_its_stage(run, compiler):
    first = attempt(run)
    for name, parts in (("masked", ["a", "b"]), ("unmasked", ["c"])):
        first.start_stage(stage(name))
        compiler.parts += parts
        first.save(stage(name))
    assert compiler.loaded == []
    attempt(run).start_stage(stage("masked"))
    assert compiler.loaded == ["a", "b"]
    attempt(run).start_stage(stage("unmasked"))
    assert compiler.loaded == ["a", "b", "c"]
    assert run.compiled.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in run.compiled.iterdir()} == {0o600}


def open_to_all(file):
    file.chmod(0o666)


def link_elsewhere(file):
    file.rename(file.with_suffix(".other"))
    file.symlink_to(file.with_suffix(".other"))


@pytest.mark.parametrize("change", [open_to_all, link_elsewhere])
def test_code_that_another_user_may_have_written_is_not_loaded(run, compiler, change):
    """The folder was open to a group for a while; torch unpickles the code."""
    compiler.parts = ["a"]
    attempt(run).save(stage("masked"))
    run.compiled.chmod(0o2775)
    change(run.compiled / "masked.bin")
    attempt(run).start_stage(stage("masked"))
    assert compiler.loaded == []


def test_code_is_copied_once_and_by_rank_0(run, compiler, monkeypatch):
    compiler.parts = ["a"]
    attempt(run, rank=1).save(stage("masked"))
    assert not run.compiled.exists()
    code = attempt(run)
    code.save(stage("masked"))
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: pytest.fail("nothing new was compiled"))
    code.save(stage("masked"))


def test_short_attempt_keeps_copy_that_has_more(run, compiler):
    """Captions have other lengths in every step, each of which is compiled once."""
    compiler.parts = ["length8", "length16", "length24"]
    attempt(run).save(stage("masked"))
    later = attempt(run)
    later.start_stage(stage("masked"))
    for parts in (["length16"], ["length16", "length8", "length24", "length32"]):
        compiler.parts = parts
        later.save(stage("masked"))
        attempt(run).start_stage(stage("masked"))
        assert len(compiler.loaded) == max(3, len(parts))


def test_first_rank_of_a_node_loads(run, compiler, monkeypatch):
    compiler.parts = ["a"]
    attempt(run).save(stage("masked"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    attempt(run, rank=1).start_stage(stage("masked"))
    assert compiler.loaded == []


@pytest.mark.parametrize("obstacle", ["link", "file", "too large"])
def test_unsafe_or_unreadable_copy_is_not_used(run, compiler, obstacle, tmp_path, monkeypatch, caplog):
    """torch unpickles it."""
    compiler.parts = ["a"]
    attempt(run).save(stage("masked"))
    if obstacle == "too large":
        monkeypatch.setattr(compiled_code, "LARGEST_FILE", 0)
    else:
        run.compiled.rename(tmp_path / "other")
    if obstacle == "link":
        run.compiled.symlink_to(tmp_path / "other")
    elif obstacle == "file":
        run.compiled.touch()
    code = attempt(run)
    code.start_stage(stage("masked"))
    assert compiler.loaded == [] and "is not used" in caplog.text
    if obstacle != "too large":
        code.save(stage("masked"))
        assert "is not kept" in caplog.text


@pytest.mark.parametrize(("device", "count"), [("cuda", 1), ("cpu", 0)])
def test_runs_on_gpus_have_the_callback(run, device, count):
    config = Config(stages=[Stage(samples=256, batch=64)])
    config.compute = Compute(device=device, compile="yes")
    world = parallel.World(0, 1, torch.device("cpu"), None, None)
    callbacks = standard_callbacks(run, 1, config, world, None, None)
    assert [type(each) for each in callbacks.members].count(CompiledCode) == count


def test_log_of_samples_is_a_file_of_the_attempt_and_rank_if_the_variable_asks(tmp_path, monkeypatch):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    config = Config(stages=[Stage(samples=256, batch=64)])
    world = parallel.World(0, 1, torch.device("cpu"), None, None)
    standard_callbacks(run, 3, config, world, None, None)
    assert not (run.path / "witness").exists()
    monkeypatch.setenv(VARIABLE, "1")
    standard_callbacks(run, 3, config, world, None, None)
    assert [path.name for path in (run.path / "witness").iterdir()] == ["3.0.jsonl"]
