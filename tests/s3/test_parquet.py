"""Tests of parquet files with images in a bucket: the index, reads under faults, and an index that is killed."""

import hashlib
import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flip.data.chunk_reader import ChunkReader
from flip.data.manifest.manifest import Manifest
from flip.data.storage.retry import RetryPolicy
from flip.runs.errors import STORAGE, DataError
from tests.harness.common import wait_until
from tests.harness.training_run import TrainingRun, configuration
from tests.s3.conftest import on_nanio
from tests.s3.servers import BUCKET, environment, files
from tests.synthetic import make_dataset, make_tokenizer
from tests.tools.shards_commands.test_parquet_files import write
from tests.verdicts import check_equal
from tools.commands.shards import main

pytestmark = pytest.mark.s3

JOBS = Path(__file__).resolve().parents[2] / "jobs"
COLUMNS = ["--image", "image", "--caption", "caption", "--chunk", "8"]


@pytest.fixture
def objects(server, tmp_path):
    """Upload two parquet files; return their prefix and the local folder."""
    folder = write(tmp_path / "local", compression="none", use_dictionary=False)
    store = files(server.address)
    for path in folder.glob("*.parquet"):
        store.pipe_file(f"{BUCKET}/{tmp_path.name}/{path.name}", path.read_bytes())
    return f"s3://{BUCKET}/{tmp_path.name}/", folder


def digest(manifest, reader=None):
    total = hashlib.sha256()
    for _, sample in (reader or ChunkReader()).samples(manifest):
        total.update(sample["jpg"])
        total.update(sample["json"])
    return total.hexdigest()


def index(source, out):
    assert main(["index", str(source), *COLUMNS, "--out", str(out)]) == 0
    return Manifest.load(out)


def test_index_of_bucket_equals_index_of_files(server, proxied, objects, tmp_path):
    proxied(server)
    prefix, folder = objects
    remote = index(prefix, tmp_path / "remote")
    local = index(folder, tmp_path / "files")
    assert remote.digest == local.digest and remote.keys[0].startswith(prefix)
    assert all(remote.etags[:2]) and not any(remote.etags[2:])
    assert digest(remote) == digest(local)


@on_nanio
@pytest.mark.parametrize("fault", ["slowdown", "server", "reset", "short", "flip"])
def test_faults_leave_samples_equal(server, proxied, objects, tmp_path, fault):
    proxy = proxied(server)
    manifest = index(objects[0], tmp_path / "remote")
    expected = digest(manifest)
    proxy.plan([fault], 0.3, 7)
    reader = ChunkReader(retry_policy=RetryPolicy(deadline=30, timeout=5, first=0.05))
    assert digest(manifest, reader) == expected
    assert sum(reader.counters.retries.values()) > 0


@on_nanio
def test_flipped_byte_in_bucket_is_named_by_chunk_and_command_that_excludes_it(server, proxied, objects, tmp_path):
    proxy = proxied(server)
    manifest = index(objects[0], tmp_path / "remote")
    expected = [bytes(sample["jpg"]) for _, sample in ChunkReader().samples(manifest)]
    key, start, _, _ = manifest.chunk_reads(2)[0]
    proxy.rotten = key.removeprefix("s3:/").encode(), start + 600
    with pytest.raises(DataError, match=r"chunk 2 \(samples 16 to 23\) is damaged") as error:
        digest(manifest)
    assert proxy.counts["rot"] >= 2
    command = re.search(r"flip (shards exclude .*--ids (\S+) --out) NEW_FOLDER", error.value.remedy)
    assert command[2] == "16-23"
    assert main([*shlex.split(command[1])[1:], str(tmp_path / "repaired")]) == 0
    repaired = Manifest.load(tmp_path / "repaired")
    assert [bytes(sample["jpg"]) for _, sample in ChunkReader().samples(repaired)] == expected[:16] + expected[24:]


