import dataclasses
import json
import os

import numpy as np
import pytest

from flip.common.host import Host, core_seconds, this_host
from flip.config.derived import buffer_bytes
from flip.config.merge import merge
from flip.config.resolve import (
    DatasetFacts,
    dataset_facts,
    default_chunk,
    default_lanes,
    manifest_record,
    resolve_auto,
    resolve_path,
)
from flip.data.manifest.manifest import Manifest
from flip.runs.errors import ConfigError, DataError, PermissionDenied
from flip.runs.formats import FormatError
from tests.harness.common import no_access

LAPTOP = Host(cores=2, memory=16 * 10**9)
LAION = {"data.samples": 400e6, "stages": [{"samples": 12.8e9, "batch": 65536}], "model.size": "L/16"}


def config(settings=None, *overrides):
    return merge([("test", LAION if settings is None else settings)], overrides)


def resolved(on=LAPTOP, *overrides):
    unresolved = config(None, *overrides)
    return resolve_auto(unresolved, on, dataset_facts(unresolved))


def write_manifest(folder, **facts):
    folder.mkdir(parents=True, exist_ok=True)
    record = {"samples": 5513, "chunk": 1, "mean_bytes": 3000.4, "digest": "abc", "version": 2, **facts}
    (folder / "manifest.json").write_text(json.dumps(record))
    return str(folder)


def test_resolve_replaces_every_auto_and_keeps_explicit_values():
    unresolved = config(None, "data.workers=0", "compute.precision=bf16")
    before = dataclasses.replace(unresolved)
    done = resolve_auto(unresolved, LAPTOP, dataset_facts(unresolved))
    assert unresolved == before
    assert "auto" not in str(dataclasses.asdict(done))
    assert (done.compute.device, done.compute.precision, done.compute.attention) == ("cpu", "bf16", "explicit")
    assert (done.data.workers, done.compute.threads, done.compute.deterministic) == (0, 2, "yes")
    assert resolve_auto(done, Host(cores=64, memory=10**12, bf16=True, cuda=True), dataset_facts(done)) == done


def test_resolve_ignores_submitting_host_for_gpu_run():
    gpu = ("resources.gpus=8", "resources.processes=8", "resources.nodes=4", "data.buffer=1e12", "data.chunk=64")
    first = resolved(LAPTOP, *gpu)
    second = resolved(Host(cores=96, memory=10**12, bf16=True), *gpu)
    assert first == second
    assert (first.compute.device, first.compute.precision, first.compute.attention) == ("cuda", "bf16", "sdpa")
    assert first.data.workers == 8 and first.compute.deterministic == "no"


def test_resolve_chooses_precision_and_threads_for_cpu_host():
    fast = resolved(Host(cores=8, memory=10**11, bf16=True), "resources.processes=2")
    assert (fast.compute.precision, fast.compute.attention) == ("bf16", "explicit")
    assert (fast.data.workers, fast.compute.threads) == (1, 3)
    slow = resolved(LAPTOP)
    assert (slow.compute.precision, slow.compute.attention, slow.compute.threads) == ("fp32", "sdpa", 1)


def test_default_lanes_is_largest_number_that_fits():
    def lanes(samples, chunk, batches, world=1, block=4, mean=1000.0, buffer=10**15):
        stages = [{"name": f"s{i}", "samples": 1, "batch": b} for i, b in enumerate(batches)]
        unresolved = config({"stages": stages, "data.block": block, "resources.processes": world})
        return default_lanes(unresolved, [DatasetFacts(samples, chunk, mean, True)], buffer)

    assert lanes(400_000_000, 256, [65536]) == 4096
    assert lanes(400_000_000, 256, [65536, 3 * 1024]) == 1024
    assert lanes(400_000_000, 256, [96], world=3) == 96
    assert lanes(5513, 1, [128]) == 128
    assert lanes(1024, 1, [256], block=4) == 128
    assert lanes(1023, 1, [256], block=4) == 64
    assert lanes(10**6, 1, [256], buffer=buffer_bytes(64, 4, 1, 1000.0)) == 64
    assert lanes(10**6, 1, [256], buffer=buffer_bytes(64, 4, 1, 1000.0) - 1) == 32
    assert lanes(4, 1, [256], world=2) == 2
    assert lanes(400_000_000, 256, [10_000]) == 2500


