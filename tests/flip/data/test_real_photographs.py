"""Tests on JPEG files that this project did not make: photographs that Debian packages ship.

The packages are downloaded by their names once, into the cache (FLIP_CACHE), and installed nowhere. Without apt-get, or
where the download fails, the tests are skipped.
"""

import csv
import hashlib
import itertools
import shutil
import subprocess
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
import visible_jpeg

from flip.common.cache import cache_root
from flip.config import schema
from flip.data import kernel
from flip.data.loader import Loader
from flip.data.manifest.manifest import Manifest
from flip.data.worker import WorkerConfig
from tests.synthetic import make_tokenizer
from tests.tools.commands.test_shards_cli import call

pytestmark = pytest.mark.slow

PACKAGES = ("mate-backgrounds", "budgie-backgrounds", "ukui-wallpapers", "opencv-doc", "python3-skimage")
"""Together 200 MB, with 670 files of cameras, editors and libraries; opencv-doc also has drawings and screenshots."""
LEAST = 300
"""Files that the packages must hold, whatever their releases."""
BATCH = 32
MASKS = ("0", "0.5", "0.75")


def download(folder):
    """Download and unpack the packages. Skips if that is impossible."""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        pytest.skip("no apt-get or no dpkg-deb")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        done = subprocess.run(["apt-get", "download", "-q", *PACKAGES], cwd=name, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"the packages cannot be downloaded: {done.stderr.strip()[-300:]}")
        files = Path(name) / "files"
        files.mkdir()
        for package in sorted(Path(name).glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", package, files / package.name.partition("_")[0]], check=True)
        try:
            files.rename(folder)
        except OSError:  # another clone was first
            if not folder.exists():
                raise


@pytest.fixture(scope="module")
def photographs():
    """Folder of the packages' files, and the JPEG files among them, each content once."""
    folder = cache_root() / "photographs"
    if not folder.exists():
        download(folder)
    files = [path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg") and path.is_file()]
    by_digest = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in files}
    if len(by_digest) < LEAST:
        pytest.skip(f"the packages hold {len(by_digest)} JPEG files, and {LEAST} are needed")
    return folder, [by_digest[digest] for digest in sorted(by_digest)]


@pytest.fixture
def decisions(monkeypatch):
    """Of the kernel: whether it accepted each file."""
    results = []
    decode = visible_jpeg.File.patches

    def patches(*arguments, **options):
        result = decode(*arguments, **options)
        results.append(result is not None)
        return result

    monkeypatch.setattr(visible_jpeg.File, "patches", patches)
    return results


def digest(folder, tokenizer, mask):
    """SHA-256 of the patches and ids of a pass over the data."""
    manifest = Manifest.load(folder)
    data = schema.Data(
        manifest=str(folder), tokenizer=str(tokenizer), workers=0, chunk=manifest.chunk, block=1, lanes=1,
        decoder="simplejpeg", resize="torchvision", max_replaced=1,
    )  # fmt: skip
    config = WorkerConfig(data, schema.Augment(), schema.ImageTower(size=224, patch=16), schema.TextTower(), 7)
    total = hashlib.sha256()
    with closing(Loader(config).batches(0, BATCH, mask)) as batches:
        for batch in itertools.islice(batches, manifest.samples // BATCH):
            total.update(batch.patches.numpy().tobytes())
            total.update(batch.ids.numpy().tobytes())
    return total.hexdigest()


def test_photographs_are_recoded_and_give_equal_patches_with_and_without_kernel(
    photographs, decisions, tmp_path, capsys, monkeypatch
):
    if reason := visible_jpeg.unavailable():
        pytest.skip(f"no kernel: {reason}")
    folder, files = photographs
    with (tmp_path / "table.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("path", "caption"))
        rows.writerows((path, path.stem) for path in files)
    make_tokenizer(tmp_path / "tokenizer.json")
    options = ("--images", folder, "--out", tmp_path / "source", "--json")
    code, created = call(capsys, "make", tmp_path / "table.csv", *options)
    assert code == 0, created
    code, recoded = call(capsys, "recode", tmp_path / "source", "--out", tmp_path / "small", "--json")
    assert code == 0, recoded
    print(f"{len(files)} files, created: {created}, recoded: {recoded}")
    assert kernel.difference() == ""  # it asks the kernel once
    for name, least in (("source", 0.5), ("small", 0.95)):
        for mask in MASKS:
            decisions.clear()
            monkeypatch.delenv(kernel.VARIABLE, raising=False)
            used = digest(tmp_path / name, tmp_path / "tokenizer.json", mask)
            accepted = sum(decisions)
            print(f"{name}, mask {mask}: the kernel is asked for {len(decisions)} and accepts {accepted}; {used}")
            assert accepted >= least * Manifest.load(tmp_path / name).samples // BATCH * BATCH
            monkeypatch.setenv(kernel.VARIABLE, "0")
            assert digest(tmp_path / name, tmp_path / "tokenizer.json", mask) == used
