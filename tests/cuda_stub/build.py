"""Builds the stub and an environment with PyTorch's CUDA build, and runs a command on them.

``python -m tests.cuda_stub.build WORDS ...`` runs Python with these words there, such as ``benchmarks/gpu.py --quick
--folder FOLDER``. Its figures mean nothing, and the name of the card says so. The
environment (4.6 GB) has the torch release of this one, by its package's name, and lies in the cache (``FLIP_CACHE``),
where all clones use it; all other packages are this environment's. On Linux for x86-64 the index has a build for CUDA.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

from flip.common.cache import cache_root
from flip.files.creation import private_folder

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PACKAGES = ("torch", "torchvision")
PRELOADED = "libstub.so"
LIBRARIES = {
    PRELOADED: ("runtime.c", "libraries.c"),
    "libcuda.so.1": ("driver.c",),
    "libnvidia-ml.so.1": ("management.c",),
}
"""Library -> its sources."""
REHEARSAL = {
    "FLIP_STUB_NAME": "NVIDIA H100 80GB HBM3 (stub: a rehearsal)",
    "FLIP_STUB_CUDNN": "yes",
    "PYTEST_ADDOPTS": "-p tests.cuda_stub.plugin -k 'pins or (completes and not yes)'",  # these need no values
}
"""Variables of a command, which starts others."""
OPTIONS = ("-O1", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unused-parameter")


def main(words):
    environment = REHEARSAL | prepare()
    python = environment.pop("STUB_PYTHON")
    os.execve(python, [python, *words], environment)


def prepare(capability=90):
    """The variables of a process on the stub, and STUB_PYTHON, its interpreter.

    ``capability``: of the pretended GPUs, times 10.
    """
    python = packages()
    site = (
        Path(python).parents[1] / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    )
    libraries = compile_stub(site)
    cache = libraries / f"compiled-{capability}"
    return os.environ | {
        "STUB_PYTHON": str(python),
        "LD_PRELOAD": str(libraries / PRELOADED),
        "LD_LIBRARY_PATH": str(libraries),
        "PYTHONPATH": os.pathsep.join([str(HERE / "site"), str(ROOT)]),
        "FLIP_STUB_PACKAGES": sysconfig.get_paths()["purelib"],
        "FLIP_STUB_CAPABILITY": str(capability),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # as a run has it (jobs/host/rank_entry.py)
    }


def packages():
    """Python of the environment with PyTorch's CUDA build, which is installed if it is not there."""
    releases = [f"{name}=={version(name).partition('+')[0]}" for name in PACKAGES]
    name = f"{releases[0].partition('==')[2]}-{sys.implementation.cache_tag}"
    folder = private_folder(cache_root() / "cuda-stub" / name)
    python = folder / "bin" / "python"
    ready = folder / ".ready"
    with (folder.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ready.exists():
            print(f"installing {' and '.join(releases)} for CUDA (4.6 GB) into {folder}", file=sys.stderr)
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
            uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv"
            install = [uv, "pip", "install", "--quiet", "--no-config", "--python", python]
            subprocess.run([*install, *releases], check=True)
            ready.touch()
    return python


def compile_stub(site):
    """The folder of the stub's libraries, built from the sources with the headers of the packages in ``site``."""
    text = b"".join((HERE / name).read_bytes() for names in LIBRARIES.values() for name in names)
    digest = hashlib.sha256(text + str(site).encode()).hexdigest()[:16]
    folder = private_folder(cache_root() / "cuda-stub" / f"stub-{digest}")
    include = ["-I", site / "nvidia/cu13/include", "-I", site / "nvidia/nccl/include"]
    include += ["-idirafter", site / "triton/backends/nvidia/include"]
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for library, sources in LIBRARIES.items():
            target = folder / library
            if not target.exists():
                part = folder / f"{library}.part"
                names = [HERE / name for name in sources]
                command = ["cc", *OPTIONS, *include, *names, "-ldl", f"-Wl,-soname,{library}", "-o", part]
                subprocess.run(list(map(str, command)), check=True)
                part.replace(target)
    return folder


if __name__ == "__main__":
    main(sys.argv[1:])
