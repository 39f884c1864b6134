"""Pins: what keeps a commit of a run because another run directory needs it (``pins/``, docs/contracts.md).

Who needs it is a run that begins from it (``init``), or an evaluation under way, which is a run directory as well. A
pin binds until that one is complete. Standard library, Python >= 3.6: retention on every node looks at it.
"""

import hashlib
import os
import time

from flip.runs.records import PIN
from flip.runs.rundir import RunDir, read_record, write_json

if False:  # names for annotations only: Python 3.6 runs this file too
    from pathlib import Path  # noqa: F401
    from typing import Any, Dict, Iterator, Set, Tuple  # noqa: F401


def pin(run, by, stage, samples):
    # type: (RunDir, RunDir, str, int) -> None
    """See to it that retention spares the commit of ``stage`` at S = ``samples`` until the run ``by`` is complete.

    ``by`` must be there: pins of those that are gone are cleared away. Raises OSError where it cannot be written.
    """
    run.pins.mkdir(exist_ok=True)
    for path, record in _pins(run):
        if not os.path.isdir(record["by"]):  # told here, where runs are submitted: a node might not see that folder
            try:
                path.unlink()
            except FileNotFoundError:  # somebody else clears away too
                continue
    name = hashlib.sha256(("%s %s %d" % (by.path, stage, samples)).encode()).hexdigest()[:16]
    record = {"by": str(by.path), "stage": stage, "samples": samples, "time": time.time()}
    write_json(run.pins / ("%s.json" % name), record)


def pinned(run):
    # type: (RunDir) -> Set[Tuple[str, int]]
    """(stage, S) of the commits that must stay. Raises OSError where a pin cannot be read: then nothing may go."""
    return {(record["stage"], record["samples"]) for _, record in _pins(run) if not _over(record)}


def holders(run):
    # type: (RunDir) -> Set[Path]
    """The run directories for which a commit of this run is kept. Raises as ``pinned`` does."""
    return {RunDir(record["by"]).path for _, record in _pins(run) if os.path.isdir(record["by"]) and not _over(record)}


def _over(record):
    # type: (Dict[str, Any]) -> bool
    return RunDir(record["by"]).result.exists()


def _pins(run):
    # type: (RunDir) -> Iterator[Tuple[Path, Dict[str, Any]]]
    for path in sorted(run.pins.glob("*.json")):
        try:
            record = read_record(path, PIN)
        except ValueError as error:
            raise OSError("%s, so this is no pin" % error)
        if record is None:  # removed meanwhile
            continue
        yield path, {name: record[name] for name in ("by", "stage", "samples")}
