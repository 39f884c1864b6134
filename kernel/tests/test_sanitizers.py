"""Runs the library under AddressSanitizer and UBSan: on real and damaged files, and by a short run of the fuzzer."""

import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from images import damage, draw_image, encode

KERNEL = Path(__file__).resolve().parents[1]
FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-g", "-O1", "-ffp-contract=off", f"-I{KERNEL / 'src'}"]
SANITIZERS = "address,undefined"
SECONDS = 60
"""Of the fuzzer."""

pytestmark = pytest.mark.slow


def build(compiler: str, program: Path, *flags: str) -> None:
    sources = [str(KERNEL / "fuzz" / "target.c"), *map(str, sorted((KERNEL / "src").glob("*.c")))]
    subprocess.run([compiler, *FLAGS, *flags, *sources, "-lm", "-o", str(program)], check=True)


def request(random: np.random.Generator, width: int, height: int) -> bytes:
    """The bytes after a file, see fuzz/target.c."""
    box = (random.integers(width), random.integers(height), width, height)
    return struct.pack(">4H", *map(int, box)) + random.bytes(8)


def write_corpus(folder: Path, originals: int, damaged: int) -> list[Path]:
    random = np.random.default_rng(11)
    names = []
    files = []
    for _ in range(originals):
        width, height = random.integers(16, 90, 2).tolist()
        files.append((encode(random, draw_image(random, width, height)), width, height))
    for i in range(originals + damaged):
        content, width, height = files[i % originals]
        if i >= originals:
            content = damage(random, content)
        names.append(folder / f"{i:05d}")
        names[-1].write_bytes(content + request(random, width, height))
    return names


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_real_and_damaged_files_touch_no_memory_that_they_should_not(kernel, compiler, tmp_path):
    found = shutil.which(compiler) or shutil.which(f"{compiler}-14")
    if found is None:
        pytest.skip(f"no {compiler}")
    program = tmp_path / "replay"
    build(found, program, f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=undefined", "-DREPLAY")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    names = write_corpus(corpus, 200, 2300)
    done = subprocess.run([program, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "2500 files\n"


def test_fuzzer_finds_nothing_in_a_short_run(kernel, tmp_path):
    clang = shutil.which("clang") or shutil.which("clang-14")
    if clang is None:
        pytest.skip("no clang, and so no libFuzzer")
    program = tmp_path / "fuzz"
    build(clang, program, f"-fsanitize=fuzzer,{SANITIZERS}", "-fno-sanitize-recover=undefined")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write_corpus(corpus, 200, 0)
    limits = [f"-max_total_time={SECONDS}", "-max_len=20000", f"-artifact_prefix={tmp_path}/"]
    # libFuzzer takes the peak memory of the process that started it, which Linux passes on, for its own.
    limits += ["-rss_limit_mb=0", "-malloc_limit_mb=1024"]
    done = subprocess.run([program, *limits, corpus], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
