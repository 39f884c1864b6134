"""The folder of a run's checkpoints at a URL: its address, and the record of its owner.

The address is computed: ``<checkpoint.url>/<sweep>/<name>-<8 hex digits>``. The last component comes from
checkpoints/url.json, and counts only if it has the form that this module writes. owner.json in the folder names the run
directory that writes and deletes there. A run directory that finds the path of another one in these records, because it
was copied, renamed or moved, gets a folder of its own. The checkpoints that it inherited stay readable; it deletes them
only after ``take_over``, an explicit act of the user.
"""

from __future__ import annotations

import logging
import os
import secrets
from pathlib import Path
from typing import Any

from flip.checkpoint.remote import RemoteCheckpoint
from flip.data.storage.retry import DEFAULT_POLICY, RetryPolicy
from flip.files import deletion
from flip.files.creation import run_folder
from flip.runs import checkpoint_folder, records, remote_owner
from flip.runs.addresses import as_url
from flip.runs.errors import PermissionDenied, StorageError
from flip.runs.rundir import RunDir, load_record, read_record, to_json, write_json

log = logging.getLogger(__name__)

OWNER_FILE = "owner.json"
ID_FILE = "remote.json"
"""In the folder of an attempt: the id of its owner record."""
OWNER_LIMIT = 1 << 16
"""Largest owner record that is read, bytes."""
OWNER_READS = 8
"""Reads of an owner record until two in a row are equal."""


