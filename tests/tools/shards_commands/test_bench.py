"""Tests of shards bench: its stages run and its arithmetic is correct; speed is not tested."""

import os

import pytest

from flip.data import kernel, worker
from flip.data.manifest.manifest import Manifest
from flip.runs.errors import ConfigError, DataError
from jobs.planning import core_speeds
from tests.flip.data.loading import SAMPLES
from tests.synthetic import make_dataset
from tests.tools.commands.test_shards_cli import call
from tools.shards_commands import bench
from tools.shards_commands.bench import PipelineStage, find_bottleneck
from tools.shards_commands.manifest import excepting


def test_measure_stages_runs_all_stages(original):
    manifest = Manifest.load(original)
    spec = bench.spec_of(manifest, ["txt"], "simplejpeg", "pillow", 24, 8, 0)
    stages = bench.measure_stages(manifest, spec, "0.5", 0.05)
    assert tuple(stage.name for stage in stages) == bench.STAGES
    for stage in stages:
        assert stage.samples > 0 and stage.bytes > 0 and stage.seconds > 0 and stage.skipped == 0
    assert bench.cached(manifest)


def test_bench_rejects_zero_seconds_missing_captions_and_indivisible_size(original):
    manifest = Manifest.load(original)
    spec = bench.spec_of(manifest, ["alt"], "pillow", "pillow", 24, 8, 0)
    with pytest.raises(ConfigError, match="seconds"):
        bench.measure_stages(manifest, spec, "0.5", 0)
    with pytest.raises(DataError, match="no sample"):
        bench.measure_stages(manifest, spec, "0.5", 0.02)
    with pytest.raises(ConfigError, match="divide"):
        bench.spec_of(manifest, ["txt"], "pillow", "pillow", 25, 8, 0)


def test_find_bottleneck_names_slowest_stage_and_worker_count():
    costs = {"read": 100, "walk": 20, "decode": 300, "whole": 1000}
    stages = [PipelineStage(name, 1000, 1, 1e-3 * cost, 1e-3 * cost) for name, cost in costs.items()]
    bottleneck = find_bottleneck(stages, mean_bytes=40_000, want=2500)
    assert bottleneck["limit"] == "view" and bottleneck["shares"] == pytest.approx(
        {"read": 0.1, "walk": 0.02, "decode": 0.3, "view": 0.58}
    )
    assert bottleneck["samples_per_second_per_worker"] == 1000
    assert bottleneck["workers"] == 3 and bottleneck["megabytes_per_second_needed"] == 100
    late = [stage if stage.name != "read" else PipelineStage("read", 1000, 1, 5.0, 0.1) for stage in stages]
    assert find_bottleneck(late, 40_000)["shares"] == bottleneck["shares"], "reads that are late are made ahead"
    waiting = [*stages[:-1], PipelineStage("whole", 1000, 1, 2.5, 1.0)]
    other_bottleneck = find_bottleneck(waiting, 40_000)
    assert other_bottleneck["limit"] == "wait" and other_bottleneck["shares"]["wait"] == pytest.approx(0.6)
    assert other_bottleneck["samples_per_second_per_worker"] == 400 and "workers" not in other_bottleneck
    threads = [*stages[:-1], PipelineStage("whole", 1000, 1, 0.7, 1.0)]
    assert find_bottleneck(threads, 40_000) == find_bottleneck(stages, 40_000), "a worker has a core, not several"
    with_kernel = find_bottleneck(stages, 40_000, with_kernel=True)
    assert with_kernel["shares"] == pytest.approx({"read": 0.1, "walk": 0.02, "decode and view": 0.88})
    assert with_kernel["limit"] == "decode and view", "the kernel decodes no whole images"


def test_chunks_are_drawn_in_endless_shuffled_passes(original):
    chunks = bench.chunks_in_random_order(Manifest.load(original), 3)
    passes = [[next(chunks) for _ in range(SAMPLES // 2)] for _ in range(2)]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(SAMPLES // 2)) and passes[0] != passes[1]


def test_chunks_without_usable_samples_are_skipped(original, tmp_path):
    manifest = Manifest.load(original)
    ids = [id for j in (0, 1) for id in manifest.chunk_ids(j)]
    less = excepting(manifest, dict.fromkeys(ids[:-1], "damaged"), str(tmp_path / "less"))
    chunks = bench.chunks_in_random_order(less, 3)
    assert sorted(next(chunks) for _ in range(SAMPLES // 2 - 1)) == list(range(1, SAMPLES // 2))
    none = excepting(manifest, dict.fromkeys(range(manifest.samples), "damaged"), str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="no complete chunk"):
        next(bench.chunks_in_random_order(none, 3))


def test_bench_writes_rows_that_plans_read(original, tmp_path, capsys):
    path = tmp_path / "speeds.yaml"
    command = ["bench", original, "--resize", "pillow", "--size", 24, "--patch", 8, "--seconds", 0.05, "--write", path]
    assert call(capsys, *command)[0] == 0
    rows = core_speeds.read_table(str(path)).rows
    assert [(row.short, row.markers, row.size, row.mask, row.kernel) for row in rows] == [
        (32, False, 24, mask, False) for mask in (0, 0.5, 0.75)
    ]
    assert all(0 < row.microseconds < 1e6 for row in rows)
    assert call(capsys, *command, "--size", 48)[0] == 0
    assert len(core_speeds.read_table(str(path)).rows) == 6
    path.write_text("text")
    code, text = call(capsys, *command)
    assert code == 78 and str(path) in text and path.read_text() == "text"


def test_rows_with_the_kernel_are_measured_if_it_is_used(tmp_path, monkeypatch):
    monkeypatch.delenv(kernel.VARIABLE, raising=False)
    manifest = Manifest.load(make_dataset(tmp_path / "data", 8, 1, size=40, chunk=4, fmt="jpg"))
    spec = bench.spec_of(manifest, ["txt"], "simplejpeg", "torchvision", 32, 8, 0)
    used = not kernel.obstacle(spec.data, spec.augment, spec.image)
    has_kernel = []
    why_unused = worker.why_unused

    def recorded(*args):
        reason = why_unused(*args)
        has_kernel.append(not reason)
        return reason

    monkeypatch.setattr(worker, "why_unused", recorded)
    rows = bench.measure_rows(manifest, spec, 0.05)
    assert [row.kernel for row in rows] == [False] * 3 + [True] * 3 * used
    assert has_kernel == [False] * 3 + [True] * 3 * used and kernel.VARIABLE not in os.environ
    monkeypatch.setenv(kernel.VARIABLE, "0")
    assert not any(row.kernel for row in bench.measure_rows(manifest, spec, 0.05))
    assert os.environ[kernel.VARIABLE] == "0"


def test_whole_work_is_that_of_the_loader(original, monkeypatch):
    manifest = Manifest.load(original)
    spec = bench.spec_of(manifest, ["txt"], "simplejpeg", "pillow", 24, 8, 0)
    tokens = []
    fill = bench.BatchProducer.fill

    def filled(producer, out):
        result = fill(producer, out)
        tokens.append(out.tokens.copy())
        return result

    monkeypatch.setattr(bench.BatchProducer, "fill", filled)
    bench.measure_rows(manifest, spec, 0.05)
    assert tokens and all((batch[:, 1] > 4).all() for batch in tokens), "no word is unknown to the tokenizer"
