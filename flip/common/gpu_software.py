"""What ranks on NVIDIA GPUs need from a machine besides torch: a driver for its CUDA release, and a C compiler.

``compute.compile`` uses Triton, which builds a small library in C before its first kernel. Nothing here imports torch:
the launcher asks before it submits, and each rank before it starts.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import socket
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from flip.runs.checks import Rule
from flip.runs.errors import FlipError

DRIVERS = {11: 450, 12: 525, 13: 580}
"""Major release of CUDA -> oldest series of drivers that runs all its releases (NVIDIA, CUDA Compatibility)."""
INSTALL_PAGE = "docs/one_machine.md, Before the first job on GPUs"
TRITON_LIBRARY = "*/cuda_utils*.so"
"""The library that Triton builds, in its cache."""
COMPILER_REMEDY = (
    "Install a C compiler and the headers of Python (Debian: gcc, python3-dev) on the nodes or in the image, or set"
    " compute.compile to no for new runs."
)
DRIVER_TOO_OLD = "the NVIDIA driver on this system is too old"
NO_COMPILER = "Triton cannot build its library"
"""Both are phrases that ``flip.runs.restart_policy`` looks for: the node is left out, and the run starts on another."""


def torch_cuda() -> str:
    """The CUDA release of the torch of this interpreter, such as ``13.0``; empty without torch or for a CPU build."""
    spec = find_spec("torch")
    if spec is None or not spec.origin:
        return ""
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return ""
    release = re.search(r"^cuda\b.*= *'([\d.]+)'", text, re.MULTILINE)
    if release is None:
        return ""
    return release[1]


def driver_cuda(library: str = "libcuda.so.1") -> str:
    """The newest CUDA release that the driver runs, such as ``12.8``; empty without a driver.

    The driver's library is asked, so that NVIDIA's packages for forward compatibility count.
    """
    version = ctypes.c_int()
    try:
        ctypes.CDLL(library).cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return ""
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def required_driver(built: str) -> str:
    """The series of drivers that a torch for this CUDA release needs, as words."""
    major = int(built.partition(".")[0])
    if major in DRIVERS:
        return f"series {DRIVERS[major]} or newer"
    return f"for CUDA {major}"


def driver_defect(built: str, driver: str) -> str:
    """Why a driver cannot run a torch for the CUDA release ``built``; empty if it can, or if one of them is unknown.

    Within a major release of CUDA every driver runs every release.
    """
    if not built or not driver or int(driver.partition(".")[0]) >= int(built.partition(".")[0]):
        return ""
    return f"{DRIVER_TOO_OLD}: it runs CUDA {driver}, and torch is built for CUDA {built}"


def driver_remedy(built: str) -> str:
    other = int(built.partition(".")[0]) - 1
    build = f"install a build of torch for CUDA {other}: {INSTALL_PAGE}"
    return f"Update the driver ({required_driver(built)}), or {build}."


def compiler_defect() -> str:
    """Why Triton cannot build its library here; empty if it can. It looks for CC, gcc and clang, as here."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        return f"{NO_COMPILER}: there is no C compiler (gcc or clang)"
    if shutil.which(compiler.split()[0]) is None:
        return f"{NO_COMPILER}: CC names no program ({compiler})"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_paths(scheme=scheme)["include"], "Python.h")
    if not header.exists():
        return f"{NO_COMPILER}: there is no {header}"
    return ""


def node_defect(compiled: bool, triton_cache: str = "") -> tuple[str, str]:
    """(what, remedy) of the first requirement that this machine lacks; both empty if it has all.

    A library in ``triton_cache`` needs no compiler: an earlier attempt has built it.
    """
    built = torch_cuda()
    if defect := driver_defect(built, driver_cuda()):
        return defect, driver_remedy(built)
    if not compiled or (triton_cache and any(Path(triton_cache).glob(TRITON_LIBRARY))):
        return "", ""
    if defect := compiler_defect():
        return defect, COMPILER_REMEDY
    return "", ""


def _check_node(compiled: bool) -> None:
    """Raise FlipError if this node lacks a driver for the CUDA release of torch, or what compiled blocks need.

    The canary of a sweep meets it before the other runs start. The cause is a crash of this node, which the restart
    policy leaves out: other nodes may have it.
    """
    what, remedy = node_defect(compiled, os.environ.get("TRITON_CACHE_DIR", ""))
    if what:
        raise FlipError(what, socket.gethostname(), remedy=remedy)


OF_RANKS = (Rule("GPU software", _check_node, "do torch, driver and compiler of the node fit together?"),)
"""Of a rank on a GPU, for whether it compiles blocks, before it uses the GPU."""
