"""What is a data set, and how is it built from tar shards or parquet files?

- ``manifest``: ``Manifest`` and its files; which samples filters keep.
- ``trust``: which addresses a manifest may name.
- ``tar``: headers of tars as webdataset reads them.
- ``scan``: one pass over a shard, and the journal of scans; ``census``: which members samples have.
- ``build``: scans shards in processes and writes their manifest.
- ``filters``: samples chosen by columns; ``uids``: by lists of uids. ``weights``: how often training sees each sample.
- Parquet files that are read in place. ``scan_parquet``: one pass over a file; ``row_texts``: captions and other
  columns as JSON lines; ``build_parquet``: the tables of the manifest.
- ``labels``: samples of each class. ``npy_header``: checks of .npy files.

May import ``flip.data.parquet``, ``flip.data.storage``, ``flip.files``, ``flip.runs``, ``flip.concurrency``,
``flip.config`` and ``flip.tokenizer``.
"""
