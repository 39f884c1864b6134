import shutil
from multiprocessing import forkserver
from pathlib import Path

import pytest

from flip.data.manifest.build import index
from tests.flip.data.loading import CHUNK, SAMPLES
from tests.s3.proxy import Proxy
from tests.s3.servers import BUCKET, SECRET, Nanio, Weed, environment, upload
from tests.synthetic import make_dataset, make_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    """Create the data set as local files. Tests compare every other way of reading with it."""
    root = tmp_path_factory.mktemp("s3")
    make_tokenizer(root / "tokenizer.json")
    return make_dataset(root / "shards", SAMPLES, 5, size=32, classes=7, chunk=CHUNK)


@pytest.fixture(scope="session")
def servers(original, tmp_path_factory):
    """Provide kind -> the server of this kind, with the shards under ``set/``, which no test changes."""
    started = {}

    def of(kind):
        if kind not in started:
            started[kind] = kind(tmp_path_factory.mktemp("server") / "data").start()
            upload(started[kind], original)
        elif not started[kind].running:  # a test that failed has killed it
            started[kind].start()
        return started[kind]

    yield of
    for server in started.values():
        server.kill()


@pytest.fixture(params=[Nanio, Weed], ids=["nanio", "weed"])
def server(request, servers):
    """Provide each server if the test does not choose. The test may kill and restart it."""
    return servers(request.param)


on_nanio = pytest.mark.parametrize("server", [Nanio], indirect=True, ids=["nanio"])
on_weed = pytest.mark.parametrize("server", [Weed], indirect=True, ids=["weed"])
either = pytest.mark.parametrize(
    "server, workers", [(Nanio, 0), (Weed, 1)], indirect=["server"], ids=["nanio-0", "weed-1"]
)
"""Both servers, with a loader process and without."""


@pytest.fixture
def prefix(server, original, tmp_path):
    """Return the prefix of shards that the test may change."""
    upload(server, original, tmp_path.name)
    return tmp_path.name


@pytest.fixture
def weed(servers):
    return servers(Weed)


@pytest.fixture
def own(original, tmp_path):
    """Start a server for a single test."""
    server = Nanio(tmp_path / "nanio").start()
    upload(server, original)
    yield server
    server.kill()


@pytest.fixture
def proxied(monkeypatch):
    """Start a proxy before a server; s3:// names the proxy in this process and in workers that start later."""
    proxies = []

    def before(server):
        proxies.append(Proxy(server).start())
        lead_to(monkeypatch, proxies[-1].address)
        return proxies[-1]

    yield before
    for proxy in proxies:
        proxy.stop()


def lead_to(monkeypatch, address, secret=SECRET):
    for name, value in environment(address, secret).items():
        monkeypatch.setenv(name, value)
    forkserver._forkserver._stop()  # workers have the environment that it was started in


@pytest.fixture
def remote(original, tmp_path):
    """Index the objects through the server that s3:// names, and return their manifest."""

    def make(prefix="set", chunk=CHUNK):
        keys = [f"s3://{BUCKET}/{prefix}/{path.name}" for path in sorted(original.glob("*.tar"))]
        manifest = index(keys, tmp_path / "remote", chunk=chunk)
        shutil.copy(original.parent / "tokenizer.json", tmp_path)
        return manifest

    return make
