"""A data set in a bucket, on a real server behind the proxy that misbehaves when it is told to."""

import collections
import shutil

from flip.data.index import index
from tests.s3.proxy import COUNTED_AS, Proxy
from tests.s3.servers import BUCKET, Nanio, environment, upload


class Store:
    """The shards of ``data``; what else lies beside their manifest is beside ``manifest``."""

    def __init__(self, folder, data):
        self._data, self.manifest = data, folder / "manifest"
        self._server, self._before = Nanio(folder / "nanio"), collections.Counter()

    def start(self):
        self._server.start()
        upload(self._server, self._data)
        self._proxy = Proxy(self._server.port).start()
        self.environment = environment(self._proxy.address)
        return self

    def index(self, chunk):
        """Make the manifest; ``environment`` must be this process's."""
        keys = [f"s3://{BUCKET}/set/{path.name}" for path in sorted(self._data.glob("*.tar"))]
        index(keys, self.manifest, chunk=chunk)
        for path in {*self._data.glob("*.json")} - {self._data / "manifest.json"}:
            shutil.copy(path, self.manifest)

    def stop(self):
        self._proxy.stop()
        self._server.kill()

    @property
    def done(self):
        """What the proxy did until now, by its names."""
        return self._before + self._proxy.counts

    def go(self):
        self._server.kill()

    def come_back(self):
        self._server.start()

    def disturb(self, run, faults, share, limit):
        """So many faults; over when they are done, and told in the newest attempt's metrics, or the run is over."""
        self._before = self.done
        self._proxy.plan(faults, share, limit=limit)
        kinds = {COUNTED_AS[name] for name in faults}

        def over():
            done = sum(self._proxy.counts[name] for name in faults) == limit
            return done and all(run.retries(run.run.newest_attempt())[kind] for kind in kinds)

        run.wait(lambda: over() or run.run.result.exists(), f"{limit} of {faults}")
