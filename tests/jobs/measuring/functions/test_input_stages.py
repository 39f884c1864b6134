"""Tests of the cost of a sample: its stages run and their arithmetic is correct; speed is not tested."""

import os

import pytest

from flip.data import kernel, worker
from flip.data.manifest.build import index
from flip.data.manifest.manifest import Manifest
from flip.runs.errors import ConfigError, DataError
from jobs.measuring.functions import input_stages
from jobs.measuring.functions.input_stages import PipelineStage, find_bottleneck
from tests.flip.data.loading import SAMPLES
from tests.flip.data.manifest.test_manifest import write_tar
from tests.synthetic import draw_image, encode, make_dataset
from tools.shards_commands.manifest import excepting

STAGES = ["read", "walk", "decode", "whole"]


def small(manifest, decoder="simplejpeg"):
    return input_stages.spec_of(manifest, decoder, "pillow", 24, 8)


def test_all_stages_and_masks_are_measured(original):
    manifest = Manifest.load(original)
    rows, stages = input_stages.measure(manifest, small(manifest), 0.1)
    assert [(row.short, row.markers, row.size, row.mask, row.kernel) for row in rows] == [
        (32, False, 24, mask, False) for mask in (0, 0.5, 0.75)
    ]
    assert all(0 < row.microseconds < 1e6 for row in rows)
    assert [stage.name for stage in stages] == STAGES
    for stage in stages:
        assert stage.samples > 0 and stage.bytes > 0 and stage.seconds > 0 and stage.skipped == 0
    assert input_stages.cached(manifest)


@pytest.mark.parametrize(
    ("members", "captions"),
    [
        ({"png": b"", "txt": b"a cat", "json": b'{"caption": "a cat"}'}, ["txt"]),
        ({"png": b"", "json": b'{"url": "a", "caption": "a cat"}', "alt": b"a cat"}, ["json:caption"]),
        ({"png": b"", "alt": b"a cat"}, ["alt"]),
        ({"png": b"", "cls": b"7", "json": b'{"width": 7}'}, ["cls"]),
        ({"png": b""}, []),
    ],
)
def test_captions_are_those_that_a_sample_has(members, captions):
    sample = {name: memoryview(content) for name, content in members.items()}
    assert input_stages.caption_members(sample) == captions


def test_captions_in_a_field_of_json_are_measured(tmp_path):
    image = encode(draw_image(1, 32))
    members = [(f"{i}.{name}", data) for i in range(8) for name, data in (("png", image), ("json", b'{"text": "cat"}'))]
    write_tar(tmp_path / "0.tar", members)
    manifest = index([str(tmp_path / "0.tar")], tmp_path / "m", 4)
    rows, _ = input_stages.measure(manifest, small(manifest, "pillow"), 0.05)
    assert len(rows) == 3


def test_data_without_captions_is_refused(tmp_path, original, monkeypatch):
    monkeypatch.setattr(input_stages, "caption_members", lambda sample: [])
    manifest = Manifest.load(original)
    with pytest.raises(DataError, match="no sample has a caption"):
        input_stages.measure(manifest, small(manifest), 0.02)


def test_find_bottleneck_names_slowest_stage():
    costs = {"read": 100, "walk": 20, "decode": 300, "whole": 1000}
    stages = [PipelineStage(name, 1000, 1, 1e-3 * cost, 1e-3 * cost) for name, cost in costs.items()]
    bottleneck = find_bottleneck(stages)
    assert bottleneck["limit"] == "view"
    assert bottleneck["shares"] == pytest.approx({"read": 0.1, "walk": 0.02, "decode": 0.3, "view": 0.58})
    assert bottleneck["samples_per_second_per_worker"] == 1000
    late = [stage if stage.name != "read" else PipelineStage("read", 1000, 1, 5.0, 0.1) for stage in stages]
    assert find_bottleneck(late)["shares"] == bottleneck["shares"], "reads that are late are made ahead"
    waiting = [*stages[:-1], PipelineStage("whole", 1000, 1, 2.5, 1.0)]
    other_bottleneck = find_bottleneck(waiting)
    assert other_bottleneck["limit"] == "wait" and other_bottleneck["shares"]["wait"] == pytest.approx(0.6)
    assert other_bottleneck["samples_per_second_per_worker"] == 400
    threads = [*stages[:-1], PipelineStage("whole", 1000, 1, 0.7, 1.0)]
    assert find_bottleneck(threads) == find_bottleneck(stages), "a worker has a core, not several"
    with_kernel = find_bottleneck(stages, with_kernel=True)
    assert with_kernel["shares"] == pytest.approx({"read": 0.1, "walk": 0.02, "decode and view": 0.88})
    assert with_kernel["limit"] == "decode and view", "the kernel decodes no whole images"


def test_chunks_are_drawn_in_endless_shuffled_passes(original):
    chunks = input_stages.chunks_in_random_order(Manifest.load(original), 3)
    passes = [[next(chunks) for _ in range(SAMPLES // 2)] for _ in range(2)]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(SAMPLES // 2)) and passes[0] != passes[1]


def test_chunks_without_usable_samples_are_skipped(original, tmp_path):
    manifest = Manifest.load(original)
    ids = [id for j in (0, 1) for id in manifest.chunk_ids(j)]
    less = excepting(manifest, dict.fromkeys(ids[:-1], "damaged"), str(tmp_path / "less"))
    chunks = input_stages.chunks_in_random_order(less, 3)
    assert sorted(next(chunks) for _ in range(SAMPLES // 2 - 1)) == list(range(1, SAMPLES // 2))
    none = excepting(manifest, dict.fromkeys(range(manifest.samples), "damaged"), str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="no complete chunk"):
        next(input_stages.chunks_in_random_order(none, 3))


def test_rows_with_the_kernel_are_measured_if_it_is_used(tmp_path, monkeypatch):
    monkeypatch.delenv(kernel.VARIABLE, raising=False)
    manifest = Manifest.load(make_dataset(tmp_path / "data", 8, 1, size=40, chunk=4, fmt="jpg"))
    spec = input_stages.spec_of(manifest, "simplejpeg", "torchvision", 32, 8)
    used = not kernel.obstacle(spec.data, spec.augment, spec.image)
    has_kernel = []
    why_unused = worker.why_unused

    def recorded(*args):
        reason = why_unused(*args)
        has_kernel.append(not reason)
        return reason

    monkeypatch.setattr(worker, "why_unused", recorded)
    rows, _ = input_stages.measure(manifest, spec, 0.05)
    assert [row.kernel for row in rows] == [False] * 3 + [True] * 3 * used
    assert has_kernel == [False] * 3 + [True] * 3 * used and kernel.VARIABLE not in os.environ
    monkeypatch.setenv(kernel.VARIABLE, "0")
    assert not any(row.kernel for row in input_stages.measure(manifest, spec, 0.05)[0])
    assert os.environ[kernel.VARIABLE] == "0"


def test_whole_work_is_that_of_the_loader(original, monkeypatch):
    manifest = Manifest.load(original)
    spec = small(manifest)
    tokens = []
    fill = input_stages.BatchProducer.fill

    def filled(producer, out):
        result = fill(producer, out)
        tokens.append(out.tokens.copy())
        return result

    monkeypatch.setattr(input_stages.BatchProducer, "fill", filled)
    input_stages.measure(manifest, spec, 0.05)
    assert tokens and all((batch[:, 1] > 4).all() for batch in tokens), "no word is unknown to the tokenizer"
