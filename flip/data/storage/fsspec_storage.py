"""Storage over fsspec, for the schemes of ``flip.runs.addresses`` except S3. One attempt per call."""

import os
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

from flip.data.storage.base import ObjectStat, RangeResponse, RequestError, RequestRunner, completed_future, run_once
from flip.files.creation import atomic_write, run_folder
from flip.runs.addresses import require_admitted
from flip.runs.errors import ConfigError


class FsspecStorage:
    """Keys are URLs. The package of a protocol finds the credentials."""

    def get(self, key: str, start: int, stop: int) -> Future[RangeResponse]:
        return completed_future(self._get, key, start, stop)

    def _get(self, key: str, start: int, stop: int) -> RangeResponse:
        data = self._call(key, lambda files, path: files.cat_file(path, start=start, end=stop))
        if len(data) != stop - start:
            raise RequestError("short", f"{len(data)} bytes came of {stop - start}")
        return RangeResponse(data, "")

    def stat(self, key: str) -> ObjectStat:
        return ObjectStat(int(self._call(key, lambda files, path: files.info(path)["size"])), "")

    def list(self, prefix: str, each: RequestRunner = run_once) -> Iterator[tuple[str, ObjectStat]]:
        """Keys below the folder ``prefix``.

        They start with ``prefix`` as given: the paths of a file system lack parts of a URL that choose the store, such
        as the account in ``abfs://container@account/path``.
        """

        def find(files: Any, path: str) -> dict[str, int]:
            entries = {}
            if files.exists(path):
                entries = files.find(path, detail=True)
            return {name[len(path.rstrip("/")) :]: int(info["size"]) for name, info in entries.items()}

        below = each(lambda: self._call(prefix, find))
        yield from ((prefix.rstrip("/") + name, ObjectStat(size, "")) for name, size in below.items())

    def put(self, key: str, data: bytes | memoryview, each: RequestRunner = run_once) -> str:
        from fsspec.implementations.local import LocalFileSystem

        def write(files: Any, path: str) -> None:
            if isinstance(files, LocalFileSystem):
                run_folder(os.path.dirname(path))
                with atomic_write(path) as file:  # durable, as objects are once they are accepted
                    file.write(data)
                return
            files.makedirs(files._parent(path), exist_ok=True)
            files.pipe_file(path, bytes(data))

        each(lambda: self._call(key, write))
        return ""

    def delete(self, key: str) -> None:
        self._call(key, lambda files, path: files.rm_file(path) if files.exists(path) else None)

    def reconnect(self) -> None:
        pass

    def _call(self, key: str, request: Any) -> Any:
        import fsspec

        require_admitted(key)
        try:
            files, path = fsspec.core.url_to_fs(key)
        except (
            ImportError,
            ValueError,
        ) as error:  # its package is not installed, or the rest of the address is invalid
            raise ConfigError(f"this address cannot be used: {error}", key) from error
        try:
            files.invalidate_cache()
            return request(files, path)
        except FileNotFoundError as error:
            raise RequestError("missing", str(error)) from error
        except PermissionError as error:
            raise RequestError("denied", str(error)) from error
        except OSError as error:
            raise RequestError("io", str(error)) from error
        except Exception as error:  # the packages of protocols raise unrelated classes of their own
            raise RequestError("connection", f"{type(error).__name__}: {error}") from error
