"""Replies to ranged requests: their headers, bodies and errors. S3 and web servers answer in the same way."""

import asyncio
import re
from collections.abc import Callable
from typing import Any

from flip.data.storage.base import SLOWEST, RequestError, ends_early, redirected

_PIECE = 1 << 20
RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})")

# Error codes of S3 and compatible servers, by kind (``retry.ACTION_BY_KIND``).
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired", "RequestTimeTooSkewed"}
_SLOW = {
    "SlowDown", "ServiceUnavailable", "Throttling", "ThrottlingException", "TooManyRequests",
    "RequestLimitExceeded", "BandwidthLimitExceeded",
}  # fmt: skip
_SERVER = {"InternalError", "RequestTimeout"}
_REDIRECT = {
    "PermanentRedirect", "TemporaryRedirect", "Redirect", "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
}  # fmt: skip


def check_range(key: str, length: int | None, content_range: str, start: int, stop: int) -> None:
    """Check the headers of a reply to bytes [start, stop): its length, if there is one, and its range, "" if not.

    Raises DataError if the object ends before the range, RequestError if the response has another range.
    """
    if length == 0 and not content_range:
        what = f"an empty reply without a range came for bytes {start}-{stop - 1}"
        raise RequestError("short", what, remedy="Check AWS_ENDPOINT_URL and proxies in front of it.")
    length = length or 0  # chunked bodies have none
    if start and not content_range:
        raise range_ignored(f"the response to bytes {start}-{stop - 1} is the object from its first byte")
    match = RANGE.match(content_range or f"bytes 0-{length - 1}/{length}")
    if match:
        first, last, size = map(int, match.groups())
    else:
        first = -1
        last = -1
        size = stop
    if match and first != start:
        raise range_ignored(f"bytes {first}-{last} came for {start}-{stop - 1}")
    if size < stop:
        raise ends_early(key, size, stop)
    if (first, last) != (start, stop - 1) or length > stop - start:
        raise RequestError("short", f"bytes {first}-{last} came for {start}-{stop - 1}")


async def receive(
    body: Any, start: int, stop: int, timeout: float, etag: str, transient: tuple[type[BaseException], ...],
    classify: Callable[[BaseException], RequestError],
) -> bytes:  # fmt: skip
    """Read a body to its end, within a time for its size. ``transient``: errors of the client, for ``classify``.

    Raises RequestError with the bytes that came before an error: they need not be requested again.
    """
    pieces: list[bytes] = []
    left = stop - start
    try:
        async with asyncio.timeout(timeout + left / SLOWEST):
            while piece := await body.read(min(_PIECE, left + 1)):  # one more byte shows that it does not end
                pieces.append(piece[:left])
                left -= len(piece)
                if left < 0:
                    raise RequestError("short", f"more than the {stop - start} bytes of the range came")
    except transient as error:
        failed = classify(error)
        raise RequestError(failed.kind, str(failed), b"".join(pieces), etag, failed.remedy) from error
    return b"".join(pieces)


def refuse_incomplete(data: bytes, asked: int, encoding: str) -> None:
    """Raise RequestError unless a body that ended without an error has the bytes asked for."""
    if len(data) == asked:
        return
    if encoding:
        raise _compressed(encoding, len(data), asked)
    raise RequestError("short", f"{len(data)} bytes came of {asked}, announced as complete")


def range_ignored(text: str) -> RequestError:
    """The error of a server that does not return the requested range. It says nothing about the shard."""
    remedy = "Reads need a server that supports ranges (HTTP 206): check AWS_ENDPOINT_URL and proxies in front of it."
    return RequestError("range", f"the server ignores the start of a range: {text}", remedy=remedy)


def _compressed(encoding: str, received: int, asked: int) -> RequestError:
    """The error of a range whose bytes were compressed on their way: of an object that is stored so, they would fit."""
    text = f"{received} bytes came of {asked}, compressed on their way (content-encoding: {encoding})"
    remedy = "A proxy in front of the storage compresses replies: switch that off, or pass it by (NO_PROXY)."
    return RequestError("range", text, remedy=remedy)


def by_status(status: int, code: str, region: str = "") -> RequestError:
    """The RequestError of an error response, by its code or else its status: HEAD and proxies send no code."""
    text = f"{status} {code}" if code != str(status) else code
    if 300 <= status < 400 or code in _REDIRECT:
        return redirected(text, region)
    if code in _EXPIRED:
        return RequestError("expired", text)
    if code in _SLOW or status in (429, 503):
        return RequestError("slowdown", text)
    if code in _SERVER or status == 408 or (status >= 500 and status != 501):
        return RequestError("server", text)
    if status == 404:
        return RequestError("missing", text)
    if status in (412, 416):
        return RequestError("changed", text)
    without_body = status == 400 and code in ("", "400")  # HEAD has no body: an expired token looks like this
    return RequestError("denied" if status in (401, 403) or without_body else "refused", text)
