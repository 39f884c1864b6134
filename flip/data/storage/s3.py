"""Object storage over s3fs: one signed request per call, with errors classified for ``retry.py``.

Address and credentials come from the usual places of botocore (AWS_ENDPOINT_URL, AWS_PROFILE, AWS_ACCESS_KEY_ID, ...,
~/.aws, the machine's role) and from fsspec's settings (FSSPEC_S3_ANON=true for public buckets); botocore refreshes
expired credentials. Retries of s3fs and botocore are off: only ``RetryState`` knows the deadline, the shard and its
checksum.
"""

import asyncio
import base64
import contextlib
import hashlib
import os
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from functools import cache
from itertools import chain
from typing import Any

from flip.data.storage.base import (
    SLOWEST,
    ObjectStat,
    RangeResponse,
    RequestError,
    RequestRunner,
    plain_etag,
    redirected,
    run_once,
)
from flip.data.storage.checksums import etag_of_parts
from flip.data.storage.ranges import by_status, check_range, range_ignored, receive, refuse_incomplete
from flip.runs.credentials import scrub
from flip.runs.errors import ConfigError, DataError

WRONG_CLOCK = 600
"""Seconds between the clocks of this machine and of the storage that explain a denied request."""
MOST_PARTS = 10_000
"""Parts of an object, by S3's limit."""
MOST_LISTED = 5_000_000
MOST_PAGES = 50_000
"""Largest listing that is read: objects and pages. S3 gives 1,000 objects a page."""
PART = 1 << 26
PARTS_AT_ONCE = 4
"""Bytes of a part of an upload, and parts that are sent at the same time."""
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")


