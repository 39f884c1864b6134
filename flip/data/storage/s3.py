"""Object storage behind a reader, over s3fs: one signed request per call, told as it went.

Address and credentials come from where botocore looks for them (AWS_ENDPOINT_URL, AWS_PROFILE, AWS_ACCESS_KEY_ID, ...,
~/.aws, the machine's role) and from fsspec's own settings (FSSPEC_S3_ANON=true for public buckets); expired ones are
refreshed there. Retries of s3fs and botocore are off: ours know the deadline, the shard and its checksum.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from flip.data.storage.base import ObjectStat, RangeResponse, RequestError, RequestRunner, ends_early, run_once
from flip.runs.errors import ConfigError, scrub

_PIECE = 1 << 20
SLOWEST = 1 << 16
"""Bytes per second below which a body that trickles counts as stalled."""
PART, PARTS_AT_ONCE = 1 << 26, 4
"""Bytes of a part of an upload; S3 takes 10,000 of them."""
_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})")


class S3Storage:
    """Keys are ``s3://bucket/path``. The client is made at the first call, in the process that makes the call."""

    def __init__(self, timeout: float = 15.0) -> None:
        self.timeout = timeout
        self._lock = threading.Lock()
        self._files: Any = None
        self._owner = 0

    def get(self, key: str, start: int, stop: int) -> Future[RangeResponse]:
        return self._send(key, lambda client: self._get(client, key, start, stop))

    def stat(self, key: str) -> ObjectStat:
        bucket, path = split(key)
        reply = self._run(key, lambda client: client.head_object(Bucket=bucket, Key=path))
        return ObjectStat(reply["ContentLength"], _etag(reply))

    def parts(self, key: str, stat: ObjectStat) -> list[int]:
        bucket, path = split(key)
        sizes = list[int]()
        while True:
            place = {"Bucket": bucket, "Key": path, "PartNumber": len(sizes) + 1}
            try:
                reply = self._run(key, lambda client, at=place: client.head_object(**at))  # type: ignore[misc]
            except RequestError as fault:
                if fault.kind != "refused":
                    raise
                return []
            if "PartsCount" not in reply:  # the server passes over the number
                return []
            sizes.append(reply["ContentLength"])
            if len(sizes) >= reply["PartsCount"]:
                return sizes if sum(sizes) == stat.size else []

    def list(self, prefix: str, each: RequestRunner = run_once) -> Iterator[tuple[str, ObjectStat]]:
        bucket, path = split(prefix)
        page: dict[str, Any] = {}
        while not page or page.get("NextContinuationToken"):
            ask = partial(_page, bucket=bucket, prefix=path, before=page)
            page = each(lambda: self._run(prefix, ask))  # noqa: B023
            for entry in page.get("Contents", ()):
                yield f"s3://{bucket}/{entry['Key']}", ObjectStat(entry["Size"], _etag(entry))

    def put(self, key: str, data: bytes | memoryview, each: RequestRunner = run_once) -> str:
        """Make an object of these bytes and return its ETag. More than ``PART`` go in parts; none is seen before all.

        ``each`` makes every single request, and may make it again.
        """
        view = memoryview(data).cast("B")
        if len(view) <= PART:
            return _etag(each(lambda: self._body(key, "put_object", view)))
        upload = each(lambda: self._named(key, "create_multipart_upload"))["UploadId"]

        def part(number: int) -> dict[str, Any]:
            piece = view[(number - 1) * PART : number * PART]
            reply = each(lambda: self._body(key, "upload_part", piece, UploadId=upload, PartNumber=number))
            return {"ETag": reply["ETag"], "PartNumber": number}

        try:
            with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
                parts = list(pool.map(part, range(1, -(-len(view) // PART) + 1)))
            return self._complete(key, upload, parts, len(view), each)
        except BaseException:
            with contextlib.suppress(RequestError):  # what is left of it cannot be seen, but is paid for
                self._named(key, "abort_multipart_upload", UploadId=upload)
            raise

    def _complete(self, key: str, upload: str, parts: Sequence[dict[str, Any]], size: int, each: RequestRunner) -> str:
        """Put the parts together, once: after a reply that was lost, an upload that is gone may be an object that is
        there. Returns its ETag.
        """
        asked = 0

        def complete() -> str:
            nonlocal asked
            asked += 1
            try:
                whole = {"UploadId": upload, "MultipartUpload": {"Parts": parts}}
                return _etag(self._named(key, "complete_multipart_upload", **whole))
            except RequestError as fault:
                if fault.kind != "missing" or asked == 1:
                    raise
                found = self.stat(key)
                if found.size != size or found.etag != _etag_of(parts):
                    raise
                return found.etag

        return each(complete)  # type: ignore[no-any-return]

    def delete(self, key: str) -> None:
        """One request; an object that is not there is no fault."""
        try:
            self._named(key, "delete_object")
        except RequestError as fault:
            if fault.kind != "missing":
                raise

    def reconnect(self) -> None:
        with self._lock:
            self._files = None

    def _named(self, key: str, method: str, **more: Any) -> Any:
        bucket, path = split(key)
        return self._run(key, lambda client: getattr(client, method)(Bucket=bucket, Key=path, **more))

    def _body(self, key: str, method: str, view: memoryview, **more: Any) -> Any:
        """Send bytes with their MD5: what the server took is what was sent, or it refuses."""
        (bucket, path), body = split(key), bytes(view)
        digest = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()

        async def send(client: Any) -> Any:
            async with asyncio.timeout(self.timeout + len(body) / SLOWEST):
                send = getattr(client, method)
                return await send(Bucket=bucket, Key=path, Body=body, ContentMD5=digest, **more)

        return self._run(key, send)

    async def _get(self, client: Any, key: str, start: int, stop: int) -> RangeResponse:
        """Body and ETag are of one reply: two requests could see two objects."""
        bucket, path = split(key)
        reply = await client.get_object(Bucket=bucket, Key=path, Range=f"bytes={start}-{stop - 1}")
        etag, body = _etag(reply), reply["Body"]
        pieces: list[bytes] = []
        try:
            _check(key, reply, start, stop)
            async with asyncio.timeout(self.timeout + (stop - start) / SLOWEST):
                while piece := await body.read(_PIECE):
                    pieces.append(piece)
        except transient_errors() as error:  # what came until here need not be asked for again
            fault = classify_error(error)
            raise RequestError(fault.kind, str(fault), b"".join(pieces), etag) from error
        finally:
            body.close()
        data = b"".join(pieces)
        if len(data) != stop - start:
            raise RequestError("short", f"{len(data)} bytes came of {stop - start}, announced as complete")
        return RangeResponse(data, etag)

    def _run(self, key: str, request: Callable[[Any], Awaitable[Any]]) -> Any:
        """Send one request, wait for its answer. Raises Fault, ConfigError."""
        return self._send(key, request).result()

    def _send(self, key: str, request: Callable[[Any], Awaitable[Any]]) -> Future[Any]:
        """Send one request from fsspec's loop: its answer, Fault, or ConfigError."""
        files = self._client()

        async def once() -> Any:
            try:
                # The client itself, not ``call_s3``: that one repeats, and its errors have lost their status.
                await files.set_session()
                return await request(await files.get_s3(split(key)[0]))
            except transient_errors() as error:
                raise classify_error(error) from error
            except RuntimeError as error:
                if "still expired" not in str(error):
                    raise
                raise RequestError(
                    "expired", str(error)
                ) from error  # botocore's: those that the provider handed out just now
            except permanent_errors() as error:
                remedy = "Check AWS_ENDPOINT_URL, AWS_REGION, AWS_PROFILE and ~/.aws, and the name of the bucket."
                raise ConfigError(f"object storage cannot be addressed: {error}", key, remedy=remedy) from error

        return asyncio.run_coroutine_threadsafe(once(), files.loop)

    def _client(self) -> Any:
        """s3fs, made here and now unless this process has it: after a fork it would hang or fail."""
        with self._lock:
            if self._files is None or self._owner != os.getpid():
                import s3fs

                settings = {
                    "retries": {"total_max_attempts": 1, "mode": "standard"},
                    "read_timeout": self.timeout,
                    "connect_timeout": self.timeout,
                    "max_pool_connections": 64,
                    # Ranges have no checksum of their own, and not every server knows the header.
                    "response_checksum_validation": "when_required",
                    "request_checksum_calculation": "when_required",
                }
                self._files = s3fs.S3FileSystem(skip_instance_cache=True, config_kwargs=settings)
                self._owner = os.getpid()
            return self._files


def split(key: str) -> tuple[str, str]:
    """Bucket and path of ``s3://bucket/path``."""
    bucket, _, path = key.removeprefix("s3://").partition("/")
    return bucket, path


def _etag(reply: dict[str, Any]) -> str:
    return reply.get("ETag", "").strip('"')


def _etag_of(parts: Sequence[dict[str, Any]]) -> str:
    """Of an object that was put together of parts: the MD5 of their MD5s, as all S3 servers have it."""
    sums = b"".join(bytes.fromhex(_etag(part)) for part in parts)
    return f"{hashlib.md5(sums, usedforsecurity=False).hexdigest()}-{len(parts)}"


async def _page(client: Any, bucket: str, prefix: str, before: dict[str, Any]) -> Any:
    token = before.get("NextContinuationToken")
    more = {"ContinuationToken": token} if token else {}
    return await client.list_objects_v2(Bucket=bucket, Prefix=prefix, **more)


def _check(key: str, reply: dict[str, Any], start: int, stop: int) -> None:
    """Whether the reply's head promises what was asked for. Raises DataError where the object ends before."""
    length = reply.get("ContentLength", 0)  # none is told of a body in chunks
    found = _RANGE.match(reply.get("ContentRange") or f"bytes 0-{length - 1}/{length}")
    first, last, size = map(int, found.groups()) if found else (-1, -1, stop)
    if size < stop:
        raise ends_early(key, size, stop)
    if (first, last) != (start, stop - 1) or length > stop - start:
        raise RequestError("short", f"bytes {first}-{last} came for {start}-{stop - 1}")


_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
_SLOW = {
    "SlowDown", "ServiceUnavailable", "Throttling", "ThrottlingException", "TooManyRequests",
    "RequestLimitExceeded", "BandwidthLimitExceeded",
}  # fmt: skip
_SERVER = {"InternalError", "RequestTimeout"}
_STATUS, _CODE = re.compile(r"status code: (\d{3})"), re.compile(r"<Code>(\w+)</Code>")


def transient_errors() -> tuple[type[BaseException], ...]:
    """What ``classify_error`` knows: trouble of network, server or credentials."""
    import aiohttp
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError

    return (
        boto.ClientError, boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, ResponseParserError,
        *_no_credentials(), *_stale_credentials(), aiohttp.ClientError, OSError,
    )  # fmt: skip


def permanent_errors() -> tuple[type[BaseException], ...]:
    """Mistakes in an address, a name or a configuration file."""
    from botocore import exceptions as boto

    return (
        boto.ProfileNotFound, boto.ParamValidationError, boto.ConfigParseError, boto.ConfigNotFound,
        boto.ValidationError, boto.MissingParametersError, ValueError,
    )  # fmt: skip


def classify_error(error: BaseException) -> RequestError:
    """The class of one of ``transient_errors``."""
    from botocore.exceptions import ClientError, ConnectTimeoutError, ReadTimeoutError
    from botocore.parsers import ResponseParserError

    if isinstance(error, ClientError):
        return _answer(error)
    text = scrub(str(error)) or type(error).__name__
    if isinstance(error, _no_credentials()):
        return RequestError("denied", text)
    if isinstance(error, _stale_credentials()):
        return RequestError("expired", text)
    if isinstance(error, ReadTimeoutError | ConnectTimeoutError | TimeoutError):
        return RequestError("stall", text)
    return RequestError("server" if isinstance(error, ResponseParserError) else "connection", text)


def classify_obstore_error(error: BaseException) -> RequestError:
    """The class of an error of obstore, by its text: it tells no more."""
    text = scrub(str(error).split("\n\nDebug source", 1)[0])
    status, code = _STATUS.search(text), _CODE.search(text)
    if status:
        return _by_code(int(status[1]), code[1] if code else status[1])
    return RequestError("stall" if "kind: Timeout" in str(error) else "connection", text)


def _answer(error: object) -> RequestError:
    reply = getattr(error, "response", {})
    status = reply.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return _by_code(status, reply.get("Error", {}).get("Code", ""))


def _by_code(status: int, code: str) -> RequestError:
    """An answer that is an error, by its code, else by its status: HEAD and proxies send no code."""
    text = f"{status} {code}" if code != str(status) else code
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
    return RequestError("denied" if status in (401, 403) else "refused", text)


def _no_credentials() -> tuple[type[BaseException], ...]:
    from botocore import exceptions as boto

    return boto.NoCredentialsError, boto.PartialCredentialsError, boto.NoAuthTokenError


def _stale_credentials() -> tuple[type[BaseException], ...]:
    from botocore import exceptions as boto

    return boto.CredentialRetrievalError, boto.MetadataRetrievalError, boto.TokenRetrievalError, boto.SSOError
