"""Ranges over obstore (``data.client: obstore``), which needs less CPU time per byte than s3fs.

Sizes, listings, address and credentials come from s3fs, so that both clients use the same bucket. obstore hangs after a
fork, also in the child; loader processes come from the fork server, which has read nothing.
"""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

from flip.data.storage.base import SLOWEST, RangeResponse, RequestError, ends_early, plain_etag
from flip.data.storage.s3 import S3Storage, classify_obstore_error, split
from flip.runs.errors import ConfigError

_PIECE = 1 << 20
_UNCLEAR = ("connection", "range", "short")
"""Kinds of errors of obstore that may have another cause."""
_CREDENTIALS_LIFETIME = timedelta(minutes=6)
"""obstore requests new credentials five minutes before they expire: after one minute here."""


class ObstoreStorage(S3Storage):
    """``S3Storage`` whose ranges are read by obstore."""

    def __init__(self, timeout: float = 15.0) -> None:
        super().__init__(timeout)
        self._stores: dict[str, Any] = {}
        """Bucket -> store."""
        self._has_read = False

    def reconnect(self) -> None:
        super().reconnect()
        self._stores = {}

    async def _get(self, client: Any, key: str, start: int, stop: int) -> RangeResponse:
        """As ``S3Storage._get``, which repeats a request that fails before any has succeeded.

        obstore follows redirects, to a login page for example, and hides headers of its replies.
        """
        try:
            response = await self._get_range(client, key, start, stop)
        except RequestError as error:
            if self._has_read or error.kind not in _UNCLEAR:
                raise
            return await super()._get(client, key, start, stop)
        self._has_read = True
        return response

    async def _get_range(self, client: Any, key: str, start: int, stop: int) -> RangeResponse:
        bucket, path = split(key)
        obstore = _import_obstore()
        store = self._stores.get(bucket)
        if store is None:
            store = self._stores[bucket] = await self._store(client, bucket)
        pieces = list[memoryview]()
        etag = ""
        try:
            async with asyncio.timeout(self.timeout + (stop - start) / SLOWEST):
                reply = await obstore.get_async(store, path, options={"range": (start, stop)})
                etag = plain_etag(reply.meta["e_tag"] or "")
                if reply.meta["size"] < stop:
                    raise ends_early(key, reply.meta["size"], stop)
                received = 0
                async for piece in reply.stream(min_chunk_size=_PIECE):
                    pieces.append(memoryview(piece))
                    received += len(pieces[-1])
                    if received > stop - start:
                        raise RequestError("short", f"more than the {stop - start} bytes of the range came")
        except TimeoutError as error:
            raise RequestError("stall", str(error), b"".join(pieces), etag) from error
        except (obstore.exceptions.BaseError, OSError) as error:  # its own error for a missing key is an OSError
            failed = classify_obstore_error(error)
            raise RequestError(failed.kind, str(failed), b"".join(pieces), etag, failed.remedy) from error
        data = b"".join(pieces)
        if len(data) != stop - start:
            raise RequestError("short", f"{len(data)} bytes came of {stop - start}, announced as complete")
        return RangeResponse(data, etag)

    async def _store(self, client: Any, bucket: str) -> Any:
        """A store with the address and credentials of ``client``. Raises NoCredentialsError if there are none."""
        from obstore.store import S3Store

        files = self._client()
        wait = f"{self.timeout:g}s"
        await files.set_session()

        async def credentials() -> dict[str, Any]:
            from botocore.exceptions import NoCredentialsError

            provided = await files.session.get_credentials()
            if provided is None:
                raise NoCredentialsError
            frozen = await provided.get_frozen_credentials()
            return {
                "access_key_id": frozen.access_key,
                "secret_access_key": frozen.secret_key,
                "token": frozen.token,
                "expires_at": datetime.now(UTC) + _CREDENTIALS_LIFETIME,
            }

        if not files.anon:
            await credentials()
        return S3Store(
            bucket,
            endpoint=client.meta.endpoint_url,
            region=client.meta.region_name,
            virtual_hosted_style_request=False,
            client_options={
                "allow_http": True, "timeout": "86400s", "read_timeout": wait, "connect_timeout": wait,
            },
            retry_config={"max_retries": 0},
            **({"skip_signature": True} if files.anon else {"credential_provider": credentials}),
        )  # fmt: skip


def _import_obstore() -> Any:
    try:
        import obstore
    except ModuleNotFoundError as error:
        remedy = "Install it: pip install obstore"
        raise ConfigError("obstore is not installed", "data.client", "obstore", remedy) from error
    return obstore
