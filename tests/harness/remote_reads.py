"""Records what is read of a checkpoint at a URL."""

from flip.data.storage.fsspec_storage import FsspecStorage


def record_reads(monkeypatch):
    """Return a list that gets (start, stop) of every range read from now on. A temporary copy of a file fails."""
    ranges = []
    get = FsspecStorage._get

    def record(self, key, start, stop):
        ranges.append((start, stop))
        return get(self, key, start, stop)

    monkeypatch.setattr(FsspecStorage, "_get", record)
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    return ranges
