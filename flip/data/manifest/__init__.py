"""What is a data set, and how is it built from tar shards?

- ``manifest``: ``Manifest`` and its files; which samples filters keep.
- ``tar``: headers of tars as webdataset reads them.
- ``scan``: one pass over a shard, and the journal of scans; ``census``: which members samples have.
- ``build``: scans shards in processes and writes their manifest.
- ``filters`` and ``parquet``: samples chosen by columns; ``uids``: by lists of uids.
  ``parquet_headers`` and ``thrift``: places and sizes of the pages of a parquet file.
- Parquet files that are read in place. ``scan_parquet``: one pass over a file, by ``image_pages`` (its images),
  ``row_texts`` (captions and other columns), ``file_window`` and ``parquet_levels``. ``build_parquet``: their tables.
  ``page_table``: where chunks are. ``streams`` and ``snappy``: the bytes that hold an image.
- ``labels``: samples of each class. ``npy_header``: checks of .npy files.

May import ``flip.data.storage``, ``flip.concurrency``, ``flip.config`` and ``flip.tokenizer``.
"""
