"""Tests that shards index and verify accept the shards of a real img2dataset, which downloads from a loopback server.

FLIP_IMG2DATASET names an img2dataset command. Without it the test installs img2dataset into a separate environment
(about 800 MB), because its requirements differ from those of this project.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flip.data.chunk_reader import ChunkReader
from flip.data.manifest.manifest import Manifest
from tests.synthetic import draw_image, encode
from tests.tools.commands.test_shards_cli import call
from tools.shards_commands import inspect_samples

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
COUNT = 70
PER_SHARD = 16
SIDE = 64
LOST = range(2 * PER_SHARD, 3 * PER_SHARD)
"""Numbers of the dead links of a shard, for which img2dataset writes a tar without members."""


def status(i):
    """Return the HTTP status of the server for image i."""
    if i in LOST or i % 11 == 3:
        return 404
    return 200


def served(i):
    """Return the file of link i and additional headers. img2dataset resizes every fifth image, which exceeds SIDE."""
    if i % 11 == 5:
        return b"<html>not an image</html>", {}
    return encode(draw_image(i, 2 * SIDE if i % 5 == 4 else SIDE), "jpg"), {
        "X-Robots-Tag": "noai"
    } if i % 11 == 7 else {}


def good(i):
    return status(i) == 200 and i % 11 not in (5, 7)


def caption(i):
    if i == 0:
        return None
    return f"image {i}: «grün» 漢字 😀\nand a second line"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        i = int(self.path.strip("/").partition(".")[0])
        data, headers = served(i)
        self.send_response(status(i))
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Provide the img2dataset command."""
    if "FLIP_IMG2DATASET" in os.environ:
        yield os.environ["FLIP_IMG2DATASET"]
        return
    venv = tmp_path_factory.mktemp("img2dataset") / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    install = [
        venv / "bin" / "python",
        "-m",
        "pip",
        "install",
        "-q",
        "--disable-pip-version-check",
        "img2dataset>=1.45",
    ]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"img2dataset cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
    yield venv / "bin" / "img2dataset"
    shutil.rmtree(venv)


@pytest.fixture(scope="module")
def shards(command, tmp_path_factory):
    """Return the folder that img2dataset wrote."""
    root = tmp_path_factory.mktemp("shards")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    urls = [f"http://127.0.0.1:{server.server_port}/{i}.jpg" for i in range(COUNT)]
    columns = {"URL": urls, "TEXT": list(map(caption, range(COUNT))), "similarity": [i / COUNT for i in range(COUNT)]}
    pq.write_table(pa.table(columns), root / "links.parquet")
    options = {
        "url_list": root / "links.parquet", "input_format": "parquet", "url_col": "URL", "caption_col": "TEXT",
        "output_format": "webdataset", "output_folder": root / "out", "number_sample_per_shard": PER_SHARD,
        "processes_count": 2, "thread_count": 4, "save_additional_columns": '["similarity"]', "image_size": SIDE,
        "resize_mode": "keep_ratio", "resize_only_if_bigger": True, "skip_reencode": True, "enable_wandb": False,
        "disallowed_header_directives": '["noai","noindex"]',
    }  # fmt: skip
    try:
        subprocess.run(
            [command, *(f"--{name}={value}" for name, value in options.items())], check=True, timeout=900,
            env=os.environ | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "NO_ALBUMENTATIONS_UPDATE": "1"},
        )  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()
    return root / "out"


def samples(folder):
    """Map the number of each link to the members of its sample."""
    manifest = Manifest.load(folder)
    by_number = {}
    for j in range(manifest.chunks):
        for id, sample in zip(manifest.chunk_ids(j), ChunkReader().read_chunk(manifest, j), strict=True):
            members = {name: bytes(data) for name, data in sample.items()}
            facts = json.loads(members["json"])
            assert inspect_samples.sample(manifest, id).key == facts["key"] and facts["status"] == "success"
            number = int(facts["url"].rpartition("/")[2].removesuffix(".jpg"))
            assert number not in by_number, "two samples have the same number"
            by_number[number] = members
    return by_number


def test_index_contains_every_img2dataset_sample(shards, tmp_path, capsys):
    assert sorted(path.name for path in shards.glob("*.tar")) == [f"{n:05d}.tar" for n in range(5)]
    code, text = call(capsys, "index", shards / "*.tar", "--out", tmp_path / "none")
    assert code == 65 and "00002.tar: not a whole tar: zeros alone, without a single member" in text
    command = ["index", shards / "*.tar", "--skip-damaged", "--out", tmp_path / "m", "--json"]
    code, report = call(capsys, *command)
    expected = [i for i in range(COUNT) if good(i)]
    assert code == 0 and report["samples"] == len(expected) and "skipped_members" not in report
    assert report["complete"] == len(expected) - 1 and report["incomplete_by_reason"] == {"empty caption": 1}
    assert "shards_without_stats_json" not in report
    assert call(capsys, "verify", tmp_path / "m")[0] == 0

    by_number = samples(tmp_path / "m")
    assert sorted(by_number) == expected
    for i, members in by_number.items():
        assert set(members) == {"jpg", "txt", "json"} and members["txt"].decode() == (caption(i) or "")
        facts = json.loads(members["json"])
        assert facts["similarity"] == i / COUNT and (facts["width"], facts["height"]) == (SIDE, SIDE)
        assert facts["original_width"] == (2 * SIDE if i % 5 == 4 else SIDE)
        assert (members["jpg"] == served(i)[0]) == (i % 5 != 4)


def test_index_filters_match_img2dataset_rows(shards, tmp_path, capsys):
    command = ["index", shards / "*.tar", "--skip-damaged", "--out", tmp_path / "m", "--json"]
    code, report = call(capsys, *command, "--filter", "similarity>=0.5", "--filter", "status==success")
    assert code == 0 and sorted(samples(tmp_path / "m")) == [i for i in range(COUNT) if good(i) and 2 * i >= COUNT]
    assert report["dropped"] == {"similarity>=0.5": sum(good(i) and 2 * i < COUNT for i in range(COUNT))}
