"""Substitutes for the npm packages of the demonstration data, and readers of the built data."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from pathlib import Path

from tools.demo_datasets.npm import Package


def pack(store: Path, package: Package, files: dict[str, object]) -> Package:
    """Write the tarball of a package into the folder ``store``. Returns the package with the digest of this tarball."""
    with tarfile.open(store / package.file, "w:gz") as tar:
        for name, value in files.items():
            if isinstance(value, str):
                content = value.encode()
            else:
                content = json.dumps(value).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    digest = hashlib.sha512((store / package.file).read_bytes()).digest()
    return Package(package.name, package.version, base64.b64encode(digest).decode())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def samples(folder: Path) -> dict[str, dict[str, bytes]]:
    """Return key -> members of each sample of the shards, in their order."""
    result: dict[str, dict[str, bytes]] = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for item in tar:
                assert item.mtime == 0, "a time would change the bytes from day to day"
                key, member = item.name.split(".")
                result.setdefault(key, {})[member] = tar.extractfile(item).read()  # type: ignore[union-attr]
    return result
