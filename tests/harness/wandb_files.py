"""A reader of wandb's offline files: logs of records in blocks of 32 KiB (the format of LevelDB's log)."""

import json
import struct

BLOCK = 32768
HEADER = 7
FULL = 1
LAST = 4


def records(path):
    """Yield the records of a ``run-<id>.wandb``."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    offset = HEADER
    parts = b""
    assert data[:4] == b":W&B"
    while offset + HEADER <= len(data):
        if BLOCK - offset % BLOCK < HEADER:
            offset += BLOCK - offset % BLOCK
            continue
        _, size, kind = struct.unpack_from("<IHB", data, offset)
        parts += data[offset + HEADER : offset + HEADER + size]
        offset += HEADER + size
        if kind in (FULL, LAST):
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def sessions(run):
    """Return the records of each session of a run directory, in order."""
    files = run.path.glob("trackers/wandb/from-*/wandb/offline-run-*/run-*.wandb")
    ordered = sorted(files, key=lambda path: int(path.parents[2].name.removeprefix("from-")))
    return [list(records(path)) for path in ordered]


def runs(sessions_):
    """Return the run record of each session."""
    return [record.run for records_ in sessions_ for record in records_ if record.HasField("run")]


def history(sessions_):
    """Return the rows of all sessions: name -> value."""
    rows = [record.history for records_ in sessions_ for record in records_ if record.HasField("history")]
    return [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in row.item} for row in rows]


def summary(records_):
    """Return the results at the end of a session."""
    updates = [record.summary for record in records_ if record.HasField("summary")]
    return {item.key or item.nested_key[0]: json.loads(item.value_json) for update in updates for item in update.update}
