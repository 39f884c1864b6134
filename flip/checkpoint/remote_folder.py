"""The folder of a run's checkpoints at a URL: its address, and the record of its owner.

The address is computed: ``<checkpoint.url>/<sweep>/<name>-<8 hex digits>``. The last component comes from
checkpoints/url.json, and counts only if it has the form that this module writes; its name part may be an older name of
the run. owner.json in the folder names the run directory that writes and deletes there. A copied run directory gets a
folder of its own; the commits that it inherited stay readable and are never deleted by it.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
from functools import cached_property
from pathlib import Path
from typing import Any

from flip.checkpoint.remote import RemoteCheckpoint, as_url
from flip.data.storage.retry import RetryPolicy
from flip.files.creation import run_folder
from flip.runs import records
from flip.runs.errors import PermissionDenied, StorageError
from flip.runs.origin import is_copy, is_gone, original_folder
from flip.runs.rundir import RunDir, load_record, read_record, to_json, write_json

log = logging.getLogger(__name__)

OWNER_FILE = "owner.json"
ID_FILE = "remote.json"
"""In the folder of an attempt: the id of its owner record."""
OWNER_LIMIT = 1 << 16
"""Largest owner record that is read, bytes."""
OWNER_READS = 8
"""Reads of an owner record until two in a row are equal."""
_NAME = re.compile(r"\w[\w.-]{0,200}-[0-9a-f]{8}")
"""The last component of an address, as ``_new_url`` makes it."""


class RemoteFolder:
    """The remote folder of one run, used by rank 0 of the current attempt alone.

    Args:
        url: ``checkpoint.url``, a URL or an absolute path.
        retry_policy: how long a request is repeated.
        attempt: number of the current attempt, which records the id that it writes into the owner record.
    """

    def __init__(self, run: RunDir, url: str, retry_policy: RetryPolicy, attempt: int) -> None:
        self._run = run
        self._attempt = attempt
        self._root = as_url(url)
        self._base = f"{self._root}/{run.sweep}"
        self._retry_policy = retry_policy
        self._id = secrets.token_hex(16)
        self._clients: dict[tuple[str, RetryPolicy], RemoteCheckpoint] = {}
        self._address_file = run.checkpoints / "url.json"
        self.url = ""
        """Its address; empty before ``claim``."""

    def claim(self) -> None:
        """Choose the folder and write this run directory into its owner record, before the first write of an attempt.

        Later calls check that it still has this owner. Raises PermissionDenied if not, DataError if url.json is
        damaged, and what ``RemoteCheckpoint`` raises.
        """
        if self.url:
            self.check_owner()
            return
        url = self._own_url() or self._new_url()
        self._write_owner(url)
        if load_record(self._address_file).get("folder") != str(self._run.path):  # it was moved, or url.json is old
            self._write_address(url)
        self.url = url

    def check_owner(self, retry_policy: RetryPolicy | None = None) -> None:
        """Raise PermissionDenied unless the owner record is that of this attempt. For each save and each deletion.

        A missing record is written again, and so is that of a run directory that certainly no longer exists, and that
        of an older attempt of this run, whose write may arrive late.
        """
        owner = self._read_owner(self.url, retry_policy)
        if owner is not None and owner.get("id") == self._id:
            return
        if owner is None or (owner and not is_gone(owner["folder"]) and not self._is_of_older_attempt(owner)):
            if owner:
                named = owner["folder"]
            else:
                named = "a damaged owner.json"
            remedy = (
                "Two run directories, or two attempts, use it: end one of them. If this run must go on, delete"
                f" {self._address_file}; it then gets a folder of its own."
            )
            raise PermissionDenied("the remote folder of checkpoints has another owner", self.url, named, remedy)
        self._write_owner(self.url)

    def checkpoint_url(self, path: Path) -> str:
        """The address of the commit in the run directory's folder ``path``. Only after ``claim``."""
        return f"{self.url}/{path.parent.name}/{path.name}"

    def refuse_links(self, path: Path) -> None:
        """Raise PermissionDenied if the address of a commit leads through a link below ``checkpoint.url``.

        Another user may have prepared it. Object storage has no links.
        """
        if not self._root.startswith("file://"):
            return
        root = self._root.removeprefix("file://")
        address = self.checkpoint_url(path).removeprefix("file://")
        if os.path.realpath(address) != os.path.join(os.path.realpath(root), os.path.relpath(address, root)):
            remedy = "Replace the link by a folder, or let checkpoint.url name its target."
            raise PermissionDenied("a folder of this address is a symbolic link", address, remedy=remedy)

    def _own_url(self) -> str:
        """The address that this run directory has used before; "" if it has none, or that of another one."""
        record = load_record(self._address_file)
        if not record:
            return ""
        name = record["url"].rpartition("/")[2]
        if not _NAME.fullmatch(name):
            log.warning("%s: %r is no name of a folder of checkpoints; a new folder is used", self._address_file, name)
            return ""
        url = f"{self._base}/{name}"
        if self._came_with_copy(record) or self._is_owned_by_other(url, record):
            log.warning("%s has no owner.json of this run directory; a new folder is used", url)
            return ""
        return url

    def _came_with_copy(self, record: dict[str, Any]) -> bool:
        """Whether url.json (``record``) came with a copy of another run directory. job.json also shows that after the
        original was moved."""
        original = original_folder(self._run, self._job)
        if "folder" not in record:
            return bool(original)
        return is_copy(self._run, record) or original == record["folder"] != str(self._run.path)

    def _is_owned_by_other(self, url: str, record: dict[str, Any]) -> bool:
        """Whether owner.json names another run directory, or the folder has files without a valid owner.json.

        Older versions wrote neither owner.json nor ``folder`` into url.json (``record``). A url.json with ``folder``
        may be prepared, to name the folder of an older run: only an empty folder is then taken. If url.json and
        job.json are old, the names of sweep and run in the address decide: a copied directory has another name, or
        lies in another sweep.
        """
        owner = self._read_owner(url)
        if owner:
            return is_copy(self._run, owner)
        if "folder" in record:
            return any(name != OWNER_FILE for name in RemoteCheckpoint(url, self._retry_policy).names())
        job = self._job
        was_moved = job.get("folder", str(self._run.path)) != str(self._run.path)
        if "copy_of" in job or was_moved:
            return False
        first = re.escape(f"/{self._run.sweep}/{self._run.name}-")
        return not re.search(first + r"[0-9a-f]{8}\Z", record["url"])

    @cached_property
    def _job(self) -> dict[str, Any]:
        """job.json, empty if it does not exist or is damaged."""
        try:
            return read_record(self._run.path / "job.json") or {}
        except ValueError:
            return {}

    def _new_url(self) -> str:
        """Choose an address that no other run has, and record it."""
        url = f"{self._base}/{self._run.name}-{secrets.token_hex(4)}"
        run_folder(self._run.checkpoints)
        self._write_address(url)
        return url

    def _write_address(self, url: str) -> None:
        write_json(self._address_file, {"url": url, "folder": str(self._run.path)})

    def _is_of_older_attempt(self, owner: dict[str, Any]) -> bool:
        """Whether an owner record was written by an earlier attempt in this run directory.

        A node that was cut off may write it after this attempt has started. The folder does not show that: a copy on
        another host may have the same path.
        """
        earlier = [n for n in self._run.attempt_numbers() if n < self._attempt]
        return any(self._recorded_id(n) == owner["id"] for n in reversed(earlier))

    def _recorded_id(self, attempt: int) -> str:
        """The id with which an attempt claimed the folder; "" if it recorded none."""
        try:
            return str((read_record(self._run.attempt(attempt) / ID_FILE) or {}).get("id", ""))
        except ValueError:  # damaged
            return ""

    def _write_owner(self, url: str) -> None:
        write_json(self._run.attempt(self._attempt) / ID_FILE, {"id": self._id})  # before it can be read there
        record = {"folder": str(self._run.path), "id": self._id}
        self._client(url, self._retry_policy).put(OWNER_FILE, to_json(record).encode())

    def _client(self, url: str, retry_policy: RetryPolicy) -> RemoteCheckpoint:
        """A client of the folder, which keeps its connections for the next save."""
        key = (url, retry_policy)
        if key not in self._clients:
            self._clients[key] = RemoteCheckpoint(url, retry_policy)
        return self._clients[key]

    def _read_owner(self, url: str, retry_policy: RetryPolicy | None = None) -> dict[str, Any] | None:
        """The owner record at ``url``: empty if there is none, None if it is damaged.

        It has no checksum, and a bit may change on the way. So a record that is not that of this attempt counts only if
        it is read twice in the same way. Raises StorageError if that does not happen in OWNER_READS reads.
        """
        client = self._client(url, retry_policy or self._retry_policy)
        before: bytes | None = None
        for _ in range(OWNER_READS):
            data = client.read_small(OWNER_FILE, OWNER_LIMIT)
            if data is None:
                return {}
            owner = self._parsed_owner(url, data)
            if data == before or (owner is not None and owner["id"] == self._id):
                return owner
            before = data
        remedy = "The network or the storage changes bytes; the run starts again later."
        raise StorageError(f"{OWNER_READS} reads of {OWNER_FILE} differ", url, remedy=remedy)

    def _parsed_owner(self, url: str, data: bytes) -> dict[str, Any] | None:
        try:
            if len(data) > OWNER_LIMIT:
                raise ValueError(f"it has more than {OWNER_LIMIT:,} bytes")
            return dict(records.checked(records.parse(data), records.FIELDS[OWNER_FILE]))
        except ValueError as error:
            log.warning("%s/%s is damaged: %s", url, OWNER_FILE, error)
            return None
