"""Tests of reads from a bucket: permanent errors, retries, resumed bodies and hedges; and the index of a bucket."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import botocore.auth
import pytest
from botocore.exceptions import ClientError

from flip.checkpoint.remote import RemoteCheckpoint
from flip.data.chunk_reader import ChunkReader
from flip.data.manifest.manifest import Manifest
from flip.data.storage.base import RequestError
from flip.data.storage.ranges import by_status
from flip.data.storage.retry import RetryPolicy
from flip.data.storage.s3 import classify_error
from flip.runs.errors import ConfigError, DataError, PermissionDenied, StorageError
from tests.s3.conftest import ROOT, lead_to, on_nanio, on_weed
from tests.s3.servers import BUCKET, KEY, SECRET, files

pytestmark = pytest.mark.s3


def impatient(**fields):
    return ChunkReader(retry_policy=RetryPolicy(**{"deadline": 1.5, "timeout": 5, "first": 0.05} | fields))


def texts(manifest, reader):
    return [bytes(s["txt"]) for j in range(manifest.chunks) for s in reader.read_chunk(manifest, j)]


# -- the manifest -----------------------------------------------------------------------------------------------------


def test_index_of_bucket_equals_index_of_files(original, server, proxied, remote):
    proxy = proxied(server)
    proxy.plan((), 0)
    manifest = remote()
    local = Manifest.load(original)
    assert manifest.digest == local.digest and manifest.keys[0] == f"s3://{BUCKET}/set/00000.tar"
    assert proxy.counts["gets"] == len(manifest.keys), "each shard is read once"
    assert len(set(manifest.etags)) == 5 and all(manifest.etags) and not any(local.etags)
    assert "etags.txt" in json.loads((manifest.folder / "manifest.json").read_text())["files"]
    assert texts(manifest, impatient()) == texts(local, impatient())


@on_nanio
def test_index_detects_byte_flipped_by_network(server, proxied, remote):
    proxy = proxied(server)
    for seed in range(6):  # a flip in a header breaks the tar; elsewhere only the ETag differs
        proxy.plan(["flip"], 1, seed, limit=1)
        with pytest.raises((StorageError, DataError)):
            remote()


@on_nanio
def test_list_returns_all_pages(server, proxied):
    proxied(server)
    (server.folder / BUCKET / "many").mkdir()
    for i in range(1005):
        (server.folder / BUCKET / "many" / f"{i:04d}.tar").write_bytes(b"x")
    reader = impatient()
    listing = reader.list(f"s3://{BUCKET}/many/")
    assert list(listing) == [f"s3://{BUCKET}/many/{i:04d}.tar" for i in range(1005)]
    key = f"s3://{BUCKET}/set/00000.tar"
    assert reader.list(key) == {key: reader.stat(key)} and reader.stat(key).etag


# -- permanent errors --------------------------------------------------------------------------------------------------


@pytest.fixture
def brief_first_access(monkeypatch):
    """A first access that is denied is given up after half a second; test_retry.py checks the time without waiting."""
    monkeypatch.setattr("flip.data.storage.retry.FIRST_ACCESS", 0.5)


@pytest.mark.usefixtures("brief_first_access")
def test_read_fails_soon_if_first_request_is_denied(server, proxied, monkeypatch):
    proxy = proxied(server)
    reader = impatient(deadline=60)
    lead_to(monkeypatch, proxy.address, secret="wrong-" + SECRET)
    with pytest.raises(PermissionDenied, match=r"00000\.tar.*403.*AWS_PROFILE") as error:
        reader.read(f"s3://{BUCKET}/set/00000.tar", 0, 512)
    assert SECRET not in str(error.value) and reader.counters.requests >= 2


@pytest.mark.parametrize("code, kind", [("400", "denied"), ("", "denied"), ("InvalidRequest", "refused")])
def test_bad_request_without_body_is_a_denial(code, kind):
    """So AWS answers a HEAD with an expired token: it is no shard that is damaged."""
    assert by_status(400, code).kind == kind
    assert by_status(403, "RequestTimeTooSkewed").kind == "expired", "a clock that is not set yet"


@pytest.mark.usefixtures("brief_first_access")
@pytest.mark.parametrize("ahead", [3600, -3600])
def test_wrong_clock_is_an_outage_although_the_answer_has_no_body(server, proxied, monkeypatch, ahead):
    """The servers compare the signed time with their clock, as AWS does. The reply to a HEAD shows no more than 403."""
    proxied(server)
    checkpoint = RemoteCheckpoint(f"s3://{BUCKET}/run", RetryPolicy(deadline=1.5, timeout=5, first=0.05))
    monkeypatch.setattr(RemoteCheckpoint, "_answered", set())
    real = botocore.auth.get_current_datetime
    monkeypatch.setattr("botocore.auth.get_current_datetime", lambda: real() + timedelta(seconds=ahead))
    clock = SimpleNamespace(time=lambda: time.time() + ahead)
    monkeypatch.setattr("flip.data.storage.s3.time", clock, raising=False)
    words = "ahead of" if ahead > 0 else "behind"
    text = f"403; the clock of this machine is 3,[56][0-9]{{2}} s {words} that of the storage: set it"
    with pytest.raises(StorageError, match=text) as error:
        checkpoint.read_small("owner.json", 100)
    assert error.value.code == 69
    with pytest.raises(StorageError, match="403 RequestTimeTooSkewed"):
        impatient().read(f"s3://{BUCKET}/set/00000.tar", 0, 512)


@pytest.mark.parametrize("date", ["", "yesterday", "Tue, 99 Dec 2026 00:00:00 GMT"])
def test_denial_without_a_date_stays_a_denial(date):
    response = {"ResponseMetadata": {"HTTPStatusCode": 403, "HTTPHeaders": {"date": date}}, "Error": {"Code": "403"}}
    assert classify_error(ClientError(response, "HeadObject")).kind == "denied"


@on_nanio
@pytest.mark.usefixtures("brief_first_access")
def test_read_without_credentials_raises_permission_denied(server, proxied, monkeypatch, tmp_path):
    proxied(server)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(PermissionDenied, match="Unable to locate credentials"):
        impatient(deadline=60).read(f"s3://{BUCKET}/set/00000.tar", 0, 512)


def test_read_retries_denial_after_earlier_success(server, proxied):
    proxy = proxied(server)
    reader = impatient()
    patient = impatient(deadline=60)
    for chunk_reader in (reader, patient):
        chunk_reader.read(f"s3://{BUCKET}/set/00000.tar", 0, 512)
    proxy.plan(["denied"], 1)
    with pytest.raises(StorageError, match="reading failed for 1.5 s, at last with: 403 AccessDenied"):
        reader.read(f"s3://{BUCKET}/set/00000.tar", 0, 512)
    assert reader.counters.retries["denied"] == proxy.counts["denied"] > 0
    proxy.plan(["denied"], 1, limit=2)  # each denial creates a new client, which is slow on a busy machine
    assert len(patient.read(f"s3://{BUCKET}/set/00000.tar", 0, 512)) == 512


def test_reader_reloads_expired_credentials(server, proxied, monkeypatch, tmp_path):
    """The new client reads the present content of the credentials file: first a wrong secret, then the right secret."""
    proxy = proxied(server)
    reader = impatient()
    path = tmp_path / "credentials"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))

    def read(secret):
        path.write_text(f"[default]\naws_access_key_id = {KEY}\naws_secret_access_key = {secret}\n")
        return len(reader.read(f"s3://{BUCKET}/set/00000.tar", 0, 512))

    assert read(SECRET) == 512 and read("wrong") == 512, "the reader keeps credentials while they are valid"
    proxy.plan(["expired"], 1, limit=1)
    with pytest.raises(StorageError, match="403 SignatureDoesNotMatch"):
        read("wrong")
    proxy.plan(["expired"], 1, limit=1)
    assert read(SECRET) == 512 and reader.counters.retries["expired"] >= 1


def test_reader_waits_while_credentials_file_is_being_rewritten(server, proxied, monkeypatch, tmp_path):
    """A file that cannot be parsed is an error of the configuration only before the first answer."""
    proxy = proxied(server)
    reader = impatient()
    path = tmp_path / "credentials"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    path.write_text(f"[default]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n")
    assert len(reader.read(f"s3://{BUCKET}/set/00000.tar", 0, 512)) == 512
    path.write_text("[default")
    proxy.plan(["expired"], 1, limit=1)
    with pytest.raises(StorageError, match="parse"):
        reader.read(f"s3://{BUCKET}/set/00000.tar", 0, 512)
    with pytest.raises(ConfigError, match="cannot be addressed.*parse"):
        impatient().read(f"s3://{BUCKET}/set/00000.tar", 0, 512)


CHAIN = """
import json, pathlib, sys
handed = pathlib.Path(sys.argv[1])
number = len(handed.read_text()) if handed.exists() else 0
handed.write_text("x" * (number + 1))
answers = json.loads(sys.argv[2])
print(json.dumps(answers[min(number, len(answers) - 1)] | {"Version": 1}))
"""
GOOD, WRONG = (
    {"AccessKeyId": KEY, "SecretAccessKey": secret, "Expiration": "2222-02-02T00:00:00Z"}
    for secret in (SECRET, "wrong")
)
PAST = GOOD | {"Expiration": "2020-02-02T00:00:00Z"}


@pytest.mark.parametrize("answers", [[WRONG, GOOD], [PAST, PAST, GOOD]], ids=["denied", "expired"])
def test_reader_asks_credential_process_again_after_bad_credentials(
    server, proxied, monkeypatch, tmp_path, request, answers
):
    """A process returns credentials, as a company's login does: wrong or expired ones before valid ones."""
    proxied(server)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    script = tmp_path / "login.py"
    counter_file = tmp_path / "handed"
    script.write_text(CHAIN)
    command = shlex.join([sys.executable, str(script), str(counter_file), json.dumps(answers)])
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {command}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    reader = impatient(deadline=30)
    assert len(reader.read(f"s3://{BUCKET}/set/00000.tar", 0, 512)) == 512
    retries = {kind: count for kind, count in reader.counters.retries.items() if count}
    assert retries == {request.node.callspec.id.split("-")[-1]: 1}
    assert len(counter_file.read_text()) >= len(answers)


