"""Tests of parquet files with images in a bucket: the index, reads under faults, and an index that is killed."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flip.data.chunk_reader import ChunkReader
from flip.data.manifest.manifest import Manifest
from flip.data.storage.retry import RetryPolicy
from flip.runs.errors import STORAGE
from tests.s3.conftest import on_nanio
from tests.s3.servers import BUCKET, files
from tests.tools.shards_commands.test_parquet_files import write
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
def test_index_detects_byte_flipped_by_network(server, proxied, objects, tmp_path, capsys):
    proxy = proxied(server)
    proxy.plan(["flip"], 1, 3, limit=1)
    code = main(["index", objects[0], *COLUMNS, "--out", str(tmp_path / "remote")])
    assert code == STORAGE and "two readings differ" in capsys.readouterr().err


@on_nanio
def test_killed_index_continues(server, proxied, tmp_path, objects):
    out = tmp_path / "m"
    folder = write(tmp_path / "many", files=12)
    command = [sys.executable, str(JOBS), "shards", "index", str(folder), *COLUMNS, "--workers", "1", "--out", str(out)]
    running = subprocess.Popen(command, cwd=JOBS.parent)
    journal = tmp_path / "m.part"
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in journal.glob("*.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    running.wait()
    done = subprocess.run([*command, "--json"], cwd=JOBS.parent, capture_output=True, text=True)
    assert done.returncode in (0, 78), done.stderr
    if done.returncode == 0:
        report = json.loads(done.stdout)
        assert report["shards_scanned_before"] + report["shards_scanned"] == 12
    assert digest(Manifest.load(out)) == digest(index(folder, tmp_path / "again"))
