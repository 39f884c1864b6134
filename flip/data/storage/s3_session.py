"""The HTTP session of the S3 client, with limits of size and time around every reply.

aiobotocore reads replies that are no streams to their end: errors, listings, replies to uploads. Its time limits are
those of a single read of the socket. A hostile or intercepted endpoint could send a reply without end, or a byte now
and then. Bodies of objects are streams; ``s3.S3Storage`` reads no more of them than it asked for.

aiohttp follows redirects, and sends the session token and the body of the request to the other host. Here a redirect is
an error. botocore repeats a request for a bucket of another region: it takes the name of the region from the reply, the
address from its own table, and signs the request again.
"""

import asyncio
from typing import Any

import aiohttp
from aiobotocore.httpsession import AIOHTTPSession

from flip.data.storage.base import SLOWEST, redirected
from flip.runs.credentials import scrub

REPLY_LIMIT = 1 << 22
"""Largest reply that is no object, bytes. A listing of 1,000 keys of 1,024 bytes, each byte encoded as three, fits."""
_PIECE = 1 << 16
_LONGEST_ADDRESS = 200
"""Characters of the address of a redirect in an error."""


def limited_session(timeout: float) -> type[AIOHTTPSession]:
    """The class of a session for ``AioConfig(http_session_cls=...)``. ``timeout``: seconds to connect, and to wait for
    a byte."""
    return type("LimitedSession", (_LimitedSession,), {"wait": timeout})


class _LimitedSession(AIOHTTPSession):
    """Ends a reply that takes longer than its size allows, or that is too large, and follows no redirect.

    Raises TimeoutError and aiohttp.ClientPayloadError, which ``s3.classify_error`` knows; RequestError for a redirect.
    """

    wait = 0.0

    async def send(self, request: Any) -> Any:
        is_stream = request.stream_output
        request.stream_output = True  # else the session reads the body itself
        sent = len(request.body) if isinstance(request.body, bytes | bytearray) else 0
        async with asyncio.timeout(2 * self.wait + sent / SLOWEST):  # until all headers are read
            response = await super().send(request)
        _refuse_redirect(response)
        if not is_stream or response.status_code >= 300:
            response._content = await self._read_body(response.raw)
        return response

    async def _get_session(self, proxy_url: str | None) -> Any:
        return _DirectSession(await super()._get_session(proxy_url))

    async def _read_body(self, reply: aiohttp.ClientResponse) -> bytes:
        pieces = []
        size = 0
        start = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(self.wait) as limit:
                while piece := await reply.content.read(_PIECE):
                    pieces.append(piece)
                    size += len(piece)
                    if size > REPLY_LIMIT:
                        raise aiohttp.ClientPayloadError(f"the reply has more than {REPLY_LIMIT:,} bytes")
                    limit.reschedule(start + self.wait + size / SLOWEST)
        except BaseException:
            reply.close()
            raise
        return b"".join(pieces)


class _DirectSession:
    """The part of aiohttp.ClientSession that AIOHTTPSession uses, without following redirects."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def request(self, method: str, **options: Any) -> aiohttp.ClientResponse:
        return await self._session.request(method, **options, allow_redirects=False)


def _refuse_redirect(response: Any) -> None:
    """Raise RequestError for a redirect to an address.

    botocore takes status 300 for a success. It handles the others if they name the region of the bucket.
    """
    status = response.status_code
    address = response.headers.get("location", "")
    names_region = "x-amz-bucket-region" in response.headers
    if not 300 <= status < 400:
        return
    if status > 300 and (names_region or not address):
        return
    response.raw.close()
    shown = scrub(address.partition("?")[0][:_LONGEST_ADDRESS]) or "no address"
    raise redirected(f"{status}, the server redirects the request to {shown}; redirects are not followed", "")