def test_read_of_missing_object_or_bucket_raises_data_error(server, proxied):
    proxied(server)
    for key in (f"s3://{BUCKET}/set/00099.tar", "s3://nowhere/set/00000.tar"):
        with pytest.raises(DataError, match="the shard is missing"):
            impatient().read(key, 0, 512)


def test_read_rejects_object_with_other_etag(original, server, prefix, proxied, remote):
    proxied(server)
    manifest = remote(prefix)
    data = bytearray((original / "00002.tar").read_bytes())
    data[-1] = 1  # in the end mark, which no chunk reads: only the ETag differs
    files(server.address).pipe_file(f"{BUCKET}/{prefix}/00002.tar", bytes(data))
    with pytest.raises(DataError, match=r"00002\.tar: the shard is not the one that was indexed: its ETag") as error:
        texts(manifest, impatient())
    assert error.value.code == 65
    old = without_etags(manifest.folder)
    assert len(texts(old, impatient())) == old.samples, "it has no ETags to compare"


REDIRECTS = [(301, "PermanentRedirect"), (307, "TemporaryRedirect"), (400, "AuthorizationHeaderMalformed")]


@pytest.mark.parametrize("status, code", REDIRECTS)
def test_redirect_at_first_names_the_region_as_a_wrong_setting(server, proxied, status, code):
    proxy = proxied(server)
    key = f"s3://{BUCKET}/set/00000.tar"
    proxy.redirect = (status, code, "eu-south-9")
    reads = [lambda reader: reader.read(key, 0, 512)]
    if status != 400:  # of a HEAD it has no code, and an expired token looks the same
        reads.append(lambda reader: reader.stat(key))
    for read in reads:
        with pytest.raises(ConfigError, match=rf"00000\.tar.*{status}.*eu-south-9.*AWS_REGION=eu-south-9") as error:
            read(impatient(deadline=60))
        assert error.value.code == 78
    proxy.redirect = (status, code, "")
    with pytest.raises(ConfigError, match="Set AWS_REGION to the bucket's region"):
        impatient(deadline=60).read(key, 0, 512)