class RemoteFolder:
    """The remote folder of one run, used by rank 0 of the current attempt alone.

    Args:
        url: ``checkpoint.url``, a URL or an absolute path.
        retry_policy: how long a request is repeated.
        attempt: number of the current attempt, which records the id that it writes into the owner record; 0: none, for
            ``take_over``.
    """

    def __init__(self, run: RunDir, url: str, retry_policy: RetryPolicy = DEFAULT_POLICY, attempt: int = 0) -> None:
        self._run = run
        self._attempt = attempt
        self._root = as_url(url)
        self._base = f"{self._root}/{run.sweep}"
        self._retry_policy = retry_policy
        self.id = secrets.token_hex(16)
        """Of this attempt: in its owner record, and as ``writer`` in its checkpoints."""
        self._clients: dict[tuple[str, RetryPolicy], RemoteCheckpoint] = {}
        self._address_file = run.checkpoints / remote_owner.ADDRESS_FILE
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
        recorded = load_record(self._address_file).get("folder")
        if recorded != str(self._run.path):  # another link leads to it
            _write_address(self._run, url, remote_owner.own_places(self._run)[1])
        self.url = url

    def check_owner(self, retry_policy: RetryPolicy | None = None) -> None:
        """Raise PermissionDenied unless the owner record is that of this attempt. For each save and each deletion.

        A missing record is written again, and so is that of an older attempt of this run, whose write may arrive late.
        """
        owner = self._read_owner(self.url, retry_policy)
        if owner is not None and owner.get("id") == self.id:
            return
        if owner is None or (owner and not self._is_of_older_attempt(owner)):
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

    def take_over(self) -> None:
        """Give this run directory the remote folders of the checkpoints that it inherited, so that it deletes them.

        Only folders below ``checkpoint.url`` whose owner.json names a run directory that does not exist at that path.
        For the submission, before the next attempt. Raises PermissionDenied for another owner, before anything is
        written, DataError if url.json is damaged, and what ``RemoteCheckpoint`` raises.
        """
        folders = remote_owner.inherited(self._run, self._root, checkpoint_folder.checkpoints(self._run))
        places = [folder.place for folder in folders if folder.place]
        for place in places:
            self._refuse_owner_that_exists(f"{self._root}/{place}")
        if not places:
            return
        for place in places:
            self._put_owner(f"{self._root}/{place}")
        name, taken = remote_owner.own_places(self._run)
        url = f"{self._base}/{name}" if name else _random_url(self._base, self._run)
        _write_address(self._run, url, [*taken, *places])

    def _refuse_owner_that_exists(self, url: str) -> None:
        owner = self._read_owner(url)
        if not owner:
            remedy = "Nothing shows which run directory needs these files. Delete them by hand if none does."
            raise PermissionDenied("this remote folder has no valid owner.json", url, remedy=remedy)
        folder = str(owner["folder"])
        if not remote_owner.is_own_record(self._run, owner) and os.path.isdir(folder):
            remedy = "Delete or rename that run directory if it no longer needs its checkpoints, or omit --take-over."
            raise PermissionDenied("the run directory that owns this remote folder exists", url, folder, remedy)

    def checkpoint_url(self, path: Path) -> str:
        """The address of the checkpoint in the run directory's folder ``path``. Only after ``claim``."""
        return f"{self.url}/{path.parent.name}/{path.name}"

    def why_not_deleted(self, path: Path, address: str, retry_policy: RetryPolicy) -> str:
        """Why this run directory may not delete the files of the checkpoint ``path`` at ``address``; "" if it may.

        Only folders that this run directory uses or has taken over, as their owner.json confirms, and only files that
        an attempt of it recorded writing: ``writer`` of the commit.json there. Raises PermissionDenied if the folder
        in use has another owner, or if the address leads through a link.
        """
        place = remote_owner.place_below(self._root, address.removesuffix(f"/{path.parent.name}/{path.name}"))
        if address == self.checkpoint_url(path):
            self.check_owner(retry_policy)
        elif not place or place not in self._own_places():
            return f"its files are at {address}, and this run deletes only in its own remote folder"
        elif not self._is_own_folder(f"{self._root}/{place}", retry_policy):
            return f"its files are at {address}, and owner.json there does not name this run directory"
        self.refuse_links(address)
        if not self._wrote(path, address, retry_policy):
            return f"its files are at {address}, and another run directory wrote them"
        return ""

    def discard(self, path: Path, address: str, files: list[str] | None, retry_policy: RetryPolicy) -> str:
        """Delete the checkpoint ``path``, whose files are at ``address``: commit.json in the run directory first, that
        of the address next, then ``files`` (None: all that a checkpoint has; it was never complete, or is damaged).

        Returns "", or why it is left alone. Raises as ``why_not_deleted`` and the storage.
        """
        reason = self.why_not_deleted(path, address, retry_policy) or checkpoint_folder.make_incomplete(path)
        if reason:
            return reason
        remote = RemoteCheckpoint(address, retry_policy)
        if files is None:
            names = remote.names()
        else:
            names = [checkpoint_folder.COMMIT_FILE, *files]
        deletion.delete_remote_checkpoint(names, files, remote.delete)
        return checkpoint_folder.remove(path, files)

    def _own_places(self) -> list[str]:
        """Places below the root that this run directory has taken over and, before ``claim``, the one that it uses."""
        name, taken = remote_owner.own_places(self._run)
        if name and not self.url:
            return [*taken, f"{self._run.sweep}/{name}"]
        return taken

    def refuse_links(self, address: str) -> None:
        """Raise PermissionDenied if the address of a checkpoint leads through a link below ``checkpoint.url``.

        Another user may have prepared it. Object storage has no links.
        """
        if not self._root.startswith("file://"):
            return
        root = self._root.removeprefix("file://")
        address = address.removeprefix("file://")
        if os.path.realpath(address) != os.path.join(os.path.realpath(root), os.path.relpath(address, root)):
            remedy = "Replace the link by a folder, or let checkpoint.url name its target."
            raise PermissionDenied("a folder of this address is a symbolic link", address, remedy=remedy)

    def _own_url(self) -> str:
        """The address that this run directory has used before; "" if it has none, or that of another one."""
        record = load_record(self._address_file)
        if not record:
            return ""
        name = remote_owner.name_of(record)
        if not name:
            log.warning("%s names no folder of checkpoints; a new folder is used", self._address_file)
            return ""
        url = f"{self._base}/{name}"
        if not remote_owner.is_own_record(self._run, record) or self._is_owned_by_other(url):
            log.warning("%s belongs to another path than this run directory; a new remote folder is used", url)
            return ""
        return url

    def _is_owned_by_other(self, url: str) -> bool:
        """Whether owner.json names another run directory, or the folder has files without a valid owner.json.

        url.json may be prepared, so that without owner.json only an empty folder is taken.
        """
        owner = self._read_owner(url)
        if owner:
            return not remote_owner.is_own_record(self._run, owner)
        return any(name != OWNER_FILE for name in RemoteCheckpoint(url, self._retry_policy).names())

    def _is_own_folder(self, url: str, retry_policy: RetryPolicy) -> bool:
        owner = self._read_owner(url, retry_policy)
        return bool(owner) and remote_owner.is_own_record(self._run, owner or {})

    def _wrote(self, path: Path, address: str, retry_policy: RetryPolicy) -> bool:
        """Whether an attempt of this run directory wrote the checkpoint at ``address``.

        Without a commit.json, or with a damaged one, the files are leftovers. It is read again if it names another
        writer, because a bit may change on the way.
        """
        attempt = int(path.name.rpartition("-")[2])
        for _ in range(2):
            writer = self._writer_at(address, retry_policy)
            if not writer or writer == self._recorded_id(attempt):
                return True
        return False

    def _writer_at(self, address: str, retry_policy: RetryPolicy) -> str:
        """``writer`` of the commit.json at an address; "" if it names none."""
        limit = records.limit_of(checkpoint_folder.COMMIT_FILE)
        data = RemoteCheckpoint(address, retry_policy).read_small(checkpoint_folder.COMMIT_FILE, limit)
        if data is None or len(data) > limit:
            return ""
        try:
            record = records.checked(records.parse(data), records.FIELDS[checkpoint_folder.COMMIT_FILE])
        except ValueError:  # damaged
            return ""
        return str(record.get("writer", ""))

    def _new_url(self) -> str:
        """Choose an address that no other run has, and record it."""
        url = _random_url(self._base, self._run)
        run_folder(self._run.checkpoints)
        _write_address(self._run, url, remote_owner.own_places(self._run)[1])
        return url

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
        write_json(self._run.attempt(self._attempt) / ID_FILE, {"id": self.id})  # before it can be read there
        self._put_owner(url)

    def _put_owner(self, url: str) -> None:
        record = {"folder": str(self._run.path), "id": self.id}
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
            if data == before or (owner is not None and owner["id"] == self.id):
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


def _random_url(base: str, run: RunDir) -> str:
    """An address below ``base`` that no other run has."""
    return f"{base}/{run.name}-{secrets.token_hex(4)}"


def _write_address(run: RunDir, url: str, taken: list[str]) -> None:
    record = {"url": url, "folder": str(run.path)}
    write_json(run.checkpoints / remote_owner.ADDRESS_FILE, record | ({"taken": taken} if taken else {}))
