"""Writes a demonstration data set below the cache: shards, manifests, done.json."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from flip.files import deletion
from flip.files.creation import close_umask, closed_folder, fsync_path, new_folder, open_lock
from flip.runs.rundir import read_json, write_json
from jobs.common.filesystem import unwritable
from tools.demo_datasets import npm
from tools.demo_datasets.npm import Package

T = TypeVar("T")
Facts = dict[str, Any]


@dataclass(frozen=True)
class DemoData:
    """A data set below the cache: complete or absent.

    A higher ``version``, or other packages, make the next call of `build` build it again. ``write`` writes it into a
    folder, from the folder of the packages, with a folder for intermediate results, and returns what done.json gets.
    """

    name: str
    version: int
    packages: Sequence[Package]
    write: Callable[[Path, Path, Path], Facts]

    @property
    def source(self) -> Facts:
        """What the data set is built from."""
        return {"version": self.version, "packages": {p.name: [p.version, p.sha512] for p in self.packages}}

    def ready(self, folder: Path) -> Facts | None:
        """The facts in the done.json of ``folder`` if it was built from this source, else None."""
        try:
            done = read_json(folder / "done.json")
        except (ValueError, OSError):  # damaged or unreadable: building repairs it or reports why it cannot
            return None
        if done and {key: done.get(key) for key in self.source} == self.source:
            return done
        return None

    def build(self, cache: Path, force: bool = False) -> Facts:
        """Build ``cache``/``name`` unless it is ready, and return the facts of its done.json.

        Concurrent builders wait for each other. An interrupted build continues with its intermediate results, in
        ``name``.work, if they are of the same source. Raises StorageError (network, disk), PermissionDenied and
        DataError (a wrong tarball); nothing is half-written.
        """
        close_umask()  # it is a cache, and the libraries that write its files follow the umask
        try:
            with os.fdopen(open_lock(closed_folder(cache) / f"{self.name}.lock"), "rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                return (None if force else self.ready(cache / self.name)) or self._build(cache)
        except OSError as error:
            raise unwritable(error, cache, "Name another folder with --cache or FLIP_CACHE.") from error

    def _build(self, cache: Path) -> Facts:
        part, work, final, old = (cache / f"{self.name}{end}" for end in (".partial", ".work", "", ".old"))
        npm.fetch(self.packages, cache / "packages")
        if self.ready(work) is None:
            deletion.discard_own_folder(work)
            new_folder(work)
            write_json(work / "done.json", self.source)
        deletion.discard_own_folder(part)
        new_folder(part)
        facts = self.source | self.write(part, cache / "packages", work)
        write_json(part / "done.json", facts)
        fsync_path(part)
        deletion.discard_own_folder(old)
        if final.exists():
            os.rename(final, old)
        os.rename(part, final)
        fsync_path(cache)
        deletion.discard_own_folder(old)
        deletion.discard_own_folder(work)
        return facts


def write_shards(folder: Path, samples: Sequence[Mapping[str, Any]], shards: int = 1) -> Any:
    """Write samples to webdataset shards in order, and their manifest. Equal samples give equal bytes."""
    from webdataset import TarWriter

    from flip.data.manifest.build import index

    closed_folder(folder.parent)
    new_folder(folder)
    paths = []
    for number, part in enumerate(parts(samples, shards)):
        paths.append(str(folder / f"{number:05d}.tar"))
        with TarWriter(paths[-1], mtime=0, user="flip", group="flip") as writer:
            for sample in part:
                writer.write(sample)
    return index(paths, folder)


def parts(samples: Sequence[T], shards: int) -> Iterator[Sequence[T]]:
    """The samples of each shard."""
    for s in range(shards):
        yield samples[len(samples) * s // shards : len(samples) * (s + 1) // shards]


def licence_row(info: Mapping[str, Any], prefix: str, *columns: str) -> str:
    """A row of a Markdown table on a set of drawings by the ``info`` of Iconify: name, columns, author, licence."""
    author = info["author"]
    licence = info["license"]
    if author.get("url"):
        by = f"[{author['name']}]({author['url']})"
    else:
        by = author["name"]
    title = licence.get("spdx") or licence["title"]
    if licence.get("url"):
        terms = f"[{title}]({licence['url']})"
    else:
        terms = title
    return f"| {info['name']} ({prefix}) | {' | '.join([*columns, by, terms])} |"