@pytest.mark.parametrize("status, code", REDIRECTS)
def test_redirect_of_a_healthy_run_is_an_outage(server, proxied, status, code):
    proxy = proxied(server)
    reader = impatient()
    key = f"s3://{BUCKET}/set/00000.tar"
    first = reader.read(key, 0, 512)
    proxy.redirect = (status, code, "eu-south-9")
    with pytest.raises(StorageError, match=rf"reading failed for 1.5 s, at last with: {status}.*eu-south-9"):
        reader.read(key, 0, 512)
    assert reader.counters.retries["redirect"] > 1
    proxy.redirect = None
    assert reader.read(key, 0, 512) == first


def test_weak_etags_are_those_of_the_index(server, proxied, remote):
    """A proxy that recompresses answers marks their ETags as weak; the CRC32 of each chunk is compared in any case."""
    proxy = proxied(server)
    manifest = remote()
    expected = texts(manifest, impatient())
    proxy.weak = True
    assert texts(manifest, impatient()) == expected
    assert impatient().stat(manifest.keys[0]).etag == manifest.etags[0]


@pytest.mark.parametrize("ignores", ["range", "start", "length", "chunked"])
def test_server_that_ignores_the_start_of_a_range_is_named(server, proxied, ignores):
    """It is no damaged or short shard. Later, behind a proxy that is being changed, it is an outage."""
    proxy = proxied(server)
    key = f"s3://{BUCKET}/set/00000.tar"
    reader = impatient()
    first = reader.read(key, 1024, 2048)
    proxy.ignores = ignores
    with pytest.raises(ConfigError, match=r"00000\.tar.*the server ignores the start of a range.*HTTP 206") as error:
        impatient(deadline=60).read(key, 1024, 2048)
    assert error.value.code == 78
    with pytest.raises(StorageError, match="at last with: the server ignores the start of a range"):
        reader.read(key, 1024, 2048)
    proxy.ignores = ""
    assert reader.read(key, 1024, 2048) == first


