"""What is a data set, and how is it built from tar shards?

- ``manifest``: the files of a manifest, reading and writing them; ``kept``: samples that filters leave out.
- ``tar``: headers of tars as webdataset reads them; ``scan``, ``scans``: one shard, and the journal of many.
- ``build``: the manifest of shards; ``gather``: scans in processes; ``chunks``: its tables.
- ``filters`` and ``parquet``: samples chosen by columns; ``census``: which members samples have.

May import ``flip.data.storage``, ``flip.concurrency`` and ``flip.tokenizer``.
"""

__all__ = ["Manifest"]


def __getattr__(name: str) -> object:
    """The former place of ``flip.data.manifest.manifest.Manifest``, kept for one release."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flip.data.manifest.manifest import Manifest

    return Manifest
