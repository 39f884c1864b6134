"""Which remote folders of checkpoints belong to a run directory, by its own records?

With ``checkpoint.url`` a run directory writes to ``<checkpoint.url>/<sweep>/<name>/``, the folder that it has recorded
in checkpoints/url.json. A run directory that was copied, renamed or moved finds records of another path: it gets a new
remote folder, and the checkpoints that it inherited are read and never deleted. ``flip submit --take-over`` records in
url.json (``taken``) that the folders of these checkpoints belong to this run directory, too. Standard library, Python
>= 3.6.
"""

import re
from typing import Any, Dict, Iterable, List, Mapping, Tuple

from flip.runs import checkpoint_folder
from flip.runs.addresses import as_url
from flip.runs.origin import is_same_folder
from flip.runs.rundir import RunDir, load_record

ADDRESS_FILE = "url.json"
"""In ``checkpoints/``: the address of the remote folder, and the run directory that uses it."""
#: The last component of an address, as ``RemoteFolder`` makes it.
NAME = re.compile(r"\w[\w.-]{0,200}-[0-9a-f]{8}\Z")
#: An address below ``checkpoint.url``: SWEEP/NAME.
_PLACE = re.compile(r"\w[\w.-]{0,200}/\w[\w.-]{0,200}-[0-9a-f]{8}\Z")


class InheritedFolder:
    """A remote folder with checkpoints of a run that its run directory does not own.

    ``address``: its URL. ``place``: ``SWEEP/NAME`` below ``checkpoint.url``; "" if it lies elsewhere, where no run
    deletes. ``commits``, ``bytes``: number and size of the checkpoints that the run directory has recorded.
    """

    def __init__(self, address: str, place: str) -> None:
        self.address = address
        self.place = place
        self.checkpoints = 0
        self.bytes = 0

    def as_dict(self) -> Dict[str, Any]:
        """For --json."""
        return {
            "address": self.address,
            "commits": self.checkpoints,
            "bytes": self.bytes,
            "can_be_taken": bool(self.place),
        }


def own_places(run: RunDir) -> Tuple[str, List[str]]:
    """(name of the remote folder that this run directory uses, ``SWEEP/NAME`` of those that it has taken over).

    "" and an empty list if url.json was written by another run directory, or before this one was renamed or moved.
    Names of a form that is never written do not count. Raises DataError if url.json is damaged.
    """
    record = load_record(run.checkpoints / ADDRESS_FILE)
    if not is_own_record(run, record):
        return "", []
    name = name_of(record)
    return name, [place for place in record.get("taken", []) if _PLACE.match(place)]


def is_own_record(run: RunDir, record: Mapping[str, Any]) -> bool:
    """Whether url.json or owner.json (``record``, empty if there is none) names this run directory."""
    return bool(record) and is_same_folder(str(record["folder"]), run.path)


def name_of(record: Mapping[str, Any]) -> str:
    """The last component of the address in url.json; "" if it does not have the form that is written."""
    name = str(record.get("url", "")).rpartition("/")[2]
    if not NAME.match(name):
        return ""
    return name


def place_below(root: str, address: str) -> str:
    """``SWEEP/NAME`` of a remote folder below ``root``; "" if the address is another one."""
    place = address[len(root) + 1 :]
    if not address.startswith(root + "/") or not _PLACE.match(place):
        return ""
    return place


def folder_of(entry: checkpoint_folder.SavedCheckpoint) -> str:
    """The address of the remote folder of a checkpoint; "" if its files are in the run directory."""
    address = str(entry.record.get("url", ""))
    tail = "/%s/%s" % (entry.path.parent.name, entry.path.name)
    if not address.endswith(tail):
        return address
    return address[: -len(tail)]


def inherited(run: RunDir, url: str, entries: Iterable[checkpoint_folder.SavedCheckpoint]) -> List[InheritedFolder]:
    """The remote folders of checkpoints (``entries``) of a run that its run directory does not own, in order of use.

    ``url``: ``checkpoint.url``. Reads records of the run directory only. Raises DataError if url.json is damaged.
    """
    name, taken = own_places(run)
    own = {"%s/%s" % (run.sweep, name)} | set(taken)
    folders = {}  # type: Dict[str, InheritedFolder]
    for entry in entries:
        address = folder_of(entry)
        place = place_below(as_url(url), address)
        if not address or place in own:
            continue
        folder = folders.setdefault(address, InheritedFolder(address, place))
        folder.checkpoints += 1
        folder.bytes += sum(int(file_record["bytes"]) for file_record in entry.record["files"].values())
    return list(folders.values())
