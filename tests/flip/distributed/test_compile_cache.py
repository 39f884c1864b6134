"""Tests of the folder for compiled code that all runs on a node share, and of what is compiled."""

import os
import subprocess
import sys
import tempfile
from multiprocessing import process
from pathlib import Path

import pytest
import torch

from flip.config import schema
from flip.distributed import compile_cache, parallel
from flip.models import clip
from tests.flip.models.test_clip import sized
from tests.harness.sharded_models import SEED, compute

ROOT = Path(__file__).resolve().parents[3]
USER = """
import sys
from flip.distributed import compile_cache
compile_cache.LARGEST_CACHE = 1000
print(compile_cache.code_folder(), flush=True)
sys.stdin.read()
"""


class User:
    """A process that uses the folder below ``temporary`` until it is closed; more than 1000 bytes are too large."""

    def __init__(self, temporary):
        environ = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", USER], env=environ, cwd=ROOT, **pipes)
        self.folder = Path(self.process.stdout.readline().strip())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.communicate()


def write(folder, size):
    (folder / "AVX2" / "inductor").mkdir(parents=True, exist_ok=True)
    code = folder / "AVX2" / "inductor" / "code.bin"
    code.write_bytes(bytes(size))
    return code


def test_small_cache_outlives_its_users(tmp_path):
    with User(tmp_path) as user:
        code = write(user.folder, 900)
    with User(tmp_path):
        assert code.exists()
    assert user.folder == tmp_path / f"flip-compile-{os.geteuid()}"


def test_large_cache_is_emptied_when_nobody_uses_it(tmp_path):
    with User(tmp_path) as user:
        code = write(user.folder, 1100)
        with User(tmp_path):
            assert code.exists()
    with User(tmp_path):
        assert os.listdir(user.folder) == [compile_cache.LOCK]


def test_emptying_follows_no_link(tmp_path):
    precious = write(tmp_path / "precious", 10)
    with User(tmp_path) as user:
        write(user.folder, 1100)
        (user.folder / "AVX2" / "link").symlink_to(tmp_path / "precious")
        (user.folder / "other").symlink_to(tmp_path / "precious")
    with User(tmp_path):
        assert not (user.folder / "AVX2").exists()
    assert precious.exists()


@pytest.mark.parametrize("prepared", [False, True])
def test_compile_caches_use_private_folders(tmp_path, monkeypatch, prepared):
    """Torch loads pickles and shared objects from these caches, so a folder that another user prepared is not used."""
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # Multiprocessing creates its folder once for all later tests, and this one's path may be too long for its sockets.
    own = tmp_path / "multiprocessing"
    own.mkdir()
    monkeypatch.setitem(process.current_process()._config, "tempdir", str(own))
    if prepared:  # a symlink has the same effect as another owner, and needs no root
        (tmp_path / "other").mkdir()
        (tmp_path / f"flip-compile-{os.geteuid()}").symlink_to(tmp_path / "other")
    parallel.set_compile_caches()
    places = [Path(os.environ[name]) for name in names]
    folder = places[0].parent.parent
    assert places == [places[0].parent / part for part in ("inductor", "triton")]
    assert folder.parent == (own if prepared else tmp_path)
    assert folder.stat().st_mode & 0o777 == 0o700 and not folder.is_symlink()
    monkeypatch.setenv(names[0], "/mine")
    monkeypatch.delenv(names[1])
    parallel.set_compile_caches(tmp_path / "run" / "compiled")
    assert os.environ[names[0]] == "/mine" and Path(os.environ[names[1]]).parents[1] == tmp_path / "run" / "compiled"
    assert (tmp_path / "run" / "compiled").stat().st_mode & 0o777 == 0o700


@pytest.mark.slow
def test_compiled_block_compiles_every_sequence_length():
    """By default torch compiles 8 shapes and runs further ones eagerly. A process that starts later would then compute
    different bits."""
    torch._dynamo.reset()  # other tests may have compiled blocks of these shapes in this process
    torch._dynamo.utils.counters.clear()
    world = parallel.World(0, 1, torch.device("cpu"), None, None)
    with torch.device("meta"):
        pair = clip.CLIPModel(sized("tiny"), schema.Augment(), "explicit")
    parallel.apply_parallelism(pair, world, compute(compile="yes"))
    clip.init_weights(pair, SEED)
    block = pair.image.blocks[0]
    width = pair.image.blocks[0].norm1.weight.shape[0]
    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for length in range(3, 12):
            block(torch.zeros(2, length, width))
        compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        with torch.compiler.set_stance("force_eager"):
            block(torch.zeros(2, 20, width))
    assert compiled >= 9 and torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
