"""A context manager in which a shared file system is unavailable or full."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os

LOOKING = ("stat", "lstat", "listdir", "scandir")
MAKING = ("mkdir", "link", "symlink")
CHANGING = ("open", "replace", "rename", "unlink", "rmdir")


@contextlib.contextmanager
def trouble(folder, kind):
    """``kind``: "" (none), "away" (every call for a path below ``folder`` fails), "full" (no file can be created)."""
    if not kind:
        yield
        return
    away = kind == "away"
    number = errno.EIO if kind == "away" else errno.ENOSPC

    def failing(real, fails):
        def call(path, *args, **kwargs):
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(str(folder)) and fails(args, kwargs):
                raise OSError(number, os.strerror(number), os.fspath(path))
            return real(path, *args, **kwargs)

        return call

    def writes(args, kwargs):
        mode = args[0] if args else kwargs.get("mode", "r")
        return away or bool(mode & os.O_CREAT if isinstance(mode, int) else set(mode) & set("wax+"))

    before = []
    for name in MAKING + ((*LOOKING, *CHANGING[1:]) if away else ()):
        before.append((os, name, getattr(os, name)))
        setattr(os, name, failing(getattr(os, name), lambda *_: True))
    for module in (os, io, builtins):
        before.append((module, "open", module.open))
        module.open = failing(module.open, writes)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module, name, real in before:
            setattr(module, name, real)
