"""Which client reads an address: ``STORAGES``, and fsspec for all other schemes.

A client is imported when its first address is read: local shards need none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flip.data.storage.fsspec_storage import FsspecStorage
from flip.runs.addresses import scheme_of


def _s3(timeout: float) -> Any:
    from flip.data.storage.s3 import S3Storage

    return S3Storage(timeout)


def _web(timeout: float) -> Any:
    from flip.data.storage.http_storage import HttpStorage

    return HttpStorage(timeout)


STORAGES: dict[str, Callable[[float], Any]] = {
    "s3": _s3,
    "http": _web,
    "https": _web,
}
"""Scheme -> a client with the methods of ``base.Storage``, for schemes that have a client of their own.

Its argument is the time in seconds without a byte after which a request has failed. The other schemes of
``flip.runs.addresses.SCHEMES`` are read through fsspec.
"""


def open_storage(address: str, timeout: float) -> Any:
    """The client for an address. It reads nothing yet."""
    return STORAGES.get(scheme_of(address), FsspecStorage)(timeout)
