"""What is a data set, and how is it built from tar shards?

- ``manifest``: ``Manifest`` and its files; which samples filters keep.
- ``tar``: headers of tars as webdataset reads them.
- ``scan``: one pass over a shard, and the journal of scans; ``census``: which members samples have.
- ``build``: scans shards in processes and writes their manifest.
- ``filters`` and ``parquet``: samples chosen by columns; ``uids``: by lists of uids.
  ``parquet_headers`` and ``thrift``: places and sizes of the pages of a parquet file.
  ``labels``: samples of each class. ``npy_header``: checks of .npy files.

May import ``flip.data.storage``, ``flip.concurrency``, ``flip.config`` and ``flip.tokenizer``.
"""
