"""Errors of botocore, aiohttp, obstore and S3 servers -> classes of ``retry.TABLE``.

Texts name codes and addresses, no secrets. The modules are imported when the first error is there: whoever reads local
files needs none of them.
"""

from __future__ import annotations

import re

from flip.data.storage.base import Fault
from flip.runs.errors import scrub

_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
_SLOW = {
    "SlowDown", "ServiceUnavailable", "Throttling", "ThrottlingException", "TooManyRequests",
    "RequestLimitExceeded", "BandwidthLimitExceeded",
}  # fmt: skip
_SERVER = {"InternalError", "RequestTimeout"}
_STATUS, _CODE = re.compile(r"status code: (\d{3})"), re.compile(r"<Code>(\w+)</Code>")


def passing() -> tuple[type[BaseException], ...]:
    """What ``fault`` knows: trouble of network, server or credentials."""
    import aiohttp
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError

    return (
        boto.ClientError, boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, ResponseParserError,
        *_no_credentials(), *_stale_credentials(), aiohttp.ClientError, OSError,
    )  # fmt: skip


def lasting() -> tuple[type[BaseException], ...]:
    """Mistakes in an address, a name or a configuration file."""
    from botocore import exceptions as boto

    return (
        boto.ProfileNotFound, boto.ParamValidationError, boto.ConfigParseError, boto.ConfigNotFound,
        boto.ValidationError, boto.MissingParametersError, ValueError,
    )  # fmt: skip


def fault(error: BaseException) -> Fault:
    """The class of one of ``passing``."""
    from botocore.exceptions import ClientError, ConnectTimeoutError, ReadTimeoutError
    from botocore.parsers import ResponseParserError

    if isinstance(error, ClientError):
        return _answer(error)
    text = scrub(str(error)) or type(error).__name__
    if isinstance(error, _no_credentials()):
        return Fault("denied", text)
    if isinstance(error, _stale_credentials()):
        return Fault("expired", text)
    if isinstance(error, ReadTimeoutError | ConnectTimeoutError | TimeoutError):
        return Fault("stall", text)
    return Fault("server" if isinstance(error, ResponseParserError) else "connection", text)


def told(error: BaseException) -> Fault:
    """The class of an error of obstore, by its text: it tells no more."""
    text = scrub(str(error).split("\n\nDebug source", 1)[0])
    status, code = _STATUS.search(text), _CODE.search(text)
    if status:
        return _by_code(int(status[1]), code[1] if code else status[1])
    return Fault("stall" if "kind: Timeout" in str(error) else "connection", text)


def _answer(error: object) -> Fault:
    reply = getattr(error, "response", {})
    status = reply.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return _by_code(status, reply.get("Error", {}).get("Code", ""))


def _by_code(status: int, code: str) -> Fault:
    """An answer that is an error, by its code, else by its status: HEAD and proxies send no code."""
    text = f"{status} {code}" if code != str(status) else code
    if code in _EXPIRED:
        return Fault("expired", text)
    if code in _SLOW or status in (429, 503):
        return Fault("slowdown", text)
    if code in _SERVER or status == 408 or (status >= 500 and status != 501):
        return Fault("server", text)
    if status == 404:
        return Fault("missing", text)
    if status in (412, 416):
        return Fault("changed", text)
    return Fault("denied" if status in (401, 403) else "refused", text)


def _no_credentials() -> tuple[type[BaseException], ...]:
    from botocore import exceptions as boto

    return boto.NoCredentialsError, boto.PartialCredentialsError, boto.NoAuthTokenError


def _stale_credentials() -> tuple[type[BaseException], ...]:
    from botocore import exceptions as boto

    return boto.CredentialRetrievalError, boto.MetadataRetrievalError, boto.TokenRetrievalError, boto.SSOError
