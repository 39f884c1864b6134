"""Files on web servers: one ranged request per call over the session of fsspec's HTTP file system.

fsspec's own reads neither check which range came nor see the ETag, and report every refused request as a missing file.
Its settings count (FSSPEC_HTTPS_CLIENT_KWARGS, and headers), as do HTTPS_PROXY, NO_PROXY and ~/.netrc.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import aiohttp

from flip.data.storage.base import (
    ObjectStat,
    RangeResponse,
    RequestError,
    RequestRunner,
    plain_etag,
    run_once,
)
from flip.data.storage.fsspec_storage import FsspecStorage
from flip.data.storage.ranges import RANGE, by_status, check_range, receive, refuse_incomplete
from flip.runs.addresses import require_admitted
from flip.runs.credentials import scrub
from flip.runs.errors import ConfigError

_T = TypeVar("_T")

MOST_REDIRECTS = 5
_TRANSIENT = (aiohttp.ClientError, OSError)


class HttpStorage(FsspecStorage):
    """Keys are ``http://`` and ``https://`` URLs. Version of a file: its ETag, or else size and Last-Modified.

    Redirects are followed, from https to https only. Nothing can be listed.
    """

    def get(self, key: str, start: int, stop: int) -> Future[RangeResponse]:
        async def read(reply: aiohttp.ClientResponse) -> RangeResponse:
            content_range = reply.headers.get("Content-Range", "")
            check_range(key, reply.content_length, content_range, start, stop)
            version = _version(reply)
            data = await receive(reply.content, start, stop, self.timeout, version, _TRANSIENT, _classify)
            refuse_incomplete(data, stop - start, reply.headers.get("Content-Encoding", ""))
            return RangeResponse(data, version)

        return self._send(key, start, stop, read)

    def stat(self, key: str) -> ObjectStat:
        """By a range of one byte: servers refuse HEAD for addresses that are signed for GET."""

        async def look(reply: aiohttp.ClientResponse) -> ObjectStat:
            size = _size(reply)
            if size < 0:
                raise RequestError("range", "the server does not say how long the file is", remedy=_NO_SIZE)
            while reply.status == 206 and await reply.content.read(1):  # to its end: the connection is used again
                pass
            return ObjectStat(size, _version(reply))

        return self._send(key, 0, 1, look).result()

    def list(self, prefix: str, each: RequestRunner = run_once) -> Iterator[tuple[str, ObjectStat]]:
        raise ConfigError(
            "a web server has no listing", prefix, remedy="Name the files: https://HOST/{00000..00041}.tar"
        )

    def put(self, key: str, data: bytes | memoryview, each: RequestRunner = run_once) -> str:
        raise ConfigError("a web server stores nothing", key)

    def delete(self, key: str) -> None:
        raise ConfigError("a web server stores nothing", key)

    def _send(
        self, key: str, start: int, stop: int, use: Callable[[aiohttp.ClientResponse], Awaitable[_T]]
    ) -> Future[_T]:
        """Send a ranged request from fsspec's loop; the future has what ``use`` makes of the reply, or an error."""
        require_admitted(key, thing="")
        files = self._files(key)

        async def once() -> _T:
            try:
                files.client_kwargs = {"trust_env": True, "auto_decompress": False} | files.client_kwargs
                session = await files.set_session()
                async with asyncio.timeout(2 * self.timeout):  # until all headers are read
                    reply = await session.get(files.encode_url(key), **self._options(files, start, stop))
            except aiohttp.InvalidURL as error:
                raise ConfigError("this address cannot be used", key) from error
            except aiohttp.TooManyRedirects as error:
                raise RequestError("redirect", "the server redirects again and again", remedy=_REDIRECT) from error
            except _TRANSIENT as error:
                raise _classify(error) from error
            try:
                _refuse(reply)
                return await use(reply)
            finally:
                reply.close()  # a body that was read to its end has released the connection already

        return asyncio.run_coroutine_threadsafe(once(), files.loop)

    def _options(self, files: Any, start: int, stop: int) -> dict[str, Any]:
        options = dict(files.kwargs)
        options["headers"] = {
            **options.get("headers", {}), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity",
        }  # fmt: skip
        options["timeout"] = aiohttp.ClientTimeout(total=None, sock_connect=self.timeout, sock_read=self.timeout)
        options["max_redirects"] = MOST_REDIRECTS
        return options


_NO_SIZE = "Shards need a server that supports ranges (HTTP 206)."
_REDIRECT = "Name the address to which it leads, and check proxies in front of it."


def _refuse(reply: aiohttp.ClientResponse) -> None:
    """Raise RequestError unless a reply has bytes of the file, or says that it is empty, and came over https if asked
    so."""
    way = [str(each.url.scheme) for each in (*reply.history, reply)]
    if "https" in way and "http" in way[way.index("https") :]:
        what = "the server redirects from https to http, which is not followed"
        raise RequestError("redirect", what, remedy=_REDIRECT)
    if reply.status in (200, 206) or (reply.status == 416 and _size(reply) == 0):
        return
    reason = reply.reason or str(reply.status)
    raise by_status(reply.status, scrub(reason))


def _size(reply: aiohttp.ClientResponse) -> int:
    """Size of the file of which a reply has a range; -1 if it is unknown."""
    content_range = reply.headers.get("Content-Range", "")
    if content_range.strip() == "bytes */0":
        return 0
    match = RANGE.match(content_range)
    if match:
        return int(match[3])
    if reply.status == 200 and reply.content_length is not None:
        return reply.content_length
    return -1


def _version(reply: aiohttp.ClientResponse) -> str:
    etag = plain_etag(reply.headers.get("ETag", ""))
    changed = reply.headers.get("Last-Modified", "")
    if etag or not changed:
        return etag
    return f"{_size(reply)}@{changed}"


def _classify(error: BaseException) -> RequestError:
    """The RequestError of one of ``_TRANSIENT``."""
    kind = "connection"
    if isinstance(error, TimeoutError):
        kind = "stall"
    return RequestError(kind, scrub(str(error)) or type(error).__name__)