def test_read_rejects_truncated_object(original, server, prefix, proxied, remote):
    proxied(server)
    old = without_etags(remote(prefix).folder)
    files(server.address).pipe_file(f"{BUCKET}/{prefix}/00002.tar", (original / "00002.tar").read_bytes()[:5120])
    with pytest.raises(DataError, match=r"00002\.tar: the shard (ends at byte 5120|is not the one)"):
        texts(old, impatient(deadline=30))


@on_nanio
def test_read_chunk_reports_samples_damaged_at_rest(server, prefix, proxied, remote):
    proxied(server)
    manifest = remote(prefix)
    reader = impatient(deadline=60)
    key, start, _, _ = manifest.chunk_reads(7)[0]
    path = server.folder / BUCKET / key.removeprefix(f"s3://{BUCKET}/")  # unknown to the server: the ETag stays
    with open(path, "r+b") as file:
        file.seek(start + 600)
        byte = file.read(1)[0]
        file.seek(start + 600)
        file.write(bytes([byte ^ 16]))
    with pytest.raises(DataError, match=r"chunk 7 .*samples 14 to 15.*exclude .* --ids 14-15"):
        reader.read_chunk(manifest, 7)
    assert reader.counters.retries["checksum"] == 1


@pytest.mark.slow
@on_weed
def test_read_treats_server_side_checksum_failure_as_outage(server, proxied):
    """The server has its own checksums and answers 500, as it does for many temporary faults."""
    proxied(server)
    reader = impatient(timeout=60)
    body = os.urandom(8192)
    files(server.address).pipe_file(f"{BUCKET}/rot/00000.tar", body)
    (path,) = [path for path in server.folder.glob("*.dat") if body in path.read_bytes()]
    with open(path, "r+b") as file:
        file.seek(path.read_bytes().index(body))
        file.write(bytes([body[0] ^ 16]))
    with pytest.raises(StorageError, match="reading failed for 1.5 s, at last with: 500 InternalError"):
        reader.read(f"s3://{BUCKET}/rot/00000.tar", 0, 4096)


# -- retries and hedges -----------------------------------------------------------------------------------------------


def test_read_resumes_interrupted_body(original, server, proxied, remote):
    proxy = proxied(server)
    manifest = remote()
    reader = impatient(deadline=30)
    size = int(manifest.shards[0, 1])
    proxy.plan(["reset"], 1, limit=3)
    content = (original / "00000.tar").read_bytes()
    assert reader.read(manifest.keys[0], 0, size, manifest.etags[0]) == content
    counters = reader.counters
    assert counters.resumed > size * 0.4 and counters.bytes == size, "no byte is requested twice"


