"""Fixtures: a real Slurm for a test, and real images for training."""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import webdataset

from flip.data.manifest.build import index
from tests.slurm.scenarios import FOREIGN
from tests.slurm_site import require
from tools.sandbox.cluster import SandboxCluster

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = 200
SHARDS = 3


def start_cluster(folder, monkeypatch, **options):
    require(options.get("accounting", False))
    cluster = SandboxCluster(folder, **options)
    cluster.start()
    for key, value in cluster.env().items():
        monkeypatch.setenv(key, value)
    return cluster


@pytest.fixture
def start_slurm(tmp_path_factory, monkeypatch):
    """``start_slurm(grace=..., ...)``: starts a Slurm for one test, which is always stopped at the end.

    Its folder has a short name: the paths of sockets are limited."""
    started = []

    def start(**options):
        started.append(start_cluster(tmp_path_factory.mktemp("s"), monkeypatch, **options))
        return started[-1]

    yield start
    for cluster in started:
        cluster.stop()


@pytest.fixture
def foreign_site(start_slurm):
    """A Slurm like that of a foreign site (``scenarios.FOREIGN``): accounting with limits, preemption by QOS without
    grace, JobRequeue=0, a job_submit.lua."""
    return start_slurm(nodes=4, **FOREIGN)


@pytest.fixture(scope="session")
def emoji(tmp_path_factory):
    """A manifest over 200 of the demonstration's images, in three shards, with the classes that they show."""
    command = [sys.executable, ROOT / "jobs", "demo_data", "--json"]
    cache = Path(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["path"])
    folder = tmp_path_factory.mktemp("emoji")
    samples = {}
    with tarfile.open(cache / "noto-v1" / "00000.tar") as tar:
        for member in tar:
            key, _, kind = member.name.partition(".")
            samples.setdefault(key, {})[kind] = tar.extractfile(member).read()
            if len(samples) > SAMPLES:
                samples.popitem()
                break
    names = json.loads((cache / "classes.json").read_text())
    labels = sorted({int(sample["cls"]) for sample in samples.values()})
    for shard in range(SHARDS):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar"), mtime=0) as writer:
            for key, sample in list(samples.items())[SAMPLES * shard // SHARDS : SAMPLES * (shard + 1) // SHARDS]:
                writer.write({"__key__": key, **sample, "cls": str(labels.index(int(sample["cls"]))).encode()})
    index([str(path) for path in sorted(folder.glob("*.tar"))], folder, chunk=4)
    (folder / "classes.json").write_text(
        json.dumps({"names": [names["names"][c] for c in labels], "templates": names["templates"][:1]}),
        encoding="utf-8",
    )
    shutil.copy(cache / "tokenizer.json", folder)
    return folder
