"""Ranges over obstore (``data.client: obstore``): less work for the processor per byte than s3fs, one package more.

Sizes and listings stay with s3fs, and so do address and credentials: both clients see the same bucket. obstore hangs
after a fork, in the child too; loader processes come from the fork server, which has read nothing.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

from flip.data.storage.base import RangeResponse, RequestError, ends_early
from flip.data.storage.s3 import SLOWEST, S3Storage, classify_obstore_error, split
from flip.runs.errors import ConfigError

_PIECE = 1 << 20
_ASKED_AGAIN = timedelta(minutes=6)
"""Credentials are asked for again a minute after they were: obstore does so five minutes before they expire."""


class ObstoreStorage(S3Storage):
    """As ``S3``."""

    def __init__(self, timeout: float = 15.0) -> None:
        super().__init__(timeout)
        self._stores: dict[str, Any] = {}
        """Bucket -> store."""

    def reconnect(self) -> None:
        super().reconnect()
        self._stores = {}

    async def _get(self, client: Any, key: str, start: int, stop: int) -> RangeResponse:
        bucket, path = split(key)
        obstore = _package()
        store = self._stores.get(bucket)
        if store is None:
            store = self._stores[bucket] = await self._store(client, bucket)
        pieces, etag = list[memoryview](), ""
        try:
            async with asyncio.timeout(self.timeout + (stop - start) / SLOWEST):
                reply = await obstore.get_async(store, path, options={"range": (start, stop)})
                etag = (reply.meta["e_tag"] or "").strip('"')
                if reply.meta["size"] < stop:
                    raise ends_early(key, reply.meta["size"], stop)
                async for piece in reply.stream(min_chunk_size=_PIECE):
                    pieces.append(memoryview(piece))
        except TimeoutError as error:
            raise RequestError("stall", str(error), b"".join(pieces), etag) from error
        except (obstore.exceptions.BaseError, OSError) as error:  # a FileNotFoundError is one of its own
            fault = classify_obstore_error(error)
            raise RequestError(fault.kind, str(fault), b"".join(pieces), etag) from error
        data = b"".join(pieces)
        if len(data) != stop - start:
            raise RequestError("short", f"{len(data)} bytes came of {stop - start}, announced as complete")
        return RangeResponse(data, etag)

    async def _store(self, client: Any, bucket: str) -> Any:
        """A store where ``client`` leads, with its credentials, asked for once so that their lack shows here."""
        from obstore.store import S3Store

        files, wait = self._client(), f"{self.timeout:g}s"
        await files.set_session()

        async def credentials() -> dict[str, Any]:
            from botocore.exceptions import NoCredentialsError

            found = await files.session.get_credentials()
            if found is None:
                raise NoCredentialsError
            frozen = await found.get_frozen_credentials()
            return {
                "access_key_id": frozen.access_key,
                "secret_access_key": frozen.secret_key,
                "token": frozen.token,
                "expires_at": datetime.now(UTC) + _ASKED_AGAIN,
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


def _package() -> Any:
    try:
        import obstore
    except ModuleNotFoundError as error:
        raise ConfigError(
            "obstore is not installed", "data.client", "obstore", "Install it: pip install obstore"
        ) from error
    return obstore