def test_read_restarts_if_object_is_replaced_before_resume(original, server, prefix, proxied):
    proxy = proxied(server)
    reader = impatient(deadline=30)
    key = f"s3://{BUCKET}/{prefix}/00000.tar"
    size = (original / "00000.tar").stat().st_size
    proxy.plan(["reset"], 1, limit=1)
    once = reader._once

    def replace_after_failure(key, request):
        try:
            return once(key, request)
        except RequestError:
            files(server.address).pipe_file(f"{BUCKET}/{prefix}/00000.tar", b"z" * size)
            raise

    reader._once = replace_after_failure
    assert reader.read(key, 0, size) == b"z" * size


@on_nanio
@pytest.mark.parametrize("fault", ["silence", "stall"])
def test_hedge_replaces_silent_or_stalled_request(original, server, proxied, fault):
    proxy = proxied(server)
    reader = impatient(timeout=600, deadline=600, hedge=0.3)
    key = f"s3://{BUCKET}/set/00000.tar"
    assert reader.read(key, 0, 512)  # on a busy machine this, too, may take two requests
    before = reader.counters
    proxy.plan([fault], 1, limit=1)
    threads = threading.active_count()
    content = (original / "00000.tar").read_bytes()
    assert reader.read(key, 0, len(content)) == content and threading.active_count() == threads
    assert proxy.counts["gets"] == 2 and not any(reader.counters.retries.values())
    assert reader.counters.requests == before.requests + 2 and reader.counters.hedges_won == before.hedges_won + 1


@on_nanio
def test_hedge_sends_no_request_if_answers_arrive(server, proxied, remote):
    proxy = proxied(server)
    manifest = remote()
    reader = impatient(deadline=30, hedge=10)
    proxy.plan((), 0)
    texts(manifest, reader)
    assert reader.counters.hedged == 0 and reader.counters.requests == proxy.counts["gets"] >= manifest.chunks


@on_nanio
def test_slowdown_lowers_request_cap_of_all_threads(server, proxied, remote):
    proxy = proxied(server)
    manifest = remote()
    reader = impatient(deadline=30, requests=8)
    proxy.plan(["slowdown"], 0.3, seed=5, limit=12)
    with ThreadPoolExecutor(8) as pool:
        caps = list(pool.map(lambda j: (reader.read_chunk(manifest, j), reader.counters.cap)[1], range(60)))
    assert min(caps) < 8 and reader.counters.retries["slowdown"] == 12
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda j: reader.read_chunk(manifest, j), range(60)))
    assert reader.counters.cap == 8, "the cap grows again"


@on_nanio
def test_reader_creates_new_client_after_fork(server, proxied, remote):
    """With the client inherited from a parent that has read, the child would hang or fail."""
    proxied(server)
    script = (
        "import os, sys; from flip.data.chunk_reader import ChunkReader as Reader\n"
        f"reader, key = Reader(deadline=5), 's3://{BUCKET}/set/00000.tar'\n"
        "whole = reader.read(key, 0, 4096)\n"
        "child = os.fork()\n"
        "if not child: os._exit(0 if reader.read(key, 0, 4096) == whole else 3)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60, env=os.environ)
    assert done.returncode == 0


def test_worker_import_loads_no_s3fs_botocore_or_torch():
    script = "import flip.data.worker, sys; sys.exit(any(m in sys.modules for m in ('s3fs', 'botocore', 'torch')))"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


def without_etags(folder):
    """Return a copy of the manifest without ETags, as that of files has none."""
    copy = shutil.copytree(folder, folder.parent / "copy")
    facts = json.loads((copy / "manifest.json").read_text())
    empty = b"\n" * len((copy / "etags.txt").read_bytes().splitlines())
    (copy / "etags.txt").write_bytes(empty)
    facts["files"]["etags.txt"] = {"bytes": len(empty), "sha256": hashlib.sha256(empty).hexdigest()}
    (copy / "manifest.json").write_text(json.dumps(facts))
    return Manifest.load(copy)
