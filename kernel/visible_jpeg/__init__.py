"""Patches of a masked view, straight from the bytes of a JPEG file.

``File.patches`` decodes the entropy code of a file, but computes inverse DCT, upsampling, colour and resize only where
visible patches need them. Its result has the bits of decoding the whole file with libjpeg-turbo (its default settings),
cutting the box out, and resizing it with ``torch.nn.functional.interpolate(mode="bicubic", antialias=True)`` on uint8.

It is not a complete decoder: files and requests that it does not reproduce bit by bit are refused, and so are files
that are not flawless. The caller then decodes them in its own way; ``why`` says the reason of the last refusal.

The work is done by a library in C, which is built with the package if there is a compiler, and needs an x86 processor
with AVX2. ``unavailable`` says why it cannot be used. Calls release the interpreter's lock; each thread has memory of
its own.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAX_PATCH", "MAX_ROW", "MAX_SIZE", "File", "library_path", "unavailable", "version", "why"]

MAX_SIZE = 1024
MAX_PATCH = 64
MAX_ROW = 64
"""The largest sides of a view and of a patch, and the most patches in a row of a view: src/visible_jpeg.h."""

_Bytes = bytes | bytearray | memoryview | NDArray[np.uint8]

_LIMIT = 1 << 31
_REQUEST = 2  # vj_reason
# Flags of a request, src/visible_jpeg.h.
_MIRRORED = 1
_REFUSE_EXIF = 2
_VERIFIED = 4


_REQUEST_FORMAT = struct.Struct("@PN4i2iP2i")
"""``vj_request`` of src/visible_jpeg.h."""


class File:
    """A JPEG file in memory.

    Args:
        data: its bytes, which must not change.
        ignore_exif: False: refuse files with an APP1 segment, whose orientation would turn the image.
    """

    def __init__(self, data: _Bytes, *, ignore_exif: bool = True) -> None:
        self._content = np.frombuffer(data, np.uint8)
        self._address = _address(self._content)
        self._flags = _REFUSE_EXIF * (not ignore_exif)

    def size(self) -> tuple[int, int] | None:
        """(width, height) of the image, or None if the header is refused."""
        if _library is None:
            _state.reason = _unavailable
            return None
        sides = (ctypes.c_int32 * 2)()
        code = _library.vj_size(self._address, self._content.size, self._flags, sides)
        if code:
            _state.reason = _text(code)
            return None
        return sides[0], sides[1]

    def patches(
        self, box: Sequence[int], size: int, patch: int, visible: NDArray[np.integer[Any]], *,
        mirrored: bool = False, verified: bool = False, out: NDArray[np.uint8] | None = None,
    ) -> NDArray[np.uint8] | None:  # fmt: skip
        """The visible patches of a view, or None if the file or the request is refused.

        Args:
            box: (left, top, right, bottom) of the crop, in pixels of the image.
            size: side of the view: the crop is resized to size x size pixels.
            patch: side of a patch; divides ``size``.
            visible: indices of patches in the view, row by row; no index twice.
            mirrored: mirror the view, left to right, after the resize.
            verified: the file is known to be flawless. Intervals between restart markers that no visible patch needs
                are then not decoded.
            out: (len(visible), patch * patch * 3) uint8, contiguous, for the result. Undefined after a refusal.

        Returns:
            (len(visible), patch * patch * 3) uint8: of each patch its pixels by row, column and channel (RGB).
        """
        if _library is None:
            _state.reason = _unavailable
            return None
        left, top, right, bottom = box
        in_range = 0 <= left < right < _LIMIT and 0 <= top < bottom < _LIMIT
        if not (in_range and 0 < size <= MAX_SIZE and 0 < patch <= MAX_PATCH):  # before memory is taken
            _state.reason = _text(_REQUEST)
            return None
        shape = (len(visible), 3 * patch * patch)
        if out is None:
            out = np.empty(shape, np.uint8)
        elif out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous or not out.flags.writeable:
            raise ValueError(f"out: a contiguous, writable uint8 array of shape {shape} is needed")
        indices = np.ascontiguousarray(visible, np.int16)
        if indices is not visible and not np.array_equal(indices, visible):
            raise ValueError("visible: an index does not fit into 16 bits")
        request = _REQUEST_FORMAT.pack(
            self._address, self._content.size, left, top, right, bottom, size, patch,
            _address(indices), len(indices), self._flags | _MIRRORED * mirrored | _VERIFIED * verified,
        )  # fmt: skip
        code = _library.vj_patches(_decoder(), request, _address(out))
        if code:
            _state.reason = _text(code)
            return None
        return out


def why() -> str:
    """The reason of this thread's last refusal; empty if there was none."""
    return getattr(_state, "reason", "")


def unavailable() -> str:
    """Why nothing can be decoded here; empty if the library is usable."""
    return _unavailable


def version() -> str:
    """The version of the library; empty if there is none."""
    if _library is None:
        return ""
    return _library.vj_version().decode()


def library_path() -> Path | None:
    """The file of the library; None if the package was built without one."""
    return next(iter(sorted(Path(__file__).parent.glob("_library*"))), None)


class _Decoder:
    """Memory of the library for one thread."""

    def __init__(self) -> None:
        assert _library is not None
        self.handle = _library.vj_new()
        if not self.handle:
            raise MemoryError("no memory for a decoder")

    def __del__(self) -> None:
        if _library is not None and getattr(self, "handle", None):
            _library.vj_free(self.handle)


def _decoder() -> int:
    decoder = getattr(_state, "decoder", None)
    if decoder is None:
        decoder = _state.decoder = _Decoder()
    return decoder.handle


def _address(array: NDArray[Any]) -> int:
    if array.size and array.flags.writeable:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))  # in a third of the time
    return array.__array_interface__["data"][0]


def _text(code: int) -> str:
    assert _library is not None
    return _library.vj_text(code).decode()


def _load(path: Path | None) -> tuple[ctypes.CDLL | None, str]:
    """(library, ""), or (None, why there is none)."""
    if path is None:
        return None, "the package was built without a C compiler"
    try:
        library = ctypes.CDLL(str(path))
        _declare(library)
    except (OSError, AttributeError) as error:  # ctypes raises AttributeError for a function that is missing
        return None, f"the library cannot be loaded: {error}"
    if not library.vj_supported():
        return None, "the processor has no AVX2"
    return library, ""


def _declare(library: ctypes.CDLL) -> None:
    """Set the types of all functions of the library. Raises AttributeError if it lacks one."""
    library.vj_version.restype = ctypes.c_char_p
    library.vj_supported.argtypes = []
    library.vj_text.restype = ctypes.c_char_p
    library.vj_text.argtypes = [ctypes.c_int]
    library.vj_new.restype = ctypes.c_void_p
    library.vj_new.argtypes = []
    library.vj_free.restype = None
    library.vj_free.argtypes = [ctypes.c_void_p]
    library.vj_size.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int32, ctypes.c_void_p]
    library.vj_patches.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


_library, _unavailable = _load(library_path())
_state = threading.local()