class S3Storage:
    """Keys are ``s3://bucket/path``. The client is created at the first call, in the calling process."""

    def __init__(self, timeout: float = 15.0) -> None:
        self.timeout = timeout
        self._lock = threading.Lock()
        self._files: Any = None
        self._owner = 0
        self._served = False
        """Whether a request has succeeded: address, profile and configuration files were right."""

    def get(self, key: str, start: int, stop: int) -> Future[RangeResponse]:
        return self._send(key, lambda client: self._get(client, key, start, stop))

    def stat(self, key: str) -> ObjectStat:
        reply = self._call(key, "head_object")
        return ObjectStat(reply["ContentLength"], _etag(reply))

    def parts(self, key: str, stat: ObjectStat) -> list[int]:
        sizes = list[int]()
        while True:
            try:
                reply = self._call(key, "head_object", PartNumber=len(sizes) + 1)
            except RequestError as error:
                if error.kind not in ("refused", "denied"):
                    raise
                return []
            if "PartsCount" not in reply:  # the server ignores PartNumber
                return []
            size = reply["ContentLength"]
            count = reply["PartsCount"]
            if not (0 < count <= MOST_PARTS and 0 < size <= stat.size):  # no reply of S3
                return []
            rest = stat.size - size * (count - 1)
            if not sizes and 0 < rest <= size:  # nearly always all but the last are equal: no request for each
                return [size] * (count - 1) + [rest]
            sizes.append(size)
            if len(sizes) >= count:
                if sum(sizes) == stat.size:
                    return sizes
                return []

    def list(self, prefix: str, each: RequestRunner = run_once) -> Iterator[tuple[str, ObjectStat]]:
        bucket = split(prefix)[0]
        tokens: list[str] = [""]
        listed = 0
        while len(tokens) <= MOST_PAGES:
            page = each(lambda: self._page(prefix, tokens))
            entries = page.get("Contents", ())
            listed += len(entries)
            if listed > MOST_LISTED:
                break
            for entry in entries:
                yield f"s3://{bucket}/{entry['Key']}", ObjectStat(entry["Size"], _etag(entry))
            if not page.get("NextContinuationToken"):
                return
            tokens.append(page["NextContinuationToken"])
        what = f"the listing has more than {MOST_LISTED:,} objects or {MOST_PAGES:,} pages"
        raise DataError(what, prefix, remedy="Name a longer prefix, or check AWS_ENDPOINT_URL.")

    def _page(self, prefix: str, tokens: Sequence[str]) -> Any:
        """The page of a listing at the last of the continuation tokens.

        Raises RequestError if it names one of them again: the listing would have no end.
        """
        bucket, path = split(prefix)
        options = {"Bucket": bucket, "Prefix": path}
        if tokens[-1]:
            options["ContinuationToken"] = tokens[-1]
        page = self._send(prefix, lambda client: client.list_objects_v2(**options)).result()
        if page.get("NextContinuationToken") in tokens:
            raise RequestError("server", "the listing repeats a continuation token")
        return page

    def put(self, key: str, data: bytes | memoryview, each: RequestRunner = run_once) -> str:
        """Create an object and return its ETag. More than ``PART`` bytes are uploaded in parts.

        The object appears when all bytes are stored. ``each`` makes every single request and may repeat it.
        """
        view = memoryview(data).cast("B")
        if len(view) <= PART:
            return _etag(each(lambda: self._call_with_body(key, "put_object", view)))
        upload = each(lambda: self._call(key, "create_multipart_upload"))["UploadId"]

        def part(number: int) -> dict[str, Any]:
            piece = view[(number - 1) * PART : number * PART]
            reply = each(lambda: self._call_with_body(key, "upload_part", piece, UploadId=upload, PartNumber=number))
            return {"ETag": reply["ETag"], "PartNumber": number}

        try:
            with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
                parts = list(pool.map(part, range(1, -(-len(view) // PART) + 1)))
            return self._complete(key, upload, parts, len(view), each)
        except BaseException:
            with contextlib.suppress(RequestError):  # unfinished uploads are invisible, but cost money
                self._call(key, "abort_multipart_upload", UploadId=upload)
            raise

    def _complete(self, key: str, upload: str, parts: Sequence[dict[str, Any]], size: int, each: RequestRunner) -> str:
        """Complete an upload and return the object's ETag.

        If the reply to the first request was lost, the second one fails although the object exists; it is then
        compared.
        """
        requests = 0

        def complete() -> str:
            nonlocal requests
            requests += 1
            try:
                upload_parts = {"Parts": parts}
                return _etag(
                    self._call(key, "complete_multipart_upload", UploadId=upload, MultipartUpload=upload_parts)
                )
            except RequestError as error:
                if error.kind != "missing" or requests == 1:
                    raise
                stat = self.stat(key)
                if stat.size != size or stat.etag != etag_of_parts([bytes.fromhex(_etag(part)) for part in parts]):
                    raise
                return stat.etag

        return each(complete)  # type: ignore[no-any-return]

    def delete(self, key: str) -> None:
        """Delete an object in one request; it may be missing."""
        try:
            self._call(key, "delete_object")
        except RequestError as error:
            if error.kind != "missing":
                raise

    def reconnect(self) -> None:
        with self._lock:
            self._files = None

    def _call(self, key: str, method: str, **more: Any) -> Any:
        """The reply to one request for an object. Raises RequestError, ConfigError."""
        bucket, path = split(key)
        return self._send(key, lambda client: getattr(client, method)(Bucket=bucket, Key=path, **more)).result()

    def _call_with_body(self, key: str, method: str, view: memoryview, **more: Any) -> Any:
        """Send bytes with their MD5, which the server compares with what it received."""
        bucket, path = split(key)
        body = bytes(view)
        digest = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()

        async def send(client: Any) -> Any:
            async with asyncio.timeout(self.timeout + len(body) / SLOWEST):
                return await getattr(client, method)(Bucket=bucket, Key=path, Body=body, ContentMD5=digest, **more)

        return self._send(key, send).result()

    async def _get(self, client: Any, key: str, start: int, stop: int) -> RangeResponse:
        """Body and ETag come from the same reply: two requests could see two objects."""
        bucket, path = split(key)
        reply = await client.get_object(Bucket=bucket, Key=path, Range=f"bytes={start}-{stop - 1}")
        etag = _etag(reply)
        body = reply["Body"]
        try:
            check_range(key, reply.get("ContentLength"), reply.get("ContentRange") or "", start, stop)
            data = await receive(body, start, stop, self.timeout, etag, transient_errors(), classify_error)
        finally:
            body.close()
        refuse_incomplete(data, stop - start, reply.get("ContentEncoding") or "")
        return RangeResponse(data, etag)

    def _send(self, key: str, request: Callable[[Any], Awaitable[Any]]) -> Future[Any]:
        """Send one request from fsspec's loop; the future has its reply, RequestError or ConfigError."""
        from botocore.exceptions import ParamValidationError

        files = self._client()

        async def once() -> Any:
            try:
                # The client itself, not ``call_s3``, which retries and loses the status of errors.
                await files.set_session()
                reply = await request(await files.get_s3(split(key)[0]))
                self._served = True
                return reply
            except transient_errors() as error:
                raise classify_error(error) from error
            except RecursionError as error:  # botocore asks for the region again and again if the server names none
                raise redirected("the server redirects the request and names no region", "") from error
            except RuntimeError as error:
                if "still expired" not in str(error):
                    raise
                raise RequestError("expired", str(error)) from error  # raised by botocore for new credentials
            except permanent_errors() as error:
                if self._served and not isinstance(error, ParamValidationError):
                    # These settings worked: a file of ~/.aws is being rewritten, or a credential process failed once.
                    raise RequestError("expired", scrub(str(error))) from error
                remedy = "Check AWS_ENDPOINT_URL, AWS_REGION, AWS_PROFILE and ~/.aws, and the name of the bucket."
                raise ConfigError(f"object storage cannot be addressed: {error}", key, remedy=remedy) from error

        return asyncio.run_coroutine_threadsafe(once(), files.loop)

    def _client(self) -> Any:
        """The s3fs file system of this process; after a fork, the parent's would hang or fail."""
        with self._lock:
            if self._files is None or self._owner != os.getpid():
                import s3fs

                from flip.data.storage.s3_session import limited_session

                settings = {
                    "http_session_cls": limited_session(self.timeout),
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
    return plain_etag(reply.get("ETag", ""))


# -- errors; texts name codes and addresses, no secrets ----------------------------------------------------------------


@cache
def _errors_by_kind() -> dict[str, tuple[type[BaseException], ...]]:
    """Kind of error -> its exceptions; the first match counts. Imported late: local files need none of these."""
    import aiohttp
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError

    stale = (
        boto.CredentialRetrievalError, boto.MetadataRetrievalError, boto.TokenRetrievalError, boto.SSOError,
        boto.RefreshWithMFAUnsupportedError, *([boto.LoginError] if hasattr(boto, "LoginError") else []),
    )  # fmt: skip
    connection = boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, aiohttp.ClientError, OSError
    return {
        "denied": (boto.NoCredentialsError, boto.PartialCredentialsError, boto.NoAuthTokenError),
        "expired": stale,
        "stall": (boto.ReadTimeoutError, boto.ConnectTimeoutError, TimeoutError),
        "server": (ResponseParserError,),
        "connection": connection,
    }


def transient_errors() -> tuple[type[BaseException], ...]:
    """Errors of network, server or credentials, known to ``classify_error``."""
    from botocore.exceptions import ClientError

    return ClientError, *chain(*_errors_by_kind().values())


def permanent_errors() -> tuple[type[BaseException], ...]:
    """Errors in an address, a name or a configuration file: all others of botocore."""
    from botocore.exceptions import BotoCoreError

    return BotoCoreError, ValueError


def classify_error(error: BaseException) -> RequestError:
    """The RequestError of one of ``transient_errors``."""
    from botocore.exceptions import ClientError

    if isinstance(error, ClientError):
        about = error.response.get("Error", {})
        answer = error.response.get("ResponseMetadata", {})
        headers = answer.get("HTTPHeaders", {})
        region = headers.get("x-amz-bucket-region") or about.get("Region", "")
        failed = by_status(answer.get("HTTPStatusCode", 0), about.get("Code", ""), region)
        if failed.kind == "denied":
            return _denied_or_wrong_clock(failed, headers.get("date", ""))
        return failed
    kind = next(kind for kind, classes in _errors_by_kind().items() if isinstance(error, classes))
    return RequestError(kind, scrub(str(error)) or type(error).__name__)


def _denied_or_wrong_clock(failed: RequestError, date: str) -> RequestError:
    """The error of a denied request, or that of a wrong clock, which passes once the clock is set.

    S3 refuses requests whose time stamp differs from its own time by more than 15 minutes, with RequestTimeTooSkewed
    (https://docs.aws.amazon.com/AmazonS3/latest/API/RESTAuthentication.html). The reply to a HEAD has no body, and so
    no code (https://docs.aws.amazon.com/AmazonS3/latest/API/API_HeadObject.html): only its ``Date`` shows the cause.
    """
    try:
        ahead = time.time() - parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError, OverflowError):  # without a date, or with an invalid one
        return failed
    if abs(ahead) < WRONG_CLOCK:
        return failed
    direction = "ahead of" if ahead > 0 else "behind"
    clock = f"the clock of this machine is {abs(ahead):,.0f} s {direction} that of the storage: set it"
    return RequestError("expired", f"{failed}; {clock}")


def classify_obstore_error(error: BaseException) -> RequestError:
    """The RequestError of an error of obstore, which has nothing but a text."""
    text = scrub(str(error).split("\n\nDebug source", 1)[0])
    status = _STATUS.search(text)
    code = _CODE.search(text)
    if status:
        return by_status(int(status[1]), code[1] if code else status[1])
    if "redirect" in text.lower():
        return redirected(text, "")
    if "range" in text.lower():  # it compares the range itself
        return range_ignored(text)
    return RequestError("stall" if "kind: Timeout" in str(error) else "connection", text)