def parquet_of(data, folder):
    """The rows of a data set of tars as two parquet files."""
    samples = [sample for _, sample in ChunkReader().samples(Manifest.load(data))]
    images = [bytes(sample["png"]) for sample in samples]
    captions = [bytes(sample["txt"]).decode().split("\n") for sample in samples]  # two each
    texts = {"caption": [first for first, _ in captions], "other": [second for _, second in captions]}
    rows = pa.table({"image": pa.array(images, pa.binary()), **texts})
    folder.mkdir()
    pq.write_table(rows.slice(0, 90), folder / "train-00000.parquet", compression="none", use_dictionary=False)
    pq.write_table(rows.slice(90), folder / "train-00001.parquet")
    return sorted(folder.glob("*.parquet"))


@pytest.mark.slow
@pytest.mark.kill
@on_nanio
def test_weights_of_training_on_parquet_in_bucket_under_faults_are_those_of_tars(server, proxied, tmp_path):
    """A run of two ranks on local tars, and one on parquet objects behind a proxy with faults, which is killed once."""
    data = make_dataset(tmp_path / "data", samples=200, shards=3, chunk=4, classes=8)
    make_tokenizer(data / "tokenizer.json")
    proxy = proxied(server)
    store = files(server.address)
    for path in parquet_of(data, tmp_path / "parquet"):
        store.pipe_file(f"{BUCKET}/weights/{path.name}", path.read_bytes())
    columns = ["--image", "image", "--caption", "caption,other", "--chunk", "4"]
    assert main(["index", f"s3://{BUCKET}/weights/", *columns, "--out", str(tmp_path / "remote")]) == 0
    calm, storm = (TrainingRun(tmp_path, name, configuration(data, 2, (16, 4))) for name in ("calm", "storm"))
    for run in (calm, storm):
        run.config.evaluate.every = 0
        run.save_config()
    calm.submit()
    storm.config.data.manifest = str(tmp_path / "remote")
    storm.config.data.captions = ["json:caption", "json:other"]
    storm.save_config()
    storm.env |= environment(proxy.address)
    proxy.plan(["slowdown", "server", "reset", "short", "flip"], 0.2, 7)
    storm.submit()
    storm.wait_step(7)
    storm.kill(rank=1)
    storm.wait_over()
    calm.wait_over()
    assert proxy.counts["flip"] and proxy.counts["reset"]
    check_equal(calm, storm, scores=3)


@on_nanio
def test_index_detects_byte_flipped_by_network(server, proxied, objects, tmp_path, capsys):
    proxy = proxied(server)
    proxy.plan(["flip"], 1, 3, limit=1)
    code = main(["index", objects[0], *COLUMNS, "--out", str(tmp_path / "remote")])
    assert code == STORAGE and "two readings differ" in capsys.readouterr().err


@on_nanio
def test_killed_index_of_bucket_continues(server, proxied, tmp_path, capsys):
    """A request in the middle never gets an answer; the command is killed at this point."""
    proxy = proxied(server)
    store = files(server.address)
    for path in write(tmp_path / "local", files=8).glob("*.parquet"):
        store.pipe_file(f"{BUCKET}/{tmp_path.name}/{path.name}", path.read_bytes())
    command = ["index", f"s3://{BUCKET}/{tmp_path.name}/", *COLUMNS, "--workers", "1", "--json", "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    reference = json.loads(capsys.readouterr().out)
    gets = proxy.counts["gets"]
    assert gets % 8 == 0, "as many for each file"

    proxy.plan(["silence"], 1, after=gets // 2)
    child = subprocess.Popen([sys.executable, JOBS, "shards", *command, str(tmp_path / "m")])
    wait_until(lambda: proxy.counts["silence"] or child.poll() is not None, "the request without an answer", 60)
    child.kill()
    assert child.wait() == -signal.SIGKILL and not (tmp_path / "m").exists()
    proxy.plan((), 0)
    assert main([*command, str(tmp_path / "m")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["shards_scanned"], report["shards_scanned_before"], proxy.counts["gets"]) == (4, 4, gets // 2)
    assert report["digest"] == reference["digest"]
    assert digest(Manifest.load(tmp_path / "m")) == digest(Manifest.load(tmp_path / "whole"))
