"""Tests of the command flip shards on a bucket: index, move, verify and except."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flip.data.chunk_reader import ChunkReader
from flip.data.manifest.manifest import Manifest
from tests.flip.data.loading import loader
from tests.flip.data.manifest.test_manifest import write_tar
from tests.s3.servers import BUCKET, files
from tests.s3.test_loader import same, take
from tools.commands.shards import main

JOBS = Path(__file__).resolve().parents[2] / "jobs"

pytestmark = pytest.mark.s3


def test_index_expands_wildcards_and_braces_in_bucket(original, own, proxied, tmp_path, capsys):
    proxied(own)
    files(own.address).pipe_file(f"{BUCKET}/set/deeper/00009.tar", b"not to be taken")
    for number, pattern in enumerate(["set/*.tar", "s?t/0000[0-4].tar", "set/{00000..00004}.tar"]):
        out = tmp_path / str(number)
        assert main(["index", f"s3://{BUCKET}/{pattern}", "--out", str(out), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["shards"] == 5
        assert Manifest.load(out).keys[4] == f"s3://{BUCKET}/set/00004.tar"
    full = Manifest.load(tmp_path / "0")
    assert main(["except", str(full.folder), "--ids", "7", "--out", str(tmp_path / "less")]) == 0
    less = Manifest.load(tmp_path / "less")
    assert (less.keys, less.etags) == (full.keys, full.etags) and all(less.etags)
    assert main(["index", f"s3://{BUCKET}/none/*.tar", "--out", str(tmp_path / "none")]) == 65
    assert f"s3://{BUCKET}/none/*.tar: the shard is missing" in capsys.readouterr().err


def test_index_reads_only_remaining_shards_after_kill(own, proxied, tmp_path, capsys):
    """The third request for bytes never gets an answer; the command is killed at this point."""
    proxy = proxied(own)
    command = ["index", f"s3://{BUCKET}/set/*.tar", "--chunk", "4", "--json", "--workers", "1", "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    assert proxy.counts["gets"] == 5 and proxy.counts["heads"] == 0, "sizes and ETags are of the listing"
    reference = json.loads(capsys.readouterr().out)

    proxy.plan(["silence"], 1, after=2)
    child = subprocess.Popen([sys.executable, JOBS, "shards", *command, str(tmp_path / "m")])
    limit = time.monotonic() + 60
    while not proxy.counts["silence"]:
        assert child.poll() is None and time.monotonic() < limit
        time.sleep(0.02)
    child.kill()
    assert child.wait() == -signal.SIGKILL and not (tmp_path / "m").exists()
    proxy.plan((), 0)
    assert main([*command, str(tmp_path / "m")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["shards_scanned"], report["shards_scanned_before"], proxy.counts["gets"]) == (3, 2, 3)
    assert report["digest"] == reference["digest"]
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert [(tmp_path / "m" / name).read_bytes() for name in names] == [
        (tmp_path / "whole" / name).read_bytes() for name in names
    ]


def test_index_rescans_replaced_object(original, own, proxied, tmp_path, capsys):
    proxy = proxied(own)
    pattern = f"s3://{BUCKET}/set/*.tar"
    assert main(["index", pattern, "--out", str(tmp_path / "m"), "--part", "1/1"]) == 0
    files(own.address).put_file(original / "00001.tar", f"{BUCKET}/set/00003.tar")
    proxy.plan((), 0)
    capsys.readouterr()
    assert main(["index", pattern, "--out", str(tmp_path / "m"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["shards_scanned"] == proxy.counts["gets"] == 1
    manifest = Manifest.load(tmp_path / "m")
    assert manifest.shards[3].tolist() == manifest.shards[1].tolist() and manifest.etags[3] == manifest.etags[1]


def test_index_is_independent_of_number_of_processes(own, proxied, tmp_path, monkeypatch):
    proxy = proxied(own)
    monkeypatch.setattr("flip.data.manifest.build._BYTES_PER_PROCESS", 1 << 10)
    for workers in "12":
        keys = f"s3://{BUCKET}/set/{{00000..00004}}.tar"
        assert main(["index", keys, "--workers", workers, "--out", str(tmp_path / workers)]) == 0
    serial = Manifest.load(tmp_path / "1")
    concurrent = Manifest.load(tmp_path / "2")
    assert (serial.digest, serial.keys, serial.etags) == (concurrent.digest, concurrent.keys, concurrent.etags)
    assert proxy.counts["gets"] == proxy.counts["heads"] == 10


@pytest.mark.parametrize("server, readings", [("weed", 1), ("own", 2)])
def test_index_verifies_etag_of_multipart_object(server, readings, request, proxied, tmp_path):
    """A single pass suffices if the server lists the parts, whose sizes may differ. The server ``own`` does not."""
    server = request.getfixturevalue(server)
    write_tar(tmp_path / "x.tar", [(f"{i}.txt", bytes([i]) * 2_900_000) for i in range(2)])
    data = (tmp_path / "x.tar").read_bytes()
    with files(server.address).open(f"{BUCKET}/parts/x.tar", "wb", block_size=5 << 20) as file:
        for offset in range(0, len(data), 700_000):
            file.write(data[offset : offset + 700_000])
    proxy = proxied(server)
    proxy.plan((), 0)
    command = ["index", f"s3://{BUCKET}/parts/*.tar", "--min-complete", "0", "--out"]  # the shard holds no images
    assert main([*command, str(tmp_path / "m")]) == 0
    manifest = Manifest.load(tmp_path / "m")
    assert manifest.etags[0].endswith("-2") and manifest.samples == 2 and proxy.counts["gets"] == readings
    proxy.plan(["flip"], 1, limit=1)
    assert main([*command, str(tmp_path / "n")]) == 69


def test_index_filters_read_parquet_objects(original, own, proxied, tmp_path, capsys):
    proxied(own)
    for shard in range(5):
        first = 203 * shard // 5
        stop = 203 * (shard + 1) // 5
        keys = [f"{shard:05d}{i:04d}" for i in range(first, stop)]
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.table({"key": keys, "number": range(first, stop)}), buffer)
        files(own.address).pipe_file(f"{BUCKET}/set/{shard:05d}.parquet", buffer.getvalue().to_pybytes())
    arguments = ["index", f"s3://{BUCKET}/set/*.tar", "--filter", "number>=50", "--chunk", "2", "--json", "--out"]
    assert main([*arguments, str(tmp_path / "m")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["samples"], facts["seen"], facts["dropped"]) == (153, 203, {"number>=50": 50})
    filtered = Manifest.load(tmp_path / "m")
    full = Manifest.load(original)
    assert [filtered.locate(id)[1] for id in (0, 30, 31)] == [10, 40, 0]
    actual, expected = (
        [bytes(sample["txt"]) for sample in ChunkReader().read_chunk(*chunk)] for chunk in ((filtered, 0), (full, 25))
    )
    assert actual == expected
    files(own.address).rm(f"{BUCKET}/set/00002.parquet")
    assert main([*arguments, str(tmp_path / "n")]) == 65
    reason = "the parquet file of this shard is missing"
    shard = f"s3://{BUCKET}/set/00002.tar"
    assert json.loads(capsys.readouterr().out)["damaged"] == [{"shard": shard, "reason": reason}]


def test_move_to_bucket_reads_no_shard_and_keeps_batches(original, own, proxied, tmp_path, capsys):
    proxy = proxied(own)
    prefix = f"s3://{BUCKET}/set"
    assert main(["move", str(original), "--to", prefix, "--out", str(tmp_path / "m"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (proxy.counts["gets"], proxy.counts["heads"]) == (0, 0), "sizes and ETags are of the listing"
    assert report["compared_by_size"] == 5 and report["digest"] == Manifest.load(original).digest
    moved = Manifest.load(tmp_path / "m")
    assert moved.keys == [f"{prefix}/{Path(key).name}" for key in Manifest.load(original).keys] and all(moved.etags)
    local = loader(original)
    remote = loader(original, folder=moved.folder)
    assert same(take(remote), take(local))


def test_move_compares_objects_by_etag(original, own, proxied, tmp_path, capsys):
    proxied(own)
    store = files(own.address)
    assert main(["index", f"s3://{BUCKET}/set/*.tar", "--chunk", "4", "--out", str(tmp_path / "old")]) == 0
    for path in sorted(original.glob("*.tar")):
        store.pipe_file(f"{BUCKET}/copy/{path.name}", path.read_bytes())
    command = ["move", str(tmp_path / "old"), "--to", f"s3://{BUCKET}/copy", "--json", "--out"]
    capsys.readouterr()
    assert main([*command, str(tmp_path / "m")]) == 0
    assert json.loads(capsys.readouterr().out)["compared_by_etag"] == 5
    changed = bytearray((original / "00002.tar").read_bytes())
    changed[600] ^= 1
    store.pipe_file(f"{BUCKET}/copy/00002.tar", bytes(changed))
    assert main([*command, str(tmp_path / "n")]) == 65
    (wrong,) = json.loads(capsys.readouterr().out)["wrong"]
    assert wrong["shard"] == f"s3://{BUCKET}/copy/00002.tar" and wrong["reason"].startswith("its ETag is ")
    assert main([*command, str(tmp_path / "n"), "--sizes-only"]) == 0
    assert main(["verify", str(tmp_path / "n"), "--workers", "1"]) == 65
    assert "CRC32" in capsys.readouterr().out
