"""Which addresses a manifest may name: its author chooses to which hosts its readers connect."""

from collections.abc import Sequence
from pathlib import Path

from flip.data.storage.base import is_remote
from flip.files import ownership
from flip.runs.addresses import SHARDS, require_admitted
from flip.runs.errors import PermissionDenied

KEYS = "keys.txt"
"""The file of a manifest that names its shards."""


def require_trust(folder: Path, keys: Sequence[str]) -> None:
    """Raise PermissionDenied if a manifest that another person may have written names addresses, other than of S3.

    A reader connects to the hosts that they name, with the credentials of its user for them.
    """
    addresses = [key for key in keys if is_remote(key) and not key.startswith("s3://")]
    if not addresses:
        return
    for address in addresses:
        require_admitted(address, str(folder / KEYS), SHARDS)
    reason = ownership.why_untrusted(folder / KEYS)
    for exposure in [] if reason else ownership.exposures(folder / KEYS)[:1]:
        reason = f"{exposure.place}: {exposure.reason}"
    if reason:
        what = f"the manifest names addresses, and it is not trusted: {reason}"
        remedy = (
            "Read its keys.txt, then copy it to a folder of your own, closed to others (cp -r, chmod -R go-w), "
            "or name the group that you trust: FLIP_TRUST_GROUP."
        )
        raise PermissionDenied(what, str(folder / KEYS), addresses[0], remedy)
