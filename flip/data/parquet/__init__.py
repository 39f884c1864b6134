"""Where are the values in a parquet file, and which of its bytes hold them?

The bytes of the format, without pyarrow's reader: no size that a file states is believed before it was checked.

- ``thrift``: the encoding of footers and page headers; ``headers``: row groups, column chunks and pages.
- ``levels``: definition levels, and indices of a dictionary. ``file_window``: a large file, a piece at a time.
- ``image_pages``: the images of a file, and the rows without one.
- ``streams`` and ``snappy``: the bytes that hold a value, and how they are decompressed.
- ``page_table``: where the chunks of a manifest of parquet files are.
- ``small_file``: columns of a small file by pyarrow, after the sizes of its pages were compared with limits.

What a data set makes of it stands in ``flip.data.manifest``: ``scan_parquet``, ``row_texts`` and ``build_parquet``.
May import ``flip.data.storage``.
"""