@pytest.mark.parametrize("samples, chunk", [(1, 1), (8191, 1), (8192, 2), (2**20 - 1, 128), (2**20, 256), (10**9, 256)])
def test_default_chunk_grows_with_number_of_samples(samples, chunk):
    assert default_chunk(samples) == chunk


def test_resolve_path_expands_cache_prefix_and_relative_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("FLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert resolve_path("cache:emoji/train") == str(tmp_path / "cache/emoji/train")
    assert resolve_path("here/x") == str(tmp_path / "here/x")
    assert (resolve_path(""), resolve_path("s3://bucket/x")) == ("", "s3://bucket/x")
    monkeypatch.delenv("FLIP_CACHE")
    assert resolve_path("cache:x") == os.path.expanduser("~/.cache/flip/x")
    done = resolved(LAPTOP, "data.tokenizer=cache:t.json", "evaluate.sets.t.classes=c.json")
    assert done.data.tokenizer == resolve_path("cache:t.json")
    assert done.evaluate.sets[0].classes == str(tmp_path / "c.json")


def test_dataset_facts_come_from_manifest_and_contradicting_chunk_is_rejected(tmp_path):
    unresolved = config(
        {"data.manifest": write_manifest(tmp_path), "data.samples": 7, "stages": [{"samples": 1, "batch": 128}]}
    )
    facts = dataset_facts(unresolved)
    assert facts == [DatasetFacts(5513, 1, 3000.4, False)]
    data = resolve_auto(unresolved, LAPTOP, facts).data
    assert (data.samples, data.sample_bytes, data.chunk, data.lanes) == (5513, 3000, 1, 128)
    assert data.buffer == LAPTOP.memory // 4
    unresolved.data.chunk = 64
    with pytest.raises(ConfigError, match=r"data\.chunk.* 1 .*64"):
        resolve_auto(unresolved, LAPTOP, facts)


def test_dataset_facts_reject_missing_manifest_without_nominal_samples(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.manifest"):
        dataset_facts(config({}))
    missing = str(tmp_path / "none")
    with pytest.raises(DataError, match=r"none: .*flip shards index") as caught:
        dataset_facts(config({"data.manifest": missing}))
    assert caught.value.code == 65 and "relative" not in caught.value.remedy
    with pytest.raises(DataError, match="data/none is relative to the current folder"):
        dataset_facts(config({"data.manifest": "data/none"}))
    claimed = config({"data.manifest": missing, "data.samples": 10**6})
    assert [facts.nominal for facts in dataset_facts(claimed)] == [True]
    with pytest.raises(DataError, match="--dry-run"):
        dataset_facts(claimed, nominal=False)


@pytest.mark.parametrize(
    "manifest, made_by",
    [
        ("cache:emoji/train", "flip demo_data"),
        ("cache:emoji/train/", "flip demo_data"),
        ("cache:emoji/half", "flip shards index"),  # used by sweeps/grid_small.yaml
        ("cache:laion400m", "flip shards index"),
        ("cache:imagenet/validation", "flip shards index"),
    ],
)
def test_missing_manifest_error_names_command_that_creates_manifest(manifest, made_by, tmp_path, monkeypatch):
    monkeypatch.setenv("FLIP_CACHE", str(tmp_path))
    with pytest.raises(DataError) as caught:
        dataset_facts(config({"data.manifest": manifest}))
    remedy = caught.value.remedy
    assert made_by in remedy and ("demo_data" in remedy) == ("demo_data" in made_by)
    assert ("docs/reproduce.md" in remedy) == ("index" in made_by)


def test_dataset_facts_reject_damaged_or_unreadable_manifest(tmp_path):
    folder = write_manifest(tmp_path / "m")
    path = tmp_path / "m/manifest.json"
    unresolved = config({"data.manifest": folder})
    for text in ("{", "[]", '{"samples": 3, "version": 2}'):
        path.write_text(text)
        with pytest.raises(DataError, match="damaged"):
            dataset_facts(unresolved)
    path.write_text('{"samples": 3, "version": 1}')
    with pytest.raises(FormatError, match="an older version wrote this format"):
        dataset_facts(unresolved)
    write_manifest(tmp_path / "m")
    tmp_path.chmod(0o755)
    with no_access(path), pytest.raises(PermissionDenied, match="manifest.json"):
        dataset_facts(unresolved)


def _fifo(path):
    os.mkfifo(path)


def _deep(path):
    path.write_text('{"samples": ' + "[" * 200_000)


def _huge(path):
    with path.open("wb") as file:
        file.truncate(3 << 30)


@pytest.mark.parametrize(
    "prepare, words", [(_fifo, "not a regular file"), (_deep, "nested too deeply"), (_huge, "more than the limit")]
)
def test_manifest_record_is_read_with_limits(tmp_path, prepare, words):
    """A FIFO would hang, a huge file take its size in memory, and nested brackets raise RecursionError."""
    path = tmp_path / "manifest.json"
    prepare(path)
    with pytest.raises(DataError, match=words) as error:
        manifest_record(str(tmp_path))
    assert str(path) in str(error.value)
    with pytest.raises(DataError, match=r"manifest\.json"):
        Manifest.load(tmp_path)


def test_manifest_record_of_many_labels_is_read(tmp_path):
    """`shards make` counts up to 65,536 labels, which take more bytes than other records."""
    labels = {"counts": {str(10**9 + label): 10**6 for label in range(65_536)}}
    folder = write_manifest(tmp_path, settings={"labels": labels})
    assert (tmp_path / "manifest.json").stat().st_size > 1 << 20
    assert manifest_record(folder)["settings"]["labels"] == labels


def test_resolve_checks_ranges_before_arithmetic():
    with pytest.raises(ConfigError, match=r"resources\.processes: must be at least 1"):
        resolved(LAPTOP, "resources.processes=0")


def test_this_host_reports_cores_and_memory():
    host = this_host()
    assert host.cores >= 1 and host.memory > 10**8


def test_core_seconds_exclude_own_time_and_cores_outside_affinity(tmp_path, monkeypatch):
    """In one second, the allowed cores 0 and 2 are busy for 0.6 s, 0.25 s by this process. Core 1 is always busy."""
    ticks = os.sysconf("SC_CLK_TCK")
    statistics = tmp_path / "stat"
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2})

    def clock(second):
        busy = [1, *[0] * 9]
        mixed = [0.3, 0, 0.2, 0.2, 0.2, 0, 0, 0.1, 0.3, 0]
        idle = [0, 0, 0, 1, *[0] * 6]
        rows = {"cpu": busy, "cpu0": mixed, "cpu1": busy, "cpu2": idle, "intr": [5]}
        lines = [" ".join([name, *(str(round(ticks * (9 + x * second))) for x in row)]) for name, row in rows.items()]
        statistics.write_text("\n".join(lines))
        monkeypatch.setattr(os, "times", lambda: (7 + 0.2 * second, 0.0, 0.05 * second, 0.0, 0.0))

    clock(0)
    before = core_seconds(str(statistics))
    clock(1)
    used, total = np.subtract(core_seconds(str(statistics)), before)
    assert (used, total) == (pytest.approx(0.6 - 0.25), pytest.approx(2.0))
    assert core_seconds(str(tmp_path / "absent")) == (0, 0)
