"""Builds the library in C. It is a plain shared library, which ctypes loads: it does not include Python.h, so that one
wheel fits every Python. Without a compiler the package is built without it, and says so (`visible_jpeg.unavailable`).

CC and CFLAGS are used as usual: CFLAGS="-fsanitize=address,undefined -g" builds a library for AddressSanitizer.
"""

import re
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("src")
#: -ffp-contract=off: a fused multiply-add would change bits of the resize's weights.
FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]


class BuildLibrary(build_ext):
    """Builds `visible_jpeg/_library.so`, named without the version of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"


class PlatformWheel(bdist_wheel):
    """A wheel for every Python 3 of this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def _version() -> str:
    header = (SOURCES / "visible_jpeg.h").read_text(encoding="utf-8")
    return re.search(r'#define VJ_VERSION "(.+)"', header)[1]


setup(
    version=_version(),
    ext_modules=[
        Extension(
            "visible_jpeg._library",
            sources=sorted(map(str, SOURCES.glob("*.c"))),
            depends=sorted(map(str, SOURCES.glob("*.h"))),
            extra_compile_args=FLAGS,
            libraries=["m"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
