"""Real S3 servers on loopback, each in a process of its own, killed by its id."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import s3fs
from botocore.exceptions import BotoCoreError

from tests.harness.common import free_port

KEY = "tester"
SECRET = "secret-of-the-tests"
BUCKET = "data"


class Server:
    """A server that tests can kill and restart with its data, at the same port unless that is taken."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.port = 0
        self.process = None

    @property
    def address(self):
        return f"http://127.0.0.1:{self.port}"

    @property
    def running(self):
        return self.process is not None and self.process.poll() is None

    def command(self):
        raise NotImplementedError

    def start(self, attempts=3):
        """Start the process and wait for its first answer. Another program may take a port first: try others then."""
        for _ in range(attempts):
            self.port = self.port or free_port()
            self._launch()
            if self._answers():
                return self
            self.kill()
            self.port = 0
        raise AssertionError(f"no server after {attempts} attempts: {self.folder.with_suffix('.log').read_text()}")

    def _launch(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"NANIO_ACCESS_KEY": KEY, "NANIO_SECRET_KEY": SECRET}
        with open(self.folder.with_suffix(".log"), "ab") as log:
            self.process = subprocess.Popen(self.command(), stdout=log, stderr=log, env=environment)

    def _answers(self, wait=60.0):
        """Whether the server answers, before its process ends and within ``wait`` seconds."""
        end = time.monotonic() + wait
        while self.running and time.monotonic() < end:
            with contextlib.suppress(OSError, BotoCoreError):
                files(self.address).ls("")
                return True
            time.sleep(0.05)
        return False

    def kill(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()


class Nanio(Server):
    """Keeps an object as a file: ``folder/bucket/key``."""

    def command(self):
        for unfinished in self.folder.rglob(".tmp." + "?" * 32):  # of a killed server, which would list it as an object
            unfinished.unlink()
        return [
            sys.executable, "-m", "nanio", "serve", "--data-dir", str(self.folder), "--host", "127.0.0.1",
            "--port", str(self.port), "--no-access-log", "--log-level", "error",
        ]  # fmt: skip


class Weed(Server):
    """SeaweedFS: master, volume, filer and S3 in one process. Without telemetry, which reports to a public host."""

    def command(self):
        ports = {"-s3.port": self.port, "-s3.port.iceberg": 0, "-s3.port.lance": 0, "-s3.port.grpc": free_port()}
        for part in ("master", "volume", "filer"):
            ports |= {f"-{part}.port": free_port(), f"-{part}.port.grpc": free_port()}
        credentials = [{"accessKey": KEY, "secretKey": SECRET}]
        identities = {"identities": [{"name": "tester", "credentials": credentials, "actions": ["Admin"]}]}
        (self.folder / "s3.json").write_text(json.dumps(identities))
        return [
            str(Path(sys.executable).parent / "weed"), "server", "-s3", "-filer", f"-dir={self.folder}",
            "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-master.volumeSizeLimitMB=64",
            "-volume.max=64", f"-s3.config={self.folder / 's3.json'}",
            *(f"{name}={port}" for name, port in ports.items()),
        ]  # fmt: skip


def files(address):
    """Return an s3fs file system, as a user's script creates it, to write objects."""
    return s3fs.S3FileSystem(
        key=KEY, secret=SECRET, endpoint_url=address, skip_instance_cache=True,
        config_kwargs={"retries": {"total_max_attempts": 1}, "region_name": "us-east-1"},
    )  # fmt: skip


def upload(server, folder, prefix="set"):
    """Upload the shards of a folder as objects."""
    store = files(server.address)
    if not store.exists(BUCKET):
        store.mkdir(BUCKET)
    for path in sorted(folder.glob("*.tar")):
        store.pipe_file(f"{BUCKET}/{prefix}/{path.name}", path.read_bytes())


def environment(address, secret=SECRET):
    """Return the environment variables with which s3:// names this server."""
    return {
        "AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
