"""Tests of the folder for compiled code that all runs on a node share: it is bounded, and never emptied while used."""

import os
import subprocess
import sys
from pathlib import Path

from flip.distributed import compile_cache

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
